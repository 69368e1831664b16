"""Sweeps of many runs, and measurements of a step or of a trained model."""
