"""Figures of ranks: planted and found, by layer and role, their course in training, and accuracy by adapted weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from lorascope.analysis import norms, rank_allocations
from lorascope.analysis.planted_ranks import recovered_ranks
from lorascope.analysis.seed_intervals import seed_cells
from lorascope.charts.chart import Chart, Drawable, set_side_by_side, stack_vertically, wrap
from lorascope.charts.marks import Axis, Band, Heat, Line, Mark, Point
from lorascope.plots.builders import curves, heat_by_role, metric_dots, ticks_at
from lorascope.plots.figure_registry import figure, gather_runs
from lorascope.plots.run_groups import Cohort, Group, Runs, define, join_by_label, require_counts

# Kendall's tau and its 200 random draws take the time of all pairs of modules: 10 s for this many modules.
_MOST_COMPARED = 1000
_MOST_COLUMNS = 26  # largest number of columns of cells in one row of panels
_SUM = "total rank"
_SPREAD = "in brackets, where there is room, the smallest and largest of the seeds (also in the data)"
_RETAINED = "every initial component is equally likely to be retained"
_ANYWHERE = "every component is equally likely to be in any module"
_TRUTH = "planted rank"


@figure(
    topic="ranks",
    needs=("planted_rank",),
    reads="A line along the diagonal assigns rank where the teacher needs it; a flat line, such as a uniform rank, "
    "ignores the need. Where bands overlap, these seeds do not distinguish two allocators.",
    misleads="Planted components have similar sizes, unlike those of a real task: confirm the result there. A method "
    "whose ranks cannot exceed the initial rank, or cannot reach 0, must leave the diagonal at that end.",
)
def planted(runs: Runs, control: Runs | None = None) -> Chart:
    """Plot rank allocations against planted ranks, one line per recipe.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs on the text of a planted teacher, and runs to compare with.

    Examples
    --------
    >>> ls.plots.planted({"AdaLoRA": ls.example("adalora")})
    """
    cohort = gather_runs("planted", runs, control)
    return cohort.complete(found_by_planted(cohort, pd.concat(map(recovered_ranks, cohort.runs))))


def found_by_planted(cohort: Cohort, ranks: pd.DataFrame) -> Chart:
    """Plot rank allocations against planted ranks, from ``run, planted, found`` of a cohort, one line per recipe."""
    means = ranks.groupby(["run", "planted"], sort=True)["found"].mean().rename("value").reset_index()
    cells = seed_cells(cohort.label(means), ["recipe", "kind", "planted"])
    truth = pd.DataFrame({"planted": sorted(set(means["planted"]))}).assign(recipe=_TRUTH)
    return curves(
        cells,
        "planted",
        (
            Axis(label="rank of the teacher's update", ticks=ticks_at(means["planted"])),
            Axis(label="found rank", limits=(0, None)),
        ),
        Line("planted", "planted", "recipe", data=truth),
        title="Found rank by planted rank",
        caption=cohort.caption("Found rank, mean over the modules with the same planted rank."),
        colors=[*cohort.labels, _TRUTH],
    )


@figure(
    topic="ranks",
    needs=("rank",),
    reads="Each cell is the rank of one role in one layer; hatched cells have no adapter, which differs from rank 0. "
    "Trust only what the seeds agree on: Kendall's τ in the caption is 1 for identical orderings and at chance level "
    "for unrelated ones.",
    misleads="Random allocation also produces a pattern: compare with chance=True or a control. A rank costs more "
    "parameters in larger matrices, and a high rank shows what a module received, not what it needs.",
)
def rank_allocation(runs: Runs, control: Runs | None = None, step: int | None = None, chance: bool = False) -> Drawable:
    """Plot rank allocations by layer and role, one panel per recipe (AdaLoRA, AutoLoRA and ALoRA, each in its Fig. 3).

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs to plot, and runs to compare with.
    step : int, optional
        Step after which the ranks are shown; by default the end.
    chance : bool
        Add a panel per recipe with its budget allocated at random, resampled for every seed.

    Examples
    --------
    >>> ls.plots.rank_allocation({"AdaLoRA": ls.example("adalora")}, chance=True)
    """
    cohort = gather_runs("rank_allocation", runs, control)
    steps = cohort.table["step"].dropna()
    if step is not None and steps.empty:
        raise ValueError(f"step must be None for adapters, whose steps are not known, got {step}")
    if step is not None and not 0 <= step <= steps.max():
        raise ValueError(f"step must be from 0 to {steps.max()}, the last step, got {step}")
    ranks = cohort.label(rank_allocations.current_ranks(cohort.table, step))
    sums = ranks.groupby(["recipe", "run"], observed=True, sort=False)["value"].sum()
    means = sums.groupby("recipe", sort=False).mean()
    totals = join_by_label(dict(zip(means.index, means.round(1).map("{:,.6g}".format), strict=True)))
    when = "at the end" if step is None else f"after step {step}"
    sentences = [f"{define('rank')} Ranks {when}. Total rank: {totals}.", *_agreements(cohort, ranks)]
    if chance:
        allocations, assumptions = [], {}
        for group in cohort.groups:
            learned = ranks[ranks["recipe"] == group.label]
            allocations.append(learned)
            if group.kind == "run":  # a control is a baseline itself
                cap = _cap(cohort, group)
                assumptions[group.label] = _ANYWHERE if cap is None else _RETAINED
                random = rank_allocations.random_ranks(learned, cap)
                allocations.append(random.assign(recipe=f"{group.label}, random", kind="control"))
        ranks = pd.concat(allocations)
        sentences.append(f"Random: the same budget; {join_by_label(assumptions)}.")
    cells = _rank_cells(ranks, ["recipe", "kind"])
    caption = cohort.caption(*sentences, interval=_SPREAD, pair=_SPREAD)
    panels = _rank_heats(cells, list(dict.fromkeys(ranks["recipe"])), caption)
    return cohort.complete(wrap(panels, _MOST_COLUMNS // cells["place"].nunique(), "Rank by layer and role"))


@figure(
    topic="ranks",
    needs=("rank",),
    history=True,
    reads="The frames show the allocator's decisions: the ranks of a step add up to its dot below, which follows the "
    "budget. Changes after the budget is final are exchanges between modules, not pruning.",
    misleads="Masked components of AdaLoRA keep training between decisions, so a rank of 0 can recover. While the "
    "budget falls, all modules lose rank: only those that lose it more slowly were spared.",
)
def rank_replay(runs: Runs, control: Runs | None = None, frames: int = 30) -> Drawable:
    """Plot rank allocations by layer and role at the allocator's decisions, with the budget; one row per recipe.

    A budget that never changes is in the titles and has no panel.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs to plot, and runs to compare with in the rows below.
    frames : int
        Maximum number of steps shown, evenly spaced among the decisions of the runs.

    Examples
    --------
    >>> ls.plots.rank_replay({"AdaLoRA": ls.example("adalora")})
    """
    cohort = gather_runs("rank_replay", runs, control)
    require_counts(frames=frames)
    table = cohort.without_controls().table  # controls are drawn at the decisions of the runs
    steps = rank_allocations.decision_steps(table, frames)
    ranks = cohort.label(pd.concat([rank_allocations.current_ranks(cohort.table, step) for step in steps]))
    cells = _rank_cells(ranks, ["recipe", "kind", "step"])
    event = "decided" if (table["quantity"] == "budget").any() else "recorded"
    caption = cohort.caption(
        f"{define('rank')} Steps are those at which ranks were {event}.", interval=_SPREAD, pair=_SPREAD
    )
    heats = _rank_heats(cells, cohort.labels, caption, frame="step")
    title = "Ranks at the decisions of the allocator"
    totals = ranks.groupby(["recipe", "run", "step"], observed=True)["value"].sum()
    if totals.nunique() == 1:  # the course would be a flat line
        heats = [replace(heat, title=f"{heat.title}, total rank {totals.iloc[0]:g}") for heat in heats]
        return cohort.complete(wrap(heats, 1, title))
    courses = [_rank_course(cohort, ranks, label, caption) for label in cohort.labels]
    return cohort.complete(stack_vertically(*map(set_side_by_side, heats, courses), title=title))


@figure(
    topic="ranks",
    needs=("test_metric",),
    reads="Each dot is the mean test metric when only this type of weight, or these layers, are trained. Dots are "
    "comparable at equal parameters (see the caption); the differences on the right are paired by seed.",
    misleads="A type that does well on its own may add nothing to the others: also train combinations. Types with "
    "larger matrices may need another learning rate, or else the dots compare rates: tune it per type.",
)
def adapted_types(runs: Runs, control: Runs | None = None) -> Drawable:
    """Plot test metric by the weights to which rank is allocated, one row per label (AdaLoRA, Fig. 1).

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs labeled by role or by group of layers; ``ls.baseline_ranks.equal_parameters`` computes their ranks.

    Examples
    --------
    ``types`` are runs of ``ls.LoRA(targets=...)``, one per role, and of all roles.

    >>> ls.plots.adapted_types(types)
    """
    cohort = gather_runs("adapted_types", runs, control)
    return cohort.complete(metric_dots(cohort, _spent_parameters(cohort)))


def _rank_cells(ranks: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Return mean, smallest and largest rank over the runs for every layer and role, with the text of its cell."""
    keys = [*columns, "place", "role"]
    pooled = norms.pool_modules(ranks, [key for key in keys if key != "step"])  # which always keeps the step
    over_runs = pooled.groupby(keys, observed=True, sort=False)["value"]
    cells = over_runs.agg(value="mean", least="min", most="max", n="count").reset_index()
    texts = []
    for mean, low, high in zip(cells["value"], cells["least"], cells["most"], strict=True):
        texts.append(f"{mean:.1f} ({low:g}–{high:g})" if low < high else f"{mean:g}")
    return cells.assign(words=texts)


def _rank_heats(cells: pd.DataFrame, labels: Sequence[str], caption: str, frame: str | None = None) -> list[Chart]:
    """Plot the ranks of every recipe; the color scale is the same in all panels."""
    limits = (0.0, max(float(cells["value"].max()), 1.0))  # all ranks may be 0

    def heat(rows: pd.DataFrame) -> Heat:
        are_integers = bool((rows["value"] % 1 == 0).all())
        return Heat("place", "role", "value", "rank", ".0f" if are_integers else ".1f", limits=limits, words="words")

    return heat_by_role(cells, labels, heat, "layer", caption, frame)


def _rank_course(cohort: Cohort, ranks: pd.DataFrame, label: str, caption: str) -> Chart:
    """Plot budget, phases and total rank of one recipe over the steps, once for all frames."""
    of_recipe = ranks[ranks["recipe"] == label].groupby(["run", "recipe", "kind", "step"], observed=True)
    totals = of_recipe["value"].sum().reset_index()
    sums = seed_cells(totals, ["recipe", "step"]).assign(series=_SUM)
    rows = cohort.select("budget")
    budget = seed_cells(rows[rows["recipe"] == label], ["step"]).rename(columns={"step": "at"}).sort_values("at")
    stairs = rank_allocations.step_corners(budget).assign(series="budget")
    top = 1.06 * float(pd.concat([stairs, sums])["value"].max())  # room for the dot at the largest total
    marks: list[Mark] = [Point("step", "value", "series")]
    if len(stairs):
        marks.insert(0, Line("at", "value", "series", data=stairs))
    if phases := rank_allocations.budget_phases(budget):
        corners = []
        for name, start, end in phases:
            corners += [(start, name, 0.0, top), (end, name, 0.0, top)]
        bands = pd.DataFrame(corners, columns=["at", "series", "low", "high"])
        marks.insert(0, Band("at", "low", "high", "series", data=bands))
    return Chart(
        sums,
        marks,
        title=f"{label}, total and budget",
        x=Axis(label="step"),
        y=Axis(label="total rank", limits=(0, top)),
        caption=caption,
        colors=("budget", _SUM, *rank_allocations.PHASES),
    )


def _cap(cohort: Cohort, group: Group) -> int | None:
    return rank_allocations.initial_cap(cohort.table[cohort.table["run"].isin([run.id for run in group.runs])])


def _agreements(cohort: Cohort, ranks: pd.DataFrame) -> list[str]:
    """Describe the agreement of seeds of every recipe that has several: Kendall's tau and its random baseline."""
    taus, sentences, statistic = [], [], "Kendall's τ of the module ranks between seeds"
    for group in cohort.groups:
        of_recipe = ranks[ranks["recipe"] == group.label]
        if len(group.runs) > 1 and of_recipe["module"].nunique() > _MOST_COMPARED:
            sentences.append(f"{statistic} is not computed for more than {_MOST_COMPARED:,} modules.")
            continue
        mean, low, high, _ = rank_allocations.stability(of_recipe)
        if np.isfinite(mean):
            tau = f"{mean:z.2f}"
            if np.isfinite(low):  # two seeds are one pair, which has no interval
                tau += f" [{low:z.2f}, {high:z.2f}]"
            limit = np.nanquantile(rank_allocations.random_stability(of_recipe, _cap(cohort, group)), 0.95)
            taus.append(f"{group.label}: {tau} (random: 95th percentile {limit:.2f})")
    if taus:
        text = "; ".join(taus)
        statistic += ", mean over pairs" + " [95% jackknife t-interval over seeds]" * ("[" in text)
        sentences.append(f"{statistic}, {text}.")
    return list(dict.fromkeys(sentences))


def _spent_parameters(cohort: Cohort) -> str:
    """Return the adapter parameters of every label, mean over its runs, as text; "" if those of a run are unknown."""
    means = {}
    for group in cohort.groups:
        sums = []
        for run in group.runs:
            if not (run.table["quantity"] == "rank").any():
                return ""
            table = rank_allocations.add_parameters(rank_allocations.current_ranks(run.table), run.modules)
            sums.append(float(table["parameters"].sum(skipna=False)))
        if np.isnan(sums).any():
            return ""
        means[group.label] = f"{np.mean(sums):,.0f}"
    text = f"Adapter parameters: {join_by_label(means)}"
    if len(set(means.values())) == 1:
        text += " each"
    return f"{text}."
