"""Blocks of the page on the first edition: its verdicts, claims without one, and results on published numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from page_blocks import format_table

from lorascope.papers.judging import first_edition
from lorascope.papers.judging.data_folder import PAPERS
from lorascope.papers.judging.first_edition import FirstClaim, format_estimate


def blocks(data: Path) -> dict[str, str]:
    """Return the text of every block by name, from the folder ``data`` of a clone."""
    folder = data / "edition-1"
    claims = first_edition.read_claims(folder / "registered.toml")
    verdicts = pd.read_csv(folder / first_edition.VERDICTS)
    published = pd.read_csv(folder / first_edition.PUBLISHED)
    return {
        "edition-1-verdicts": _verdicts(claims, verdicts),
        "edition-1-retired": _retired(claims, first_edition.read_estimates(folder)),
        "edition-1-published": _published(claims, published),
    }


def _verdicts(claims: Mapping[str, FirstClaim], verdicts: pd.DataFrame) -> str:
    rows = []
    for row in verdicts.itertuples():
        claim = claims[str(row.claim)]
        effect = format_estimate(claim, row.effect, row.low, row.high)
        level = f"{100 * (1 - 2 * row.level):g}%"
        rows.append((_described(claim), row.seeds, f"{effect} ({level})", _bound(claim), row.outcome))
    return format_table(("claim", "seeds", "effect", "bound", "verdict"), rows)


def _retired(claims: Mapping[str, FirstClaim], estimates: pd.DataFrame) -> str:
    """Return a table for each reason, the withdrawn verdicts first."""
    parts = []
    for reason, of_reason in estimates.groupby("reason", sort=False):
        rows = []
        for row in of_reason.itertuples():
            claim = claims[str(row.claim)]
            effect = "not run"
            if row.seeds:
                effect = f"{format_estimate(claim, row.effect, row.low, row.high)} {claim.unit}"
            rows.append((_described(claim), row.seeds, effect))
        table = format_table(("claim", "seeds", "estimate [95%]"), rows)
        parts.append(f"**{str(reason).capitalize()}** ({len(rows)})\n\n{table}")
    return "\n\n".join(parts)


def _published(claims: Mapping[str, FirstClaim], published: pd.DataFrame) -> str:
    rows = []
    for row in published.itertuples():
        claim = claims[str(row.claim)]
        rows.append((_described(claim), row.shown, _bound(claim), row.outcome))
    return format_table(("claim", "effect", "bound", "verdict"), rows)


def _described(claim: FirstClaim) -> str:
    methods = {arxiv: method for method, arxiv in PAPERS.items()}
    place = ", ".join(filter(None, (methods.get(claim.arxiv), claim.place)))
    return f"`{claim.id}` {claim.sentence} ({place})"


def _bound(claim: FirstClaim) -> str:
    where = {"superiority": "above ", "non-inferiority": "above -", "equivalence": "within "}[claim.kind]
    return f"{where}{claim.bound:g} {claim.unit}"
