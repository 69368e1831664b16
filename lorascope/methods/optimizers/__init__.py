"""Optimizers of torch that the methods use."""
