"""Figure of NeFT's motive: sensitivity of changed neurons by block, and how stable each score is over seeds."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd

from lorascope.analysis.score_agreement import spearman
from lorascope.charts.chart import Chart, Panels
from lorascope.charts.marks import Axis, Band, Line, Mark, Point, Rule
from lorascope.files.printable import count_phrase
from lorascope.papers.figures.neuron_hits import SCORES
from lorascope.papers.figures.study_marks import write_word
from lorascope.plots.builders import ticks_at
from lorascope.schema.module_table import parse

CHANGED, OTHER, NULL = "changed neurons", "other neurons", "random neurons, 95%"
_PANELS = {"sensitivity": "Sensitivity at step 0", "sensitivity_end": "Sensitivity at the end"}
_Z = 1.96  # of a normal distribution, in 95%
_STABLE = [column for column in SCORES if column != "selected"]


def sensitivity_table(neurons: pd.DataFrame, score: str) -> pd.DataFrame:
    """Tabulate ``block, neurons, value, low, high`` from the kept table ``neurons``.

    The value is the geometric mean of a score over the neurons of a block, then over seeds. The interval of changed and
    other neurons is the range over seeds. That of ``NULL`` has the mean of as many neurons as are changed in 95% of
    random choices from every module, by the variance of a sample without replacement.
    """
    block = neurons["module"].map(lambda name: parse(name).layer)
    logs = neurons.assign(block=block, value=np.log10(neurons[score].astype("float64")))
    labels = np.where(neurons["changed"], CHANGED, OTHER)
    by_seed = logs.assign(neurons=labels).groupby(["neurons", "block", "seed"], sort=False)["value"].mean()
    means = by_seed.groupby(["neurons", "block"], sort=False).agg(value="mean", low="min", high="max").reset_index()

    modules = logs.groupby(["block", "seed", "module"]).agg(
        value=("value", "mean"), variance=("value", "var"), size=("value", "size"), changed=("changed", "sum")
    )
    modules["variance"] *= 1 / modules["changed"] - 1 / modules["size"]
    # Modules have equally many changed neurons, so their means have equal weights.
    of_blocks = modules.groupby("block").agg(value=("value", "mean"), error=("variance", "mean"), n=("value", "size"))
    error = _Z * np.sqrt(of_blocks["error"] / of_blocks["n"])
    value = of_blocks["value"]
    null = pd.DataFrame({"value": value, "low": value - error, "high": value + error}).reset_index()
    table = pd.concat([null.assign(neurons=NULL), means], ignore_index=True)
    numbers = ["value", "low", "high"]
    table[numbers] = 10 ** table[numbers]
    return table[["block", "neurons", *numbers]]


def stability_table(neurons: pd.DataFrame) -> pd.DataFrame:
    """Tabulate ``score, value, low, high``: rank correlation of each score between pairs of seeds, and its range.

    Neurons are correlated within their module, then averaged over modules. One seed has no row.
    """
    rows = []
    if neurons["seed"].nunique() < 2:
        return pd.DataFrame(columns=["score", "value", "low", "high"], dtype="float64")
    for score in _STABLE:
        values = neurons.pivot(index=["module", "neuron"], columns="seed", values=score)
        correlations = [spearman(of_module.to_numpy(np.float64)) for _, of_module in values.groupby("module")]
        pairs = list(combinations(range(values.shape[1]), 2))
        of_pairs = [float(np.mean([matrix[pair] for matrix in correlations])) for pair in pairs]
        rows.append((SCORES[score], np.mean(of_pairs), min(of_pairs), max(of_pairs)))
    return pd.DataFrame(rows, columns=["score", "value", "low", "high"])


def sensitivity_of_changed_neurons(neurons: pd.DataFrame, hits: Chart) -> Panels:
    """Draw the sensitivity of changed neurons by block with its null, the stability of each score, and its hit rate.

    Parameters
    ----------
    neurons : DataFrame
        Kept table ``neurons``.
    hits : Chart
        Chart of ``neuron_hits``.
    """
    caption = (
        "Full fine-tuning of a small decoder on the text of a planted teacher. Displacement: norm of the change of a "
        "neuron's weights; rotation: their angle with the initial ones. The teacher changes as many neurons of every "
        "module, but other ones in every seed. Above: geometric mean over neurons and seeds, bars: range over seeds, "
        "band: as many neurons at random. Below: rank correlation of a score between two seeds within a module, mean "
        "over modules and pairs, bars: range over pairs; and percentage of the neurons with the highest scores that "
        f"the teacher changed, one dot per seed. {count_phrase(neurons['seed'].nunique(), 'seed')}, "
        f"{count_phrase(neurons['module'].nunique(), 'module')}."
    )
    charts = []
    for score, title in _PANELS.items():
        table = sensitivity_table(neurons, score)
        marks: list[Mark] = [
            Band("block", "low", "high", "neurons", data=table[table["neurons"] == NULL]),
            Line("block", "value", "neurons"),
            Point("block", "value", "neurons", low="low", high="high"),
        ]
        charts.append(
            Chart(
                table[table["neurons"] != NULL],
                marks,
                title=title,
                x=Axis(label="block", order=sorted(set(table["block"]))),
                y=Axis(label="|w ∂L/∂w|", log=True, ticks=ticks_at([0.01, 0.015, 0.02, 0.03])),
                colors=(CHANGED, OTHER, NULL),
                caption=caption,
            )
        )
    table = stability_table(neurons)
    marks = [Rule(x=0), Point("value", "score", low="low", high="high")]
    if table.empty:
        marks.append(write_word(0.45, SCORES["sensitivity"], "one seed"))
    stability = Chart(
        table,
        marks,
        title="Stability of a score over seeds",
        x=Axis(label=f"rank correlation; permuted: 0 ± {_null_width(neurons):.2f}", limits=(-0.1, 1)),
        y=Axis(order=list(SCORES.values())),
    )
    rates = hits.data.groupby("score")["value"].mean()
    title = (
        f"Rotation finds {rates[SCORES['rotation']]:.0f}% of the changed neurons, sensitivity "
        f"{rates[SCORES['sensitivity']]:.0f}%"
    )
    return Panels((tuple(charts), (stability, replace(hits, caption=""))), title=title)


def _null_width(neurons: pd.DataFrame) -> float:
    """Return half the width of the null of a rank correlation, a mean over modules."""
    sizes = neurons[neurons["seed"] == neurons["seed"].min()].groupby("module").size()
    return float(_Z * np.sqrt((1 / (sizes - 1)).mean() / len(sizes)))
