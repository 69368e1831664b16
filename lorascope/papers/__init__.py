"""Studies of the papers: one file per paper with its claims, arms, kept tables and figures."""
