"""Export of runs and adapters: ranks for a next LoRA, adapters in several formats, and tables as files."""

from lorascope.runs.export.peft_folder import base_of, to_peft
from lorascope.runs.export.rank_budget import RankBudget, rank_pattern, select_components
from lorascope.runs.export.sums import interference, sum_adapters
from lorascope.runs.export.tables import to_table
from lorascope.runs.export.writers import convert
from lorascope.schema.deprecation import accept_old_names

__all__ = [
    "RankBudget",
    "base_of",
    "convert",
    "interference",
    "rank_pattern",
    "select_components",
    "sum_adapters",
    "to_peft",
    "to_table",
]

accept_old_names(__name__, Cut="RankBudget", cut="select_components")
