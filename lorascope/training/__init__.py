"""Training loop with evaluation, checkpoints and resuming."""
