"""Figure that compares methods by their updates: singular values, norms by layer and angles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, combinations_with_replacement, product
from typing import Any

import pandas as pd

from lorascope.analysis import initial_update
from lorascope.analysis import leading_directions as analysis
from lorascope.analysis.seed_intervals import seed_cells
from lorascope.analysis.spectra import added_values
from lorascope.charts.chart import Chart, Panels, set_side_by_side, stack_vertically
from lorascope.charts.marks import Axis, Band, Mark, Point, Text
from lorascope.plots.builders import curves
from lorascope.plots.figure_registry import figure, gather_runs
from lorascope.plots.norms import update_profile
from lorascope.plots.requirements import SPECTRA
from lorascope.plots.run_groups import Cohort, Runs, common_names, define, require_counts
from lorascope.plots.sensitive_neurons import NULL, profiles_by_recipe
from lorascope.runs.result import Result

_UPDATES, _RANDOM = "two updates", "random directions"
_RIGHT_ANGLE = 90.0  # degrees: the largest principal angle


@figure(
    topic="updates",
    needs=("learned_norm", SPECTRA),
    runs=2,
    reads="The panels show the singular values of each method's update, its norm by layer, and the angles between "
    "leading singular vectors of two updates. Only dots well to the left of their tick, the angle of random "
    "directions, show shared directions; a row of seeds compares the runs of one recipe.",
    misleads="Heights of spectra and norms follow the learning rates, which differ between methods: compare shapes. "
    "Small angles may come from shared initial factors (runs of one seed) or shared frequencies (all FourierFT runs): "
    "compare different seeds and methods.",
)
def atlas(runs: Runs, control: Runs | None = None, module: str | None = None, k: int = 8) -> Panels:
    """Plot an atlas of methods on one task: spectra, norms by layer, angles between learned updates, and neurons.

    The learned update of a run is ΔW − ΔW₀. If an update depends on the input (HydraLoRA), it is evaluated at the gate
    weights that the caption names. Runs with ``observe.neurons()`` also show the sorted sensitivities of their neurons.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        At least two runs of one model on one task.
    module : str, optional
        Module whose spectrum is plotted. By default pool the modules in blocks whose spectrum all runs have; if there
        are none, pool those of each run.
    k : int
        Number of leading singular vectors to compare.

    Raises
    ------
    ValueError
        There are fewer than two runs, or they differ in task or model.

    Examples
    --------
    >>> runs = {"LoRA": ls.example("lora"), "AdaLoRA": ls.example("adalora"), "FourierFT": ls.example("fourierft")}
    >>> ls.plots.atlas(runs)
    """
    cohort = gather_runs("atlas", runs, control)
    require_counts(k=k)
    cohort.require_runs(2)
    cohort.require_same("task", "model")
    spectrum, modules = _spectrum(cohort, module)
    angles, notes = _angles(cohort, k)
    panels: list[Chart] = [angles]
    if (profiles := profiles_by_recipe(cohort)) is not None:
        panels.append(profiles)
        notes.append("Neurons: sensitivity |w ∂L/∂w| over the mean of the module, mean over modules.")
        if profiles.marks_of(Band):
            notes.append(NULL)
    caption = cohort.caption(
        f"Singular values of the learned update ΔW − ΔW₀: {modules}. {define('learned_norm')}",
        f"Angles: principal angles between the first {k} singular vectors (fewer if an update has fewer), averaged "
        "over outputs, inputs, the modules that both runs have and pairs of runs; 0: equal directions, 90: orthogonal "
        "ones.",
        *notes,
        *cohort.missing_initial_updates(),
    )
    norms = update_profile(cohort, "learned_norm", "Update by layer", log=True)
    rows = set_side_by_side(spectrum, norms), set_side_by_side(*panels)
    return cohort.complete(stack_vertically(*rows, title="Updates by method"), caption)


def _spectrum(cohort: Cohort, module: str | None) -> tuple[Chart, str]:
    """Plot the singular values of one module or of several pooled, and describe the modules as text."""
    spectra = {run.id: added_values(run) for run in cohort.runs}
    pools, description = _pools(cohort, spectra, module)
    values = pd.concat(analysis.pool_spectra(spectra[run], names).assign(run=run) for run, names in pools.items())
    chart = curves(
        seed_cells(cohort.label(values), ["recipe", "kind", "component"]),
        "component",
        (Axis(label="component", log=True), Axis(label="singular value", log=True)),
        points=False,
        title=f"Spectrum of {module}" if module else "Spectrum (ends at the rank)",
        colors=cohort.labels,
    )
    return chart, description


def _pools(
    cohort: Cohort, spectra: Mapping[str, Mapping[str, Any]], module: str | None
) -> tuple[Mapping[str, Sequence[str]], str]:
    """Return the modules of each run whose spectra are pooled, and their description as text."""
    if module is not None:
        module = cohort.common_module(list(spectra.values()), module)
        return dict.fromkeys(spectra, (module,)), module
    in_blocks = {}
    for run in cohort.runs:
        blocks = set(run.modules["module"][run.modules["layer"].notna()])
        in_blocks[run.id] = common_names([spectra[run.id], blocks])
    # The head trains with every method, so that its spectrum does not compare them.
    shared = common_names(list(in_blocks.values()))
    if len(shared) == 1:
        return dict.fromkeys(spectra, shared), shared[0]
    if shared:
        description = f"root mean square over the {len(shared)} modules in blocks that all runs have"
        return dict.fromkeys(spectra, shared), description
    for id, names in in_blocks.items():
        if not names:
            raise ValueError(f"atlas needs the spectrum of a module in a block (run {id} has none)")
    return in_blocks, "root mean square over each run's own modules in blocks, because no module is in all runs"


def _angles(cohort: Cohort, k: int) -> tuple[Chart, list[str]]:
    """Plot the angles between every pair of recipes, and return a note on recipes without saved directions."""

    def directions_of(run: Result) -> dict[str, Any]:
        updates = initial_update.learned_updates(run)
        return {module: analysis.leading_singular_vectors(update, k) for module, update in updates.items()}

    directions = {group.label: list(map(directions_of, group.runs)) for group in cohort.groups}
    rows = []
    for row, column in combinations_with_replacement(cohort.labels, 2):
        # Within one recipe, two of its seeds form a pair.
        pairs = list(combinations(directions[row], 2))
        if row != column:
            pairs = list(product(directions[row], directions[column]))
        if not pairs:
            continue
        mean, chance = analysis.average_angles(pairs)
        words = ""
        if pd.isna(mean):
            # A run that saved only singular values has no directions at all.
            words = "none shared" if all(map(all, pairs)) else "not saved"
        pair = f"{row}, seeds" if row == column else f"{row}, {column}"
        rows.append({"row": row, "column": column, "pair": pair, "angle": mean, "random": chance, "words": words})
    table = pd.DataFrame(rows)
    table = table.assign(value=table["angle"] - table["random"], series=_UPDATES)
    empty = table[table["angle"].isna()].assign(middle=_RIGHT_ANGLE / 2)
    marks: list[Mark] = [
        Point("random", "pair", "series", symbol="line-ns-open", data=table.assign(series=_RANDOM)),
        Point("angle", "pair", "series"),
    ]
    if len(empty):
        marks.append(Text("middle", "pair", "words", muted=True, data=empty))
    chart = Chart(
        table,
        marks,
        title="Angle between updates (left of the tick: shared directions)",
        x=Axis(label="angle (degrees)", limits=(0, _RIGHT_ANGLE)),
        y=Axis(order=table["pair"], compact=True),
        colors=[*cohort.labels, _UPDATES, _RANDOM],
    )
    unsaved = [label for label, runs in directions.items() if not any(runs)]
    if not unsaved:
        return chart, []
    return chart, [f"Only singular values were saved, no directions: {', '.join(unsaved)}."]
