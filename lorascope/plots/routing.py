"""Figures of HydraLoRA's routers: gates by domain, their entropy over the steps, and the choice of experts."""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd

from lorascope.analysis import norms
from lorascope.analysis.seed_intervals import band
from lorascope.charts.chart import Chart, Drawable, Panels, set_side_by_side, wrap
from lorascope.charts.marks import Axis, Band, Heat, Line, Mark, Point, Rule, Text
from lorascope.plots.builders import course, mean_over_modules, used_roles
from lorascope.plots.figure_registry import figure, gather_runs
from lorascope.plots.run_groups import Cohort, Runs, axis_label, define
from lorascope.runs.result import Result

_BASELINE = ", shuffled domains"
_TEXT = "Recorded on held-out text without padding."
_KMEANS = "k-means"
_OFFSET = 0.3  # horizontal offset of the second algorithm, so that its dots do not hide those of the first
_MOST_NUMBERED = 6  # largest number of columns whose cells have room for numbers


@figure(
    topic="routers",
    needs=("gate_information",),
    reads="Each cell is the mean gate weight of an expert on one domain minus a uniform weight, in one layer. Rows "
    "that differ within an expert mean domain-specific routing; equal rows mean that all domains prefer the expert.",
    misleads="Experts of different layers or seeds do not correspond, so one run is drawn, and random routers also "
    "separate domains slightly: compare with step 0. Means hide tokens that are routed sharply to different experts: "
    "check gate_course.",
)
def gates(runs: Runs, control: Runs | None = None, step: int | None = None) -> Drawable:
    """Plot the routing to experts: mean gate weight of each by domain minus a uniform weight, one layer per frame.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs to plot, and runs to compare with below; one panel per recipe, its first run.
    step : int, optional
        First or last step of the run; by default the last.

    Examples
    --------
    >>> ls.plots.gates({"HydraLoRA": hydralora})
    """
    cohort = gather_runs("gates", runs, control)
    gates_by_group = [_gates_by_domain(group.runs[0], step) for group in cohort.groups]
    largest = max(float(cells["value"].abs().max()) for cells in gates_by_group)
    panels = []
    for group, cells in zip(cohort.groups, gates_by_group, strict=True):
        experts = sorted(cells["head"].unique())
        columns = [f"{role} {expert}" for role in used_roles(cells) for expert in experts]
        numbers = ".2f" if len(columns) <= _MOST_NUMBERED else None
        definition = (
            f"Mean gate weight of each expert over held-out tokens of a domain, minus 1/{len(experts)}; modules of "
            f"a role pooled by mean; after step {cells['step'].iloc[0]}."
        )
        seed = group.runs[0].meta.seed
        run = "One run" if seed is None else f"One run (seed {seed})"
        limits = (-largest, largest)
        panels.append(
            Chart(
                cells.assign(column=cells["role"].astype("str") + " " + cells["head"].astype("str")),
                [Heat("column", "domain", "value", f"gate − 1/{len(experts)}", numbers, "diverging", limits)],
                title=group.label,
                x=Axis(label="role and expert", order=columns),
                y=Axis(order=sorted(cells["domain"].unique())),
                caption=f"{definition} {run}, so no interval.",
                frame="layer",
            )
        )
    return cohort.complete(wrap(panels, 1))


@figure(
    topic="routers",
    needs=("gate_entropy",),
    history=True,
    reads="At the dashed line every token uses all experts equally, at 0 it uses one; a falling curve means that "
    "routing becomes more confident. Routing is domain-specific only as far as the second panel exceeds the shuffled "
    "baseline.",
    misleads="Confident routing need not help, and all tokens may use the same expert: check the gates figure. The "
    "recorded text is short, so even a router that ignores domains exceeds 0 in the second panel: compare with the "
    "baseline.",
)
def gate_course(runs: Runs, control: Runs | None = None) -> Drawable:
    """Plot routing over the steps: entropy of a token's gate weights, and their mutual information with the domain.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs to plot, and runs to compare with; curves are means over modules.

    Examples
    --------
    >>> ls.plots.gate_course({"HydraLoRA": hydralora})
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
    return cohort.complete(wrap(panels, len(panels)))


def head_choice(found: pd.DataFrame, static: int | None = None) -> Panels:
    """Plot the choice of how many experts to route to: k-means error by K, clusters per sample (HydraLoRA, Fig. 7).

    An elbow on the left is meaningful if the curve falls steeply before it and little after. A curve that hardly falls
    also has an elbow, but it is noise: the chosen number on the right then varies between samples. Caveat: even a clear
    elbow counts topics, which experts need not specialize in.

    Parameters
    ----------
    found : DataFrame
        Table from ``analysis.head_count.repeated_selection``.
    static : int, optional
        Manually chosen number, drawn for comparison.
    """
    curves = found[found["algorithm"] == _KMEANS]
    start = curves.groupby("seed")["sse"].transform("first")  # K = 1
    cells = band(curves.assign(value=curves["sse"] / start), ["algorithm", "k"])
    selected = found[found["chosen"]]
    number, texts = found["seed"].nunique(), found["texts"].max()
    spread = selected.groupby("algorithm", sort=False)["k"].agg(["mean", "min", "max"])
    clusters = [f"{name} {row['mean']:.1f} ({row['min']:.0f}–{row['max']:.0f})" for name, row in spread.iterrows()]
    elbow = "the elbow, the K farthest below the chord of the curve"
    samples = f"One sample of {texts:,} texts."
    if number > 1:
        elbow += ", with the number of samples that choose it"
        samples = f"{number} samples of {texts:,} texts each. Band: 95% t-interval over samples."
    caption = (
        f"TF-IDF vectors. Error: sum of squared distances to the centers, relative to K = 1. Dots: {elbow}. "
        f"Clusters, mean (min–max): {'; '.join(clusters)}. {samples}"
    )
    votes = selected[selected["algorithm"] == _KMEANS].groupby("k").size()
    elbows = cells.assign(votes=cells["k"].map(votes)).dropna(subset="votes")
    elbows = elbows.assign(words=elbows["votes"].map("{:.0f}×".format), above=elbows["value"] + 0.06)
    marks: list[Mark] = [Line("k", "value", "algorithm"), Point("k", "value", "algorithm", data=elbows)]
    if number > 1:
        marks = [Band("k", "low", "high", "algorithm"), *marks, Text("k", "above", "words", data=elbows)]
    error = Chart(
        cells,
        marks,
        title="Error and elbows",
        x=Axis(label="clusters K"),
        y=Axis(label="error relative to K = 1", limits=(0, 1.12)),
        caption=caption,
        colors=dict.fromkeys(found["algorithm"]),
    )
    rules = [Rule(y=static, label=f"manual: {static}")] if static is not None else []
    chosen_number = Chart(
        selected.assign(sample=1 + selected["seed"] + _OFFSET * (selected["algorithm"] != _KMEANS)),
        [*rules, Point("sample", "k", "algorithm")],
        title="Chosen number of clusters",
        x=Axis(label="sample of the corpus"),
        y=Axis(label="clusters", limits=(0, None)),
        caption=caption,
        colors=dict.fromkeys(found["algorithm"]),
    )
    return set_side_by_side(error, chosen_number)


def _gates_by_domain(run: Result, step: int | None) -> pd.DataFrame:
    """Return the gate weights of a run by domain, and in ``value`` minus uniform ones, by layer and role."""
    rows = run.table[run.table["quantity"] == "gate_information"].drop_duplicates("module")
    names = [f"{module}/gate_by_domain" for module in rows["module"]]
    saved = run.snapshot_steps(names[0])  # all modules are saved at the same steps
    if step is not None and step not in saved:
        raise ValueError(
            f"step must be one of {', '.join(map(str, saved))}, where run {run.id} saved its gates, got {step}"
        )
    tables = []
    for name, position, role in zip(names, norms.layer_places(rows), rows["role"], strict=True):
        snapshot = run.snapshot(name, saved[-1] if step is None else step)
        tables.append(snapshot.assign(layer=str(position), role=role))
    keys = ["step", "layer", "role", "domain", "head"]
    cells = pd.concat(tables).groupby(keys, sort=False)["value"].mean().rename("gate").reset_index()
    return cells.assign(value=cells["gate"] - 1 / cells["head"].nunique())


def _module_means(cohort: Cohort, quantity: str) -> pd.DataFrame:
    """Average a quantity over modules, then return mean and band over seeds by recipe and step."""
    return band(mean_over_modules(cohort.select(quantity)), ["recipe", "kind", "step"])


def _course_chart(cohort: Cohort, quantity: str, cells: pd.DataFrame, *rules: Rule) -> Chart:
    chart = course(
        cells.assign(quantity=quantity),
        Axis(label=axis_label(quantity), limits=(0, None)),
        caption=cohort.caption(f"{define(quantity)} {_TEXT}"),
        colors=[*cohort.labels, *(f"{label}{_BASELINE}" for label in cohort.labels)],
    )
    # Rules are below the curves.
    return replace(chart, marks=[*rules, *chart.marks])
