"""Split of rows by a hash of their text: it changes neither with the order of the rows nor with their selection."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import pandas as pd

SPLITS = {"train": 0.7, "validation": 0.8, "test": 1.0}
"""Upper bound of each split on the hash scale, from 0 to 1."""
RULE = "sha256 of the casefolded text; train below 0.7, validation below 0.8, test the rest"


def digest_text(text: str) -> str:
    """Return the SHA-256 of a text, which decides its split; case and the amount of white space do not matter.

    As all texts of one digest are in the same split, none of them leaks from one split to another.
    """
    return hashlib.sha256(" ".join(text.split()).casefold().encode()).hexdigest()


def assign(digests: Iterable[str]) -> pd.DataFrame:
    """Return the ``split`` and ``draw`` of each row's digest: its first two 64-bit numbers, scaled to 0 to 1."""
    numbers = [(_unit_number(digest[:16]), _unit_number(digest[16:32])) for digest in digests]
    position, draw = np.array(numbers, dtype=np.float64).reshape(-1, 2).T
    split = np.array(list(SPLITS))[np.searchsorted([*SPLITS.values()], position, side="right")]
    return pd.DataFrame({"split": split, "draw": draw})


def _unit_number(digits: str) -> float:
    """Return the number in [0, 1) of 16 hex digits: their first 53 bits, which float64 represents."""
    return (int(digits, 16) >> 11) / 2**53
