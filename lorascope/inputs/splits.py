"""Split of rows by a hash of their text: it changes neither with the order of the rows nor with their selection."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import pandas as pd

SPLITS = {"train": 0.7, "validation": 0.8, "test": 1.0}
"""Upper bound of each split on the hash scale, from 0 to 1."""
RULE = "sha256 of the casefolded text; train below 0.7, validation below 0.8, test the rest"


def digest(text: str) -> str:
    """Return the SHA-256 of a text in hex; texts that differ only in case or the amount of white space have the same.

    As all texts of one digest are in the same split, none of them leaks from one split to another.
    """
    return hashlib.sha256(" ".join(text.split()).casefold().encode()).hexdigest()


def assign(digests: Iterable[str]) -> pd.DataFrame:
    """Return ``split`` and ``draw`` of each digest: its first two 64-bit numbers, on a scale from 0 to 1."""
    scaled = [(int(each[start : start + 16], 16) >> 11) / 2**53 for each in digests for start in (0, 16)]
    place, draw = np.array(scaled).reshape(-1, 2).T
    return pd.DataFrame(
        {"split": np.array(list(SPLITS))[np.searchsorted([*SPLITS.values()], place, side="right")], "draw": draw}
    )
