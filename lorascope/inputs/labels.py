"""Labels of a table as class names, or as numbers to predict."""

from __future__ import annotations

import math
import reprlib

import pandas as pd

from lorascope.files.safe_csv import is_numeric_text
from lorascope.inputs import sources


def read_names(rows: pd.DataFrame, name: str) -> list[str]:
    """Return labels as class names: strings, whole numbers or booleans. A fraction is a rating, not a class."""
    names = []
    for number, label in enumerate(rows["label"].to_list(), start=1):
        if isinstance(label, float) and label.is_integer():
            label = int(label)
        text = str(label).strip() if isinstance(label, str | int) else ""
        if not text or (is_numeric_text(text) and not _is_whole_number(text)):
            raise ValueError(
                f"label in row {number} of {name} must be a class name or whole number, got {reprlib.repr(label)}"
            )
        names.append(text)
    return names


def has_fractions(labels: pd.Series) -> bool:
    """Return whether all labels are numbers, and some are not whole; hidden ones are neither."""
    texts = labels[labels != sources.HIDDEN_LABEL].astype(str).str.strip()
    return bool(texts.map(is_numeric_text).all()) and bool((pd.to_numeric(texts, errors="coerce") % 1 > 0).any())


def read_numbers(rows: pd.DataFrame, name: str) -> list[float]:
    """Return labels as numbers, NaN for hidden ones."""
    numbers = []
    for number, label in enumerate(rows["label"].to_list(), start=1):
        value = math.nan
        if label != sources.HIDDEN_LABEL:
            try:
                value = float(label)
            except (TypeError, ValueError):
                value = math.inf
            if not math.isfinite(value):
                raise ValueError(f"label in row {number} of {name} must be a finite number, got {reprlib.repr(label)}")
        numbers.append(value)
    return numbers


def _is_whole_number(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def sort_key(label: str) -> tuple[int, str]:
    """Return the sort key of a label: numbers by value, all others by name."""
    return int(label) if _is_whole_number(label) else 0, label
