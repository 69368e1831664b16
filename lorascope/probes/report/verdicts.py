"""Texts and positions of the table of claims: the rule, the number of claims by outcome, and the strip of an effect."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lorascope.probes.claims import MINIMUM_SEEDS, Verdict
from lorascope.probes.report.tables import count

MARKS = {"supported": "✓", "not supported": "✗", "inconclusive": "?"}
RULE = (
    "Effect: statistic minus control, paired by seed; mean and 95% t-interval over seeds. Margin: the smallest effect "
    "that supports the claim. Supported: the whole interval is above the margin. Not supported: the whole interval is "
    f"below the margin. Inconclusive: all other cases, and always with fewer than {MINIMUM_SEEDS} seeds. The strip "
    "shows effect and interval in units of the margin. The dashed line marks no effect, the solid line the margin; an "
    "arrow marks an effect outside the strip."
)
LEAST, MOST, WIDTH = -2.0, 4.0, 120  # ends of the strip in units of the margin, and its width in pixels


def tally(verdicts: Sequence[Verdict]) -> str:
    """Count the claims by outcome, such as "3 claims: 2 supported, 1 inconclusive"."""
    found = Counter[str](verdict.outcome for verdict in verdicts)
    parts = [f"{found[outcome]} {outcome}" for outcome in MARKS if found[outcome]]
    return f"{count(len(verdicts), 'claim')}: {', '.join(parts)}" if parts else "no claims"


def too_few(verdicts: Sequence[Verdict]) -> str:
    """Explain that claims are inconclusive because they have too few seeds; "" if all have enough."""
    few = [verdict for verdict in verdicts if verdict.n < MINIMUM_SEEDS]
    if not few:
        return ""
    which = "Every claim here is" if len(few) == len(verdicts) else f"{len(few)} of the {len(verdicts)} claims here are"
    seeds = " or ".join(count(n, "seed") for n in sorted({verdict.n for verdict in few}))
    return (
        f"{which} inconclusive regardless of the numbers, because {seeds} cannot separate an effect from chance: the "
        f"rule needs at least {MINIMUM_SEEDS} seeds."
    )


def strip_position(margins: float) -> float:
    """Return the x coordinate in pixels of an effect in units of the margin, clipped to the strip."""
    inside = min(max(margins, LEAST), MOST)
    return 4 + (WIDTH - 8) * (inside - LEAST) / (MOST - LEAST)
