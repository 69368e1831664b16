"""Registry of the papers: probes, claims and figures that the modules of ``papers`` define.

A module may define instances of ``Probe``, ``CLAIMS`` (id -> statistic and control), and ``HEADING`` with ``FIGURES``.
None of them imports torch at its top, so that verdicts are computed without it. A study reads in one order: question,
arms, statistics and claims, kept tables, figures, probe.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from lorascope.papers.figures.gallery_figure import GalleryFigure
from lorascope.papers.judging.verdicts import Pair
from lorascope.papers.probe import Probe

__all__ = ["PAIRS", "PROBES", "SECTIONS", "module_of"]

PROBES: dict[str, Probe] = {}
"""Probes by name, in the order of the report."""
PAIRS: dict[str, Pair] = {}
"""Statistic and control of every claim, by id."""
SECTIONS: dict[str, list[GalleryFigure]] = {}
"""Figures by heading: the method, or what a study of this project shows."""
_module_of: dict[str, str] = {}

for _file in sorted(Path(__file__).parent.glob("*.py")):
    if _file.stem in ("__init__", "registry"):
        continue
    _module = import_module(f"lorascope.papers.{_file.stem}")
    # A module may have several probes, such as LISA's motivation and its training.
    PROBES |= {value.name: value for value in vars(_module).values() if isinstance(value, Probe)}
    if hasattr(_module, "CLAIMS"):
        PAIRS |= _module.CLAIMS
        _module_of |= dict.fromkeys(_module.CLAIMS, _module.__name__)
    if hasattr(_module, "FIGURES"):
        SECTIONS.setdefault(_module.HEADING, []).extend(_module.FIGURES)
# Sorting is stable: probes with the same number stay in the order of their files.
PROBES = dict(sorted(PROBES.items(), key=lambda item: item[1].order))


def module_of(claim: str) -> str:
    """Return the name of the module of ``papers`` that registers a claim."""
    return _module_of[claim]
