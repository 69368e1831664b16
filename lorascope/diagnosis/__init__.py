"""What is in an adapter or a run, and what went wrong with it."""
