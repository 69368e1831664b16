"""The report of the probes, as one HTML page."""
