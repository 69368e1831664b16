"""Measurements of instruments in the folder of a run, for the report card and the doctor, which load no model.

``lorascope dial -o``, ``price -o`` and ``read -o`` write them. A file of another run is not used: its numbers would be
those of other weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lorascope.files.lazy_pandas import pandas as pd
from lorascope.files.printable import printable
from lorascope.files.typed_json import read_json
from lorascope.runs.result import Result

DIAL, PRICE, READING = "dial.csv", "price.json", "reading.json"
_DIAL_COLUMNS = ["part", "learn", "learn_low", "learn_high", "forget", "forget_low", "forget_high"]
_DIAL_COLUMNS += ["learn_share", "forget_share", "verdict", "best_scale"]
_BEST_COLUMNS = ["best_loss", "best_loss_low", "best_loss_high", "best_distance", "best_distance_high"]


class StoredMeasurement(NamedTuple):
    """Measurement in the folder of a run: its file, the title and the caption of its table, and the table."""

    file: str
    title: str
    caption: str
    table: pd.DataFrame


def stored_measurements(run: Result) -> Iterator[StoredMeasurement]:
    """Yield the measurements in the folder of a run.

    Raises
    ------
    ValueError
        A file is not what an instrument writes.
    """
    if (dial := read_dial(run)) is not None:
        caption = "Task loss and distance from the base without each part; 95% intervals over rows."
        yield StoredMeasurement(DIAL, "What each part buys", caption, dial[_DIAL_COLUMNS])
    if (price := read_document(run, PRICE)) is not None:
        caption = f"Verdict: {price['verdict']}, tolerance {price['tolerance']:.3g} nats. Cuts are exact."
        table = pd.DataFrame(price["table"])
        yield StoredMeasurement(PRICE, "Price of rank", caption, table.loc[:, table.notna().any()])
    if (reading := read_document(run, READING)) is not None:
        rows = []
        for card in reading["cards"]:
            words = ", ".join(card["uses"]) or "no word above random components"
            rows.append((card["module"], card["component"], card["total"]["mean"], words))
        table = pd.DataFrame(rows, columns=["module", "component", "total", "words"])
        caption = "Contribution to the margin in nats, and the words that a component uses more than random ones do."
        yield StoredMeasurement(READING, "Words of its components", caption, table)


def read_dial(run: Result) -> pd.DataFrame | None:
    """Return the summary of a dial in the folder of a run; None if there is none of this run.

    Raises
    ------
    ValueError
        The table has other columns.
    """
    file = _file(run, DIAL)
    if file is None:
        return None
    table = pd.read_csv(file, dtype={"part": str, "run": str})
    if missing := {*_DIAL_COLUMNS, *_BEST_COLUMNS, "control", "run"} - set(table):
        raise ValueError(f"{printable(file)} must be the table of a dial, but it has no column {min(missing)}")
    return table if set(table["run"]) == {run.id} else None


def read_document(run: Result, name: str) -> dict[str, Any] | None:
    """Return the JSON form of a price or a reading in the folder of a run; None if there is none of this run.

    Raises
    ------
    ValueError
        The file has no receipt.
    """
    file = _file(run, name)
    if file is None:
        return None
    document = read_json(file, dict[str, Any])
    if not isinstance(document.get("receipt"), dict):
        raise ValueError(f"{printable(file)} must be the result of lorascope price or read, but it has no receipt")
    return document if document["receipt"].get("run") == run.id else None


def _file(run: Result, name: str) -> Path | None:
    if run.path is None or not (run.path / name).is_file():
        return None
    return run.path / name
