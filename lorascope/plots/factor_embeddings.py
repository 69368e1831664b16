"""The figure of what A and B learned: every factor of every run as a point, coloured by its domain."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from lorascope.analysis import factor_embeddings, factor_sharing, norms
from lorascope.analysis.factor_embeddings import Factor, FactorSet, Updates, View
from lorascope.charts.chart import Axis, Chart, Panels, Point, Text
from lorascope.plots.registry import UPDATES, figure
from lorascope.plots.run_groups import Cohort, Runs, gather

_VIEWS = {
    "raw": "factors as they are",
    "canonical": "factors by the singular vectors of the update",
    "space": "row spaces of A and column spaces of B",
}
TINY = float(np.finfo(np.float64).tiny)
_ONE_PLACE = 0.3  # of the plane's reach, within which dots of one module share their name
_NAMED = 12  # modules whose names leave a plane legible
_ABOVE = 0.13  # of the plane's height, between a dot and the name above it


@figure(
    needs=(UPDATES,),
    runs=2,
    reads="Each dot is one whole factor of one module. Dots of all colours in one place: the module's factor is alike "
    "whatever the text. Colours apart: the factor tells the texts apart. Look at the control first, runs that each "
    "began from an A of their own; only what is left there was learned.",
    misleads="From one initial A all runs' A stay beside each other because they moved little, whether or not they "
    "learned anything in common. Distances between groups mean nothing in t-SNE, and another perplexity draws other "
    "groups; the numbers of analysis.sharing do not depend on either. Raw factors also differ by how an update was "
    "split into B and A: view='space' does not.",
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
    """t-SNE of factors (HydraLoRA, Fig. 3) at two perplexities, PCA beside it; a row for A and for B of every shape.

    Parameters
    ----------
    runs : mapping domain -> run or runs
        LoRAs trained apart, two or more a domain.
    control : as ``runs``, optional
        Rows below, such as runs that began from different A.
    factors : sequence of {"A", "B"}
        Before the first step there is an A alone.
    together : bool
        A and B in one plane, where they have one shape, as in the paper.
    view : {"raw", "canonical", "space"}
        Factors as they are (the paper's), of the update's singular value decomposition, or their spaces.
    step : int, optional
        A step with a snapshot; by default the end.
    perplexity : float or sequence of float, optional
        A panel each. By default the paper's 30, or a third of the points where they are few, and a third of that.
    seeds : sequence of int
        Random starts of t-SNE, on a slider; its first position starts from the principal components.
    modules : sequence of str
        Draw these alone, a dozen or fewer with layer and role beside their dots (Fig. 10); by default all.

    Raises
    ------
    ValueError
        There are not two runs, they have no factor to compare or not these modules, or a perplexity is not below the
        number of points.
    """
    name = "factor_embedding"
    shown = {"": gather(name, runs)} | ({"control: ": gather(name, control)} if control is not None else {})
    starts = [None, *seeds]
    caption = (
        f"A dot is a factor of one module in one run: {_VIEWS[view]}, of length one. Dots in one place are rings. "
        "Components of PCA with their share of the variance."
    )
    rows: list[list[Chart]] = []
    for prefix, cohort in shown.items():
        held = _embedded_updates(cohort, step, modules)
        found = [_clouds(cohort, held, (factor,), view) for factor in factors]
        caption += factor_caption(prefix, cohort, found)
        apart = [cloud for clouds in found for cloud in clouds]
        clouds = _clouds(cohort, held, factors, view) if together else apart
        for cloud in clouds:
            planes = [_tsne(cloud, cohort, prefix, size, starts) for size in _perplexities(cloud, perplexity)]
            drawn = [*planes, _pca(cloud, cohort, prefix)]
            rows.append([_name_dots(chart) for chart in drawn] if 0 < len(modules) <= _NAMED else drawn)
    return Panels(tuple(tuple(replace(chart, caption=caption) for chart in row) for row in rows))


def _embedded_updates(cohort: Cohort, step: int | None, modules: Sequence[str]) -> Updates:
    """The updates of all runs that have factors, or of these modules alone."""
    cohort.require(UPDATES)
    if len(cohort.runs) < 2:
        raise ValueError(f"{cohort.name} compares the factors of runs, and got one: give runs of two domains or more")
    held = {run.id: factor_embeddings.factored_updates(run.updates(step)) for run in cohort.runs}
    common = factor_embeddings.common_modules(held)
    if unknown := next((name for name in modules if name not in common), None):
        raise ValueError(f"{cohort.name}: not all runs hold {unknown}; they hold {', '.join(common[:5])}")
    return {run: {name: found[name] for name in modules or common} for run, found in held.items()}


def _clouds(cohort: Cohort, updates: Updates, factors: Sequence[Factor], view: View) -> list[FactorSet]:
    domains = {run.id: group.label for group in cohort.groups for run in group.runs}
    return factor_embeddings.clouds(updates, domains, factors, view)


def factor_caption(prefix: str, cohort: Cohort, found: Sequence[Sequence[FactorSet]]) -> str:
    """The runs, and the number that the picture is to be read with."""
    told = f"{prefix}{cohort.sample}."
    if len(cohort.groups) > 1:
        shares = {clouds[0].factors[0]: factor_sharing.sharedness(clouds) for clouds in found}
        hits = [f"{factor} {100 * share['sharedness']:.0f} %" for factor, share in shares.items()]
        chances = [f" (by chance {100 * share['sharedness_chance']:.0f} %)" for share in shares.values()]
        if len(set(chances)) == 1:  # told once
            chances = [""] * (len(hits) - 1) + chances[:1]
        listed = ", ".join(map("".join, zip(hits, chances, strict=True)))
        told += f" The nearest factor of another domain is the same module's: {listed}."
    return f" {told[0].upper()}{told[1:]}"


def _perplexities(cloud: FactorSet, asked: float | Sequence[float] | None) -> Sequence[float]:
    if asked is None:
        usual = factor_embeddings.default_perplexity(len(cloud.flat))
        return usual, usual / 3
    return asked if isinstance(asked, Sequence) else [asked]


def _tsne(cloud: FactorSet, cohort: Cohort, prefix: str, perplexity: float, starts: Sequence[int | None]) -> Chart:
    parts = []
    for seed in starts:
        plane = factor_embeddings.tsne(cloud, perplexity, seed)
        # A plane has no unit: its outermost dot stands at one.
        points = _place_points(cloud, cohort, plane / (np.abs(plane).max() or 1.0))
        parts.append(points.assign(start="from PCA" if seed is None else f"from seed {seed}"))
    axes = [Axis(label=f"t-SNE {number}", ticks={}, limits=(-1.1, 1.1)) for number in (1, 2)]
    title = f"{prefix}t-SNE of {_factor_set_name(cloud)}, perplexity {perplexity:.3g}"
    return _embedding_chart(pd.concat(parts), cohort, title, axes, "start" if len(starts) > 1 else None)


def _pca(cloud: FactorSet, cohort: Cohort, prefix: str) -> Chart:
    whole = factor_embeddings.pca(cloud, len(cloud.flat))
    shares = 100 * (whole**2).sum(axis=0) / max((whole**2).sum(), TINY)
    axes = [Axis(label=f"component {number + 1} ({shares[number]:.0f} %)") for number in (0, 1)]
    return _embedding_chart(
        _place_points(cloud, cohort, whole[:, :2]), cohort, f"{prefix}PCA of {_factor_set_name(cloud)}", axes, None
    )


def _embedding_chart(
    points: pd.DataFrame, cohort: Cohort, title: str, axes: Sequence[Axis], frame: str | None
) -> Chart:
    marks: list[Any] = [Point("x", "y", "domain", shape="role", size="size")]
    if points["factor"].nunique() > 1:
        # In one plane of A and B their names stand above the dots of each.
        names = points.groupby(["factor", *([frame] if frame else [])], as_index=False).agg({"x": "mean", "y": "max"})
        marks.append(Text("x", "y", "factor", data=names))
    return Chart(
        points,
        marks,
        title=title,
        x=axes[0],
        y=axes[1],
        frame=frame,
        colors=cohort.labels,
        meta=cohort.meta,
    )


def _name_dots(chart: Chart) -> Chart:
    """With layer and role of every module wherever it has dots, above the topmost of those in one place."""
    reach = _ONE_PLACE * np.abs(chart.data[["x", "y"]].to_numpy()).max()
    kept: list[dict[Hashable, Any]] = []
    for dot in chart.data.sort_values("y", ascending=False).to_dict("records"):
        alike = (one for one in kept if all(one.get(key) == dot.get(key) for key in ("module", "factor", "start")))
        if all(math.hypot(one["x"] - dot["x"], one["y"] - dot["y"]) > reach for one in alike):
            kept.append(dot | {"place": dot["place"] if pd.isna(dot["layer"]) else f"{dot['place']} {dot['role']}"})
    names = pd.DataFrame(kept)
    names["y"] += _ABOVE * chart.data["y"].abs().max()
    y = replace(chart.y, limits=(-1.1, 1.3)) if chart.y.limits else chart.y
    return replace(chart, marks=[*chart.marks, Text("x", "y", "place", data=names)], y=y)


def _place_points(cloud: FactorSet, cohort: Cohort, plane: Float[np.ndarray, "point 2"]) -> pd.DataFrame:
    """Where the points are drawn, with the place of their modules in the model, later domains smaller."""
    modules = cohort.runs[0].modules
    places = modules.assign(place=norms.place(modules).astype("str")).set_index("module")[["layer", "role", "place"]]
    sizes = dict(zip(cohort.labels, np.linspace(1.0, 0.2, len(cohort.labels)), strict=True))
    points = cloud.table().assign(x=plane[:, 0], y=plane[:, 1]).join(places, on="module")
    return points.assign(size=points["domain"].map(sizes))


def _factor_set_name(cloud: FactorSet) -> str:
    """Such as "A, 8 × 384"."""
    return f"{' and '.join(dict.fromkeys(cloud.factors))}, {' × '.join(map(str, cloud.shape))}"
