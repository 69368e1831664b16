"""Table of claims: sentence, outcome, effect with its interval, margin, statistic and control."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from lorascope.probes.claims import MINIMUM_SEEDS, Verdict
from lorascope.probes.report.html import Html, count, element, format_value, table

MARKS = {"supported": "✓", "not supported": "✗", "inconclusive": "?"}
RULE = (
    "Effect: statistic minus control, paired by seed; mean and 95% t-interval over seeds. Margin: the smallest effect "
    "that supports the claim. Supported: the whole interval is above the margin. Not supported: the whole interval is "
    f"below the margin. Inconclusive: all other cases, and always with fewer than {MINIMUM_SEEDS} seeds. The strip "
    "shows effect and interval in units of the margin. The dashed line marks no effect, the solid line the margin; an "
    "arrow marks an effect outside the strip."
)
_HEADS = {
    "Claim": False, "Outcome": False, "Effect": True, "Margin": True, "Statistic": False, "Control": False,
    "Seeds": True, "Source": False,
}  # fmt: skip
_LEAST, _MOST, _WIDTH = -2.0, 4.0, 120  # ends of the strip in units of the margin, and its width in pixels


def claims_table(judged: Sequence[tuple[Verdict, str]]) -> Html:
    """Build the table of claims, one row per claim.

    Parameters
    ----------
    judged : sequence of (Verdict, str)
        Verdicts, each with the anchor of its probe on the page.
    """
    return table(
        "Claims and their outcomes", _HEADS, [_claim_row(verdict, probe) for verdict, probe in judged], "claims"
    )


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


def by_seed(verdicts: Sequence[Verdict]) -> Html:
    """Build the table of statistic, control and effect for each seed."""
    heads = {"Claim": False} | dict.fromkeys(("Seed", "Statistic", "Control", "Effect"), True)
    return table("Claims by seed", heads, [row for verdict in verdicts for row in _seed_rows(verdict)])


def _seed_rows(verdict: Verdict) -> Iterator[Html]:
    """Yield one row per seed; the first has the sentence of the claim as the header of all."""
    sentence = element("th", verdict.claim.sentence, scope="rowgroup", rowspan=str(verdict.n))
    values = verdict.values[["seed", "statistic", "control", "effect"]].astype(object)
    for place, row in enumerate(values.itertuples(index=False, name=None)):
        cells = [element("td", format_value(value), class_="n") for value in row]
        yield element("tr", *([sentence] if place == 0 else []), *cells)


def _claim_row(verdict: Verdict, probe: str) -> Html:
    claim, means = verdict.claim, verdict.values[["statistic", "control"]].mean()
    interval = f"[{verdict.low:.3g}, {verdict.high:.3g}]" if verdict.n > 1 else "no interval"
    reach = element("span", interval, class_="interval")
    return element(
        "tr",
        element("th", element("a", claim.sentence, href=f"#{probe}"), scope="row"),
        element("td", outcome(verdict.outcome)),
        element("td", element("b", f"{verdict.effect:.3g}"), reach, strip(verdict), class_="n"),
        element("td", f"{claim.margin:.3g}", class_="n"),
        *(
            element("td", element("b", f"{means[name]:.3g}"), " ", text)
            for name, text in (("statistic", claim.statistic), ("control", claim.control))
        ),
        element("td", str(verdict.n), class_="n"),
        element("td", claim.source),
    )


def outcome(word: str) -> Html:
    """Mark up an outcome with its sign and its color."""
    sign = element("span", MARKS[word], aria_hidden="true")
    return element("span", sign, " ", word, class_=f"outcome {word.replace(' ', '-')}")


def strip(verdict: Verdict) -> Html:
    """Draw the effect and its interval relative to the margin, as a small SVG image."""
    place = {name: _strip_position(getattr(verdict, name) / verdict.claim.margin) for name in ("effect", "low", "high")}
    parts = [
        element("path", d=f"M{_strip_position(0.0):.1f} 2V18", class_="zero"),
        element("path", d=f"M{_strip_position(1.0):.1f} 2V18", class_="margin"),
    ]
    if verdict.n > 1:
        parts.append(element("path", d=f"M{place['low']:.1f} 10H{place['high']:.1f}", class_="reach"))
    x = place["effect"]
    margins = verdict.effect / verdict.claim.margin
    # An effect outside the strip is an arrow at its end, pointing outward.
    if _LEAST <= margins <= _MOST:
        parts.append(element("circle", cx=f"{x:.1f}", cy="10", r="3.5"))
    else:
        parts.append(element("path", d=f"M{x:.1f} 10l{-6 if margins > 0 else 6} -4v8z", class_="beyond"))
    size = {"width": str(_WIDTH), "height": "20", "viewBox": f"0 0 {_WIDTH} 20"}
    return element("svg", *parts, class_="strip", aria_hidden="true", **size)


def _strip_position(margins: float) -> float:
    """Return the x coordinate in pixels of an effect in units of the margin, clipped to the strip."""
    inside = min(max(margins, _LEAST), _MOST)
    return 4 + (_WIDTH - 8) * (inside - _LEAST) / (_MOST - _LEAST)
