"""Figures of neurons: which were chosen, how far each turned, what two choices share, how their use moved."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from lorascope.analysis import neuron_utilization as utilisation
from lorascope.analysis import selected_neurons
from lorascope.analysis.norms import place
from lorascope.analysis.seed_intervals import band
from lorascope.charts.chart import (
    Axis,
    Band,
    Bar,
    Chart,
    Drawable,
    Heat,
    Line,
    Mark,
    Panels,
    Rule,
    set_side_by_side,
    wrap,
)
from lorascope.plots.registry import figure
from lorascope.plots.run_groups import INTERVAL, Cohort, Group, Runs, axis_label, ends, gather
from lorascope.runs.run import Run
from lorascope.schema.module_roles import ROLES
from lorascope.schema.records import QUANTITIES

_MOST_BESIDE = 14  # layers, in all panels, whose bars still have room beside each other
_TAILS = (0.05, 0.95)
_KINDS = ("strong", "suppressed", "indirect")


@figure(
    needs=("selected",),
    reads="A bar is how many neurons of one projection in one layer train: rows of ffn_in and ffn_gate, columns of "
    "ffn_out. The line is what as many neurons drawn by lot would put there, a line for each projection where these "
    "hold unequal numbers; what stands above it was preferred.",
    misleads="One threshold for all layers prefers those whose weights are small or whose gradients are large, "
    "whatever they do. A pattern that another seed repeats may still be one of the depth, not of the task.",
)
def neurons(runs: Runs, control: Runs | None = None) -> Drawable:
    """Chosen neurons by layer and projection, one panel a recipe.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs of NeFT; as a control such of mode "reversed" or "random".
    """
    cohort = gather("neurons", runs, control)
    cohort.require("selected")
    found = cohort.label(pd.concat([selected_neurons.by_layer(run) for run in cohort.runs], ignore_index=True))
    found["place"] = place(found)
    cells = band(found, ["recipe", "place", "role"])
    lots = found.groupby(["recipe", "place", "role"], observed=True, sort=False)["chance"].mean().reset_index()
    panels = [_neuron_bars(cohort, cells, group, lots[lots["recipe"] == group.label]) for group in cohort.groups]
    return wrap(panels, _MOST_BESIDE // cells["place"].nunique())


@figure(
    needs=("neuron_cosine",),
    reads="By layer how far the neurons of a projection turned, on a logarithmic axis: the line is the median neuron, "
    "the band holds nine of ten. Neurons above the rule, if there is one, were chosen; a layer whose whole band lies "
    "above it gave all.",
    misleads="A cosine is blind to growth, and for small changes it is the squared change over the squared norm: small "
    "weights turn far for little. Neurons that did not turn at all have no place on the axis.",
)
def neuron_cosine(runs: Runs, control: Runs | None = None, quantity: str | None = None) -> Drawable:
    """Cosine distance of the neurons by layer and projection, one panel a recipe.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        What to draw, and what to draw beside it.
    quantity : str, optional
        ``selection_cosine``, what NeFT chose by, where all runs have it; else ``neuron_cosine``, of the run itself.
    """
    cohort = gather("neuron_cosine", runs, control)
    recorded = cohort.table.loc[cohort.table["quantity"] == "selection_cosine", "run"].nunique()
    quantity = quantity or ("selection_cosine" if recorded == len(cohort.runs) else "neuron_cosine")
    cohort.require(quantity)
    panels = [_rotation_quantiles(cohort, group, quantity) for group in cohort.groups]
    return wrap(panels, len(panels))


@figure(
    needs=("selected",),
    runs=2,
    reads="A cell is the share of neurons that two choices have in common, mean over pairs of runs; on the diagonal "
    "stand two seeds of one label. A task has neurons of its own only as far as the cells off the diagonal are lower.",
    misleads="All overlaps lie far above chance, which the caption states, since some layers turn more under any task; "
    "a high overlap between tasks says no more than that. The larger the choice, the larger the overlap by chance.",
)
def neuron_overlap(runs: Runs, control: Runs | None = None, k: int | None = None) -> Chart:
    """Overlap of chosen neurons between labels, and between the seeds of each (NeFT, table 6).

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Labels such as domains; several seeds of each.
    k : int, optional
        Choose so many neurons of each run by what it turned most, in place of those that it trained.
    """
    cohort = gather("neuron_overlap", runs, control)
    cohort.require("selected" if k is None else "neuron_cosine")
    cohort.require_same("model")
    sets = {
        g.label: [selected_neurons.as_set(selected_neurons.list_selected(run, k)) for run in g.runs]
        for g in cohort.groups
    }
    found = selected_neurons.overlaps(sets, selected_neurons.pool(cohort.runs[0]))
    if found.empty:
        raise ValueError("neuron_overlap compares two runs or more, got one")
    mirrored = found.rename(columns={"first": "second", "second": "first"})
    cells = pd.concat([found, mirrored]).groupby(["first", "second"], sort=False)["overlap"].mean().reset_index()
    by_lot = f"By lot {found['chance'].mean():.2f}, in 95 of 100 draws at most {found['most'].max():.2f}"
    sizes = sorted({len(each) for group in sets.values() for each in group})
    told = f"Share of {' or '.join(f'{size:,}' for size in sizes)} neurons that two choices have in common"
    return Chart(
        cells,
        [Heat("second", "first", "overlap", "overlap", ".2f", limits=(0, 1))],
        title="Overlap of chosen neurons",
        x=Axis(order=cohort.labels),
        y=Axis(order=cohort.labels),
        caption=f"{told}, mean over pairs; on the diagonal between seeds. {by_lot} (hypergeometric). "
        f"{_sample_sentence(cohort)}",
        meta=cohort.meta,
    )


@figure(
    needs=("utilisation",),
    history=True,
    reads="Left, how many ranks a neuron moved through training, by the share of neurons that were used more before, "
    "and at the end over all: the paper finds both ends stable. Right, neurons that moved by more than 28 % of the "
    "ranks; of these, those that fell, and those that were not trained themselves.",
    misleads="Ranks in the middle lie close, so that small changes move neurons far there, whatever made them. A rank "
    "can rise because others fell. Where everything trains no neuron counts as indirect.",
)
def rank_shift(runs: Runs, control: Runs | None = None, reference: Run | Sequence[Run] | None = None) -> Panels:
    """How far the neurons' ranks by utilisation lie apart, and the paper's three kinds (NeFT, figures 2, 4 and 5).

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs that observed ``utilisation``.
    reference : Run or sequence of Run, optional
        What they are held against, such as NeFT with fewer neurons: one run for all, or one for each seed. The model
        before training by default.

    Raises
    ------
    ValueError
        They are of different models, observed utilisation by different settings, or a seed has no reference.
    """
    cohort = gather("rank_shift", runs, control)
    others = [reference] if isinstance(reference, Run) else list(reference or ())
    known = Cohort(cohort.name, (*cohort.groups, *((Group("reference", tuple(others)),) if others else ())))
    known.require("utilisation", history=not others)
    known.require_same("model")
    states = _utilization_states(known)
    shifts = {}
    for run in cohort.runs:
        against = _reference(run, others).table if others else None
        shifts[run.id] = utilisation.shifts(run.table, selected_neurons.trained(run), against)
    moved = pd.concat(utilisation.buckets(found).assign(run=run) for run, found in shifts.items())
    moved["bucket"] = [
        "all" if (low, high) == (0, 1) else f"{100 * low:g}–{100 * high:g}"
        for low, high in zip(moved["low"], moved["high"], strict=True)
    ]
    kinds = [
        {"run": run, "category": kind, "value": count}
        for run, found in shifts.items()
        for kind, count in utilisation.counts(found).items()
        if kind in _KINDS
    ]
    caption = (
        "Neurons of each projection ranked by utilisation, the largest |Pearson correlation| of their weights with "
        f"{states}, and held against {'another run' if others else 'the model before training'}. "
        f"Strong: moved by {utilisation.STRONG:.0%} of the ranks or more; suppressed: of these, fell; indirect: of "
        "these, not trained."
    )
    order = list(dict.fromkeys(moved.sort_values(["low", "high"])["bucket"]))
    order = [*(bucket for bucket in order if bucket != "all"), "all"]
    share = f"percentile {'in the reference' if others else 'before'} (%)"
    return set_side_by_side(
        _shift_panel(known, cohort, moved, "bucket", order, share, "mean shift (ranks)", caption),
        _shift_panel(known, cohort, pd.DataFrame(kinds), "category", _KINDS, "", "neurons", caption),
    )


def _reference(run: Run, others: Sequence[Run]) -> Run:
    """What a run is held against: the only other, or that of its seed."""
    found = [other for other in others if len(others) == 1 or other.meta["seed"] == run.meta["seed"]]
    if len(found) != 1:
        raise ValueError(f"reference: {len(found)} runs have seed {run.meta['seed']}, as run {run.id} has: give one")
    return found[0]


def _utilization_states(cohort: Cohort) -> str:
    """Which states utilisation was taken with, in words."""
    told = set()
    for run in cohort.runs:
        for observer in run.meta["settings"].get("observers", ()):
            if observer["name"] == "utilisation":
                which = "a later" if observer.get("layers", "later") == "later" else "an earlier"
                kind = "standardised " if observer.get("standardise") else ""
                told.add(f"the mean {kind}hidden state of their own or {which} layer")
    if len(told) > 1:
        raise ValueError(f"{cohort.name} compares one kind of utilisation, got {' and '.join(sorted(told))}")
    return told.pop() if told else "a mean hidden state"


def _shift_panel(
    known: Cohort,
    cohort: Cohort,
    found: pd.DataFrame,
    x: str,
    order: Sequence[str],
    xlabel: str,
    ylabel: str,
    caption: str,
) -> Chart:
    cells = band(cohort.label(found), ["recipe", x])
    low, high = ends(cells)
    return Chart(
        cells,
        [Bar(x, "value", "recipe", low=low, high=high)],
        x=Axis(label=xlabel, order=order),
        y=Axis(label=ylabel, limits=(0, None)),
        caption=cohort.caption(caption, interval=f"bars: {INTERVAL}"),
        colors=cohort.labels,
        meta=known.meta,
    )


def _neuron_bars(cohort: Cohort, cells: pd.DataFrame, group: Group, lots: pd.DataFrame) -> Chart:
    own = cells[cells["recipe"] == group.label]
    low, high = ends(own)
    chance, told = _random_marks(lots)
    return Chart(
        own,
        [Bar("place", "value", "role", low=low, high=high), *chance],
        title=group.label,
        x=Axis(label="layer", order=own["place"].cat.categories),
        y=Axis(label="chosen neurons", limits=(0, None)),
        caption=cohort.caption(
            f"Neurons that train, by layer and projection; {told}.",
            interval=f"bars: {INTERVAL}",
        ),
        colors=_roles(cells),
        meta=cohort.meta,
    )


def _random_marks(lots: pd.DataFrame) -> tuple[list[Mark], str]:
    """Where lots would lie: at one height, at one for each role, or another in every layer; and what to say of it."""
    heights = lots.groupby("role", observed=True, sort=False)["chance"]
    if not np.isclose(heights.min(), heights.max()).all():
        return [Line("place", "chance", "role", data=lots)], "the lines are where as many drawn by lot would lie"
    each = heights.mean().sort_values(ascending=False)
    if np.isclose(each, each.iloc[0]).all():
        return [Rule(y=float(each.iloc[0]))], "the line is where as many drawn by lot would lie"
    rules: list[Mark] = [Rule(y=float(height)) for height in each]
    return rules, f"the lines are where as many drawn by lot would lie, from the top {', '.join(map(str, each.index))}"


def _rotation_quantiles(cohort: Cohort, group: Group, quantity: str) -> Chart:
    """Quantiles over the neurons of every layer and role, mean over the runs of a recipe."""
    found = pd.concat(
        [selected_neurons.scores(run, quantity).assign(run=run.id) for run in group.runs], ignore_index=True
    )
    found["place"] = place(found)
    over = found.groupby(["place", "role", "run"], observed=True, sort=False)["value"]
    quantiles = pd.DataFrame(
        {"value": over.median(), "low": over.quantile(_TAILS[0]), "high": over.quantile(_TAILS[1])}
    )
    cells = quantiles.groupby(["place", "role"], observed=True, sort=False).mean().reset_index()
    marks: list[Mark] = [Band("place", "low", "high", "role"), Line("place", "value", "role")]
    thresholds = [t for run in group.runs if (t := selected_neurons.threshold(run, quantity)) is not None]
    chosen = ""
    if len(thresholds) == len(group.runs):
        marks.append(Rule(y=float(np.mean(thresholds)), label="chosen above"))
        chosen = " Neurons above the rule were chosen."
    return Chart(
        cells,
        marks,
        title=group.label,
        x=Axis(label="layer", order=cells["place"].cat.categories),
        y=Axis(label=axis_label(quantity), log=True),
        caption=f"{axis_label(quantity)}: {QUANTITIES[quantity].definition}. Median of the neurons of a layer, and the "
        f"5 % and 95 % quantiles; mean over runs.{chosen} {_sample_sentence(cohort)}",
        colors=_roles(cells),
        meta=cohort.meta,
    )


def _roles(cells: pd.DataFrame) -> list[str]:
    return [role for role in ROLES if role in set(cells["role"])]


def _sample_sentence(cohort: Cohort) -> str:
    return f"{cohort.sample[0].upper()}{cohort.sample[1:]}."
