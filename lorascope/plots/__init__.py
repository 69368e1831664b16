"""Figures of runs: each function takes runs and returns a chart.

Pass a Run, a list of runs (runs of one recipe count as its seeds) or a dict label -> run or runs. ``FIGURES`` lists all
figures with how to read them; ``available(run)`` lists those that a run has the records for.
"""

from typing import Any

from lorascope.plots.figure_registry import DRAWN, FIGURES, Figure, available
from lorascope.schema.plugins import load_plugins

load_plugins(__name__, "lorascope.figures", skip=("explore",))  # the widget draws no figure, and imports Jupyter
globals().update(DRAWN)

__all__ = ["FIGURES", "Figure", "available"]
__all__ += sorted(DRAWN)


def __getattr__(name: str) -> Any:
    """Find figures that were registered after this import."""
    if name in DRAWN:
        return DRAWN[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *DRAWN})
