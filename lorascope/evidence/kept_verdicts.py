"""Table of the kept verdicts: claims on published figures first, then claims on trained runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from lorascope.evidence import published, registration
from lorascope.evidence.registration import Registration

COLUMNS = ("claim", "sentence", "n", "effect", "control", "outcome")


@dataclass(frozen=True)
class KeptVerdicts:
    """Verdicts of a folder ``data``.

    Parameters
    ----------
    table : DataFrame
        ``COLUMNS``: one row per claim with a verdict. ``n`` is the number of seeds, or of published values; ``effect``
        has the interval, and ``outcome`` the side of zero of an interval that does not contain it.
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
    tables, notes = [published.judge(claims.claims, data / "published")], []
    if file.exists():
        kept = pd.read_csv(file)
        judged = (kept["look"] >= 1) | (kept["outcome"] == "void")
        tables.append(kept[judged].fillna({"side": "", "shown": ""}))
        if missing := int((~judged).sum()):
            notes.append(f"Claims without a verdict: {missing} of {len(kept)}.")
    else:
        notes.append("No trained runs are judged yet: data/evidence has no verdicts.csv.")
    return KeptVerdicts(pd.concat([_rows(table, claims) for table in tables], ignore_index=True), tuple(notes))


def _rows(verdicts: pd.DataFrame, claims: Registration) -> pd.DataFrame:
    texts = [claims.claims[id].text for id in verdicts["claim"]]
    sides = verdicts["side"].map(lambda side: f", {side}" if side else "")
    return pd.DataFrame(
        {
            "claim": verdicts["claim"],
            "sentence": [text.sentence for text in texts],
            "n": verdicts["n"].astype("int64"),
            "effect": verdicts["shown"],
            "control": [text.control for text in texts],
            "outcome": verdicts["outcome"] + sides,
        }
    )
