"""Readers of adapters from other libraries, one module per format; they are found by definition."""

from lorascope.formats.peft_factors import group_factors
from lorascope.formats.readers import READERS, find_reader, find_sentence, reads, says
from lorascope.formats.stored_update import AdapterFiles, StoredTensor, StoredUpdate

__all__ = [
    "READERS",
    "AdapterFiles",
    "StoredTensor",
    "StoredUpdate",
    "find_reader",
    "find_sentence",
    "group_factors",
    "reads",
    "says",
]
