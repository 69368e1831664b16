"""Table that is displayed whole, for columns of sentences, which pandas cuts after 50 characters."""

from __future__ import annotations

import pandas as pd


class UncutTable(pd.DataFrame):
    """DataFrame whose cells are displayed in full."""

    def __repr__(self) -> str:
        with pd.option_context("display.max_colwidth", None, "display.max_rows", None):
            return super().__repr__()

    def _repr_html_(self) -> str:
        with pd.option_context("display.max_colwidth", None, "display.max_rows", None):
            return super()._repr_html_()  # type: ignore[misc]  # the stubs lack it
