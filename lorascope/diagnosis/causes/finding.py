"""Contract of a cause: a rule reads the evidence of an adapter or a run, and yields findings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorascope.diagnosis.case import MeasuredModule, TrainedModule
from lorascope.diagnosis.kinds import KINDS, Severity
from lorascope.diagnosis.training_case import Evidence


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


Found = Iterator[Finding]
RULES: list[DoctorRule] = []
"""All rules, in the order of the files in ``causes`` and of the functions in them."""


@dataclass
class DoctorRule:
    """Decorator that registers a function from ``Evidence`` to findings, named like the function.

    The evidence is a ``Case`` unless ``live_from`` is set.

    Parameters
    ----------
    fix : str
        Suggested fix. ``doctor`` shows the rules with a fix, ``inspect`` those without. Default "".
    needs : {"factors", "config", "weights", "base", "history", "training"}
        Evidence that the check requires. Default "factors".
    suppresses : tuple of str
        Findings that only follow from this one, and are omitted. Default none.
    inspected : bool
        Whether ``inspect`` shows it in spite of a fix. Default False.
    name : str
        Another name, such as that of another rule.
    id : str
        Id of a kind in ``KINDS``, which gives name, fix and needs; only rules of this package have one.
    live_from : int, optional
        Number of steps at a nonzero learning rate from which ``alarms`` checks it in training; None for never, because
        a training in progress lacks the evidence.
    """

    fix: str = ""
    needs: str = "factors"
    suppresses: tuple[str, ...] = ()
    inspected: bool = False
    name: str = ""
    id: str = ""
    live_from: int | None = None

    def __post_init__(self) -> None:
        if self.id:
            kind = KINDS[self.id]
            self.name, self.fix, self.needs = kind.name, kind.fix, kind.needs

    def __call__(self, find: Callable[[Any], Found]) -> DoctorRule:
        """Register a function."""
        self.find, self.name = find, self.name or find.__name__.replace("_", "-")
        RULES.append(self)
        return self

    def findings(self, case: Evidence) -> Found:
        """Yield the findings in a case; none without the evidence that the check requires."""
        for seen in self.find(case) if case.has(self.needs) else ():
            # Findings of one observation differ in severity.
            severity = KINDS[self.id].severity if self.id and self.fix else seen.severity
            yield replace(seen, cause=self.name, fix=self.fix, id=self.id, severity=severity)


def run_rules(rules: Iterable[DoctorRule], case: Evidence) -> list[Finding]:
    """Return the findings of rules, without those that only follow from another finding."""
    found = [(rule, list(rule.findings(case))) for rule in rules]
    # A finding may explain others: NaN weights, for example, also make the loss diverge.
    follows = {name for rule, own in found if own for name in rule.suppresses}
    return [finding for rule, own in found for finding in own if rule.name not in follows]


def found(message: str, names: Iterable[Any] = (), /, **evidence: Any) -> Finding:
    """Return a finding of a rule, which adds its name and its fix; the message ends with the first of the names."""
    modules = tuple(map(str, names))
    listed = f": {first_and_count(modules)}" if modules else ""
    return Finding("", f"{message}{listed}", evidence, "", modules=modules)


def of_kind(
    id: str,
    message: str,
    evidence: dict[str, Any],
    fix: str | None = None,
    modules: Iterable[str] = (),
) -> Finding:
    """Return a finding that no rule yields, with name, severity and (by default) fix of its kind."""
    kind = KINDS[id]
    return Finding(
        kind.name, message, evidence, kind.fix if fix is None else fix, kind.severity, tuple(modules), kind.id
    )


def caution(message: str, names: Iterable[Any] = (), severity: Severity = "caution") -> Finding:
    """Return a finding that affects the comparison with other adapters."""
    return replace(found(message, names), severity=severity)


def some_have(
    rows: Sequence[TrainedModule | MeasuredModule],
    modules: Sequence[TrainedModule | MeasuredModule],
    what: str,
    /,
    **evidence: Any,
) -> Found:
    """Yield the finding "n of m modules have ...", unless no row has it."""
    if len(rows):
        verb = "has" if len(rows) == 1 else "have"
        counts = {"modules": len(rows), "of": len(modules)}
        yield found(f"{len(rows)} of {len(modules)} modules {verb} {what}", names_of(rows), **counts | evidence)


def names_of(rows: Iterable[TrainedModule | MeasuredModule]) -> list[str]:
    """Return the names of modules."""
    return [row.module for row in rows]


def at_rate(rate: float | None) -> str:
    """Return the end of a message that names the learning rate, "" if it is unknown."""
    return f" at learning rate {rate:.3g}" if rate else ""


def first_and_count(names: Iterable[Any]) -> str:
    """Return the first name, and the number of the others."""
    first, *others = map(str, names)
    return f"{first} and {len(others)} more" if others else first
