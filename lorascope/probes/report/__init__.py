"""HTML report of the probes: one self-contained page."""
