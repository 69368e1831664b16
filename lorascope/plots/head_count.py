"""Figure of the choice of the number of experts, from the tables of ``analysis.head_count.repeated_selection``."""

from __future__ import annotations

import pandas as pd

from lorascope.analysis.seed_intervals import seed_cells
from lorascope.charts.chart import Chart, Panels, set_side_by_side
from lorascope.charts.marks import Axis, Band, Line, Mark, Point, Rule, Text
from lorascope.plots.builders import ends
from lorascope.plots.figure_registry import document_result

_KMEANS = "k-means"
_OFFSET = 0.3  # horizontal offset of the second algorithm, so that its dots do not hide those of the first


@document_result
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

    Raises
    ------
    ValueError
        ``found`` is not a table.

    Examples
    --------
    ``clusters`` is ``repeated_selection(texts)``.

    >>> ls.plots.head_choice(clusters, static=3)
    """
    if not isinstance(found, pd.DataFrame):
        must = "found must be the table of analysis.head_count.repeated_selection"
        raise ValueError(f"{must}, got {type(found).__name__}")
    # Only k-means has an error for every K; the other algorithm finds the number of clusters itself.
    curves = found[found["algorithm"] == _KMEANS]
    start = curves.groupby("seed")["sse"].transform("first")  # K = 1
    cells = seed_cells(curves.assign(value=curves["sse"] / start), ["algorithm", "k"])
    selected = found[found["chosen"]]
    number, texts = found["seed"].nunique(), found["texts"].max()
    spread = selected.groupby("algorithm", sort=False)["k"].agg(["mean", "min", "max"])
    clusters = [f"{name} {row['mean']:.1f} ({row['min']:.0f}–{row['max']:.0f})" for name, row in spread.iterrows()]
    elbow = "the elbow, the K farthest below the chord of the curve"
    samples = f"One sample of {texts:,} texts."
    if number > 1:
        elbow += ", with the number of samples that choose it"
        samples = f"{number} samples of {texts:,} texts each."
    caption = (
        f"TF-IDF vectors. Error: sum of squared distances to the centers, relative to K = 1. Dots: {elbow}. "
        f"Clusters, mean (min–max): {'; '.join(clusters)}. {samples}"
    )
    votes = selected[selected["algorithm"] == _KMEANS].groupby("k").size()
    elbows = cells.assign(votes=cells["k"].map(votes)).dropna(subset="votes")
    elbows = elbows.assign(words=elbows["votes"].map("{:.0f}×".format), above=elbows["value"] + 0.06)
    marks: list[Mark] = [Line("k", "value", "algorithm"), Point("k", "value", "algorithm", data=elbows)]
    if number > 1:
        marks.append(Text("k", "above", "words", data=elbows))
    if ends(cells):
        marks.insert(0, Band("k", "low", "high", "algorithm"))
        caption += " Band: 95% t-interval over samples."
    error = Chart(
        cells,
        marks,
        title="Error and elbows",
        x=Axis(label="clusters K"),
        y=Axis(label="error relative to K = 1", limits=(0, 1.12)),  # room for the counts above the elbows
        caption=caption,
        colors=dict.fromkeys(found["algorithm"]),
    )
    choices: list[Mark] = [Point("sample", "k", "algorithm")]
    if static is not None:
        choices.insert(0, Rule(y=static, label=f"manual: {static}"))
    chosen_number = Chart(
        selected.assign(sample=1 + selected["seed"] + _OFFSET * (selected["algorithm"] != _KMEANS)),
        choices,
        title="Chosen number of clusters",
        x=Axis(label="sample of the corpus"),
        y=Axis(label="clusters", limits=(0, None)),
        caption=caption,
        colors=dict.fromkeys(found["algorithm"]),
    )
    return set_side_by_side(error, chosen_number)
