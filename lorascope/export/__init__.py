"""Export of runs and adapters: ranks for a next LoRA, adapters in several formats, and tables as files."""

from lorascope.export.conversion import convert
from lorascope.export.peft_folder import base_of, to_peft
from lorascope.export.rank_budget import RankBudget, rank_pattern, select_components
from lorascope.export.sums import interference, sum_adapters
from lorascope.export.tables import to_table
from lorascope.export.text_files import to_texts

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
    "to_texts",
]


def __dir__() -> list[str]:
    return __all__
