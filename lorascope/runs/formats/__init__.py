"""Readers of adapter folders from other libraries, one module per format."""
