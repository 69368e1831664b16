"""Labels of a table as class names, as numbers to predict, or as choices with the number of the right one."""

from __future__ import annotations

import math
import reprlib

import numpy as np
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


def read_choices(rows: pd.DataFrame, name: str) -> list[list[str]]:
    """Return the choices of each row."""
    lists = []
    for number, cell in enumerate(rows["choices"].to_list(), start=1):
        # Parquet files have arrays.
        texts = list(cell) if isinstance(cell, list | tuple | np.ndarray) else []
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            expected = "must be a list of non-empty strings"
            raise ValueError(f"choices in row {number} of {name} {expected}, got {reprlib.repr(cell)}")
        lists.append(texts)
    return lists


def read_answers(rows: pd.DataFrame, choices: list[list[str]], name: str) -> list[int]:
    """Return the number of the right choice of each row, from 0; ``HIDDEN_ANSWER`` for hidden ones."""
    answers = []
    for number, (answer, texts) in enumerate(zip(rows["answer"].to_list(), choices, strict=True), start=1):
        if answer == sources.HIDDEN_LABEL:
            answers.append(sources.HIDDEN_ANSWER)
            continue
        is_number = isinstance(answer, int | float | np.integer) and not isinstance(answer, bool)
        if not is_number or answer not in range(len(texts)):
            raise ValueError(
                f"answer in row {number} of {name} must be from 0 to {len(texts) - 1}, got {reprlib.repr(answer)}"
            )
        answers.append(int(answer))
    return answers


def _is_whole_number(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def sort_key(label: str) -> tuple[int, str]:
    """Return the sort key of a label: numbers by value, all others by name."""
    return int(label) if _is_whole_number(label) else 0, label
