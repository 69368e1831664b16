"""Figures of runs: each function takes runs and returns a chart.

Pass a Run, a list of runs (runs of one recipe count as its seeds) or a dict label -> run or runs. ``FIGURES`` lists all
figures with how to read them; ``available(run)`` lists those that a run has the records for, and ``by_paper(id)`` those
that a paper has.
"""

from types import FunctionType
from typing import Any

from lorascope.plots.accuracy_and_size import accuracy_by_parameters as accuracy_by_parameters
from lorascope.plots.adapter_similarity import adapter_pairs as adapter_pairs
from lorascope.plots.component_ablations import ablations as ablations
from lorascope.plots.component_ablations import basis_ablation as basis_ablation
from lorascope.plots.component_ablations import bias_curve as bias_curve
from lorascope.plots.component_ablations import number_of_experts as number_of_experts
from lorascope.plots.component_reading import reading as reading
from lorascope.plots.course_of_updates import rotation as rotation
from lorascope.plots.course_of_updates import settling as settling
from lorascope.plots.course_of_updates import turns as turns
from lorascope.plots.factor_embeddings import factor_embedding as factor_embedding
from lorascope.plots.figure_registry import FIGURES as FIGURES
from lorascope.plots.figure_registry import Figure as Figure
from lorascope.plots.figure_registry import available as available
from lorascope.plots.forgetting_course import kl as kl
from lorascope.plots.fork_courses import forks as forks
from lorascope.plots.fourier import fourier_spectrum as fourier_spectrum
from lorascope.plots.fourier import frequency_bias as frequency_bias
from lorascope.plots.fourier import update_image as update_image
from lorascope.plots.head_count import head_choice as head_choice
from lorascope.plots.importance_scores import importance as importance
from lorascope.plots.learning_and_forgetting import dial as dial
from lorascope.plots.learning_and_forgetting import learn_forget as learn_forget
from lorascope.plots.learning_curves import guidance as guidance
from lorascope.plots.learning_curves import learning_rates as learning_rates
from lorascope.plots.learning_curves import training_curves as training_curves
from lorascope.plots.lisa_schedule import active_layers as active_layers
from lorascope.plots.lisa_schedule import draw_frequency as draw_frequency
from lorascope.plots.lisa_schedule import draw_grid as draw_grid
from lorascope.plots.method_atlas import atlas as atlas
from lorascope.plots.norms import mean_norm as mean_norm
from lorascope.plots.norms import norm_over_steps as norm_over_steps
from lorascope.plots.norms import update_norm as update_norm
from lorascope.plots.norms import update_norm_heat as update_norm_heat
from lorascope.plots.optimizer_moments import factor_error as factor_error
from lorascope.plots.optimizer_moments import factor_rank as factor_rank
from lorascope.plots.optimizer_moments import factorization_methods as factorization_methods
from lorascope.plots.optimizer_moments import moment_error as moment_error
from lorascope.plots.optimizer_moments import second_moments as second_moments
from lorascope.plots.paper_figures import by_paper as by_paper
from lorascope.plots.price_of_rank import price as price
from lorascope.plots.printed_numbers import printed_table as printed_table
from lorascope.plots.rank_allocations import adapted_types as adapted_types
from lorascope.plots.rank_allocations import planted as planted
from lorascope.plots.rank_allocations import rank_allocation as rank_allocation
from lorascope.plots.rank_allocations import rank_replay as rank_replay
from lorascope.plots.routing import gate_course as gate_course
from lorascope.plots.routing import gates as gates
from lorascope.plots.score_agreement import against_truth as against_truth
from lorascope.plots.score_agreement import agreement as agreement
from lorascope.plots.selected_neurons import neuron_cosine as neuron_cosine
from lorascope.plots.selected_neurons import neuron_overlap as neuron_overlap
from lorascope.plots.selected_neurons import neurons as neurons
from lorascope.plots.selected_neurons import rank_shift as rank_shift
from lorascope.plots.sensitive_neurons import neuron_sensitivity as neuron_sensitivity
from lorascope.plots.sensitive_neurons import sensitivity_over_steps as sensitivity_over_steps
from lorascope.plots.step_cost import memory as memory
from lorascope.plots.step_cost import step_seconds as step_seconds
from lorascope.plots.subspaces import spectrum as spectrum
from lorascope.plots.subspaces import subspace_similarity as subspace_similarity
from lorascope.schema.plugins import load_plugins

# The widget and its slider draw no figure, and import Jupyter and plotly.
load_plugins(__name__, "lorascope.figures", skip=("dial_slider", "explore"))


def __getattr__(name: str) -> Any:
    """Find figures of other packages."""
    if name in FIGURES:
        return FIGURES[name].draw
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    functions = [name for name, value in globals().items() if isinstance(value, FunctionType) and name[0] != "_"]
    return sorted({*functions, *FIGURES, "FIGURES", "Figure"} - {"load_plugins"})
