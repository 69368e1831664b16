"""Table that is displayed whole, for columns of sentences, which pandas cuts after 50 characters."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pandas as pd


class UncutTable(pd.DataFrame):
    """DataFrame whose cells are displayed in full."""

    def __repr__(self) -> str:
        with _display_all():
            return super().__repr__()

    def _repr_html_(self) -> str:
        with _display_all():
            return super()._repr_html_()  # type: ignore[misc]  # the stubs lack it


def _display_all() -> AbstractContextManager[None]:
    # A table that is wider than the terminal is continued below, as pandas would otherwise replace columns by dots.
    return pd.option_context("display.max_colwidth", None, "display.max_rows", None, "display.max_columns", None)
