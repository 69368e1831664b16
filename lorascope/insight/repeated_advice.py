"""Verification of an advice: everything is measured again, and numbers that differ are named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorascope.insight.advise import Adviser, Plan
from lorascope.insight.measured_results import measured_again
from lorascope.runs.result import Result

_TOLERANCE = 1e-6  # of a repeated number


def repeat(document: Mapping[str, Any], run: Result) -> list[str]:
    """Measure an advice again, and return one line per number that differs by more than 1e-6.

    Parameters
    ----------
    document : mapping
        The JSON form of an advice.
    run : Run, Adapter or Series
        Its run.

    Raises
    ------
    ValueError
        The run is another one, or its model and task were passed as objects.
    """
    # Seconds and texts may differ, numbers may not.
    receipt = document["receipt"]
    call = receipt["call"]
    model, task, keep = (call[name] or None for name in ("model", "task", "keep"))
    adviser = Adviser(run, model, task, keep, call["rows"], call["keep_rows"], call["state"], progress=False)
    # For a series, the last checkpoint is measured.
    if receipt["run"] != adviser.run.id:
        raise ValueError(f"the receipt is of run {receipt['run']}, got {adviser.run.id}")
    with measured_again():
        adviser.measure(Plan(**call["plan"]), call["retrain"])
    repeated = adviser.give({}).to_json()
    lines = []
    for section in ("facts", "actions"):
        before, after = document[section], repeated[section]
        if [item.get("name", item.get("verdict")) for item in before] != [
            item.get("name", item.get("verdict")) for item in after
        ]:
            lines.append(f"{section}: other entries than before")
            continue
        for old, new in zip(before, after, strict=True):
            lines += _differences(old, new)
    return lines


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    title = old.get("name") or old["change"]
    lines = []
    for name, value in old.items():
        if name in ("text", "change", "command", "weight") or isinstance(value, str):
            continue
        if (value is None) != (new[name] is None) or (value is not None and abs(value - new[name]) > _TOLERANCE):
            lines.append(f"{title}: {name} kept {value}, measured {new[name]}")
    return lines
