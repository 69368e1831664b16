"""Figures: ``plots.f(runs, control=None)`` turns runs into a chart.

``runs`` is a Run, a list of runs (those of one recipe are its seeds) or a dict label -> run or runs. ``FIGURES`` is the
catalogue, ``available(run)`` says what can be drawn.
"""

from lorascope.plots.catalogue import FIGURES, Figure, available
from lorascope.plots.norms import mean_norm, norm_over_steps, update_norm, update_norm_heat
from lorascope.plots.subspaces import spectrum, subspace_similarity
from lorascope.plots.training import training_curves

__all__ = [
    "FIGURES",
    "Figure",
    "available",
    "mean_norm",
    "norm_over_steps",
    "spectrum",
    "subspace_similarity",
    "training_curves",
    "update_norm",
    "update_norm_heat",
]
