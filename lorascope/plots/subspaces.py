"""Figures of the singular values of an update and of the subspaces that two runs share."""

from __future__ import annotations

from itertools import combinations, product

import pandas as pd

from lorascope.analysis import spectra
from lorascope.analysis import subspace_similarity as subspace
from lorascope.analysis.seed_intervals import band
from lorascope.analysis.subspace_similarity import Side
from lorascope.charts.chart import Chart, Panels, set_side_by_side
from lorascope.charts.marks import Axis, Heat
from lorascope.plots.builders import curves
from lorascope.plots.figure_registry import figure, gather_apart, gather_runs
from lorascope.plots.requirements import SPECTRA, UPDATES
from lorascope.plots.run_groups import Cohort, Runs, require_choices
from lorascope.runs.result import Result

_MOST_DOTS = 64  # largest number of components with a dot each
_SIDES = {"A": "A", "B": "B", "update": "the inputs of the update"}


@figure(
    topic="updates",
    needs=(SPECTRA,),
    reads="A steep line means that few directions carry the update, a flat line that it uses its whole rank. The "
    "effective rank in the caption is the number of equal singular values with the same entropy.",
    misleads="After short training, small singular values may be remnants of the random initialization, not learned "
    "directions. Runs with equal spectra may still share no direction: check subspace_similarity.",
)
def spectrum(
    runs: Runs, control: Runs | None = None, module: str | None = None, step: int | None = None, added: bool = False
) -> Chart:
    """Plot the spectrum of one module's update: singular values of its leading subspaces, one line per recipe.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs to plot, and runs to compare with.
    module : str, optional
        Module to plot; by default the one with the largest update among those whose spectrum all runs have.
    step : int, optional
        Step with a snapshot; by default the last step.
    added : bool
        Subtract the initial update where it is nonzero, as in FourierFT.

    Raises
    ------
    ValueError
        The runs have no such module, or no snapshot of the step.

    Examples
    --------
    >>> ls.plots.spectrum({"full fine-tuning": ls.example("full"), "LoRA": ls.example("lora")})
    """
    cohort = gather_runs("spectrum", runs, control)
    values_of, symbol = spectra.singular_values, "W − W₀"
    notes: list[str] = []
    if added:
        values_of, symbol, notes = spectra.added_values, "ΔW − ΔW₀", cohort.missing_initial_updates()
    by_run = {run.id: values_of(run, step) for run in cohort.runs}
    module = cohort.common_module(list(by_run.values()), module)
    # Rounding errors of zero would be a long tail of the line.
    sigmas = {run: spectra.above_rounding(by_module[module]) for run, by_module in by_run.items()}
    values = spectra.tabulate_spectra(sigmas).rename(columns={"module": "run", "sigma": "value"})
    ranks = spectra.rank_definitions(sigmas).rename(columns={"module": "run", "effective_rank": "value"})
    cells = band(cohort.label(values), ["recipe", "kind", "component"])
    effective = []
    for row in band(cohort.label(ranks), ["recipe"]).to_dict("records"):
        text = f"{row['recipe']} {row['value']:.1f}"
        if pd.notna(row["low"]):
            text += f" [{row['low']:.1f}, {row['high']:.1f}]"
        effective.append(text)
    return cohort.complete(
        curves(
            cells,
            "component",
            ("component", Axis(label="singular value", log=True)),
            points=bool(cells["component"].max() <= _MOST_DOTS),
            title=f"Spectrum of {module}",
            caption=cohort.caption(f"Singular values of {symbol}. Effective rank: {'; '.join(effective)}.", *notes),
            colors=cohort.labels,
            meta={"module": module},
        )
    )


@figure(
    topic="updates",
    needs=(UPDATES,),
    runs=2,
    reads="Cell (i, j) is the overlap of the first i directions of one run with the first j of another: 1 if "
    "contained, 0 if orthogonal. Only what is brighter than the same cell of the random panel is shared.",
    misleads="Runs with the same random initial A are similar before they learn anything: use different seeds. In "
    "narrow models, or for large i or j, the random baseline itself is close to 1.",
)
def subspace_similarity(runs: Runs, control: Runs | None = None, module: str | None = None, side: Side = "A") -> Panels:
    """Plot LoRA's subspace similarity φ between runs, next to a random baseline (section 7.2, Figs. 3 and 4).

    Parameters
    ----------
    runs : sequence of Run, or mapping label -> run or runs
        At least two runs. Runs of one label: mean over all pairs (two seeds, Fig. 4). Two labels: every run of the
        first, on the vertical axis, with every run of the second (two ranks, Fig. 3).
    control : as ``runs``, optional
        Runs for another panel, such as runs on another task.
    module : str, optional
        Adapted module; by default the one with the largest update.
    side : {"A", "B", "update"}
        Directions of A (as in the paper), of B, or of the inputs of the update, which do not depend on how the update
        was factored.

    Raises
    ------
    ValueError
        There are no two runs to compare.

    Examples
    --------
    >>> ls.plots.subspace_similarity({"seed 0": ls.example("adapter"), "seed 1": ls.example("adapter_seed_1")})
    """
    cohorts = gather_apart("subspace_similarity", runs, control)
    require_choices(side=(side, _SIDES))
    updates = [run.updates() for cohort in cohorts.values() for run in cohort.runs]
    # Panels of the control show the same module, so that they can be compared.
    module = cohorts[""].common_module(updates, module)
    panels: list[Chart] = []
    for prefix, cohort in cohorts.items():
        title, pairs = _similarity_pairs(cohort)
        tables = [subspace.similarity_of_runs(a.updates(), b.updates(), module, side) for a, b in pairs]
        over_pairs = pd.concat(tables).groupby(["i", "j"], as_index=False)
        # The random baseline depends only on i, j and the width of the module.
        cells = over_pairs.agg(
            phi=("phi", "mean"), least=("phi", "min"), most=("phi", "max"), phi_random=("phi_random", "first")
        )
        caption = _phi_caption(cells, len(pairs), module, side)
        panels.append(_phi_heat(cells, "phi", prefix + title, caption, cohort))
    random = _phi_heat(panels[0].data, "phi_random", "random subspaces", panels[0].caption, cohorts[""])
    return cohorts[""].complete(set_side_by_side(*panels, random))


def _similarity_pairs(cohort: Cohort) -> tuple[str, list[tuple[Result, Result]]]:
    """Return a title and the pairs of runs to compare."""
    if len(cohort.groups) == 2:
        first, second = cohort.groups
        return f"{first.label} against {second.label}", list(product(first.runs, second.runs))
    pairs = list(combinations(cohort.runs, 2))
    if len(cohort.groups) > 2 or not pairs:
        raise ValueError(
            f"{cohort.name} needs two labels, or at least 2 runs of one label, got {len(cohort.runs)} of "
            f"{', '.join(cohort.labels)}"
        )
    return f"{cohort.labels[0]}, between seeds", pairs


def _phi_caption(cells: pd.DataFrame, pairs: int, module: str, side: Side) -> str:
    """Return the caption: definition of φ, and its value in opposite corners with the random baseline."""
    sample = "One pair of runs" if pairs == 1 else f"Mean of {pairs} pairs that share runs, so no interval"
    values = []
    for cell in cells.iloc[[0, -1]].itertuples():  # smallest and largest i and j
        spread = f" ({cell.least:.2f} to {cell.most:.2f})" if pairs > 1 else ""
        values.append(f"φ({cell.i}, {cell.j}) = {cell.phi:.2f}{spread}, random {cell.phi_random:.2f}")
    return (
        f"φ(i, j) = ‖U₁ᵀU₂‖² / min(i, j) of the top i and j directions of {_SIDES[side]} in {module}. {sample}. "
        f"{'; '.join(values)}. Random baseline: max(i, j) / dimension."
    )


def _phi_heat(cells: pd.DataFrame, value: str, title: str, caption: str, cohort: Cohort) -> Chart:
    return Chart(
        cells,
        [Heat("j", "i", value, "φ(i, j)", limits=(0, 1))],
        title=title,
        x=Axis(label="j"),
        y=Axis(label="i"),
        caption=caption,
        meta=cohort.meta,
    )
