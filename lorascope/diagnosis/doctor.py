"""Diagnosis of a run or an adapter: the faults that the rules find in its evidence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lorascope.diagnosis.case import Case
from lorascope.diagnosis.causes import RULES, Finding
from lorascope.diagnosis.causes.finding import finding, run_rules
from lorascope.files.printable import first_of
from lorascope.runs.result import Result

_NEEDS = {"weights": "norms of the weights", "base": "norms of the weights", "history": "a history"}
SKIP_REASONS = {"norms of the weights": "no weight norms", "a history": "no training history"}
"""Missing evidence -> reason to print."""
_OBSERVED = {"unused-rank", "full-rank"}


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
    """Return the doctor's findings, without those that follow from another: of all checks, then the recorded alarms."""
    findings = run_rules((rule for rule in RULES if rule.fix), case)
    return [*findings, *_recorded_alarms(case, findings)]


def _recorded_alarms(case: Case, findings: Sequence[Finding]) -> Iterator[Finding]:
    """Yield one finding per alarm of a training, unless it is among the findings or follows from one."""
    causes = {finding.cause for finding in findings}
    # For example, replaced weights follow from a loss that diverged later.
    explained = causes.union(*(rule.suppresses for rule in RULES if rule.name in causes))
    for rule in RULES:
        if rule.id and rule.name not in explained and rule.number in case.alarms:
            rows = case.alarms[rule.number]
            steps = list(dict.fromkeys(int(row.step) for row in rows))
            modules = list(dict.fromkeys(row.module for row in rows if row.module))
            problem = rule.problem[0].lower() + rule.problem[1:].removesuffix(".")
            draft = finding(f"alarm at step {first_of(steps)}: {problem}", modules, steps=steps, modules=modules)
            yield rule.finding(draft.message, draft.modules, **draft.evidence)


def observe_ranks(case: Case) -> list[Finding]:
    """Return the doctor's observations about the use of the rank, which are not faults."""
    return run_rules((rule for rule in RULES if rule.name in _OBSERVED), case)


def model_checks(case: Case) -> dict[str, str]:
    """Return the doctor's questions that the files do not answer -> command that measures them with the base model."""
    questions = {}
    if case.stored_price is None:
        questions["loss at a smaller rank"] = "lorascope price"
    if case.stored_dial is None:
        questions["what each part learns and forgets"] = "lorascope dial"
    return questions


def completed_checks(case: Case) -> list[str]:
    """Return the names of the doctor's checks whose evidence exists: for faults, and of the rank if there is one."""
    names = [rule.name for rule in RULES if rule.fix and case.has(rule.needs)]
    if case.rank_use is not None:
        names += sorted(_OBSERVED)
    return list(dict.fromkeys(names))  # two kinds may share a name


def skipped_checks(case: Case) -> dict[str, list[str]]:
    """Return the doctor's skipped checks: missing evidence -> names of the checks for faults that require it."""
    missing: dict[str, list[str]] = {}
    for rule in RULES:
        if rule.fix and rule.needs in _NEEDS and not case.has(rule.needs):
            missing.setdefault(_NEEDS[rule.needs], []).append(rule.name)
    return missing
