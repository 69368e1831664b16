"""The figure of a number of heads: what clusters leave of the error, and how many a corpus seems to hold."""

from __future__ import annotations

import pandas as pd

from lorascope.analysis.seed_intervals import band
from lorascope.charts.chart import Axis, Band, Chart, Line, Mark, Panels, Point, Rule, Text, set_side_by_side

_KMEANS = "k-means"
_ASIDE = 0.3  # of a sample, so that two dots at one number do not hide each other


def head_choice(found: pd.DataFrame, static: int | None = None) -> Panels:
    """Error of k-means against K with its elbow, and the number chosen sample by sample (HydraLoRA, App. B, Fig. 7).

    Read the left panel first: an elbow counts where the curve falls far before it and little after. One that hardly
    falls at all has an elbow as well, which then is noise, and the right panel shows it jump from sample to sample. It
    misleads where it is clear, too: topics of a text need not be what heads are of use for.

    Parameters
    ----------
    found : DataFrame
        From ``analysis.head_count.repeated_selection``.
    static : int, optional
        A number chosen by hand, to compare with.
    """
    curves = found[found["algorithm"] == _KMEANS]
    start = curves.groupby("seed")["sse"].transform("first")
    cells = band(curves.assign(value=curves["sse"] / start), ["algorithm", "k"])
    chosen = found[found["chosen"]]
    caption = _head_count_caption(found, chosen)
    votes = chosen[chosen["algorithm"] == _KMEANS].groupby("k").size()
    elbows = cells.assign(votes=cells["k"].map(votes)).dropna(subset="votes")
    elbows = elbows.assign(words=elbows["votes"].map("{:.0f}×".format), above=elbows["value"] + 0.06)
    several = found["seed"].nunique() > 1
    spread: list[Mark] = [Band("k", "low", "high", "algorithm")] if several else []
    error = Chart(
        cells,
        [
            *spread,
            Line("k", "value", "algorithm"),
            Point("k", "value", "algorithm", data=elbows),
            *([Text("k", "above", "words", data=elbows)] if several else []),
        ],
        title="Error left, and elbows",
        x=Axis(label="clusters K"),
        y=Axis(label="error left (share)", limits=(0, 1.12)),
        caption=caption,
        colors=dict.fromkeys(found["algorithm"]),
    )
    number = Chart(
        chosen.assign(sample=1 + chosen["seed"] + _ASIDE * (chosen["algorithm"] != _KMEANS)),
        [
            *([Rule(y=static, label=f"by hand: {static}")] if static is not None else []),
            Point("sample", "k", "algorithm"),
        ],
        title="Number chosen",
        x=Axis(label="sample of the corpus"),
        y=Axis(label="clusters", limits=(0, None)),
        caption=caption,
        colors=dict.fromkeys(found["algorithm"]),
    )
    return set_side_by_side(error, number)


def _head_count_caption(found: pd.DataFrame, chosen: pd.DataFrame) -> str:
    number, texts = found["seed"].nunique(), found["texts"].max()
    spread = chosen.groupby("algorithm", sort=False)["k"].agg(["mean", "min", "max"])
    told = "; ".join(f"{name} {row['mean']:.1f} ({row['min']:.0f}–{row['max']:.0f})" for name, row in spread.iterrows())
    samples = f"{number} samples, of {texts:,} texts each" if number > 1 else f"One sample, of {texts:,} texts"
    band = " Band: 95 % t-interval over samples." if number > 1 else ""
    return (
        "TF-IDF vectors. Error: sum of squared distances to the centres, against that of K = 1. Dots: the K where the "
        "curve lies farthest below its chord, and how often it is chosen. "
        f"Clusters, mean (smallest–largest): {told}. {samples}.{band}"
    )
