"""Block of the page on the questions about the instruments: bounds, effects and words, from the kept seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from page_blocks import format_table

from lorascope.papers.judging import beliefs, kept_study, registered_study
from lorascope.papers.judging.beliefs import format_with_interval, shown_word


def question_blocks(root: Path) -> dict[str, str]:
    """Return the table of the questions by the name of its block, from a clone."""
    folder = root / "data" / "instruments"
    registration = registered_study.read(folder / "registered.toml")
    evidence = kept_study.read(folder / "evidence")
    results: dict[Any, Any] = beliefs.read_results(folder / "evidence").set_index("claim").to_dict("index")
    rows = []
    for claim in registration.claims.values():
        result, rule = results[claim.id], claim.rule
        effects = [format_with_interval(result, rule.unit, prefix) for prefix in ("", "positive_")]
        # An arm may have more seeds, for another question.
        finished = min(rule.seeds, *(len(evidence.seeds(arm)) for arm in claim.for_arms))
        place = f"[{claim.paper.place}]({claim.paper.place}.md)"
        rows.append((f"`{claim.id}` {claim.sentence}", place, f"{rule.kind} {rule.bound:g} {rule.unit}", *effects,
                     shown_word(result), f"{finished} of {rule.seeds}"))  # fmt: skip
    header = ("question", "instrument", "bound", "effect [95%]", "positive control", "word", "seeds")
    return {"questions": format_table(header, rows)}
