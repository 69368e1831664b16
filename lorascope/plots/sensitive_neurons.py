"""Figures of the sensitivity of neurons: where it is concentrated, whether runs agree on it, and its course."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from lorascope.analysis import sensitive_neurons as analysis
from lorascope.analysis.seed_intervals import seed_cells
from lorascope.analysis.selected_neurons import Neurons, compare_all_selections
from lorascope.charts.chart import Chart, Drawable, Panels, set_side_by_side, stack_vertically, wrap
from lorascope.charts.marks import Axis, Band, Heat, Line, Mark
from lorascope.plots.builders import heat_by_role, mean_over_modules, ticks_at, used_roles
from lorascope.plots.figure_registry import FIGURES, figure, gather_runs
from lorascope.plots.requirements import missing_reason
from lorascope.plots.run_groups import Cohort, Runs, require_counts
from lorascope.plots.selected_neurons import describe_chance, overlap_dots

_MULTIPLE = "sensitivity / mean"
NULL = "Null: expected sensitivity if the gradients are shuffled within the module; band: range over modules and runs."
"""Sentence of captions."""


@figure(
    topic="neurons",
    needs=("sensitivity_out", "sensitivity_in"),
    reads="Cells are the percentage of a module's sensitivity in its top tenth of neurons (10: all equal); profiles "
    "above the null are more concentrated than with shuffled gradients. Overlaps above the random baseline mean "
    "that runs agree on these neurons.",
    misleads="Sensitivity is first-order and measured on a few batches, and large weights raise it for any gradient: "
    "compare with the null. Runs share the sensitive neurons of their base model: compare tasks with seeds of one "
    "task.",
)
def neuron_sensitivity(runs: Runs, control: Runs | None = None) -> Panels:
    """Plot the sensitivity of neurons by layer and role, sorted, and its overlap between runs.

    Sensitivity is ``|w ∂L/∂w|``, summed over the weights of a neuron: a row of a linear layer, a column of ``ffn_out``.
    The null shuffles the gradients of a module. The profiles are by role for one label, and by label for several. The
    overlap of the most sensitive tenth of each module is drawn for several runs.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs with ``observe.neurons()``, labeled by task for example, ideally with several seeds of each label.

    Raises
    ------
    ValueError
        The runs have different models, or one recorded no sensitivity of a module in a block.

    Examples
    --------
    ``sensitive`` and ``sensitive_news`` are runs with ``observe=[ls.observe.neurons()]``:

    >>> ls.plots.neuron_sensitivity({"tweets": sensitive, "news": sensitive_news})
    """
    cohort = gather_runs("neuron_sensitivity", runs, control)
    cohort.require_same("model")
    by_run = {run.id: analysis.list_sensitivities(run) for run in cohort.runs}
    neurons = pd.concat(by_run.values(), ignore_index=True)
    sentences = [
        "Sensitivity |w ∂L/∂w| is summed over a row of a linear layer, or a column of ffn_out. Top tenth: percentage "
        "of a module's sensitivity in its most sensitive tenth of neurons, at the last recorded step. Sorted neurons: "
        "sensitivity that a percentage of the neurons of a module reaches, over the mean of the module; mean over "
        "modules and runs."
    ]
    if neurons["shuffled"].notna().all():
        sentences.append(NULL)
    heats = _share_heats(cohort, neurons)
    profiles, color, colors = analysis.sort_profiles(neurons), "recipe", cohort.labels
    if len(cohort.groups) == 1:
        color, colors = "role", used_roles(neurons)
    summaries = [_profile_chart(cohort.label(profiles), color, colors, title="Sorted neurons")]
    if len(cohort.runs) > 1:
        summaries.append(_overlap(cohort, by_run))
        sentences.append(
            "Overlap: fraction of the most sensitive tenth of every module that two runs share, a dot per pair. "
            f"{describe_chance(summaries[-1].data)}."
        )
    rows = [[*heats, *summaries]]
    if len(rows[0]) > 2:
        rows = [heats, summaries]
    panels = stack_vertically(*(set_side_by_side(*row) for row in rows), title="Sensitivity of neurons")
    return cohort.complete(panels, " ".join([*sentences, cohort.sample_sentence]))


@figure(
    topic="neurons",
    needs=("sensitivity_out", "sensitivity_in"),
    history=True,
    reads="Each row is one of the most sensitive neurons at the last step; one below the row 'of all' at a step became "
    "so later. The row 'at random' is what the most sensitive neurons would have if the gradients were shuffled.",
    misleads="The neurons are chosen at the last step, so their rows brighten towards it by selection: compare each "
    "step with the row 'of all', and seeds. Each step is measured on its own few batches, so single bright cells are "
    "noise.",
)
def sensitivity_over_steps(runs: Runs, control: Runs | None = None, k: int = 8) -> Drawable:
    """Plot the sensitivity of the most sensitive neurons over the steps, one panel per label.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs with ``observe.neurons()`` at several steps.
    k : int
        Number of neurons: the most sensitive ones at the last step compared with their module.

    Examples
    --------
    ``sensitive`` and ``sensitive_news`` are runs with ``observe=[ls.observe.neurons(every=10)]``:

    >>> ls.plots.sensitivity_over_steps({"tweets": sensitive, "news": sensitive_news})
    """
    cohort = gather_runs("sensitivity_over_steps", runs, control)
    require_counts(k=k)
    courses = {group.label: analysis.follow_top(group.runs, k) for group in cohort.groups}
    largest = max(float(course["value"].max()) for course in courses.values())
    caption = (
        f"Sensitivity |w ∂L/∂w| over the mean of the module, for the {k} largest at the last step; neurons by layer, "
        f"role and number. No. {k} of all: value number {k} of all neurons at each step, in descending order. "
    )
    if any(analysis.top_references(k)[1] in set(course["name"]) for course in courses.values()):
        caption += "At random: the same of the expected sensitivities if the gradients are shuffled within the module. "
    caption += cohort.sample_sentence
    panels = []
    for label, course in courses.items():
        panels.append(
            Chart(
                course,
                [Heat("step", "name", "value", _MULTIPLE, ".2g", limits=(0, largest))],
                title=cohort.title(label),
                x=Axis(label="step", order=sorted(set(course["step"]))),
                y=Axis(order=course["name"].unique()),
                caption=caption,
            )
        )
    return cohort.complete(wrap(panels, 2, f"Sensitivity by step of the {k} most sensitive neurons at the last step"))


def _share_heats(cohort: Cohort, neurons: pd.DataFrame) -> list[Chart]:
    """Plot the percentage of the sensitivity in the most sensitive tenth by layer and role, one chart per label."""
    shares = analysis.top_shares(neurons)
    shares["value"] *= 100
    cells = seed_cells(cohort.label(shares), ["recipe", "place", "role"])
    # The scale begins at equal neurons, and is not so narrow that noise takes all of it.
    limits = (100 * analysis.TOP, max(float(cells["value"].max()), 200 * analysis.TOP))

    def heat(_: pd.DataFrame) -> Heat:
        return Heat("place", "role", "value", "% of sensitivity", ".0f", limits=limits)

    charts = heat_by_role(cells, cohort.labels, heat, "layer", "")
    if len(charts) == 1:
        return [replace(charts[0], title="Share of the top tenth")]
    return [replace(chart, title=f"{chart.title}: share of the top tenth") for chart in charts]


def profiles_by_recipe(cohort: Cohort) -> Chart | None:
    """Plot the sorted sensitivities by recipe, mean over modules, for the runs with records; None if there are none."""
    tables = []
    for run in cohort.runs:
        if not any(missing_reason(run, need) for need in FIGURES["neuron_sensitivity"].needs):
            tables.append(analysis.sort_profiles(analysis.list_sensitivities(run)))
    if not tables:
        return None
    rows = cohort.label(pd.concat(tables))
    return _profile_chart(rows, "recipe", cohort.labels, title="Sorted neurons")


def _profile_chart(rows: pd.DataFrame, color: str, colors: Sequence[str], **settings: Any) -> Chart:
    """Plot the sorted sensitivities of modules by a column, with mean and range over modules of their null."""
    recorded, shuffled = analysis.GRADIENTS.values()
    values = rows[rows["gradients"] == shuffled].groupby("percent")["value"]
    null = values.agg(value="mean", low="min", high="max").reset_index().assign(**{color: shuffled})
    means = mean_over_modules(rows[rows["gradients"] == recorded], *{color, "percent"} - {"recipe"})
    marks: list[Mark] = [Line("percent", "value", color)]
    if len(null):
        marks = [Band("percent", "low", "high", color, data=null), Line("percent", "value", color, data=null), *marks]
    return Chart(
        seed_cells(means, [*dict.fromkeys(("recipe", color)), "percent"]),
        marks,
        x=Axis(label="top % of neurons", log=True, ticks=ticks_at((1, 10, 100))),
        y=Axis(label=_MULTIPLE, log=True),
        colors=[*colors, shuffled],
        **settings,
    )


def _overlap(cohort: Cohort, by_run: dict[str, pd.DataFrame]) -> Chart:
    """Plot the overlap of the most sensitive neurons of every pair of runs, by pair of labels."""
    choices: dict[str, list[Neurons]] = {}
    for group in cohort.groups:
        choices[group.label] = [analysis.sensitive_set(by_run[run.id]) for run in group.runs]
    neurons = by_run[cohort.runs[0].id]
    chance, percentile = analysis.random_overlap(neurons)  # of equal numbers per module
    overlaps = compare_all_selections(choices, len(neurons)).assign(chance=chance, most=percentile)
    return overlap_dots(overlaps, title="Overlap of the top tenth")
