"""Figure of the table of a recipe: scores with their intervals next to the numbers that a paper prints."""

from __future__ import annotations

import itertools
import math

import pandas as pd

from lorascope.charts.chart import Chart, Drawable, Panels
from lorascope.charts.marks import Axis, Point
from lorascope.plots.figure_registry import document_result
from lorascope.schema.labels import to_words

_EVALUATIONS = {"best": "best evaluation", "last": "last evaluation", "test": "test", "printed": "printed"}
_READ = ("column", "metric", "row", "evaluation", "mean", "low", "high", "n", "seeds", "printed", "printed_sd")
_PER_LINE = 3


@document_result
def printed_table(table: pd.DataFrame) -> Drawable:
    """Plot the scores of a recipe with their intervals next to the printed numbers, one panel per column of the table.

    Where the interval of a score contains the printed number, the seeds do not distinguish them, which does not show
    that they are equal. The best evaluation is selected on the reported split, so it is higher than that of new data.

    Parameters
    ----------
    table : DataFrame
        Table of ``ls.recipes.table``. Columns without scores and printed numbers have no panel.

    Raises
    ------
    ValueError
        The table is of another kind, or has neither a score nor a printed number.

    Examples
    --------
    >>> ls.plots.printed_table(ls.recipes.table("adalora-table1"))
    """
    if missing := [name for name in _READ if name not in table]:
        raise ValueError(f"table must be of ls.recipes.table, got one without the column {missing[0]}")
    cells = _stack(table)
    if cells.empty:
        raise ValueError("cannot plot the table: it has neither a score nor a printed number")
    rows = list(cells["row"].unique())
    used = [name for name in _EVALUATIONS if name in set(cells["evaluation"])]
    cells = cells.assign(
        line=cells["row"] + "\n" + cells["evaluation"], evaluation=cells["evaluation"].map(_EVALUATIONS)
    )
    order = [f"{row}\n{name}" for row, name in itertools.product(rows, used)]
    # A row of the table has one line per evaluation, because their intervals overlap. The middle one has its name.
    names = {f"{row}\n{used[(len(used) - 1) // 2]}": row for row in rows}
    charts = []
    for number, (column, of_column) in enumerate(cells.groupby("column", sort=False)):
        # Panels of a line have the same rows, so the first one names them.
        ticks = dict.fromkeys(names, "") if number % _PER_LINE else names
        axis = Axis(order=order, ticks=ticks)
        charts.append(_draw_column(str(column), of_column.reset_index(drop=True), axis))
    lines = [tuple(charts[first : first + _PER_LINE]) for first in range(0, len(charts), _PER_LINE)]
    return Panels(tuple(lines), columns=min(_PER_LINE, len(charts)), title="Scores and printed numbers")


def _stack(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row per score and per printed number: ``column, metric, row, evaluation, value, low, high``."""
    scores = table.rename(columns={"mean": "value"})
    numbers = table.drop_duplicates(["column", "row"]).assign(evaluation="printed", n=math.nan, seeds=math.nan)
    numbers = numbers.assign(
        value=numbers["printed"],
        low=numbers["printed"] - numbers["printed_sd"],
        high=numbers["printed"] + numbers["printed_sd"],
    )
    names = ["column", "metric", "row", "evaluation", "value", "low", "high", "n", "seeds"]
    return pd.concat([numbers[names], scores[names]]).dropna(subset="value")


def _draw_column(column: str, cells: pd.DataFrame, rows: Axis) -> Chart:
    """Draw the scores of one column over the rows of the table."""
    metric = to_words(cells["metric"].iloc[0]).replace("_", " ")
    return Chart(
        cells,
        [Point("value", "line", "evaluation", low="low", high="high")],
        title=f"{column}, {metric}",
        # Each panel has its own range, so its label has to differ.
        x=Axis(label=column),
        y=rows,
        caption=(
            "Scores: mean over the finished seeds, bars: 95% t-interval. Printed: number of the paper, bars: its "
            "standard deviation over seeds, if it prints one."
        ),
        meta={"figure": "printed_table"},
        colors=dict.fromkeys(_EVALUATIONS.values()),
    )
