"""Output of ``lorascope inspect`` for a series of checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from json import dumps

from lorascope.diagnosis.series_inspection import inspect_series, series_screen
from lorascope.files.lazy_pandas import pandas as pd
from lorascope.files.safe_csv import csv_text
from lorascope.runs.loading import load_series


def show_series(paths: Sequence[str], base: str | None, spectra: bool, all: bool, json: bool, csv: bool) -> int:
    """Print the checkpoints of a folder, or several adapters as those of one training; see ``inspect`` for the options.

    Skipped checkpoints are part of the output.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        series = load_series(paths[0] if len(paths) == 1 else paths, base)
    found = inspect_series(series, spectra)
    if csv:
        print(csv_text(pd.DataFrame(found.modules()).astype({"layer": "Int16"}).assign(name=series.label)), end="")
    else:
        print(dumps(found.to_json(), indent=1) if json else series_screen(found, all))
    return 0
