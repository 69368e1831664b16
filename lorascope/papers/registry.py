"""Registry of the papers: probes, claims and figures that the modules of ``papers`` define.

A module may define instances of ``Probe``, ``CLAIMS`` (id -> statistic and control), and ``HEADING`` with ``FIGURES``.
None of them imports torch at its top, so that verdicts are computed without it.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from lorascope.papers.figures.gallery_figure import GalleryFigure
from lorascope.papers.probe import Probe

__all__ = ["PAIRS", "PROBES", "SECTIONS", "module_of"]
_NAMES = sorted(file.stem for file in Path(__file__).parent.glob("*.py") if file.stem not in ("__init__", "registry"))
_MODULES = {name: import_module(f"lorascope.papers.{name}") for name in _NAMES}
_defined = [value for module in _MODULES.values() for value in vars(module).values() if isinstance(value, Probe)]
PROBES = {probe.name: probe for probe in sorted(_defined, key=lambda probe: probe.order)}
"""Probes by name, in the order of the report."""
PAIRS = {id: pair for module in _MODULES.values() for id, pair in getattr(module, "CLAIMS", {}).items()}
"""Statistic and control of every claim, by id."""
SECTIONS: dict[str, list[GalleryFigure]] = {}
"""Figures by heading: the method, or what a study of this project shows."""
for _module in _MODULES.values():
    if hasattr(_module, "FIGURES"):
        SECTIONS.setdefault(_module.HEADING, []).extend(_module.FIGURES)


def module_of(claim: str) -> str:
    """Return the name of the module that computes a claim."""
    return next(module.__name__ for module in _MODULES.values() if claim in getattr(module, "CLAIMS", {}))
