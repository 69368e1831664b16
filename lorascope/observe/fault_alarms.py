"""Observer that names faults of a training while it trains."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from lorascope.analysis.forgetting_course import DISTANCES
from lorascope.diagnosis.causes import RULES, DoctorRule, Finding
from lorascope.diagnosis.causes.finding import run_rules
from lorascope.diagnosis.kinds import KINDS
from lorascope.diagnosis.nonfinite import describe_nonfinite
from lorascope.files.printable import printable
from lorascope.methods.field_checks import is_number, require
from lorascope.methods.method import Step, added_later, trained_parameters
from lorascope.observe.live_case import LiveModel
from lorascope.observe.observer import Observer
from lorascope.observe.trainable import are_finite
from lorascope.observe.weight_norms import from_trees, nonzero_trees
from lorascope.schema.records import Item, Message, Quantity, Record, register
from lorascope.schema.suggestions import unknown_name

register(
    "train with observe=[ls.observe.alarms()]",
    alarm=Quantity("alarm", definition="number of the id of a finding: 15 for LS015, at the module that it concerns"),
)


@dataclass(kw_only=True)
class alarms(Observer):
    """Alarms about faults of a training, by the checks of ``lorascope doctor`` that apply while it trains.

    A fault is a warning with its id, cause and fix, again if it concerns further modules. It is also a record of the
    quantity ``alarm`` at each of these modules, or of the whole run: the number of the id, such as 15 for LS015. The
    training is not changed unless ``stop`` names the fault.

    Parameters
    ----------
    every : int
        Steps between checks; step 0 and the last step are always checked. Whether the weights are finite is checked at
        every step, to report whether loss, gradients or weights were the first that were not.
    stop : sequence of str
        Causes or ids at which training stops, such as ``("nan", "diverged")``; by default none. ``train`` raises a
        RuntimeError, a Trainer and Lightning end training, and in your own loop ``recorder.stopped`` becomes true. The
        run has the status "broken", with the fault as its error.
    kl : float, optional
        Limit of the distance from the base on the rows to keep, in nats or as a drift, above which the fault
        "far-from-base" is found. ``observe.kl`` records the distance, and must be listed before the alarms.

    Raises
    ------
    ValueError
        ``stop`` has a name that is not checked in training, or no distance from the base is recorded for ``kl``.
    """

    stop: Sequence[str] = field(default=())
    kl: float | None = field(default=None, metadata=added_later())

    def __post_init__(self) -> None:
        super().__post_init__()
        self.stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        names: list[str] = []
        for rule in _rules(math.inf):
            names += rule.name, rule.id
        for name in self.stop:
            if name not in names:
                raise ValueError(unknown_name("alarm", printable(name), dict.fromkeys(names)))
        if self.kl is not None:
            require(self, "kl", "a number > 0", is_number(self.kl) and self.kl > 0)
        self.losses_: list[float] = []
        self.loss_step_ = 0
        self.moving_steps_ = 0
        self.reported_: list[str] = []
        self.unrecorded_: list[str] = []
        self.initial_: dict[str, Any] = {}
        self.nonfinite_ = ""
        self._model: LiveModel | None = None

    def __call__(self, step: Step) -> list[Item]:
        """Return the records and messages of new faults, if the step is due."""
        if step.finished:
            rates = [step.values.get("lr", (0, 0.0))[1], *map(itemgetter("lr"), step.optimizer.param_groups)]
            # A step at rate 0, such as the first one of a warmup, moves nothing, so its rules must wait.
            self.moving_steps_ += any(map(float, rates))
        if not self.nonfinite_:
            self.nonfinite_ = _describe_nonfinite(step)
        if not self.due(step.finished, step.total):
            return []
        self._model = model = self._model or LiveModel(step)
        if step.finished == 0:
            self.initial_ = nonzero_trees(model.trained.updates())
        loss_step, loss = step.values.get("loss", (0, None))
        if loss is not None and loss_step > self.loss_step_:
            self.loss_step_ = loss_step
            self.losses_.append(float(loss))
        losses = dict(enumerate(self.losses_, start=1))
        evidence = model.measure(step, losses, self.moving_steps_, from_trees(self.initial_))
        evidence.nonfinite = self.nonfinite_
        if self.kl is not None:
            evidence.distance, evidence.distance_limit = _recorded_distance(step, self.kl), self.kl
        findings = run_rules(_rules(self.moving_steps_), evidence)
        findings.sort(key=lambda finding: not self._stops_at(finding))
        messages = []
        for finding in findings:
            fresh = []
            for module in finding.modules or ("",):
                key = f"{finding.id} {module}"
                if key not in self.reported_:
                    fresh.append(key)
            if not fresh:
                continue
            self.reported_ += fresh
            self.unrecorded_ += fresh
            # Without a registry, Python also shows a warning that an earlier training has given.
            text = f"{describe_alarm(finding)}; fix: {printable(finding.fix)}"
            warnings.warn_explicit(text, UserWarning, "lorascope", 0)
            messages.append(Message(f"alarm/{finding.id}", text))
            if self._stops_at(finding):
                step.stop = f"stopped by an alarm at step {step.finished}: {describe_alarm(finding)}"
        return [*self._records(), *messages]

    def _records(self) -> Iterator[Record]:
        """Yield one record per module, because it has one value at a step; further faults of a module follow later."""
        waiting, self.unrecorded_ = self.unrecorded_, []
        recorded = set()
        for key in waiting:
            id, _, module = key.partition(" ")
            if module in recorded:
                self.unrecorded_.append(key)
            else:
                recorded.add(module)
                yield Record("alarm", KINDS[id].number, module)

    def _stops_at(self, finding: Finding) -> bool:
        return finding.id in self.stop or finding.cause in self.stop


def _recorded_distance(step: Step, limit: float) -> float:
    """Return the last recorded distance from the base on the rows to keep, NaN right after a resumption."""
    for quantity in DISTANCES:
        if quantity in step.values:
            return float(step.values[quantity][1])
    if step.finished:
        return math.nan
    raise ValueError(f"alarms(kl={limit:g}) requires ls.observe.kl() before it in observe, got no recorded distance")


def _describe_nonfinite(step: Step) -> str:
    """Return what was not finite first, if these are the first weights of a training that are not finite; else ""."""
    number, trained = step.finished, trained_parameters(step.optimizer)
    if number == 0:
        start_is_finite = are_finite(step.model.parameters())
        return "" if start_is_finite else describe_nonfinite(None, 0, None, None)
    if are_finite(trained):
        return ""
    loss_fault = gradient_fault = None
    loss_step, loss = step.values.get("loss", (0, 0.0))
    if loss_step == number and not math.isfinite(loss):
        loss_fault = number
    if not are_finite(parameter.grad for parameter in trained if parameter.grad is not None):
        gradient_fault = number
    return describe_nonfinite(number - 1, number, loss_fault, gradient_fault)


def describe_alarm(finding: Finding) -> str:
    """Return id, cause and message of a finding, for an alarm."""
    return f"{finding.id} {finding.cause}: {printable(finding.message)}"


def _rules(moving_steps: float) -> list[DoctorRule]:
    """Return the rules that apply after a number of steps at a nonzero learning rate."""
    return [rule for rule in RULES if rule.id and rule.live_from is not None and rule.live_from <= moving_steps]
