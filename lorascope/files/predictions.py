"""Predictions of a model on test rows, as files store them."""

from __future__ import annotations

import numpy as np

from lorascope.array_types import Float, Int, Int8

_STEPS_OF_MARGIN = 32


def quantize_margins(logits: Float[np.ndarray, "row class"], labels: Int[np.ndarray, "row"]) -> Int8[np.ndarray, "row"]:
    """Quantize predictions to one byte: the logit of the right class minus the largest other, in steps of 1/32.

    Values are rounded away from zero, so that zero means a tie, and clipped to 127 steps. A difference that is not a
    number is a tie.
    """
    right_logits = np.take_along_axis(logits, labels[:, None], axis=1)[:, 0].astype(np.float64)
    other_logits = np.array(logits, dtype=np.float64)
    np.put_along_axis(other_logits, labels[:, None], -np.inf, axis=1)
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        margin = np.nan_to_num((right_logits - other_logits.max(axis=1)) * _STEPS_OF_MARGIN, nan=0.0)
    return np.clip(np.sign(margin) * np.ceil(np.abs(margin)), -127, 127).astype(np.int8)
