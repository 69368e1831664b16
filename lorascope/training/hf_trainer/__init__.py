"""Integration with transformers' Trainer: a recorder, and a callback that runs lorascope's methods."""
