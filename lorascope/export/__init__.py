"""A run for others: the ranks of a next LoRA, an adapter that PEFT loads."""

from lorascope.export.folder import base_of, to_peft
from lorascope.export.ranks import Cut, cut, rank_pattern

__all__ = ["Cut", "base_of", "cut", "rank_pattern", "to_peft"]
