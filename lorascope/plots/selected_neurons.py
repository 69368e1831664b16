"""Figures of neurons: selection by layer, rotation, overlap of selections, and shift of utilization ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd

from lorascope.analysis import neuron_utilization, selected_neurons
from lorascope.analysis.norms import layer_places
from lorascope.analysis.seed_intervals import seed_cells
from lorascope.charts.chart import Chart, Drawable, Panels, set_side_by_side, stack_vertically, wrap
from lorascope.charts.marks import Axis, Band, Bar, Line, Mark, Point, Rule
from lorascope.plots.builders import block_stretches, curves, ends, used_roles
from lorascope.plots.figure_registry import figure, gather_runs
from lorascope.plots.run_groups import Cohort, Group, Runs, axis_label, list_runs, require_counts
from lorascope.runs.result import Result
from lorascope.schema.records import QUANTITIES

_MOST_LAYERS = 14  # largest number of layers whose bars have room in one row of panels
_KINDS = ("strong", "suppressed", "indirect")
_SHUFFLED = "random ranks"


@figure(
    topic="neurons",
    needs=("selected",),
    reads="Each dot is the number of trained neurons of one projection in one layer: rows of ffn_in and ffn_gate, "
    "columns of ffn_out. Dots above the line, the expectation for a random selection of the same size, are preferred "
    "layers.",
    misleads="One threshold for all layers prefers small weights and large gradients, regardless of function: compare "
    "with select_by='random'. A pattern that repeats over seeds may reflect depth, not the task: compare tasks.",
)
def neurons(runs: Runs, control: Runs | None = None) -> Drawable:
    """Plot the number of selected neurons by layer and projection, one panel per recipe.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs of NeFT, and controls such as runs with ``select_by="reversed"`` or ``"random"``.

    Examples
    --------
    >>> ls.plots.neurons({"NeFT": ls.example("neft")})
    """
    cohort = gather_runs("neurons", runs, control)
    counts = cohort.label(pd.concat(map(selected_neurons.count_by_layer, cohort.runs), ignore_index=True))
    counts["place"] = layer_places(counts)
    cells = seed_cells(counts, ["recipe", "place", "role"])
    chance = counts.groupby(["recipe", "place", "role"], observed=True, sort=False)["chance"].mean().reset_index()
    panels = []
    for label, rows in cohort.split(cells):
        marks, meaning = _random_marks(chance[chance["recipe"] == label])
        sentence = f"Number of trained neurons by layer and projection; {meaning}."
        panels.append(
            curves(
                rows.assign(stretch=block_stretches(rows["place"])),
                "place",
                (Axis(label="layer", order=rows["place"].cat.categories), "selected neurons"),
                *marks,
                color="role",
                stretch="stretch",
                title=label,
                caption=cohort.caption(sentence),
                colors=used_roles(cells),
            )
        )
    return cohort.complete(wrap(panels, _MOST_LAYERS // cells["place"].nunique(), "Selected neurons by layer"))


@figure(
    topic="neurons",
    needs=("neuron_cosine",),
    reads="Lines are the median cosine distance of the neurons of a projection by layer, bands contain 90% of them. "
    "Neurons above the threshold, if one is drawn, were selected; a layer whose whole band is above it was selected "
    "almost entirely.",
    misleads="Cosine distance ignores growth and, for small changes, scales with the squared change over the squared "
    "norm, so small weights rotate easily: compare update norms. Neurons that did not rotate are missing from the "
    "logarithmic axis.",
)
def neuron_cosine(runs: Runs, control: Runs | None = None, quantity: str | None = None) -> Panels:
    """Plot the cosine distance of neurons from their base weights by layer, a panel per recipe and projection.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs to plot, and runs to compare with.
    quantity : str, optional
        Recorded cosine distance. By default ``selection_cosine``, by which NeFT selects, if all runs have it, else
        ``neuron_cosine``, that of the run itself.

    Examples
    --------
    >>> ls.plots.neuron_cosine({"full fine-tuning": ls.example("full")})
    """
    cohort = gather_runs("neuron_cosine", runs, control, check=False)
    if quantity is None:
        quantity = "selection_cosine" if cohort.has_recorded("selection_cosine") else "neuron_cosine"
    cohort.require(quantity)
    rows = [set_side_by_side(*_rotation_quantiles(cohort, group, quantity)) for group in cohort.groups]
    return cohort.complete(stack_vertically(*rows, title="Rotation of neurons from their base weights"))


@figure(
    topic="neurons",
    needs=("selected",),
    runs=2,
    reads="Each dot is the fraction of neurons that two selections share; rows of seeds compare the runs of one label. "
    "Neurons are task-specific only as far as dots between labels are lower than those between seeds.",
    misleads="All overlaps exceed the random baseline, because some layers rotate more on any task: "
    "compare with the seeds of one label. Larger selections overlap more at random: compare selections of equal size.",
)
def neuron_overlap(runs: Runs, control: Runs | None = None, k: int | None = None) -> Chart:
    """Plot the overlap of selected neurons between labels, and between the seeds of each label (NeFT, Table 6).

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        At least two runs, labeled by domain for example, ideally with several seeds of each label.
    k : int, optional
        Number of neurons selected from each run by cosine distance; by default the neurons that it trained.

    Raises
    ------
    ValueError
        There are fewer than two runs, or they have different models.

    Examples
    --------
    ``sensitive`` and ``sensitive_news`` are runs with ``observe=[ls.observe.neurons()]``:

    >>> ls.plots.neuron_overlap({"tweets": sensitive, "news": sensitive_news}, k=100)
    """
    cohort = gather_runs("neuron_overlap", runs, control, check=False)
    require_counts(k=k)
    cohort.require("selected" if k is None else "neuron_cosine")
    cohort.require_runs(2)
    cohort.require_same("model")
    selections = {}
    for group in cohort.groups:
        tables = [selected_neurons.list_selected(run, k) for run in group.runs]
        selections[group.label] = list(map(selected_neurons.to_set, tables))
    selectable = selected_neurons.count_selectable(cohort.runs[0]).total()
    overlaps = selected_neurons.compare_all_selections(selections, selectable)
    sizes = sorted(set(map(len, chain(*selections.values()))))
    shared = f"Fraction of {' or '.join(map('{:,}'.format, sizes))} neurons that two selections share, a dot per pair."
    return cohort.complete(
        overlap_dots(
            overlaps,
            title="Overlap of selected neurons",
            caption=f"{shared} {describe_chance(overlaps)} (hypergeometric). {cohort.sample_sentence}",
        )
    )


def overlap_dots(overlaps: pd.DataFrame, **settings: Any) -> Chart:
    """Plot the overlap of selected neurons of every pair of runs by pair of labels, with that of random neurons."""
    pairs = overlaps["first"] + ", " + overlaps["second"]
    within = overlaps["first"] == overlaps["second"]
    cells = overlaps.assign(pair=pairs.mask(within, overlaps["first"] + ", seeds"))
    return Chart(
        cells,
        [
            Point("most", "pair", symbol="line-ns-open", label="random neurons, 95th percentile"),
            Point("overlap", "pair", symbol="circle", label="two runs"),
        ],
        x=Axis(label="fraction of neurons shared", limits=(0, None)),
        y=Axis(compact=True),
        **settings,
    )


def describe_chance(overlaps: pd.DataFrame) -> str:
    """Return mean and 95th percentile of the overlap of random neurons, which `overlap_dots` shows, as text."""
    return f"Random neurons: mean {overlaps['chance'].mean():.2f}, 95th percentile {overlaps['most'].max():.2f}"


@figure(
    topic="neurons",
    needs=("utilisation",),
    history=True,
    reads="Left: mean shift of utilization ranks by percentile in the reference (0: most used) and over all; the paper "
    "finds both ends stable, where random ranks would shift most. Right: neurons that moved by at least 28% of the "
    "ranks (strong), and how many of them fell (suppressed) or were not trained (indirect).",
    misleads="Ranks in the middle are close together, so small changes shift them far, and ranks also rise because "
    "others fall: compare with random selection. If all neurons train, none counts as indirect.",
)
def rank_shift(runs: Runs, control: Runs | None = None, reference: Result | Sequence[Result] | None = None) -> Panels:
    """Plot the shift of utilization ranks, and the paper's three kinds of neurons (NeFT, Figs. 2, 4 and 5).

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs with ``observe.utilization()``.
    reference : Run or sequence of Run, optional
        Runs to compare with, such as NeFT with fewer neurons: one for all, or one per seed. By default the model
        before training.

    Raises
    ------
    ValueError
        The runs have different models, recorded utilization with different settings, or a seed has no reference.

    Examples
    --------
    >>> ls.plots.rank_shift({"NeFT": ls.example("neft")})
    """
    cohort = gather_runs("rank_shift", runs, control, check=False)
    references = list_runs(reference or ())
    compared = cohort
    if references:
        compared = replace(cohort, groups=(*cohort.groups, Group("reference", tuple(references))))
    # Without a reference, a run is compared with its own first step.
    compared.require("utilisation", history=not references)
    compared.require_same("model")
    states = _utilization_states(compared)
    buckets, random, kinds = [], [], []
    for run in cohort.runs:
        table = None
        if references:
            table = _reference_of(run, references).table
        shifts = neuron_utilization.rank_shift_of_run(run.table, selected_neurons.list_trained(run), table)
        buckets.append(neuron_utilization.average_shifts(shifts).assign(run=run.id))
        random.append(neuron_utilization.average_shifts(_random_shifts(shifts)).assign(run=run.id))
        counts = neuron_utilization.count_shifts(shifts)
        kinds += [{"run": run.id, "category": kind, "value": counts[kind]} for kind in _KINDS]
    shuffled = pd.concat(random).assign(recipe=_SHUFFLED, kind="control")
    moved = pd.concat([cohort.label(pd.concat(buckets)), shuffled])
    percent = (100 * moved[["low", "high"]]).map("{:g}".format)
    moved["bucket"] = (percent["low"] + "–" + percent["high"]).replace("0–100", "all")  # over all ranks
    base, order_label = "the model before training", "percentile before (%)"
    if references:
        base, order_label = "another run", "percentile in the reference (%)"
    caption = (
        "Neurons of each projection are ranked by utilization, the largest absolute Pearson correlation of their "
        f"weights with {states}, and compared with {base}. "
        f"Strong: moved by at least {neuron_utilization.STRONG:.0%} of the ranks; suppressed: strong and lower; "
        f"indirect: strong and not trained. {_SHUFFLED.capitalize()}: expected shift if all ranks were drawn again."
    )
    order = list(dict.fromkeys(moved.sort_values(["low", "high"])["bucket"]))
    order.append(order.pop(order.index("all")))  # after the percentiles
    settings: dict[str, Any] = {
        "caption": cohort.caption(caption, pair="hollow dots and ends of bars: both seeds"),
        "colors": [*cohort.labels, _SHUFFLED],
        "meta": compared.meta,
    }
    by_bucket = seed_cells(moved, ["recipe", "bucket"])
    by_kind = seed_cells(cohort.label(pd.DataFrame(kinds)), ["recipe", "category"])
    axes = Axis(label=order_label, order=order), "mean shift (ranks)"
    # A line does not continue from the percentiles to the mean over all.
    by_bucket = by_bucket.assign(is_all=by_bucket["bucket"] == "all")
    shift = curves(by_bucket, "bucket", axes, stretch="is_all", title="Shift by percentile", **settings)
    by_kind = by_kind.fillna({"low": by_kind["smaller"], "high": by_kind["larger"]})
    bars, x = Bar("value", "category", "recipe", **ends(by_kind)), Axis(label="neurons")
    number = Chart(by_kind, [bars], title="Neurons by kind of shift", x=x, y=Axis(order=_KINDS), **settings)
    return cohort.complete(set_side_by_side(shift, number, title="Shift of utilization ranks"))


def _random_shifts(shifts: pd.DataFrame) -> pd.DataFrame:
    """Return the table of rank shifts with the mean distance of each rank to all ranks of its role as the shift."""
    size = shifts.groupby("role", observed=True)["rank_2"].transform("size")
    below, above = shifts["rank_2"] - 1, size - shifts["rank_2"]
    return shifts.assign(d_rank=(below * (below + 1) + above * (above + 1)) / (2 * size))


def _reference_of(run: Result, references: Sequence[Result]) -> Result:
    """Return the only reference, or the one with the seed of the run."""
    seed = run.meta.seed
    if len(references) == 1:
        return references[0]
    same_seed = [other for other in references if other.meta.seed == seed]
    if len(same_seed) != 1:
        raise ValueError(f"reference must contain one run with seed {seed}, that of run {run.id}, got {len(same_seed)}")
    return same_seed[0]


def _utilization_states(cohort: Cohort) -> str:
    """Return the hidden states with which utilization was recorded, as text."""
    states = set()
    for run in cohort.runs:
        for observer in run.meta.settings.get("observers", ()):
            if observer["name"] == "utilization":
                which = "a later" if observer.get("layers", "later") == "later" else "an earlier"
                kind = "standardized " if observer.get("standardize") else ""
                states.add(f"the mean {kind}hidden state of the same or {which} layer")
    if not states:
        return "a mean hidden state"
    if len(states) > 1:
        raise ValueError(
            f"{cohort.name} needs runs with the same kind of utilization, got {' and '.join(sorted(states))}"
        )
    return states.pop()


def _random_marks(chance: pd.DataFrame) -> tuple[list[Mark], str]:
    """Return the marks of the random baseline (one height, one per role, or one per layer and role), and a caption."""
    random = "the expectation for a random selection of the same size"
    heights = chance.groupby("role", observed=True, sort=False)["chance"]
    # The expectation is proportional to the number of neurons, which rarely differs between layers.
    if not np.isclose(heights.min(), heights.max()).all():
        return [Line("place", "chance", "role", data=chance)], f"lines: {random}"
    by_role = heights.mean().sort_values(ascending=False)
    if np.isclose(by_role, by_role.iloc[0]).all():
        return [Rule(y=float(by_role.iloc[0]), label="random")], f"line: {random}"
    rules: list[Mark] = [Rule(y=float(height), label=f"random, {role}") for role, height in by_role.items()]
    return rules, f"lines: {random}"


def _rotation_quantiles(cohort: Cohort, group: Group, quantity: str) -> list[Chart]:
    """Plot quantiles over the neurons of every layer, averaged over the runs of a recipe, one chart per role."""
    scores = [selected_neurons.last_scores(run, quantity).assign(run=run.id) for run in group.runs]
    neurons = pd.concat(scores, ignore_index=True)
    neurons["place"] = layer_places(neurons)
    values = neurons.groupby(["place", "role", "run"], observed=True, sort=False)["value"]
    quantiles = pd.DataFrame({"value": values.median(), "low": values.quantile(0.05), "high": values.quantile(0.95)})
    cells = quantiles.groupby(["place", "role"], observed=True, sort=False).mean().reset_index()
    cells = cells.assign(stretch=block_stretches(cells["place"]))
    rules: list[Mark] = []
    thresholds = [selected_neurons.selection_threshold(run, quantity) for run in group.runs]
    selected = ""
    if None not in thresholds:  # a run without a threshold selected its neurons otherwise
        mean = np.mean(np.array(thresholds, dtype=np.float64))
        rules.append(Rule(y=float(mean), label="threshold"))
        selected = " Neurons above the threshold were selected."
    else:
        rules.append(Rule(y=float(neurons.groupby("run")["value"].median().mean()), label="all neurons"))
        selected = " Dashed: median of all neurons."
    settings: dict[str, Any] = {
        "x": Axis(label="layer", order=cells["place"].cat.categories),
        "y": Axis(label=axis_label(quantity), log=True),
        "caption": f"{axis_label(quantity)}: {QUANTITIES[quantity].definition}. Quantiles are means over "
        f"runs.{selected} {cohort.sample_sentence}",
    }
    charts = []
    for role in used_roles(cells):
        of_role = cells[cells["role"] == role].assign(neurons="median")
        middle = of_role.assign(neurons="90% of the neurons")
        marks = [
            Band("place", "low", "high", "neurons", "stretch", data=middle),
            Line("place", "value", "neurons", stretch="stretch"),
            Point("place", "value", "neurons"),
            *rules,
        ]
        title = ": ".join(filter(None, (cohort.title(group.label), role)))
        charts.append(Chart(of_role, marks, title=title, colors=("median", "90% of the neurons"), **settings))
    return charts
