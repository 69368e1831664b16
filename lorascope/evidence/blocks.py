"""Text of the blocks of README and docs that come from the evidence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lorascope.evidence import published
from lorascope.evidence.registration import Registration


def published_block(registration: Registration, folder: Path) -> str:
    """Return the table of verdicts on published figures."""
    claims = registration.of_tier("published")
    lines = ["| claim | compared | effect | bound | verdict |", "|---|---|---|---|---|"]
    for row in published.judge(claims, folder).to_dict("records"):
        registered = claims[row["claim"]]
        bound = f"{'margin' if registered.bound.margin else 'tolerance'} {registered.claim.bound:g}"
        verdict = f"{row['outcome']}, {row['side']}" if row["side"] else row["outcome"]
        compared = f"{registered.text.statistic}; {registered.text.control}"
        lines.append(f"| {registered.text.sentence} | {compared} | {row['shown']} | {bound} | {verdict} |")
    return "\n".join(["", *lines, "", ""])


def all_blocks(registration: Registration, data: Path) -> Mapping[str, str]:
    """Return the text of every block by name, from the folder ``data``."""
    return {"published": published_block(registration, data / "published")}
