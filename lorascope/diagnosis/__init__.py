"""Contents of adapters and runs, comparisons between them, and diagnosis of faults."""
