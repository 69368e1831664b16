"""Lists of the kept figures on the pages of the docs."""

from __future__ import annotations

from lorascope.papers.judging.kept_runs import Evidence
from lorascope.papers.judging.registration import PAPERS

NO_FIGURES = "No figures are drawn from the kept runs yet."
_OF_SEVERAL = {"Planted ranks": ("AdaLoRA", "AutoLoRA", "ALoRA"), "Importance scores": ("AdaLoRA", "AutoLoRA", "ALoRA")}
"""Headings of figures that compare several methods -> these methods."""


def list_figures_of_paper(evidence: Evidence, name: str) -> str:
    """Return the kept figures of a method, and those that compare it with others, for the page of its paper."""
    headings = [name, *(heading for heading, methods in _OF_SEVERAL.items() if name in methods)]
    return "\n\n".join(line for heading in headings for line in _figures(evidence, heading, "../../")) or NO_FIGURES


def list_figures(evidence: Evidence) -> str:
    """Return all kept figures, by paper."""
    found = dict.fromkeys(figure.about.heading for figure in evidence.figures.values())
    headings = [*(name for name in PAPERS if name in found), *(name for name in found if name not in PAPERS)]
    parts = (part for name in headings for part in (f"### {name}", *_figures(evidence, name, "../")))
    return "\n\n".join(parts) or NO_FIGURES


def _figures(evidence: Evidence, heading: str, root: str) -> list[str]:
    """Return the kept figures under a heading, for a page from which the repository is at ``root``."""
    return [
        f"![{figure.about.alt}]({root}figures/{name}.png)"
        for name, figure in evidence.figures.items()
        if figure.about.heading == heading
    ]
