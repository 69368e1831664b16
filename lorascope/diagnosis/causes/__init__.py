"""Checks for reasons why an adapter or a run is not as intended, and observations about it: one function each.

A function with the decorator ``DoctorRule`` is a check, in a file of this folder or in a module that another package
lists as an entry point of the group ``lorascope.causes``. It relies only on evidence, a number compared with a
threshold. The thresholds are at the top of each file, with their reasons. A folder does not show whether a choice was
intended, so a check for a fault reports nothing if a mistake and a choice give the same numbers.
"""

from __future__ import annotations

from lorascope.diagnosis.causes.finding import RULES, DoctorRule, Finding
from lorascope.schema.plugins import load_plugins

__all__ = ["RULES", "DoctorRule", "Finding"]

load_plugins(__name__, "lorascope.causes")
