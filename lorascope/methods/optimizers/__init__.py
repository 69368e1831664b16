"""Torch optimizers of the methods."""
