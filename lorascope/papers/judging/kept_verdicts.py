"""Table of the kept verdicts: claims on published figures first, then claims on trained runs."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from lorascope.files.printable import count_phrase, printable
from lorascope.files.typed_json import unreadable
from lorascope.papers.judging import first_edition, published_numbers, registration
from lorascope.papers.judging.claims import with_level
from lorascope.papers.judging.csv_tables import read_csv
from lorascope.papers.judging.registration import Registration
from lorascope.papers.judging.verdicts import VERDICT_COLUMNS

COLUMNS = ("claim", "sentence", "n", "effect", "control", "outcome")


@dataclass(frozen=True)
class KeptVerdicts:
    """Kept verdicts of a folder ``data``.

    Parameters
    ----------
    table : DataFrame
        ``COLUMNS``: one row per claim with a verdict. ``n`` is the number of seeds, or of published values; ``effect``
        has the interval and its level, and ``outcome`` the side of zero of an interval that does not contain it and the
        claim's note.
    notes : tuple of str
        What the table lacks.
    """

    table: pd.DataFrame
    notes: tuple[str, ...] = ()


def read(data: Path = registration.FILE.parent) -> KeptVerdicts:
    """Read the kept verdicts.

    Parameters
    ----------
    data : path
        Folder ``data`` of a clone of the repository. Without it, there are no verdicts.
    """
    if not (data / "registered.toml").exists():
        return KeptVerdicts(
            pd.DataFrame(columns=list(COLUMNS)), ("No verdicts here: they are kept in a clone of the repository.",)
        )
    claims, file = registration.read(data / "registered.toml"), data / "evidence" / "verdicts.csv"
    tables, notes = [published_numbers.judge_published(first_edition.read_claims(), data / "published")], []
    if file.exists():
        verdicts = read_file(file, claims)
        judged = have_verdict(verdicts)
        tables.append(verdicts[judged])
        if missing := int((~judged).sum()):
            notes.append(f"Claims without a verdict: {missing} of {len(verdicts)}.")
    else:
        notes.append("No trained runs are judged yet: data/evidence has no verdicts.csv.")
    return KeptVerdicts(pd.concat([_rows(table, claims) for table in tables], ignore_index=True), tuple(notes))


def have_verdict(verdicts: pd.DataFrame) -> pd.Series:
    """Return which claims of a kept ``verdicts.csv`` have a verdict: void, or by runs of the registered arms."""
    return ((verdicts["look"] >= 1) & (verdicts["arms_state"] != "changed")) | (verdicts["outcome"] == "void")


def read_file(file: Path, claims: Registration) -> pd.DataFrame:
    """Read a kept ``verdicts.csv``, with one row per claim on trained runs.

    Raises
    ------
    FileNotFoundError
        The file does not exist.
    ValueError
        The file is damaged, or does not have every claim once.
    """
    verdicts = read_csv(file, VERDICT_COLUMNS)
    counts, expected = Counter(verdicts["claim"]), Counter([*claims.of_tier("primary", "secondary")])
    for id in (*expected, *counts):  # also claims that are not registered
        if counts[id] != expected[id]:
            times = count_phrase(expected[id], "time")
            raise unreadable(file, f"claim {printable(id)!r} must occur {times}, got {counts[id]}")
    return verdicts


def _rows(verdicts: pd.DataFrame, claims: Registration) -> pd.DataFrame:
    rows = []
    for verdict in verdicts.to_dict("records"):
        text = claims.claims[verdict["claim"]].text
        # Published figures have their own intervals.
        effect = with_level(verdict["shown"], verdict.get("level", math.nan))
        outcome = verdict["outcome"]
        if verdict.get("side"):
            outcome += f", {verdict['side']}"
        if verdict.get("note"):
            outcome += f"; {verdict['note']}"
        rows.append((verdict["claim"], text.sentence, verdict["n"], effect, text.control, outcome))
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"n": "int64"})
