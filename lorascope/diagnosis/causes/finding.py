"""Contract of a cause: a rule reads the evidence of an adapter or a run, and yields findings of its kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

from lorascope.diagnosis.case import TrainedModule
from lorascope.diagnosis.training_case import Evidence
from lorascope.files.printable import first_of

Severity = Literal["error", "caution", "note"]


@dataclass(frozen=True)
class Finding:
    """A finding about an adapter, a run or a whole model.

    Parameters
    ----------
    cause : str
        Name of the cause, one of those in ``RULES``.
    message : str
        The problem, with its numbers.
    evidence : dict
        Numbers by name, including thresholds.
    fix : str
        Suggested fix, empty for an observation.
    severity : {"error", "caution", "note"}
        A caution affects the comparison with other adapters. Default "note".
    modules : tuple of str
        The modules concerned, if the message lists them.
    id : str
        Stable id of the kind of finding, such as "LS001"; empty for a rule of another package.
    """

    cause: str
    message: str
    evidence: dict[str, Any]
    fix: str
    severity: Severity = "note"
    modules: tuple[str, ...] = ()
    id: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; evidence may be NaN."""
        return {
            "id": self.id,
            "cause": self.cause,
            "severity": self.severity,
            "message": self.message,
            "evidence": self.evidence,
            "fix": self.fix,
        }


Findings = Iterator[Finding]


@dataclass
class Kind:
    """Kind of finding, written next to the code that yields it.

    An id keeps its meaning, and the id of a removed kind is never used again. LS0xx are faults of adapters and
    trainings, LS1xx observations, LS2xx treatments by a runtime, LS3xx mistakes of a merge, and LS4xx observations
    about neurons.

    Parameters
    ----------
    id : str
        Stable id, such as "LS001"; only kinds of this package have one.
    name : str
        Name of the cause; two kinds may share one.
    severity : {"error", "caution", "note"}
        Severity of the findings. Default "note".
    needs : str
        Evidence that the check requires: factors, config, weights, base, history, dial (measured and in the folder),
        training (checked only during training), merged model, or tuned model. Default "factors".
    problem : str
        What is wrong, as one sentence.
    evidence : str
        Numbers that show it, with the threshold.
    fix : str
        Suggested fix, empty for an observation. Findings of runtimes have one for the case at hand.
    """

    id: str = ""
    name: str = ""
    severity: Severity = "note"
    _: KW_ONLY
    needs: str = "factors"
    problem: str = ""
    evidence: str = ""
    fix: str = ""

    @property
    def number(self) -> int:
        """Id as a number, which is the value of the recorded quantity ``alarm``."""
        return int(self.id.removeprefix("LS"))

    def finding(self, message: str, names: Iterable[str] = (), fix: str = "", /, **evidence: Any) -> Finding:
        """Return a finding of this kind about modules, with a fix for the case at hand or else that of the kind."""
        return Finding(self.name, message, evidence, fix or self.fix, self.severity, tuple(names), self.id)

    def to_json(self) -> dict[str, str]:
        """Return the JSON form."""
        return {
            "id": self.id,
            "name": self.name,
            "severity": self.severity,
            "needs": self.needs,
            "problem": self.problem,
            "evidence": self.evidence,
            "fix": self.fix,
        }


RULES: list[DoctorRule] = []
"""All rules, in the order of the files in ``causes`` and of the functions in them."""


@dataclass(kw_only=True)
class DoctorRule(Kind):
    """Decorator that registers a function from ``Evidence`` to findings of one kind.

    The evidence is a ``Case`` unless ``live_from`` is set. ``doctor`` shows the rules with a fix, ``inspect`` those
    without. The name is by default that of the function.

    Parameters
    ----------
    suppresses : tuple of str
        Findings that only follow from this one, and are omitted. Default none.
    inspected : bool
        Whether ``inspect`` shows it in spite of a fix. Default False.
    live_from : int, optional
        Number of steps at a nonzero learning rate from which ``alarms`` checks it in training; None for never, because
        a training in progress lacks the evidence.
    """

    suppresses: tuple[str, ...] = ()
    inspected: bool = False
    live_from: int | None = None

    def __call__(self, find: Callable[[Any], Findings]) -> DoctorRule:
        """Register a function."""
        self.find, self.name = find, self.name or find.__name__.replace("_", "-")
        RULES.append(self)
        return self

    def findings(self, case: Evidence) -> Findings:
        """Yield the findings in a case; none without the evidence that the check requires."""
        if case.has(self.needs):
            for draft in self.find(case):
                yield self.finding(draft.message, draft.modules, **draft.evidence)


def run_rules(rules: Iterable[DoctorRule], case: Evidence) -> list[Finding]:
    """Return the findings of rules, without those that only follow from another finding."""
    findings: list[Finding] = []
    # A finding may explain others: NaN weights, for example, also make the loss diverge.
    suppressed: set[str] = set()
    for rule in rules:
        rule_findings = list(rule.findings(case))
        findings += rule_findings
        if rule_findings:
            suppressed.update(rule.suppresses)
    return [finding for finding in findings if finding.cause not in suppressed]


def finding(message: str, names: Iterable[Any] = (), /, **evidence: Any) -> Finding:
    """Return a finding of a rule, which adds its kind; the message ends with the first of the names."""
    modules = tuple(map(str, names))
    if modules:
        message = f"{message}: {first_of(modules)}"
    return Kind().finding(message, modules, **evidence)


def finding_if_any(
    rows: Sequence[TrainedModule], modules: Sequence[TrainedModule], attribute: str, /, **evidence: Any
) -> Findings:
    """Yield the finding "n of m modules have ...", unless no row has it."""
    if rows:
        message = f"{len(rows)} of {len(modules)} modules {inflect(len(rows), 'has', 'have')} {attribute}"
        counts = {"modules": len(rows), "of": len(modules)}
        yield finding(message, module_names(rows), **counts | evidence)


def module_names(rows: Iterable[Any]) -> list[str]:
    """Return the names of modules for a finding."""
    return [row.module for row in rows]


def inflect(count: int, singular: str, plural: str) -> str:
    """Return the form of a finding's verb that agrees with a number of modules."""
    return singular if count == 1 else plural


def rate_phrase(rate: float | None) -> str:
    """Return the end of a finding's message that names the learning rate, "" if it is unknown."""
    if not rate:
        return ""
    return f" at learning rate {rate:.3g}"


def power_of_ten(value: float) -> str:
    """Return the threshold of a finding, such as 0.001, as "1e-3"."""
    return f"{value:.0e}".replace("e-0", "e-")
