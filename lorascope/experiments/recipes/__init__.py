"""Recipes of papers' tables: names, printed numbers, and the table of the finished runs next to these."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from lorascope.experiments import recipe, recipe_table
from lorascope.runs.run import Run

__all__ = ["names", "printed_scores", "table"]


def names() -> list[str]:
    """Return the names of the recipes in the package."""
    return recipe.recipe_names()


def printed_scores(source: str | Path) -> pd.DataFrame:
    """Return the numbers that the paper of a recipe prints, without its data.

    Parameters
    ----------
    source : str or path
        Name of a recipe, such as "adalora-table1", or its TOML file.

    Returns
    -------
    DataFrame
        One row per printed number, ``row, column, metric, printed, printed_sd, printed_n``: row and column of the table
        of the recipe, name of the metric, number as printed, and its standard deviation and number of seeds, NaN if
        the paper has none. Rows of several rates or arms repeat the number that all of them are compared with.

    Raises
    ------
    ValueError
        A key of the recipe is invalid.
    FileNotFoundError
        There is no such file or recipe.

    Examples
    --------
    >>> ls.recipes.printed_scores("fourierft-table2")
    """
    cells = recipe_table.tabulate(recipe.read_printed(source), {})
    # Evaluations of a cell have one printed number.
    cells = cells.dropna(subset="printed").drop_duplicates(["row", "column"])
    return cells[["row", "column", "metric", "printed", "printed_sd", "printed_n"]].reset_index(drop=True)


def table(source: str | Path, runs: Iterable[Run] | None = None) -> pd.DataFrame:
    """Return the scores of the finished runs of a recipe, with the printed numbers.

    Parameters
    ----------
    source : str or path
        Name of a recipe, such as "adalora-table1", or its TOML file. Its data are loaded.
    runs : iterable of Run, optional
        Finished runs, of which those of the recipe count. Default: those in its folder.

    Returns
    -------
    DataFrame
        One row per column and row of the table, and evaluation: ``column, metric, row, evaluation, mean, low, high, n,
        seeds, median, minimum, maximum, printed, printed_sd, printed_n, difference, difference_low, difference_high``.
        ``low`` and ``high`` are the 95% t-interval over seeds, ``n`` the finished ones of ``seeds``.

    Raises
    ------
    ValueError
        A key of the recipe is invalid.
    FileNotFoundError
        There is no such file or recipe, or a task does not exist.

    Examples
    --------
    >>> scores = ls.recipes.table("adalora-table1")
    >>> ls.plots.printed_table(scores)
    """
    plan = recipe.read(source)
    return recipe_table.tabulate(plan, recipe_table.find_runs(plan, runs))


def __dir__() -> list[str]:
    return __all__
