"""Figures of the kept runs: their definition, drawing and excerpts; without torch."""
