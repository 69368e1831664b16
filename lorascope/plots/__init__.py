"""Figures of runs: each function takes runs and returns a chart.

Pass a Run, a list of runs (runs of one recipe count as its seeds) or a dict label -> run or runs. ``FIGURES`` lists all
figures with how to read them; ``available(run)`` lists those that a run has the records for.
"""

# ruff: noqa: F403, F405
import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

from lorascope.plots.registry import DRAWN, load_plugins
from lorascope.plots.registry import FIGURES as FIGURES
from lorascope.plots.registry import OLD_FIGURES as OLD_FIGURES
from lorascope.plots.registry import Figure as Figure
from lorascope.plots.registry import available as available
from lorascope.schema.deprecation import old_names

if TYPE_CHECKING:  # for type checkers and editors, which do not run the search below
    from lorascope.plots.accuracy_and_size import *
    from lorascope.plots.adapter_similarity import *
    from lorascope.plots.component_ablations import *
    from lorascope.plots.factor_embeddings import *
    from lorascope.plots.fourier import *
    from lorascope.plots.head_count import *
    from lorascope.plots.importance_scores import *
    from lorascope.plots.learning_curves import *
    from lorascope.plots.lisa_schedule import *
    from lorascope.plots.method_atlas import *
    from lorascope.plots.norms import *
    from lorascope.plots.optimizer_moments import *
    from lorascope.plots.planted_ranks import *
    from lorascope.plots.rank_allocations import *
    from lorascope.plots.routing import *
    from lorascope.plots.score_agreement import *
    from lorascope.plots.selected_neurons import *
    from lorascope.plots.step_cost import *
    from lorascope.plots.subspaces import *
else:
    for _module in pkgutil.iter_modules(__path__):
        if _module.name != "explore":  # the widget draws no figure, and imports Jupyter
            importlib.import_module(f"{__name__}.{_module.name}")
    load_plugins()
    __all__ = sorted(["FIGURES", "Figure", "available", *DRAWN])
    globals().update(DRAWN)
    _find_old = old_names(__name__, OLD_FIGURES)

    def __getattr__(name: str) -> Any:
        """Find figures that were registered after this import, and renamed ones."""
        return DRAWN[name] if name in DRAWN else _find_old(name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *DRAWN})
