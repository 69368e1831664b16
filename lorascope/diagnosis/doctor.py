"""Diagnosis of a run or an adapter: the faults that the rules find in its evidence."""

from __future__ import annotations

from lorascope.diagnosis.case import Case
from lorascope.diagnosis.causes import RULES, Finding
from lorascope.diagnosis.causes.finding import run_rules
from lorascope.runs.result import Result

_NEEDS = {"weights": "norms of the weights", "base": "norms of the weights", "history": "a history"}
SKIP_REASONS = {"norms of the weights": "no weight norms", "a history": "no training history"}
"""Missing evidence -> reason to print."""


def diagnose(run: Result) -> list[Finding]:
    """Diagnose why a run or an adapter is not as intended, as ``lorascope doctor`` does.

    Parameters
    ----------
    run : Result
        Result of ``train`` or ``load``. More checks are possible for an adapter that was loaded with its base.

    Returns
    -------
    list of Finding
        With ``cause, message, evidence, fix`` each; empty if nothing was found.
    """
    return find_faults(Case(run))


def find_faults(case: Case) -> list[Finding]:
    """Return the doctor's findings: those of all checks for faults, without those that follow from another."""
    return run_rules((rule for rule in RULES if rule.fix), case)


def skipped_checks(case: Case) -> dict[str, list[str]]:
    """Return the doctor's skipped checks: missing evidence -> names of the checks for faults that require it."""
    missing: dict[str, list[str]] = {}
    for rule in RULES:
        if rule.fix and rule.needs in _NEEDS and not case.has(rule.needs):
            missing.setdefault(_NEEDS[rule.needs], []).append(rule.name)
    return missing
