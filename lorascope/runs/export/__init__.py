"""A run for others: the ranks of a next LoRA, an adapter that PEFT loads, tables as files."""

from lorascope.runs.export.peft_folder import base_of, to_peft
from lorascope.runs.export.rank_budget import Cut, cut, rank_pattern
from lorascope.runs.export.tables import to_table

__all__ = ["Cut", "base_of", "cut", "rank_pattern", "to_peft", "to_table"]
