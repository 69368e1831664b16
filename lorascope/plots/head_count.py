"""Figure for choosing the number of experts: clustering error by K, and the K chosen per sample of the corpus."""

from __future__ import annotations

import pandas as pd

from lorascope.analysis.seed_intervals import band
from lorascope.charts.chart import Axis, Band, Chart, Line, Mark, Panels, Point, Rule, Text, set_side_by_side
from lorascope.plots.registry import table_figure

_KMEANS = "k-means"
_OFFSET = 0.3  # horizontal offset of the second algorithm, so that its dots do not hide those of the first


@table_figure
def head_choice(found: pd.DataFrame, static: int | None = None) -> Panels:
    """Plot the k-means error against K and the number of clusters chosen per sample (HydraLoRA, App. B and Fig. 7).

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
    start = curves.groupby("seed")["sse"].transform("first")
    cells = band(curves.assign(value=curves["sse"] / start), ["algorithm", "k"])
    chosen = found[found["chosen"]]
    number, texts = found["seed"].nunique(), found["texts"].max()
    several = number > 1
    spread = chosen.groupby("algorithm", sort=False)["k"].agg(["mean", "min", "max"])
    chosen_k = [f"{name} {row['mean']:.1f} ({row['min']:.0f}–{row['max']:.0f})" for name, row in spread.iterrows()]
    samples = f"{number} samples of {texts:,} texts each" if several else f"One sample of {texts:,} texts"
    caption = (
        "TF-IDF vectors. Error: sum of squared distances to the centers, relative to K = 1. Dots: the elbow, the K "
        f"farthest below the chord of the curve{', with the number of samples that choose it' if several else ''}. "
        f"Clusters, mean (min–max): {'; '.join(chosen_k)}. {samples}."
        f"{' Band: 95% t-interval over samples.' if several else ''}"
    )
    votes = chosen[chosen["algorithm"] == _KMEANS].groupby("k").size()
    elbows = cells.assign(votes=cells["k"].map(votes)).dropna(subset="votes")
    elbows = elbows.assign(words=elbows["votes"].map("{:.0f}×".format), above=elbows["value"] + 0.06)
    bands: list[Mark] = [Band("k", "low", "high", "algorithm")] if several else []
    error = Chart(
        cells,
        [
            *bands,
            Line("k", "value", "algorithm"),
            Point("k", "value", "algorithm", data=elbows),
            *([Text("k", "above", "words", data=elbows)] if several else []),
        ],
        title="Error and elbows",
        x=Axis(label="clusters K"),
        y=Axis(label="error relative to K = 1", limits=(0, 1.12)),
        caption=caption,
        colors=dict.fromkeys(found["algorithm"]),
    )
    chosen_number = Chart(
        chosen.assign(sample=1 + chosen["seed"] + _OFFSET * (chosen["algorithm"] != _KMEANS)),
        [
            *([Rule(y=static, label=f"manual: {static}")] if static is not None else []),
            Point("sample", "k", "algorithm"),
        ],
        title="Chosen number of clusters",
        x=Axis(label="sample of the corpus"),
        y=Axis(label="clusters", limits=(0, None)),
        caption=caption,
        colors=dict.fromkeys(found["algorithm"]),
    )
    return set_side_by_side(error, chosen_number)
