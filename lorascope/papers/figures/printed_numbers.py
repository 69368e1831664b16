"""Numbers that the papers print, in the form of the figures: accuracies as fractions, parameters as numbers."""

from __future__ import annotations

import pandas as pd

from lorascope.papers.judging import registration


def printed(**columns: str) -> pd.DataFrame:
    """Return rows of ``data/published/reported.csv``, whose scores are in points, in the units of the figures.

    Parameters
    ----------
    **columns
        Values of the columns ``paper, table, model, data, metric, method`` by which rows are chosen.

    Returns
    -------
    DataFrame
        ``method, data, size, parameters, value, source``; ``size`` is the number or percentage of parameters as
        printed, ``parameters`` is NaN where the paper prints no number, and ``source`` is an entry of a legend.
    """
    table = pd.read_csv(registration.FILE.parent / "published" / "reported.csv")
    for name, value in columns.items():
        table = table[table[name] == value]
    size = table["parameters"]
    millions = pd.to_numeric(size.where(size.str.endswith("M").eq(True)).str.removesuffix("M"))
    found = table[["method", "data"]].assign(size=size, parameters=1e6 * millions, value=table["value"] / 100)
    return found.assign(source="printed: " + found["method"]).reset_index(drop=True)
