"""Count the bundled sentences: ``python data/counts.py`` writes ``sentiment_counts.csv`` next to itself."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from lorascope.inputs import tasks

TABLE = Path(__file__).resolve().with_name("sentiment_counts.csv")


def counts() -> pd.DataFrame:
    """Rows by domain, label and split.

    Returns
    -------
    DataFrame
        Columns domain, label, train, validation and test.
    """
    task = tasks.load("sentiment")
    parts = pd.concat([rows.assign(split=name) for name, rows in task.splits.items()])
    table = parts.groupby(["group", "label", "split"]).size().unstack()[list(task.splits)]
    return table.rename_axis(index=["domain", "label"], columns=None).reset_index()


if __name__ == "__main__":
    counts().to_csv(TABLE, index=False)
    print(TABLE.read_text(encoding="utf-8"), end="")
