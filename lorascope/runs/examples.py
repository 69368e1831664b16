"""Example runs and adapters of the package, which need no training: ``ls.examples()`` lists them."""

from __future__ import annotations

from pathlib import Path

from lorascope.files.data_folder import DATA
from lorascope.files.lazy_pandas import pandas as pd
from lorascope.files.typed_json import read_json
from lorascope.runs.adapter import Adapter
from lorascope.runs.loading import load
from lorascope.runs.run import Run
from lorascope.runs.series import Series
from lorascope.schema.suggestions import unknown_name

FOLDER = DATA / "examples"


def list_examples() -> pd.DataFrame:
    """List the examples that `example` loads.

    All of them adapt a small decoder with random weights to text that the same decoder wrote with a known update: its
    ranks are the ``planted_rank`` of "adalora". ``python data/write_examples.py`` in a clone makes them again.

    Returns
    -------
    DataFrame
        One row per example, with its name as index: ``kB`` (size of its files), ``description`` and ``made`` (method,
        steps, text and seed).

    Examples
    --------
    >>> ls.examples()
    >>> ls.plots.update_norm_heat(ls.example("lora"))
    """
    from lorascope.schema.uncut_table import UncutTable  # imports pandas, which `example` does not need

    table = pd.DataFrame.from_dict(_read_list(), orient="index")
    # Measured here, because a stored size would have to be changed with every format of the files.
    for name in table.index:
        files = filter(Path.is_file, (FOLDER / name).rglob("*"))
        table.loc[name, "kB"] = round(sum(file.stat().st_size for file in files) / 1000)
    return UncutTable(table.astype({"kB": int}).rename_axis("name")[["kB", "description", "made"]])


def example(name: str) -> Run | Adapter | Series:
    """Load an example of the package; its ``path`` is its folder.

    Parameters
    ----------
    name : str
        Name in `list_examples`, such as ``"adalora"``.

    Raises
    ------
    ValueError
        There is no example of this name.

    Examples
    --------
    >>> ls.plots.rank_allocation(ls.example("adalora"))
    """
    names = _read_list()
    if name not in names:
        raise ValueError(unknown_name("example", name, names))
    return load(FOLDER / name)


def _read_list() -> dict[str, dict[str, str]]:
    """Return what each example is and how it was made, by name."""
    return read_json(FOLDER / "examples.json", dict[str, dict[str, str]])
