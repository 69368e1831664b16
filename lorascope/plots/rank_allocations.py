"""Figures of rank allocation: where the ranks went, how they got there, and what a type of weight is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from lorascope.analysis import norms, rank_allocations
from lorascope.analysis.seed_intervals import band
from lorascope.charts.chart import (
    Axis,
    Band,
    Chart,
    Drawable,
    Heat,
    Line,
    Mark,
    Panels,
    Point,
    set_side_by_side,
    stack_vertically,
    wrap,
)
from lorascope.plots.registry import figure
from lorascope.plots.run_groups import INTERVAL, Cohort, Group, Runs, bars, define, gather
from lorascope.schema.module_roles import ROLES

_MOST_BESIDE = 26  # columns of cells, in all panels, that still have room beside each other
_SHOWN, _SUM = "the ranks shown", "sum of the ranks"
_SPREAD = "in the data, and in brackets where there is room, the smallest and largest of the seeds"
_STAYING = "every component that a module starts with equally likely to stay"
_FREE = "every component equally likely to be of any module"


@figure(
    needs=("rank",),
    reads="A cell is the rank that one role of weight has in one layer; hatched cells have no adapter, which is not "
    "rank 0. Believe of the pattern what the seeds share: Kendall's τ in the caption is 1 where they order the modules "
    "alike, and as low as by lot where they have nothing in common.",
    misleads="An allocator that knows nothing draws a pattern, too: set chance, or a control, beside it. One rank of a "
    "larger matrix costs more parameters, and a high rank says that a module got much, not that it needs it.",
)
def rank_allocation(runs: Runs, control: Runs | None = None, step: int | None = None, chance: bool = False) -> Drawable:
    """Rank by layer and role, one panel a recipe (AdaLoRA, AutoLoRA and ALoRA, each in its Fig. 3).

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        What to draw, and what to draw beside it.
    step : int, optional
        Ranks in force after this step; by default at the end.
    chance : bool
        Beside every recipe also its budget drawn by lot, anew for every seed.
    """
    cohort = gather("rank_allocation", runs, control)
    cohort.require("rank")
    found = cohort.label(rank_allocations.current_ranks(cohort.table, step))
    when = "at the end" if step is None else f"after step {step}"
    told = [f"{define('rank')} Ranks in force {when}. {_totals(found)}", *_agreements(cohort, found)]
    if chance:
        found = _add_random_ranks(cohort, found)
        told.append(_random_rank_caption(cohort))
    cells = _rank_cells(found, ["recipe", "kind"])
    panels = [
        _rank_heat(cohort, cells, label, cohort.caption(*told, interval=_SPREAD)) for label in _recipe_labels(found)
    ]
    return wrap(panels, _MOST_BESIDE // cells["place"].nunique())


@figure(
    needs=("rank",),
    history=True,
    reads="Move the slider through the decisions of the allocator. The ranks on the left sum up to the dot on the "
    "right, which lies on the budget in force. What changes after the budget has settled is exchange, not cutting.",
    misleads="Between two decisions the masked components of AdaLoRA go on training, so that a cell that reads 0 can "
    "come back. Where a budget falls, every module loses: only what falls slower than its neighbours was spared.",
)
def rank_replay(runs: Runs, control: Runs | None = None, frames: int = 30) -> Panels:
    """Ranks by layer and role over the steps of decisions, beside the budget; one row of panels a recipe.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        What to draw, and what to draw below it.
    frames : int
        Number of steps shown, evenly taken from those at which the runs decided.
    """
    cohort = gather("rank_replay", runs, control)
    cohort.require("rank", history=True)
    steps = rank_allocations.decisions(gather("rank_replay", runs).table, frames)
    found = cohort.label(pd.concat([rank_allocations.current_ranks(cohort.table, step) for step in steps]))
    cells = _rank_cells(found, ["recipe", "kind", "step"])
    caption = cohort.caption(f"{define('rank')} Steps at which ranks were decided.", interval=_SPREAD)
    rows = [
        set_side_by_side(
            _rank_heat(cohort, cells, label, caption, frame="step"), _rank_course(cohort, found, label, caption)
        )
        for label in cohort.labels
    ]
    return stack_vertically(*rows)


@figure(
    needs=("test_metric",),
    reads="A bar is what training this type of weight, or these layers, alone reaches on the test split. They compare "
    "where they spend the same parameters, as the caption states; where intervals overlap, the seeds do not rank them.",
    misleads="A type that does well alone need not add anything to the others. One learning rate for all is a choice "
    "as well: types with larger matrices may want another, and then the bars compare rates.",
)
def adapted_types(runs: Runs, control: Runs | None = None, start: float = 0.0) -> Chart:
    """Test metric by what was adapted, one bar a label (AdaLoRA, Fig. 1).

    Parameters
    ----------
    runs, control : mapping label -> run or runs
        Runs labelled by role or by group of layers; ``allocation.equal_parameters`` gives their ranks.
    start : float
        Lower end of the axis; bars that do not start at 0 make small differences look large.
    """
    cohort = gather("adapted_types", runs, control)
    cohort.require("test_metric")
    rows = cohort.scores()
    cells, marks = bars(band(rows, ["recipe", "kind"]), start)
    return Chart(
        cells,
        marks,
        title="Test metric by what was adapted",
        x=Axis(label="adapted", order=cohort.labels),
        y=Axis(label=cohort.metric, limits=(start, None)),
        caption=cohort.caption(_spent_parameters(cohort), interval=f"bars: {INTERVAL}"),
        meta=cohort.meta,
    )


def _rank_cells(found: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Mean, smallest and largest rank over the runs of every layer and role, with the words of a cell."""
    keys = list(dict.fromkeys([*by, "place", "role"]))
    pooled = norms.pool(found, [key for key in keys if key != "step"])
    over = pooled.groupby(keys, observed=True, sort=False)["value"]
    cells = over.agg(value="mean", least="min", most="max", n="count").reset_index()
    spread = zip(cells["value"], cells["least"], cells["most"], strict=True)
    return cells.assign(
        words=[f"{mean:.1f} ({low:g}–{high:g})" if low < high else f"{mean:g}" for mean, low, high in spread]
    )


def _rank_heat(cohort: Cohort, cells: pd.DataFrame, label: str, caption: str, frame: str | None = None) -> Chart:
    """The ranks of one recipe; all panels have the colours of the largest rank in any."""
    own = cells[cells["recipe"] == label]
    whole = bool((own["value"] % 1 == 0).all())
    limits = (0.0, max(float(cells["value"].max()), 1.0))
    heat = Heat("place", "role", "value", "rank", ".0f" if whole else ".1f", limits=limits, words="words")
    return Chart(
        own,
        [heat],
        title=label,
        x=Axis(label="layer", order=[place for place in cells["place"].cat.categories if place in set(cells["place"])]),
        y=Axis(order=[role for role in ROLES if role in set(cells["role"])]),
        caption=caption,
        frame=frame,
        meta=cohort.meta,
    )


def _rank_course(cohort: Cohort, found: pd.DataFrame, label: str, caption: str) -> Chart:
    """Budget of one recipe over the steps with its phases, the sums of its ranks on it, and the sum that is shown."""
    own = found[found["recipe"] == label]
    totals = own.groupby(["run", "recipe", "kind", "step"], observed=True)["value"].sum().reset_index()
    shown = band(totals, ["recipe", "step"]).assign(at=lambda rows: rows["step"], series=_SHOWN)
    rows = cohort.label(cohort.table[cohort.table["quantity"] == "budget"])
    budget = band(rows[rows["recipe"] == label], ["step"]).rename(columns={"step": "at"}).sort_values("at")
    stairs = rank_allocations.staircase(budget).assign(series="budget")
    sums = shown.drop(columns="step").assign(series=_SUM)
    top = 1.06 * float(pd.concat([stairs, sums])["value"].max())
    phases = [(at, name, 0.0, top) for name, *ends in rank_allocations.phases(budget) for at in ends]
    bands = pd.DataFrame(phases, columns=["at", "series", "low", "high"])
    marks: list[Mark] = [Band("at", "low", "high", "series", data=bands)] if phases else []
    marks += [Line("at", "value", "series", data=stairs)] if len(stairs) else []
    marks += [Point("at", "value", "series", data=sums)]
    return Chart(
        shown,
        [*marks, Point("at", "value", "series")],
        title="budget",
        x=Axis(label="step"),
        y=Axis(label="total rank", limits=(0, top)),
        caption=caption,
        frame="step",
        colors=("budget", _SUM, _SHOWN, *rank_allocations.PHASES),
        meta=cohort.meta,
    )


def _add_random_ranks(cohort: Cohort, found: pd.DataFrame) -> pd.DataFrame:
    """Behind the ranks of every recipe that is no control those of its budget by lot."""
    parts = []
    for group in cohort.groups:
        own = found[found["recipe"] == group.label]
        parts.append(own)
        if not group.control:
            lot = rank_allocations.random_ranks(own, _cap(cohort, group))
            parts.append(lot.assign(recipe=f"{group.label}, by lot", kind="control"))
    return pd.concat(parts)


def _random_rank_caption(cohort: Cohort) -> str:
    drawn = {g.label: _FREE if _cap(cohort, g) is None else _STAYING for g in cohort.groups if not g.control}
    return f"By lot: the same budget, {_join_by_label(drawn)}."


def _recipe_labels(found: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(found["recipe"]))


def _cap(cohort: Cohort, group: Group) -> int | None:
    return rank_allocations.cap(cohort.table[cohort.table["run"].isin([run.id for run in group.runs])])


def _totals(found: pd.DataFrame) -> str:
    """Sum of the ranks, once where all recipes have the same."""
    sums = found.groupby(["recipe", "run"], observed=True, sort=False)["value"].sum()
    means = sums.groupby("recipe", sort=False).mean()
    return (
        f"Sum of the ranks: {_join_by_label({str(label): f'{round(mean, 1):,.6g}' for label, mean in means.items()})}."
    )


def _join_by_label(notes: Mapping[str, str]) -> str:
    """What is told of every label, once where it is the same for all."""
    if len(set(notes.values())) == 1:
        return next(iter(notes.values()))
    return "; ".join(f"{label}: {text}" for label, text in notes.items())


def _agreements(cohort: Cohort, found: pd.DataFrame) -> list[str]:
    """What Kendall's tau says of the seeds of every recipe that has some, beside what lots give."""
    told = []
    for group in cohort.groups:
        own = found[found["recipe"] == group.label]
        mean, low, high, _ = rank_allocations.stability(own)
        if np.isfinite(mean):
            interval = f" [{low:.2f}, {high:.2f}]" if np.isfinite(low) else ""
            most = np.nanquantile(rank_allocations.random_stability(own, _cap(cohort, group)), 0.95)
            told.append(f"{group.label}: {mean:.2f}{interval}, by lot below {most:.2f} in 95 of 100 draws")
    intervals = " [95 % jackknife t-interval over seeds]" if any("[" in line for line in told) else ""
    what = f"Kendall's τ of the modules' ranks between seeds, mean of the pairs{intervals}"
    return [f"{what}, {'; '.join(told)}."] if told else []


def _spent_parameters(cohort: Cohort) -> str:
    """Parameters of the adapters of every label, by the mean over its runs; "" where a run's are not known."""
    told = {}
    for group in cohort.groups:
        held = [run for run in group.runs if (run.table["quantity"] == "rank").any()]
        counted = [
            rank_allocations.parameters(rank_allocations.current_ranks(run.table), run.modules)["parameters"]
            for run in held
        ]
        sums = [float(column.sum(skipna=False)) for column in counted]
        if len(sums) < len(group.runs) or np.isnan(sums).any():
            return ""
        told[group.label] = f"{np.mean(sums):,.0f}"
    return f"Adapter parameters: {_join_by_label(told)}{' each' if len(set(told.values())) == 1 else ''}."
