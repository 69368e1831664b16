"""The same under transformers' Trainer: its recorder, and our methods as a callback."""
