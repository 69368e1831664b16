"""Figures of runs: each function takes runs and returns a chart.

Pass a Run, a list of runs (runs of one recipe count as its seeds) or a dict label -> run or runs. ``FIGURES`` lists all
figures with how to read them; ``available(run)`` lists those that a run has the records for.
"""

from typing import TYPE_CHECKING

from lorascope.plots.accuracy_and_size import accuracy_by_parameters
from lorascope.plots.adapter_similarity import adapter_pairs
from lorascope.plots.component_ablations import ablations, basis_ablation, bias_curve, number_of_experts
from lorascope.plots.factor_embeddings import factor_embedding
from lorascope.plots.fourier import fourier_spectrum, frequency_bias, update_image
from lorascope.plots.head_count import head_choice
from lorascope.plots.importance_scores import importance
from lorascope.plots.learning_curves import guidance, learning_rates, training_curves
from lorascope.plots.lisa_schedule import active_layers, draw_frequency, draw_grid
from lorascope.plots.method_atlas import atlas
from lorascope.plots.norms import mean_norm, norm_over_steps, update_norm, update_norm_heat
from lorascope.plots.optimizer_moments import (
    factor_error,
    factor_rank,
    factorization_methods,
    moment_error,
    second_moments,
)
from lorascope.plots.planted_ranks import planted
from lorascope.plots.rank_allocations import adapted_types, rank_allocation, rank_replay
from lorascope.plots.registry import FIGURES, OLD_FIGURES, Figure, available
from lorascope.plots.routing import gate_course, gates
from lorascope.plots.score_agreement import against_truth, agreement
from lorascope.plots.selected_neurons import neuron_cosine, neuron_overlap, neurons, rank_shift
from lorascope.plots.step_cost import memory, step_seconds
from lorascope.plots.subspaces import spectrum, subspace_similarity
from lorascope.schema.deprecation import old_names

__all__ = [
    "FIGURES",
    "Figure",
    "ablations",
    "accuracy_by_parameters",
    "active_layers",
    "adapted_types",
    "adapter_pairs",
    "against_truth",
    "agreement",
    "atlas",
    "available",
    "basis_ablation",
    "bias_curve",
    "draw_frequency",
    "draw_grid",
    "factor_embedding",
    "factor_error",
    "factor_rank",
    "factorization_methods",
    "fourier_spectrum",
    "frequency_bias",
    "gate_course",
    "gates",
    "guidance",
    "head_choice",
    "importance",
    "learning_rates",
    "mean_norm",
    "memory",
    "moment_error",
    "neuron_cosine",
    "neuron_overlap",
    "neurons",
    "norm_over_steps",
    "number_of_experts",
    "planted",
    "rank_allocation",
    "rank_replay",
    "rank_shift",
    "second_moments",
    "spectrum",
    "step_seconds",
    "subspace_similarity",
    "training_curves",
    "update_image",
    "update_norm",
    "update_norm_heat",
]

if not TYPE_CHECKING:  # type checkers should not see the old names
    __getattr__ = old_names(__name__, OLD_FIGURES)
