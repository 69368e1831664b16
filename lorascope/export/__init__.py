"""A run for others: the ranks of a next LoRA, an adapter that PEFT loads."""

from lorascope.export.folder import base_of, to_peft
from lorascope.export.ranks import rank_pattern

__all__ = ["base_of", "rank_pattern", "to_peft"]
