"""Figures and tables of the nine papers, and which of them this package draws."""

from __future__ import annotations

from lorascope.files.lazy_pandas import pandas as pd
from lorascope.runs.examples import FOLDER

FILE = FOLDER.with_name("paper-figures.csv")


def by_paper(paper: str) -> pd.DataFrame:
    """List the figures and tables of a paper, and what draws them.

    Parameters
    ----------
    paper : str
        arXiv id, such as ``"2303.10512"``, or name of the method, such as ``"AdaLoRA"``.

    Returns
    -------
    DataFrame
        One row per figure or table of the paper, with its number as index: what it ``shows``; the ``function`` of
        `lorascope.plots` that draws it from your runs, if there is one; the ``image`` of this project's study in the
        folder ``figures``; ``state`` (done, runs open: drawn once its runs are finished, claim: judged on another
        task, or missing); and ``note``, the difference from the paper or why it is missing.

    Raises
    ------
    ValueError
        The paper is not one of the nine.

    Examples
    --------
    >>> ls.plots.by_paper("2303.10512")
    """
    from lorascope.schema.uncut_table import UncutTable  # imports pandas, which listing names does not need

    table = pd.read_csv(FILE, dtype=str, keep_default_na=False)
    key = paper.lower().removeprefix("arxiv:")
    rows = table[(table["arxiv"] == key) | (table["paper"].str.lower() == key)]
    if rows.empty:
        papers = table[["arxiv", "paper"]].drop_duplicates().to_numpy()
        ids = ", ".join(f"{arxiv} ({name})" for arxiv, name in papers)
        raise ValueError(f"unknown paper {paper!r}; expected one of {ids}")
    return UncutTable(rows.drop(columns=["paper", "arxiv"]).set_index("item"))
