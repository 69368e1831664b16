"""Figure of NeFT's motive: how many of the changed neurons each score finds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pandas as pd

from lorascope.charts.chart import Chart
from lorascope.charts.marks import Axis, Mark, Point, Rule
from lorascope.papers.figures.study_marks import write_word

SCORES = {
    "displacement": "displacement",
    "rotation": "rotation (NeFT)",
    "sensitivity": "sensitivity, step 0",
    "sensitivity_end": "sensitivity, end",
    "selected": "NeFT's selection",
}
"""Columns of the kept table, and their names."""


def hit_table(neurons: pd.DataFrame, hit_rate: Callable[[pd.DataFrame, str], float]) -> pd.DataFrame:
    """Tabulate ``score, seed, value`` with the hit rate in percent, from the kept table ``neurons``."""
    rows = []
    if len(neurons):  # an empty table may lack its columns
        for seed, of_seed in neurons.groupby("seed"):
            for column, name in SCORES.items():
                rows.append((name, seed, hit_rate(of_seed, column)))
    return pd.DataFrame(rows, columns=["score", "seed", "value"]).astype({"value": "float64"})


def neuron_hits(neurons: pd.DataFrame, hit_rate: Callable[[pd.DataFrame, str], float], at_random: float) -> Chart:
    """Draw the hit rate of each score, a dot per seed.

    Parameters
    ----------
    neurons : DataFrame
        Kept table ``neurons``.
    hit_rate : callable
        ``hit_rate(table of a run, column)``: percentage of the best neurons that the teacher changed.
    at_random : float
        Expected hit rate of random neurons, in percent.
    """
    table = hit_table(neurons, hit_rate)
    marks: list[Mark] = [Rule(x=at_random), Point("value", "score")]
    if table.empty:
        marks += map(partial(write_word, 50.0), SCORES.values())
    return Chart(
        table,
        marks,
        title="Changed neurons that a score finds",
        x=Axis(label=f"hit rate (%); random: {at_random:.1f}", limits=(0, 100)),
        y=Axis(order=SCORES.values()),
        caption="Fraction of the neurons with the highest scores that the teacher changed, as many as it changed. "
        "Each dot is one seed. Scores come from full fine-tuning.",
    )
