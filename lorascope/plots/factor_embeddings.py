"""Figure of learned factors: every A and B of every run as a point, colored by domain."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from lorascope.analysis import factor_embeddings, factor_sharing, norms
from lorascope.analysis.factor_embeddings import Factor, FactorSet, View
from lorascope.array_types import Float
from lorascope.charts.chart import Chart, Panels
from lorascope.charts.marks import Axis, Line, Mark, Point, Text
from lorascope.plots.figure_registry import figure, gather_apart
from lorascope.plots.requirements import UPDATES
from lorascope.plots.run_groups import Cohort, Runs, require_choices
from lorascope.runs.result import Result

_VIEWS = {
    "raw": "raw factors",
    "canonical": "factors from the SVD of the update",
    "space": "row spaces of A and column spaces of B",
}
_SAME_PLACE = 0.3  # fraction of the largest coordinate within which dots of one module share a name
_MOST_NAMED = 12  # largest number of modules whose names are legible
_EDGE = 1.15  # end of the axes over the largest coordinate, so that no dot is cut
_NAME_OFFSET = 0.13  # distance between a dot and its name, as a fraction of the height


@figure(
    topic="factors",
    needs=(UPDATES,),
    runs=2,
    reads="Each dot is the A or B of one module in one run, and thin lines join the dots of a module: short lines, or "
    "rings, mean that domains share its factor, long lines and separate colors that factors are domain-specific. Only "
    "structure that remains in the control (separate initial A's) with a percentage above chance was learned.",
    misleads="Runs with the same initial A stay together because A moves little, and t-SNE distances between groups "
    "mean nothing: use the numbers of lorascope.analysis.factor_sharing. Raw factors also depend on how the update was "
    "split into B and A, which view='space' avoids.",
)
def factor_embedding(
    runs: Runs,
    control: Runs | None = None,
    factors: Sequence[Factor] = ("A", "B"),
    together: bool = False,
    view: View = "raw",
    step: int | None = None,
    perplexity: float | Sequence[float] | None = None,
    seeds: Sequence[int] = (),
    modules: Sequence[str] = (),
) -> Panels:
    """Plot t-SNE embeddings of LoRA factors (HydraLoRA, Fig. 3), A next to B and the control below.

    Parameters
    ----------
    runs : mapping domain -> run or runs
        LoRA runs of each domain, trained separately; ideally two or more per domain.
    control : as ``runs``, optional
        Runs for further rows, such as runs with different initial A's.
    factors : sequence of {"A", "B"}
        Factors to plot. Before the first step B is zero, so only A can be plotted.
    together : bool
        Plot A and B in one plane if they have the same shape, as in the paper.
    view : {"raw", "canonical", "space"}
        Factors as stored (the paper's), from the SVD of the update, or the spaces they span.
    step : int, optional
        Step with a snapshot; by default the last step.
    perplexity : float or sequence of float, optional
        Perplexity, or several. Default: 30 as in the paper, a third of the points if these are few.
    seeds : sequence of int
        Seeds of random initializations, on a slider after the initialization by PCA.
    modules : sequence of str
        Modules to plot, by default those of the most common shape, because a plane has factors of one shape; up to 12
        have their layer and role next to their dots (Fig. 10).

    Raises
    ------
    ValueError
        There are fewer than two runs, they have no factors or not these modules, or a perplexity is too large.

    Examples
    --------
    ``sensitive`` are two seeds of ``ls.LoRA`` on tweets, ``sensitive_news`` is the first seed on news:

    >>> runs = {"tweets": sensitive[0], "news": sensitive_news}
    >>> ls.plots.factor_embedding(runs, control=runs | {"tweets": sensitive[1]})
    """
    cohorts = gather_apart("factor_embedding", runs, control)
    require_choices(view=(view, _VIEWS))
    if not factors:
        raise ValueError("factors must include 'A' or 'B', got none")
    for factor in factors:
        require_choices(factors=(factor, ("A", "B")))
    caption = (
        f"Each dot is a factor of one module in one run ({_VIEWS[view]}), scaled to norm 1; dots in one place appear "
        "as rings. Lines join the dots of a module with their mean."
    )
    if any(len(cohort.groups) > 1 for cohort in cohorts.values()):
        caption += (
            " Same module: factors whose nearest factor of another domain is from the same module. Same A₀: the seeds "
            "of the initial A are the same in all domains."
        )
    planes = []
    for prefix, cohort in cohorts.items():
        cohort.require_runs(2)
        factored = {run.id: factor_embeddings.factored_updates(run.updates(step)) for run in cohort.runs}
        common = factor_embeddings.common_modules(factored)
        for name in modules:
            if name not in common:
                raise cohort.no_common_module(name, common)
        updates = {}
        for run, products in factored.items():
            updates[run] = {name: products[name] for name in modules or common}
        sample = f"{prefix}{cohort.sample}."
        caption += f" {sample[0].upper()}{sample[1:]}"
        for selected in [factors] if together else [(factor,) for factor in factors]:
            clouds = factor_embeddings.build_factor_sets(updates, cohort.label_of_run, selected, view)
            if not modules:
                clouds = [max(clouds, key=lambda cloud: len(cloud.flat))]
            planes += [(shape, cloud, cohort, prefix) for shape, cloud in enumerate(clouds)]
    # A row of panels has one shape of each factor, so that A is next to B.
    rows: dict[tuple[str, int, int], list[Chart]] = defaultdict(list)
    for shape, cloud, cohort, prefix in planes:
        sizes = perplexity
        if sizes is None:
            sizes = factor_embeddings.default_perplexity(len(cloud.flat))
        for number, size in enumerate(np.atleast_1d(sizes).tolist()):
            chart = _tsne(cloud, cohort, _title(cloud, cohort, prefix), size, seeds)
            if 0 < len(modules) <= _MOST_NAMED:
                chart = _name_dots(chart)
            rows[prefix, shape, number].append(chart)
    grid = tuple(map(tuple, rows.values()))
    panels = Panels(grid, columns=max(map(len, grid)), title="Embedding of LoRA factors (t-SNE)")
    return cohorts[""].complete(panels, caption)


def _title(cloud: FactorSet, cohort: Cohort, prefix: str) -> str:
    """Return factors, seeds, and how often the nearest factor of another domain is from the same module."""
    title = f"{prefix}{' and '.join(dict.fromkeys(cloud.factors))}"
    if len(cohort.groups) == 1:
        return title
    # The initial A is drawn by this seed, so that it is a reason to be from the same module.
    seeds = {group.label: {_initial_seed(run) for run in group.runs} for group in cohort.groups}
    if None not in set().union(*seeds.values()):
        are_same = all(of_domain == seeds[cohort.labels[0]] for of_domain in seeds.values())
        title += f", {('different', 'same')[are_same]} A₀"
    matches = factor_sharing.retrieve_modules(cloud)
    percent, chance = 100 * matches["same"].mean(), 100 * matches["chance"].mean()
    return f"{title}: same module {percent:.0f}% (chance {chance:.0f}%)"


def _initial_seed(run: Result) -> int | None:
    """Return the seed of the initial factors, None for an adapter, whose seed is not known."""
    return (run.meta.recipe or {}).get("init_seed", run.meta.seed)


def _tsne(cloud: FactorSet, cohort: Cohort, title: str, perplexity: float, seeds: Sequence[int]) -> Chart:
    planes = {"from PCA": factor_embeddings.tsne(cloud, perplexity, None)}
    for seed in seeds:
        planes[f"from seed {seed}"] = factor_embeddings.tsne(cloud, perplexity, seed)
    points = []
    for start, plane in planes.items():
        # The plane has neither an origin nor a unit.
        centered = plane - (plane.min(axis=0) + plane.max(axis=0)) / 2
        scaled = centered / (np.abs(centered).max() or 1.0)  # equal factors are all at zero
        points.append(_place_points(cloud, cohort, scaled).assign(start=start))
    table, frame = pd.concat(points), "start" if seeds else None
    marks: list[Mark] = [join_dots(table, ["module", "factor", "start"]), Point("x", "y", "domain", size="size")]
    if table["factor"].nunique() > 1:
        # A and B share this plane, so their names are drawn above the dots of each.
        keys = filter(None, ("factor", frame))
        names = table.groupby(list(keys), as_index=False).agg({"x": "mean", "y": "max"})
        marks.append(Text("x", "y", "factor", data=names))
    labels = f"factors of shape {' × '.join(map(str, cloud.shape))}", f"t-SNE, perplexity {perplexity:.3g}"
    x, y = (Axis(label=label, ticks={}, limits=(-_EDGE, _EDGE)) for label in labels)
    look: dict[str, Any] = {"x": x, "y": y, "frame": frame, "colors": cohort.labels, "square": True}
    return Chart(table, marks, title=title, meta=cohort.meta, **look)


def join_dots(dots: pd.DataFrame, keys: Sequence[str]) -> Line:
    """Return the lines from the dots with equal ``keys``, the factors of a module, to their mean."""
    # Lines between all pairs of many runs would cover the dots.
    means = dots.groupby(list(keys), sort=False)[["x", "y"]].transform("mean")
    ends = [dots.assign(spoke=range(len(dots))), dots.assign(spoke=range(len(dots)), x=means["x"], y=means["y"])]
    return Line("x", "y", stretch="spoke", muted=True, data=pd.concat(ends, ignore_index=True))


def _name_dots(chart: Chart) -> Chart:
    """Add layer and role of every module above its dots, once for dots in one place."""
    reach = _SAME_PLACE * np.abs(chart.data[["x", "y"]].to_numpy()).max()
    labels: list[dict[Hashable, Any]] = []
    labeled_points: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    # From the top, so that the name of dots in one place is above the highest of them.
    for dot in chart.data.sort_values("y", ascending=False).to_dict("records"):
        point = dot["x"], dot["y"]
        points = labeled_points.setdefault((dot["module"], dot["factor"], dot.get("start")), [])
        if all(math.dist(point, labeled) > reach for labeled in points):
            points.append(point)
            if pd.notna(dot["layer"]):  # the place of any other module is its role
                dot["place"] += f" {dot['role']}"
            labels.append(dot)
    names = pd.DataFrame(labels)
    rise = _NAME_OFFSET * chart.data["y"].abs().max()
    names["y"] += rise
    chart = replace(chart, marks=[*chart.marks, Text("x", "y", "place", data=names)])
    assert chart.y.limits is not None
    low, high = chart.y.limits
    assert high is not None
    return replace(chart, y=replace(chart.y, limits=(low, high + 1.5 * rise)))  # room for the name of the highest dot


def _place_points(cloud: FactorSet, cohort: Cohort, plane: Float[np.ndarray, "point 2"]) -> pd.DataFrame:
    """Return the points with their coordinates, layer and role; dots of later domains are smaller."""
    modules = cohort.runs[0].modules
    positions = modules.assign(place=norms.layer_places(modules).astype("str")).set_index("module")
    # A dot below a smaller one remains visible as a ring.
    sizes = dict(zip(cohort.labels, np.linspace(1.0, 0.3, len(cohort.labels)), strict=True))
    points = cloud.table().assign(x=plane[:, 0], y=plane[:, 1]).join(positions[["layer", "role", "place"]], on="module")
    return points.assign(size=points["domain"].map(sizes))
