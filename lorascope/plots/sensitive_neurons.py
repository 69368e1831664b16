"""Figure of the sensitivity of neurons: where it is concentrated, and whether runs agree on the most sensitive ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from lorascope.analysis import sensitive_neurons as analysis
from lorascope.analysis.seed_intervals import seed_cells
from lorascope.analysis.selected_neurons import Neurons, compare_all_selections
from lorascope.charts.chart import Chart, Drawable, Panels, set_side_by_side, stack_vertically
from lorascope.charts.marks import Axis, Band, Heat, Line, Mark, Point, Rule
from lorascope.plots.builders import heat_by_role, mean_over_modules, ticks_at, used_roles
from lorascope.plots.figure_registry import FIGURES, figure, gather_runs
from lorascope.plots.requirements import missing_reason
from lorascope.plots.run_groups import Cohort, Runs, require_counts

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
def neuron_sensitivity(runs: Runs, control: Runs | None = None, k: int = 8) -> Panels:
    """Plot the sensitivity of neurons by layer and role, sorted, over steps, and its overlap between runs.

    Sensitivity is ``|w ∂L/∂w|``, summed over the weights of a neuron: a row of a linear layer, a column of ``ffn_out``.
    The null shuffles the gradients of a module. The most sensitive neurons are followed if several steps were recorded,
    and the overlap of the most sensitive tenth of each module is drawn for several runs.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs with ``observe.neurons()``, labeled by task for example, ideally with several seeds of each label.
    k : int
        Number of neurons to follow over the steps: the most sensitive ones at the last step compared with their module.

    Raises
    ------
    ValueError
        The runs have different models, or one recorded no sensitivity of a module in a block.

    Examples
    --------
    >>> ls.plots.neuron_sensitivity(ls.example("full"))

    ``sensitive`` and ``sensitive_news`` are runs with ``observe=[ls.observe.neurons()]``:

    >>> ls.plots.neuron_sensitivity({"tweets": sensitive, "news": sensitive_news})
    """
    cohort = gather_runs("neuron_sensitivity", runs, control)
    require_counts(k=k)
    cohort.require_same("model")
    by_run = {run.id: analysis.list_sensitivities(run) for run in cohort.runs}
    neurons = pd.concat(by_run.values(), ignore_index=True)
    sentences = [
        "Sensitivity |w ∂L/∂w| is summed over a row of a linear layer, or a column of ffn_out. Left: percentage of a "
        "module's sensitivity in its most sensitive tenth, at the last recorded step. Profiles: sensitivity that a "
        "percentage of the neurons of a module reaches, over the mean of the module; mean over modules and runs."
    ]
    if neurons["shuffled"].notna().all():
        sentences.append(NULL)
    heats, profiles, courses = _share_heats(cohort, neurons), _profiles(cohort, neurons), _courses(cohort, k)
    rows: list[Drawable] = [set_side_by_side(*charts) for charts in zip(heats, profiles, *courses, strict=True)]
    if courses:
        sentences.append("Right: neurons by layer, role and number, at each step.")
    if len(cohort.runs) > 1:
        baseline = analysis.random_overlap(by_run[cohort.runs[0].id])
        rows.append(_overlap(cohort, by_run, baseline))
        sentences.append(
            "Overlap: fraction of the most sensitive tenth of every module that two runs share, one dot per pair. "
            f"Random baseline: mean {baseline.chance:.2f} (line), 95th percentile {baseline.percentile_95:.2f}."
        )
    return cohort.complete(stack_vertically(*rows), " ".join([*sentences, cohort.sample_sentence]))


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
    return [replace(chart, title=_title(cohort, chart.title, "Share of the top 10%")) for chart in charts]


def _profiles(cohort: Cohort, neurons: pd.DataFrame) -> list[Chart]:
    """Plot the sorted sensitivities by role, and those from shuffled gradients, one chart per label."""
    profiles = cohort.label(analysis.sort_profiles(neurons))
    charts = []
    for label, rows in cohort.split(profiles):
        title = _title(cohort, label, "Sorted neurons")
        charts.append(_profile_chart(rows, "role", used_roles(neurons), title=title))
    return charts


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


def _courses(cohort: Cohort, k: int) -> list[list[Chart]]:
    """Plot the most sensitive neurons by name over the steps, one chart per label; none if a label has one step."""
    courses = {group.label: analysis.follow_top(group.runs, k) for group in cohort.groups}
    if any(course["step"].nunique() < 2 for course in courses.values()):
        return []
    largest = max(float(course["value"].max()) for course in courses.values())
    charts = []
    for label, course in courses.items():
        chart = Chart(
            course,
            [Heat("step", "name", "value", _MULTIPLE, ".2g", limits=(1, largest))],
            title=_title(cohort, label, "Top neurons"),
            x=Axis(label="step", order=sorted(set(course["step"]))),
            y=Axis(order=course["name"].unique()),
        )
        charts.append(chart)
    return [charts]


def _overlap(cohort: Cohort, by_run: dict[str, pd.DataFrame], baseline: analysis.RandomOverlap) -> Chart:
    """Plot the overlap of the most sensitive neurons of every pair of runs, by pair of labels."""
    choices: dict[str, list[Neurons]] = {}
    for group in cohort.groups:
        choices[group.label] = [analysis.sensitive_set(by_run[run.id]) for run in group.runs]
    overlaps = compare_all_selections(choices, len(by_run[cohort.runs[0].id]))
    overlaps = overlaps.assign(**baseline._asdict()).drop(columns="most")  # that of equal numbers per module
    pairs = overlaps["first"] + ", " + overlaps["second"]
    within = overlaps["first"] == overlaps["second"]
    return Chart(
        overlaps.assign(pair=pairs.mask(within, overlaps["first"] + ", seeds")),
        [Rule(x=baseline.chance, label="random"), Point("overlap", "pair")],
        title="Overlap of the top 10%",
        x=Axis(label="fraction of neurons shared", limits=(0, 1)),
        y=Axis(compact=True),
    )


def _title(cohort: Cohort, label: str, title: str) -> str:
    """Return the title of a panel, with the label if there are several."""
    return f"{label}: {title[0].lower()}{title[1:]}" if len(cohort.groups) > 1 else title
