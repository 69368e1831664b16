"""Readers of adapters from other libraries, one module per format; they are found by definition."""

from lorascope.runs.formats.registry import READERS, Reader, find_reader, reads

__all__ = ["READERS", "Reader", "find_reader", "reads"]
