"""Advice on an adapter: where its rank went, what it costs, and what to change.

An action is a change whose loss was measured on held-out rows; one whose interval touches its margin says "confirm",
with the command that does. Actions are ordered by effect over margin: the share of forgetting or of components that
they save, in even shares of the whole. Which of them follow from a measurement is in
``lorascope.analysis.advice_rules``.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from lorascope.files.printable import count_phrase
from lorascope.files.typed_json import json_values
from lorascope.runs.receipt import Receipt

LEARNED, COSTS, WRONG = "where did the rank go", "what does it cost", "what is wrong"
CONFIRM, MEASURED, MEND = "confirm", "measured", "mend"
MOST_ACTIONS = 3
_LABEL = 15


class Fact(NamedTuple):
    """Fact that was measured: a sentence, and its number with a 95% interval; NaN where there is none.

    The command measures it again; "" if there is none.
    """

    section: str
    name: str
    text: str
    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    unit: str = ""
    command: str = ""


class Action(NamedTuple):
    """Change to make, what it does to the task loss in nats with a 95% interval, and the command that makes it.

    The verdict is "confirm" if the interval touches the margin, and ``weight`` the effect over its margin.
    """

    verdict: str
    change: str
    estimate: float
    low: float
    high: float
    unit: str
    command: str
    weight: float


class OpenQuestion(NamedTuple):
    """Question that was not decided, and what would decide it; NaN if no number of rows or seeds is known to."""

    question: str
    rows_needed: float = math.nan
    seeds_needed: float = math.nan
    command: str = ""


class SkippedMeasurement(NamedTuple):
    """Measurement that was not made, with the reason and the command that makes it."""

    name: str
    reason: str
    command: str = ""


class Subject(NamedTuple):
    """Run or adapter that the advice is about, as the commands name it, with its model and its texts.

    ``rows`` is the number of rows of the task's validation split, and ``state`` the saved parameters.
    """

    path: str
    model: str = "NAME"
    task: str = "NAME"
    keep: str = ""
    rows: float = math.inf
    state: str = "last"

    def command(self, name: str, *options: str) -> str:
        """Return a command that measures the subject, as a shell reads it."""
        rows = "--rows" if name == "read" else "--task"
        words = ["lorascope", name, self.path, "--model", self.model, rows, self.task]
        if self.keep and name in ("dial", "advise"):
            words += ["--keep", self.keep]
        return shlex.join([*words, *options, *self._state_words()])

    def export_command(self, *options: str) -> str:
        """Return a command that writes the subject as an adapter, as a shell reads it."""
        return shlex.join(["lorascope", "export", self.path, *options, *self._state_words()])

    def _state_words(self) -> list[str]:
        if self.state == "last":
            return []
        return ["--state", self.state]

    def command_with_rows(self, name: str, rows: float, *options: str) -> str:
        """Return a command that measures with more rows; empty if the validation split has fewer."""
        if rows > self.rows:
            return ""
        return self.command(name, *options, "--rows", f"{rows:.0f}")

    def describe_split(self, rows: float) -> str:
        """Return how many rows there are, if these are more; an empty text otherwise."""
        if not self.rows < rows < math.inf:
            return ""
        return f" (the validation split has {self.rows:.0f} rows)"


@dataclass(frozen=True)
class Advice:
    """Advice on a run or an adapter; see ``ls.advise``.

    Parameters
    ----------
    label : str
        Name of the run.
    description : str
        Its method, ranks and base.
    facts : tuple of Fact
        What was measured: section, name, text, value, low, high, unit, command.
    actions : tuple of Action
        At most three changes, those with the largest effect first.
    undecided : tuple of OpenQuestion
        What was not decided, and how many rows or seeds would decide it.
    skipped : tuple of SkippedMeasurement
        What was not measured.
    config : mapping
        Keywords of ``peft.LoraConfig`` for the next training, with the learning rate as ``lr``; empty unless it was
        retrained here and compared with its uniform control.
    receipt : Receipt
        What was measured, and with what.
    """

    label: str
    description: str
    facts: tuple[Fact, ...]
    actions: tuple[Action, ...]
    undecided: tuple[OpenQuestion, ...]
    skipped: tuple[SkippedMeasurement, ...]
    config: Mapping[str, Any]
    receipt: Receipt

    def to_json(self) -> dict[str, Any]:
        """Return the advice as a JSON object."""
        sections: dict[str, Any] = {"run": self.label, "description": self.description}
        for name in ("facts", "actions", "undecided", "skipped"):
            sections[name] = [item._asdict() for item in getattr(self, name)]
        return json_values(sections | {"config": dict(self.config), "receipt": self.receipt.to_json()})

    def __repr__(self) -> str:
        lines = [f"{self.label:<{_LABEL}} {self.description}"]
        if self.receipt.rows:
            rows = ", ".join(f"{kind}: {text}" for kind, text in self.receipt.rows.items())
            lines.append(f"{'measured on':<{_LABEL}} {rows}")
        for title, section in self.sections().items():
            lines += ["", title, *section]
        lines.append("")
        if self.receipt.rows:
            lines.append("Intervals of cuts and scales are over rows; they do not cover the seed of the training.")
        lines.append(f"{'receipt':<{_LABEL}} {self.receipt}")
        return "\n".join(lines)

    def sections(self) -> dict[str, list[str]]:
        """Return the lines of every section that has any."""
        sections: dict[str, list[str]] = {}
        for title in (WRONG, LEARNED, COSTS):
            sections[title] = [f"  {fact.name:<13} {fact.text}" for fact in self.facts if fact.section == title]
        sections["what to do"] = list(self._describe_actions())
        sections["not decided"] = list(_describe_open(self.undecided))
        sections["skipped"] = []
        for measurement in self.skipped:
            sections["skipped"].append(f"  {measurement.name}: {measurement.reason}")
            if measurement.command:
                sections["skipped"].append(f"      {measurement.command}")
        sections["measured again by"] = list(self._describe_commands())
        return {title: lines for title, lines in sections.items() if lines}

    def _describe_commands(self) -> Iterator[str]:
        """Yield each command that measures facts again, below their names."""
        names: dict[str, dict[str, None]] = {}
        for fact in self.facts:
            # Several parts may only forget.
            names.setdefault(fact.command, {})[fact.name] = None
        names.pop("", None)
        for command, measured in names.items():
            yield f"  {', '.join(measured)}"
            yield f"      {command}"

    def _describe_actions(self) -> Iterator[str]:
        if not self.actions:
            yield f"  {self._describe_nothing()}"
        for number, action in enumerate(self.actions, start=1):
            ending = ": confirm" if action.verdict == CONFIRM else ""
            yield f"  {number} {action.change}{ending}"
            if action.command:
                yield f"      {action.command}"
        if self.config:
            keywords = [f"{name}={value!r}" for name, value in self.config.items() if name != "lr"]
            yield f"  next training, retrained here: lr={self.config['lr']:g}"
            yield f"      LoraConfig({', '.join(keywords)})"

    def _describe_nothing(self) -> str:
        if not self.receipt.rows:
            return "nothing was measured"
        # A measurement that was not made may still show a better change.
        if self.skipped:
            return "nothing yet: what was measured shows no better change, and the measurements below were skipped"
        return "nothing: no change was shown to be better"

    def _repr_html_(self) -> str:
        lists = {"facts": ["name", "text"], "actions": ["verdict", "change"], "undecided": ["question", "rows_needed"]}
        tables = []
        for name, columns in lists.items():
            if items := getattr(self, name):
                tables.append(pd.DataFrame(items)[columns].to_html(index=False, na_rep=""))
        return "\n".join(tables)


def _describe_open(questions: Sequence[OpenQuestion]) -> Iterator[str]:
    for question in questions:
        needs = []
        for number, unit in ((question.rows_needed, "row"), (question.seeds_needed, "seed")):
            if math.isfinite(number):
                needs.append(f"about {count_phrase(int(number), unit)} would decide")
        yield "; ".join([f"  {question.question}", *needs])
        if question.command:
            yield f"      {question.command}"


# Effects of actions do not add up, so more than a few would mislead.
def order_actions(actions: Sequence[Action]) -> tuple[Action, ...]:
    """Return the three actions with the largest effect over margin, the largest first."""
    return tuple(sorted(actions, key=lambda action: -action.weight)[:MOST_ACTIONS])
