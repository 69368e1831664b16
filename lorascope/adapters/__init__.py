"""Adapters on a live model: attach, read, disable and detach them."""
