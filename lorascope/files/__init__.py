"""Readers of untrusted files with size limits, and text output without control characters."""
