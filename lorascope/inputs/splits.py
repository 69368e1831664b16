"""Split of rows by a hash of their text, which changes neither with their order nor with their selection, or as given.

The column ``split`` of a table gives the splits of its rows; a mapping names a part of them for each split.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lorascope.files.printable import count_phrase, printable

SPLITS = {"train": 0.7, "validation": 0.8, "test": 1.0}
"""Upper bound of each split on the hash scale, from 0 to 1."""
RULE = "sha256 of the casefolded text; train below 0.7, validation below 0.8, test the rest"
COLUMN_RULE = f"column split; rows of train for a split without rows: {RULE}"
_SPLIT_OF = dict(zip(SPLITS, SPLITS, strict=True)) | {"dev": "validation", "valid": "validation"}
_PART = re.compile(r"(?P<source>[^\[\]]+?)\s*(?:\[(?P<low>\d+%)?:(?P<high>\d+%)?\])?")


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


def split_of_word(word: str) -> str | None:
    """Return the split that a word such as "Dev" names, or None."""
    return _SPLIT_OF.get(word.casefold())


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
        if split := split_of_word(word):
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


@dataclass(frozen=True)
class Selection:
    """Rows that a mapping selects: their positions in the table, in any order, and the split of each.

    ``selected_on_test`` is whether validation and test are the same rows. ``test_sets`` are the names of several test
    sets, of which the first is the split test.
    """

    positions: list[int]
    splits: list[str]
    selected_on_test: bool
    test_sets: tuple[str, ...] = ()


def split_of_test_set(name: str) -> str:
    """Return the split of a test set after the first."""
    return f"test:{name}"


def require_rule(rule: object) -> None:
    """Raise a ValueError if the argument ``splits`` of a task is invalid."""
    if rule is None or rule in ("given", "hash"):
        return
    if not isinstance(rule, Mapping):
        raise ValueError(f"splits must be 'given', 'hash' or a mapping of {', '.join(SPLITS)}, got {rule!r}")
    if rule.keys() != SPLITS.keys():
        raise ValueError(f"splits must name {', '.join(SPLITS)}, got {', '.join(map(repr, rule)) or 'nothing'}")
    for split, source in sources_by_split(rule).items():
        if not isinstance(source, str) or not _PART.fullmatch(source.strip()):
            raise ValueError(f"splits: {split} must be a split, or a part such as 'train[10%:]', got {source!r}")


def sources_by_split(rule: Mapping[str, Any]) -> dict[str, Any]:
    """Return the source of each split of a mapping, with one split per test set."""
    test = rule.get("test")
    if not isinstance(test, Mapping) or not test:
        return dict(rule)
    sources = dict(rule)
    first = next(iter(test))
    for name, source in test.items():
        sources["test" if name == first else split_of_test_set(name)] = source
    return sources


def select(rule: Mapping[str, Any], sources: pd.Series, digests: pd.Series, name: str) -> Selection:
    """Return the rows that a valid mapping selects for each split.

    Parameters
    ----------
    rule : mapping of str to str
        Source of train, validation and test, such as ``"train[10%:]"``, or of each test set. A percentage is one of the
        rows in the order of their digests, which is random; rows of one digest stay together.
    sources : Series
        The split of each row in the source, with the same index as ``digests``: 0 to the number of rows.
    digests : Series
        See :func:`digest_text`.
    name : str
        Name of the table, for errors.

    Raises
    ------
    ValueError
        A source does not exist, or train has rows of another split.
    """
    rows_of: dict[str, set[int]] = {}
    for split, source in sources_by_split(rule).items():
        match = _PART.fullmatch(source.strip())
        assert match is not None
        members = digests[sources == match["source"]]
        if members.empty:
            names = ", ".join(map(printable, sources.unique()))
            raise ValueError(f"splits: unknown split {match['source']!r} of {name}; expected one of {names}")
        low, high = int((match["low"] or "0%")[:-1]), int((match["high"] or "100%")[:-1])
        # Products of integers, because 0.07 * 100 is larger than 7.
        ranks = 100 * (members.rank(method="min") - 1)
        is_inside = (ranks >= low * len(members)) & (ranks < high * len(members))
        rows_of[split] = set(members.index[is_inside])
    selected_on_test = rows_of["validation"] == rows_of["test"]
    # In the order of the mapping, which may name the splits in any.
    ordered = sorted(rows_of, key=[*SPLITS, *rows_of].index)
    for split, other in itertools.combinations(ordered, 2):
        shared = rows_of[split] & rows_of[other]
        if shared and not (selected_on_test and (split, other) == ("validation", "test")):
            count = count_phrase(len(shared), "row")
            verb = "is" if len(shared) == 1 else "are"
            first = f"the first is row {1 + min(shared)}"
            raise ValueError(f"cannot use splits of {name}: {count} of {split} {verb} also in {other}, {first}")
    positions, assigned = [], []
    for split, members_of_split in rows_of.items():
        positions += sorted(members_of_split)
        assigned += [split] * len(members_of_split)
    test_sets: tuple[str, ...] = ()
    if isinstance(rule["test"], Mapping):
        test_sets = tuple(map(str, rule["test"]))
    return Selection(positions, assigned, selected_on_test, test_sets)


def _unit_number(digits: str) -> float:
    """Return the number in [0, 1) of 16 hex digits: their first 53 bits, which float64 represents."""
    return (int(digits, 16) >> 11) / 2**53
