"""Recipes of papers' tables: their names, and the table of their finished runs next to the printed numbers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from lorascope.experiments import recipe, recipe_table
from lorascope.runs.run import Run

__all__ = ["names", "table"]


def names() -> list[str]:
    """Return the names of the recipes in the package."""
    return recipe.recipe_names()


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
