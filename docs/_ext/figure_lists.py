"""Lists of the kept figures on the pages of the docs."""

from __future__ import annotations

from lorascope.papers.judging.kept_runs import Evidence
from lorascope.papers.judging.registration import PAPERS

NO_FIGURES = "No figures are drawn from the kept runs yet."
_OF_SEVERAL = {"Planted ranks": ("AdaLoRA", "AutoLoRA", "ALoRA"), "Importance scores": ("AdaLoRA", "AutoLoRA", "ALoRA")}
"""Headings of figures that compare several methods -> these methods."""


def list_figures_of_paper(evidence: Evidence, name: str) -> str:
    """Return the kept figures of a method, and those that compare it with others, for the page of its paper."""
    lines = _figures(evidence, name, "../../")
    for heading, methods in _OF_SEVERAL.items():
        if name in methods:
            lines += _figures(evidence, heading, "../../")
    return "\n\n".join(lines) or NO_FIGURES


def list_figures(evidence: Evidence) -> str:
    """Return all kept figures, by paper."""
    lines = []
    for heading in dict.fromkeys([*PAPERS, *(figure.about.heading for figure in evidence.figures.values())]):
        if figures := _figures(evidence, heading, "../"):
            lines += [f"### {heading}", *figures]
    return "\n\n".join(lines) or NO_FIGURES


def _figures(evidence: Evidence, heading: str, root: str) -> list[str]:
    """Return the kept figures under a heading, for a page from which the repository is at ``root``."""
    return [
        f"![{figure.about.alt}]({root}figures/{name}.png)"
        for name, figure in evidence.figures.items()
        if figure.about.heading == heading
    ]
