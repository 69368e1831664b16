"""Figures of the singular values of an update and of the subspaces that two runs share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, combinations, product

import pandas as pd

from lorascope.analysis import spectra
from lorascope.analysis import subspace_similarity as subspace
from lorascope.analysis.seed_intervals import seed_cells
from lorascope.analysis.subspace_similarity import Side
from lorascope.charts.chart import Chart, Panels
from lorascope.charts.marks import Axis, Heat
from lorascope.plots.builders import curves
from lorascope.plots.figure_registry import figure, gather_apart, gather_runs
from lorascope.plots.requirements import SPECTRA, UPDATES
from lorascope.plots.run_groups import Cohort, Runs, common_names, join_by_label, require_choices
from lorascope.runs.result import Result

_MOST_DOTS = 64  # largest number of components with a dot each
_ROLES = ("q", "v")  # whose similarity LoRA's paper shows
_ROUNDING = 1e-6  # of an overlap
_EXCESS = Heat("j", "i", "excess", "φ(i, j) − chance", scale="diverging")
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
    cells = seed_cells(cohort.label(values), ["recipe", "kind", "component"])
    effective = []
    for row in seed_cells(cohort.label(ranks), ["recipe"]).to_dict("records"):
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
            title="Singular values of an update",
            caption=cohort.caption(
                f"Singular values of {symbol} of {module}. Effective rank: {'; '.join(effective)}.", *notes
            ),
            colors=cohort.labels,
            meta={"module": module},
        )
    )


@figure(
    topic="updates",
    needs=(UPDATES,),
    runs=2,
    reads="Cell (i, j) is the overlap of the first i directions of one run with the first j of another, minus that of "
    "random directions. 0: as much is shared as at random.",
    misleads="Runs with the same random initial A are similar before they learn anything: use different seeds. In "
    "narrow models, or for large i or j, the random baseline itself is close to 1, and hides what is shared.",
)
def subspace_similarity(runs: Runs, control: Runs | None = None, module: str | None = None, side: Side = "A") -> Panels:
    """Plot LoRA's subspace similarity φ between runs minus its random baseline (section 7.2, Figs. 3 and 4).

    Parameters
    ----------
    runs : sequence of Run, or mapping label -> run or runs
        At least two runs. Runs of one label: mean over all pairs (two seeds, Fig. 4). Two labels: every run of the
        first, on the vertical axis, with every run of the second (two ranks, Fig. 3), without pairs of one seed if
        there are others.
    control : as ``runs``, optional
        Runs for another row of panels, such as runs on another task.
    module : str, optional
        Adapted module; by default the queries and the values of the block whose queries changed most, as in the paper,
        or without them the module with the largest update.
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
    # Panels of the control show the same modules, so that they can be compared.
    modules = _compared_modules(cohorts[""], [run for cohort in cohorts.values() for run in cohort.runs], module)
    rows, values, samples = [], [], {}
    for prefix, cohort in cohorts.items():
        label, pairs = _similarity_pairs(cohort)
        row = []
        for name, role in modules.items():
            title = ", ".join(filter(None, (prefix + label, role)))
            tables = [subspace.similarity_of_runs(a.updates(), b.updates(), name, side) for a, b in pairs]
            # The random baseline depends only on i, j and the width of the module.
            cells = pd.concat(tables).groupby(["i", "j"], as_index=False).agg(
                phi=("phi", "mean"), least=("phi", "min"), most=("phi", "max"), phi_random=("phi_random", "first")
            )  # fmt: skip
            samples[title] = f"mean of {len(pairs)} pairs that share runs, so no interval"
            if len(pairs) == 1:
                samples[title] = "one pair of runs"
            values.append(f"{title}: {_corner_values(cells)}.")
            row.append(_excess_heat(cells, title, cohort))
        rows.append(tuple(row))
    if all(chart.data["excess"].min() >= -_ROUNDING for chart in chain(*rows)):  # no negative colors are needed
        upwards = replace(_EXCESS, scale="sequence", limits=(0, None))
        rows = [tuple(replace(chart, marks=(upwards,)) for chart in row) for row in rows]
    caption = (
        f"φ(i, j) = ‖U₁ᵀU₂‖² / min(i, j) of the top i and j directions of {_SIDES[side]} in {' and '.join(modules)}, "
        f"minus the random baseline, max(i, j) / dimension; {join_by_label(samples)}. {' '.join(values)}"
    )
    return cohorts[""].complete(Panels(tuple(rows), title="Subspace similarity minus chance"), caption)


def _compared_modules(cohort: Cohort, runs: Sequence[Result], module: str | None) -> dict[str, str]:
    """Return the modules to compare and their roles: those of the paper in one block, or one module without a role."""
    updates = [run.updates() for run in runs]
    candidates: dict[str, str] = {}
    if module is None:
        described = runs[0].modules
        is_shown = described["module"].isin(common_names(updates)) & described["role"].isin(_ROLES)
        for _, block in described[is_shown].groupby(["stack", "layer"]):
            if set(block["role"]) == set(_ROLES):
                names = dict(zip(block["role"], block["module"], strict=True))
                candidates[names["q"]] = names["v"]
        if candidates:
            query = cohort.common_module([{name: update[name] for name in candidates} for update in updates], None)
            return {query: "q", candidates[query]: "v"}
    return {cohort.common_module(updates, module): ""}


def _similarity_pairs(cohort: Cohort) -> tuple[str, list[tuple[Result, Result]]]:
    """Return a title and the pairs of runs to compare."""
    if len(cohort.groups) == 2:
        first, second = cohort.groups
        pairs = list(product(first.runs, second.runs))
        # Runs of one seed can share their initial A.
        of_two_seeds = [(a, b) for a, b in pairs if a.meta.seed != b.meta.seed]
        return f"{first.label} against {second.label}", of_two_seeds or pairs
    pairs = list(combinations(cohort.runs, 2))
    if len(cohort.groups) > 2 or not pairs:
        raise ValueError(
            f"{cohort.name} needs two labels, or at least 2 runs of one label, got {len(cohort.runs)} of "
            f"{', '.join(cohort.labels)}"
        )
    return f"{cohort.labels[0]}, between seeds", pairs


def _corner_values(cells: pd.DataFrame) -> str:
    """Return the value of φ in opposite corners as text, with its range over pairs and the random baseline."""
    values = []
    for cell in cells.iloc[[0, -1]].to_dict("records"):  # smallest and largest i and j
        text = f"φ({cell['i']}, {cell['j']}) = {cell['phi']:.2f}"
        if cell["least"] < cell["most"]:
            text += f" ({cell['least']:.2f} to {cell['most']:.2f})"
        values.append(f"{text}, random {cell['phi_random']:.2f}")
    return "; ".join(values)


def _excess_heat(cells: pd.DataFrame, title: str, cohort: Cohort) -> Chart:
    ones, others = cohort.labels if len(cohort.groups) == 2 else ("one seed", "another")
    return Chart(
        cells.assign(excess=cells["phi"] - cells["phi_random"]),
        [_EXCESS],
        title=title,
        x=Axis(label=f"j: directions of {others}"),
        y=Axis(label=f"i: directions of {ones}"),
        meta=cohort.meta,
    )
