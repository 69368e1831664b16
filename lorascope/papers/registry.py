"""Registry of the papers: the claims, arms and kept tables that the modules of ``papers`` define.

A module may define ``JUDGED`` (id -> comparison), ``study_arms``, which returns the arms, ``KEPT_TABLES``, and
``PAPER``, its small version. None of them imports torch at its top, so that verdicts are computed without it. A study
reads in one order: question, arms, statistics and claims, kept tables, figures.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from lorascope.papers.arms import Arm, ComputedArm, KeptTable
from lorascope.papers.judging.study_statistics import StudyComparison
from lorascope.papers.paper_study import PaperStudy

__all__ = ["COMPARISONS", "KEPT_TABLES", "PAPERS", "module_of", "study_arms"]

PAPERS: dict[str, PaperStudy] = {}
"""Papers by the names of their modules."""
COMPARISONS: dict[str, StudyComparison] = {}
"""Comparison of every claim, by id."""
KEPT_TABLES: dict[str, list[KeptTable]] = {}
"""Kept tables by name: the arms of each, and what computes it from one run of each."""
_module_of: dict[str, str] = {}
_with_arms: list[Any] = []

for _file in sorted(Path(__file__).parent.glob("*.py")):
    if _file.stem in ("__init__", "registry"):
        continue
    _module = import_module(f"lorascope.papers.{_file.stem}")
    if hasattr(_module, "PAPER"):
        PAPERS[_file.stem] = _module.PAPER
    if isinstance(getattr(_module, "JUDGED", None), dict):
        COMPARISONS |= _module.JUDGED
        _module_of |= dict.fromkeys(_module.JUDGED, _module.__name__)
    # Several papers have a table of one name, such as the ranks of allocators.
    for _name, _kept_tables in getattr(_module, "KEPT_TABLES", {}).items():
        KEPT_TABLES.setdefault(_name, []).extend(_kept_tables)
    if hasattr(_module, "study_arms"):
        _with_arms.append(_module)


def module_of(claim: str) -> str:
    """Return the name of the module of ``papers`` that registers a claim."""
    return _module_of[claim]


def study_arms() -> list[Arm | ComputedArm]:
    """Return the arms, in the order of their papers."""
    return [arm for module in _with_arms for arm in module.study_arms()]
