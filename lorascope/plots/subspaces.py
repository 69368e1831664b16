"""Figures of what an update is made of: its spectrum, and the directions two runs share."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

import pandas as pd

from lorascope.analysis import norms, spectra
from lorascope.analysis import subspace_similarity as subspace
from lorascope.analysis.seed_intervals import band
from lorascope.analysis.subspace_similarity import Side
from lorascope.charts.chart import Axis, Chart, Heat, Panels, set_side_by_side
from lorascope.plots.registry import SPECTRA, UPDATES, figure
from lorascope.plots.run_groups import Cohort, Runs, gather, lines
from lorascope.runs.run import Run

_MOST_DOTS = 64  # components that can still be told apart on a line
_SIDES = {"A": "A", "B": "B", "update": "the update's inputs"}


@figure(
    needs=(SPECTRA,),
    reads="A steep fall says that few directions carry the update, a flat line that the whole rank is used. The "
    "effective rank in the caption sums the line up: that many equal singular values have the same entropy.",
    misleads="Small singular values of a short training may be left-overs of the random start, not directions learned. "
    "Two runs may share a spectrum and no direction: subspace_similarity tells.",
)
def spectrum(
    runs: Runs,
    control: Runs | None = None,
    module: str | None = None,
    step: int | None = None,
    added: bool = False,
) -> Chart:
    """Singular values of one module's update, one line a recipe.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        What to draw, and what to draw beside it.
    module : str, optional
        A module; by default the one with the largest update, of those whose spectrum all runs hold.
    step : int, optional
        A step with a snapshot; by default the end.
    added : bool
        Of what training added to an update that does not start at zero, such as FourierFT's.
    """
    cohort = gather("spectrum", runs, control)
    cohort.require(SPECTRA)
    values_of = spectra.added_values if added else spectra.singular_values
    held = {run.id: values_of(run, step) for run in cohort.runs}
    module = common_module(cohort, list(held.values()), module)
    found = {run: sigmas[module] for run, sigmas in held.items()}
    values = spectra.spectrum(found).rename(columns={"module": "run", "sigma": "value"})
    ranks = spectra.ranks(found).rename(columns={"module": "run", "effective_rank": "value"})
    cells = band(cohort.label(values), ["recipe", "kind", "component"])
    effective = "; ".join(map(_effective_rank_phrase, band(cohort.label(ranks), ["recipe"]).to_dict("records")))
    return Chart(
        cells,
        lines(cells, "component", points=bool(cells["component"].max() <= _MOST_DOTS)),
        title=f"Spectrum of {module}",
        x=Axis(label="component"),
        y=Axis(label="singular value", log=True),
        caption=cohort.caption(
            f"Singular values of {'what training added' if added else 'the update'}. Effective rank: {effective}.",
            *(cohort.missing_initial_updates() if added else []),
        ),
        colors=cohort.labels,
        meta=cohort.meta | {"module": module},
    )


@figure(
    needs=(UPDATES,),
    runs=2,
    reads="Cell (i, j) says how much of the first i directions of one run lies within the first j of another: 1 all of "
    "it, 0 nothing. Only what is brighter than the same cell of the random panel is shared.",
    misleads="Runs that start from the same random A look alike before they have learned anything: give each its own "
    "seed. In narrow models, and for large i or j, chance alone comes close to 1.",
)
def subspace_similarity(runs: Runs, control: Runs | None = None, module: str | None = None, side: Side = "A") -> Panels:
    """LoRA's phi (section 7.2, Eq. 4; Figs. 3 and 4) between runs, beside what chance gives.

    Parameters
    ----------
    runs : sequence of Run, or mapping label -> run or runs
        Runs of one label: the mean over all pairs (two seeds, Fig. 4). Two labels: every run of the first, on the
        vertical axis, with every run of the second (two ranks, Fig. 3).
    control : as ``runs``, optional
        A third panel, such as runs on another task.
    module : str, optional
        An adapted module; by default the one with the largest update.
    side : {"A", "B", "update"}
        Directions of A (the paper's), of B, or of the update's inputs, which do not depend on how it was factored.

    Raises
    ------
    ValueError
        There are not two runs to compare.
    """
    name = "subspace_similarity"
    shown = {"": gather(name, runs)} | ({"control: ": gather(name, control)} if control is not None else {})
    for cohort in shown.values():
        cohort.require(UPDATES)
    held = [run.updates() for cohort in shown.values() for run in cohort.runs]
    module = common_module(shown[""], held, module)
    panels = []
    for prefix, cohort in shown.items():
        title, pairs = _similarity_pairs(cohort)
        cells = _phi_cells(pairs, module, side)
        panels.append(_phi_heat(cells, "phi", prefix + title, _phi_caption(cells, len(pairs), module, side), cohort))
    cells = panels[0].data
    return set_side_by_side(
        *panels, _phi_heat(cells, "phi_random", "chance: random subspaces", panels[0].caption, shown[""])
    )


def common_module(cohort: Cohort, updates: Sequence[Mapping[str, Any]], module: str | None) -> str:
    """The module asked for, or the one with the largest update by the mean over runs, of those that all runs hold."""
    common = [name for name in updates[0] if all(name in found for found in updates)]
    if module is None and common:
        cohort.require("update_norm")
        rows = norms.last(norms.select(cohort.table, "update_norm"))
        sizes = rows[rows["module"].isin(common)].groupby("module", observed=True)["value"].mean()
        return str(sizes.idxmax())
    if module not in common:
        some = ", ".join(common[:5]) or "no module at all"
        raise ValueError(f"{cohort.name}: not all runs hold {module or 'one module'}; they hold {some}")
    return module


def _effective_rank_phrase(row: Mapping[Hashable, Any]) -> str:
    """One recipe's effective rank with its interval, for a caption."""
    interval = "" if pd.isna(row["low"]) else f" [{row['low']:.1f}, {row['high']:.1f}]"
    return f"{row['recipe']} {row['value']:.1f}{interval}"


def _similarity_pairs(cohort: Cohort) -> tuple[str, list[tuple[Run, Run]]]:
    """A title, and the pairs of runs to compare."""
    if len(cohort.groups) == 2:
        first, second = cohort.groups
        return f"{first.label} against {second.label}", list(product(first.runs, second.runs))
    pairs = list(combinations(cohort.runs, 2))
    if len(cohort.groups) > 2 or not pairs:
        raise ValueError(
            f"{cohort.name} compares two runs or more of one label, or two labels; "
            f"got {len(cohort.runs)} of {', '.join(cohort.labels)}"
        )
    return f"{cohort.labels[0]}, between seeds", pairs


def _phi_cells(pairs: Sequence[tuple[Run, Run]], module: str, side: Side) -> pd.DataFrame:
    """Mean, smallest and largest phi of the pairs."""
    tables = [subspace.similarity_of_runs(first.updates(), second.updates(), module, side) for first, second in pairs]
    cells = pd.concat(tables).groupby(["i", "j"], as_index=False)
    return cells.agg(phi=("phi", "mean"), least=("phi", "min"), most=("phi", "max"), phi_random=("phi_random", "first"))


def _phi_caption(cells: pd.DataFrame, pairs: int, module: str, side: Side) -> str:
    """The caption: what phi is, and its first and last value against chance."""
    counted = "One pair of runs" if pairs == 1 else f"Mean of {pairs} pairs of runs, which share runs: no interval"
    values = [
        f"φ({row.i}, {row.j}) = {row.phi:.2f}"
        + (f" ({row.least:.2f} to {row.most:.2f})" if pairs > 1 else "")
        + f", by chance {row.phi_random:.2f}"
        for row in cells.iloc[[0, -1]].itertuples()
    ]
    return (
        f"φ(i, j) = ‖U₁ᵀU₂‖² / min(i, j) of the top i and j directions of {_SIDES[side]} in {module}. {counted}. "
        f"{'; '.join(values)} (max(i, j) / dimension)."
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
