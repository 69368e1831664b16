"""Inputs of a run: models, tasks, text and images."""
