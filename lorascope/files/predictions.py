"""Predictions of a model on test rows, as files store them."""

from __future__ import annotations

from typing import Any

import numpy as np

from lorascope.array_types import Float, Int, Int8, Int16
from lorascope.files.lazy_pandas import pandas as pd

_STEPS_OF_MARGIN = 32
_CHOICE = "choice_"


def quantize_margins(logits: Float[np.ndarray, "row class"], labels: Int[np.ndarray, "row"]) -> Int8[np.ndarray, "row"]:
    """Quantize predictions to one byte: the logit of the right class minus the largest other, in steps of 1/32.

    Values are rounded away from zero, so that zero means a tie, and clipped to 127 steps. A difference that is not a
    number is a tie.
    """
    right_logits, other_logits = _separate(logits, labels)
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        margin = np.nan_to_num((right_logits - other_logits.max(axis=1)) * _STEPS_OF_MARGIN, nan=0.0)
    return np.clip(np.sign(margin) * np.ceil(np.abs(margin)), -127, 127).astype(np.int8)


def predict_classes(logits: Float[np.ndarray, "row class"], labels: Int[np.ndarray, "row"]) -> Int16[np.ndarray, "row"]:
    """Return the class with the largest logit; a tie with the right class gives another one, because it is an error."""
    right_logits, other_logits = _separate(logits, labels)
    is_right = right_logits > other_logits.max(axis=1)
    return np.where(is_right, labels, other_logits.argmax(axis=1)).astype(np.int16)


def choice_columns(predictions: pd.DataFrame) -> list[str]:
    """Return the columns of log-likelihoods that predictions with as many choices must have, from choice_0."""
    count = int(predictions.columns.str.startswith(_CHOICE).sum())
    return list(map(f"{_CHOICE}{{}}".format, range(count)))


def to_choice_columns(log_likelihoods: Float[np.ndarray, "row choice"]) -> pd.DataFrame:
    """Return the log-likelihoods of choices as columns of predictions."""
    return pd.DataFrame(log_likelihoods.astype(np.float32)).add_prefix(_CHOICE)


def collect_references(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row per prompt, in their order, with the list of its ``references`` and its first group, if any."""
    columns: dict[str, Any] = dict.fromkeys(rows.columns.drop("prompt"), "first")
    return rows.groupby("prompt", sort=False).agg(columns | {"references": list}).reset_index()


def _separate(
    logits: Float[np.ndarray, "row class"], labels: Int[np.ndarray, "row"]
) -> tuple[Float[np.ndarray, "row"], Float[np.ndarray, "row class"]]:
    """Return the logit of the right class, and all logits with minus infinity in its place."""
    right_logits = np.take_along_axis(logits, labels[:, None], axis=1)[:, 0].astype(np.float64)
    other_logits = np.array(logits, dtype=np.float64)
    np.put_along_axis(other_logits, labels[:, None], -np.inf, axis=1)
    return right_logits, other_logits
