"""Split of rows by a hash of their text, which changes neither with their order nor with their selection, or as given.

The column ``split`` of a table gives the splits of its rows.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pandas as pd

from lorascope.files.printable import count_phrase, printable

SPLITS = {"train": 0.7, "validation": 0.8, "test": 1.0}
"""Upper bound of each split on the hash scale, from 0 to 1."""
RULE = "sha256 of the casefolded text; train below 0.7, validation below 0.8, test the rest"
COLUMN_RULE = f"column split; rows of train for a split without rows: {RULE}"
_SPLIT_OF = dict(zip(SPLITS, SPLITS, strict=True)) | {"dev": "validation"}


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


def read_column(words: Iterable[object], name: str) -> list[str]:
    """Return the split that the column ``split`` of a table gives each row; ``name`` names the table.

    Raises
    ------
    ValueError
        A word is not the name of a split.
    """
    splits: list[str] = []
    unknown: Counter[str] = Counter()
    for cell in words:
        word = str(cell).strip()
        if split := _SPLIT_OF.get(word.casefold()):
            splits.append(split)
        else:
            unknown[word] += 1
    if unknown:
        counts = [f"{printable(word)!r} in {count_phrase(count, 'row')}" for word, count in unknown.most_common()]
        raise ValueError(f"split of {name} must be train, validation (or dev) or test, got {', '.join(counts[:5])}")
    return splits


def complete(stated: pd.Series, assigned: pd.Series) -> pd.Series:
    """Return the stated splits; a split without rows gets the rows of train that ``assign`` would put into it."""
    missing = SPLITS.keys() - set(stated)
    return stated.mask((stated == "train") & assigned.isin(missing), assigned)


def _unit_number(digits: str) -> float:
    """Return the number in [0, 1) of 16 hex digits: their first 53 bits, which float64 represents."""
    return (int(digits, 16) >> 11) / 2**53
