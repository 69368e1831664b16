"""Figures of HydraLoRA's routers: gates by group, and their entropy over the steps."""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd

from lorascope.analysis import norms
from lorascope.analysis.seed_intervals import seed_cells
from lorascope.charts.chart import Chart, Drawable, wrap
from lorascope.charts.marks import Axis, Heat, Rule
from lorascope.plots.builders import course, mean_over_modules, used_roles
from lorascope.plots.figure_registry import figure, gather_runs
from lorascope.plots.run_groups import Cohort, Runs, define
from lorascope.runs.result import Result

_BASELINE = ", shuffled groups"
_TEXT = "Recorded on held-out text without padding."
# Title and axis label of the panels of a course: the names of the quantities are too long for narrow panels.
_COURSES = {
    "gate_entropy": ("Entropy per token", "entropy (nats)"),
    "gate_information": ("Information on the group", "information (nats)"),
}
_MOST_NUMBERED = 16  # largest number of columns whose cells have room for numbers


@figure(
    topic="routers",
    needs=("gate_information",),
    reads="The first rows show which experts all groups prefer to uniform gates, at step 0 and later: what changed "
    "between them was learned. A row of a group (a domain or a task) is its mean gate weight minus that of all: pale "
    "cells mean equal routing of the groups, colored ones that routing is group-specific.",
    misleads="Experts of different layers or seeds do not correspond, so one run is drawn, and random routers also "
    "separate groups slightly: compare the information in the title with that of shuffled groups. Means hide tokens "
    "that are routed sharply to different experts: check gate_course.",
)
def gates(runs: Runs, control: Runs | None = None, step: int | None = None) -> Drawable:
    """Plot the routing to experts: mean gate weights minus uniform ones, and by group, one layer per frame.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs to plot, and runs to compare with below; one panel per recipe, its first run.
    step : int, optional
        First or last step of the run; by default the last.

    Examples
    --------
    >>> ls.plots.gates({"HydraLoRA": ls.example("hydralora")})
    """
    cohort = gather_runs("gates", runs, control)
    # Experts of different seeds do not correspond, so that a mean over runs would mix them.
    differences = [_gate_differences(group.runs[0], step) for group in cohort.groups]
    largest = float(pd.concat(differences)["value"].abs().max())
    panels = []
    for group, cells in zip(cohort.groups, differences, strict=True):
        run, last = group.runs[0], cells["step"].iloc[-1]
        experts = sorted(cells["head"].unique())
        columns = [f"{role} {expert}" for role in used_roles(cells) for expert in experts]
        numbers = "+.0f" if len(columns) <= _MOST_NUMBERED else None
        sentences = (
            "Mean gate weight of each expert over held-out tokens, in percentage points; modules of a role pooled by "
            f"mean. All: mean over groups, minus a uniform weight; below, each group minus all, after step {last}. "
            f"{define('gate_information')} Shuffled: the same with permuted groups of the texts."
        )
        sample = "One run" if run.meta.seed is None else f"One run (seed {run.meta.seed})"
        limits = (-largest, largest)  # one scale for all panels
        panels.append(
            Chart(
                cells.assign(column=cells["role"].astype("str") + " " + cells["head"].astype("str")),
                [Heat("column", "row", "value", "difference of gates (points)", numbers, "diverging", limits)],
                title=f"{group.label}, {_information(run, int(last))}",
                x=Axis(label="role and expert", order=columns),
                y=Axis(order=cells["row"].unique(), compact=True),
                caption=f"{sentences} {sample}, so no interval.",
                frame="layer",
            )
        )
    return cohort.complete(wrap(panels, 1, "Gate weights"))


@figure(
    topic="routers",
    needs=("gate_entropy",),
    history=True,
    reads="At the dashed line every token uses all experts equally, at 0 it uses one; a falling curve means that "
    "routing becomes more confident. Routing is group-specific only as far as the second panel exceeds the shuffled "
    "baseline.",
    misleads="Confident routing need not help, and all tokens may use the same expert: check the gates figure. The "
    "recorded text is short, so even a router that ignores groups exceeds 0 in the second panel: compare with the "
    "baseline.",
)
def gate_course(runs: Runs, control: Runs | None = None) -> Drawable:
    """Plot routing over the steps: entropy of a token's gate weights, and their mutual information with the group.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs to plot, and runs to compare with; curves are means over modules.

    Examples
    --------
    >>> ls.plots.gate_course({"HydraLoRA": ls.example("hydralora")})
    """
    cohort = gather_runs("gate_course", runs, control)
    experts = cohort.table[cohort.table["quantity"] == "gate"].groupby("run", observed=True)["index"].max() + 1
    uniform = [Rule(y=math.log(number), label=f"uniform, {number} experts") for number in sorted(experts.unique())]
    panels = [_course_chart(cohort, "gate_entropy", _module_means(cohort, "gate_entropy"), *uniform)]
    information = _module_means(cohort, "gate_information")
    if len(information):
        baseline = _module_means(cohort, "gate_chance")
        baseline = baseline.assign(recipe=baseline["recipe"] + _BASELINE)
        panels.append(_course_chart(cohort, "gate_information", pd.concat([information, baseline])))
    return cohort.complete(wrap(panels, len(panels), "Routing over the steps"))


def _gate_differences(run: Result, step: int | None) -> pd.DataFrame:
    """Return gates minus others in points, by layer and role: of all groups at two steps, then of each at the last."""
    by_group = _gates_by_group(run, step)
    keys = ["step", "layer", "role", "head"]
    overall = by_group.groupby(keys, sort=False)["gate"].mean().reset_index()
    experts = overall["head"].nunique()
    name = f"all − 1/{experts}, step " + overall["step"].astype("str")
    overall = overall.assign(domain="all", row=name, value=100 * (overall["gate"] - 1 / experts))
    last = by_group[by_group["step"] == by_group["step"].iloc[-1]].sort_values("domain", kind="stable")
    groups = last.merge(overall[[*keys, "gate"]], on=keys, suffixes=("", "_all"))
    groups = groups.assign(row=groups["domain"] + " − all", value=100 * (groups["gate"] - groups.pop("gate_all")))
    return pd.concat([overall, groups], ignore_index=True)


def _gates_by_group(run: Result, step: int | None) -> pd.DataFrame:
    """Return the gate weights of a run by group, layer and role, at the first saved step and then at ``step``."""
    rows = run.table[run.table["quantity"] == "gate_information"].drop_duplicates("module")
    names = [f"{module}/gate_by_domain" for module in rows["module"]]
    saved = run.snapshot_steps(names[0])  # all modules are saved at the same steps
    if step is None:
        step = saved[-1]
    if step not in saved:
        raise ValueError(
            f"step must be one of {', '.join(map(str, saved))}, where run {run.id} saved its gates, got {step}"
        )
    tables = []
    for saved_step in dict.fromkeys((saved[0], step)):
        for name, position, role in zip(names, norms.layer_places(rows), rows["role"], strict=True):
            tables.append(run.snapshot(name, saved_step).assign(layer=str(position), role=role))
    keys = ["step", "layer", "role", "domain", "head"]
    return pd.concat(tables).groupby(keys, sort=False)["value"].mean().rename("gate").reset_index()


def _information(run: Result, step: int) -> str:
    """Return the information of the gates on the group at a step, and that with shuffled groups, as text."""
    rows = run.table[run.table["step"] == step].astype({"quantity": "str"})
    means = rows.groupby("quantity")["value"].mean()
    information, shuffled = means["gate_information"], means["gate_chance"]
    return f"information on the group {information:.2g} nats (shuffled {shuffled:.2g})"


def _module_means(cohort: Cohort, quantity: str) -> pd.DataFrame:
    """Average a quantity over modules, then return mean and band over seeds by recipe and step."""
    return seed_cells(mean_over_modules(cohort.select(quantity)), ["recipe", "kind", "step"])


def _course_chart(cohort: Cohort, quantity: str, cells: pd.DataFrame, *rules: Rule) -> Chart:
    title, label = _COURSES[quantity]
    top = cells[["value", "high"]].max().max()
    for rule in rules:
        top = max(top, rule.y)
    chart = course(
        cells.assign(quantity=quantity),
        Axis(label=label, limits=(0, 1.2 * top)),  # room for the label of a rule
        title=title,
        caption=cohort.caption(f"{define(quantity)} {_TEXT}"),
        colors=[*cohort.labels, *(f"{label}{_BASELINE}" for label in cohort.labels)],
    )
    # Rules are below the curves.
    return replace(chart, marks=[*rules, *chart.marks])
