"""Report of a training while it runs: its values, pooled by layer and role, for programs that show curves."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from lorascope.files.printable import printable
from lorascope.runs.manifest import Manifest
from lorascope.runs.run import Run
from lorascope.schema.module_roles import Location, parse
from lorascope.schema.records import QUANTITIES, Item, Message, Record
from lorascope.training.state import keep_generators

Locations = Mapping[str, Location]
PREFIX = "lorascope/"
_OF_THE_HOST = {"loss", "grad_norm", "lr", "seconds", "eval_loss", "eval_metric"}
# The only indexed quantity whose mean over the index says something without the index.
_POOLED_OVER_INDEX = ("importance",)
_POOL: dict[str, Callable[[list[float]], float]] = {
    "norm": lambda values: float(np.linalg.norm(values)),
    "sum": lambda values: float(np.sum(values)),
    "mean": lambda values: float(np.mean(values)),
}


class CurveReport:
    """Report of the curves of one training; a subclass sends each step's values to the programs that show them.

    It has no effect on what is recorded, nor on the global random generators. A program that fails gets no further
    values, after one warning.
    """

    def __init__(self) -> None:
        self._locations: Locations = {}
        self._step, self._records, self._messages = 0, list[Record](), list[Message]()
        self._failed: set[str] = set()

    def open(self, path: Path, meta: Manifest) -> None:
        """Start the report of the run in a folder."""
        # The first row of a name counts, as in the table of the run.
        self._locations = {row.module: Location(row.stack, row.layer, row.role) for row in reversed(meta.modules)}

    def collect(self, step: int, items: Iterable[Item]) -> None:
        """Take what was recorded after ``step`` finished steps, and send the values of the step before."""
        if step != self._step:
            self.flush()
            self._step = step
        for item in items:
            if isinstance(item, Record):
                self._records.append(item)
            elif isinstance(item, Message):
                self._messages.append(item)

    @keep_generators()
    def flush(self) -> None:
        """Send the values and messages that were not sent yet."""
        values, messages = pool_records(self._records, self._locations), self._messages
        self.discard()
        if values or messages:
            self.send(values, messages, self._step)

    def discard(self) -> None:
        """Forget the values and messages that were not sent yet."""
        self._records, self._messages = [], []

    def send(self, values: dict[str, float], messages: Sequence[Message], step: int) -> None:
        """Send the values and messages of a step."""
        raise NotImplementedError

    def close(self, run: Run | None) -> None:
        """Send the last values; ``run`` is the finished run, or None if training failed."""
        self.flush()

    def attempt(self, where: str, act: Callable[[], object]) -> None:
        """Act on a program, unless it failed before; an error becomes a warning."""
        if where not in self._failed:
            try:
                act()
            except Exception as error:  # it is code of another package
                self.fail(where, error)

    def fail(self, where: str, error: Exception) -> None:
        """Warn that a program failed, which must not stop training, and leave it out from now on."""
        self._failed.add(where)
        warnings.warn(
            f"cannot report to {where}: {describe_error(error)}; training and recording continue", stacklevel=2
        )


class HostReport(CurveReport):
    """Report of curves into the run that another trainer, the host, has already opened in its own programs.

    It leaves out the values that the host logs itself, and prefixes the names of the others. Hosts take no messages.
    """

    def send(self, values: dict[str, float], messages: Sequence[Message], step: int) -> None:
        if prefixed := {f"{PREFIX}{name}": value for name, value in values.items() if name not in _OF_THE_HOST}:
            self.send_to_host(prefixed, step)

    def send_to_host(self, values: dict[str, float], step: int) -> None:
        """Send values to the programs of the host."""
        raise NotImplementedError


def pool_records(records: Sequence[Record], locations: Locations) -> dict[str, float]:
    """Pool the records of one step for a report: return their values by the name of their curve.

    A value of the run keeps its name. Values of modules are pooled by the rule of their quantity, as in
    ``norms.pool_modules``: over all modules, by layer, and by role within the layers. A cell with an unknown value has
    no curve. An alarm has one curve per id: the number of modules that it concerns, 1 for the whole run.

    Parameters
    ----------
    records : sequence of Record
        Records of one step.
    locations : mapping
        Location of each module; other names are parsed.

    Returns
    -------
    dict
        Such as ``{"loss": 0.3, "update_norm/all": 1.2, "update_norm/layer_03": 0.4, "update_norm/role_q": 0.2}``.
    """
    curves: dict[str, float] = {}
    modules: dict[str, list[tuple[Location, list[float]]]] = defaultdict(list)
    for record in records:
        quantity = QUANTITIES.get(record.quantity)
        if quantity is None or (quantity.index != "none" and record.quantity not in _POOLED_OVER_INDEX):
            continue
        if record.quantity == "alarm":  # the number of an id: a mean of several would be another id
            name = f"alarm/LS{int(record.value):03}"
            curves[name] = curves.get(name, 0.0) + 1
        elif record.module:
            location = locations.get(record.module) or parse(record.module)
            modules[record.quantity].append((location, np.atleast_1d(record.value).astype(float).tolist()))
        else:
            curves[record.quantity] = float(record.value)
    stacks = {location.stack for location in locations.values() if location.layer is not None}
    for name, rows in modules.items():
        cells: dict[str, list[float]] = defaultdict(list)
        # The row of a block contains those of its modules.
        blocks = {(location.stack, location.layer) for location, _ in rows if location.role == "block"}
        for location, values in rows:
            if location.role == "block" or (location.stack, location.layer) not in blocks:
                cells["all"] += values
                cells[_layer_name(location, len(stacks) > 1)] += values
            if location.role != "block" and location.layer is not None:
                cells[f"role_{location.role}"] += values
        pool = _POOL[QUANTITIES[name].pool]
        with np.errstate(over="ignore", invalid="ignore"):  # infinite values of a training that diverges
            curves |= {f"{name}/{cell}": pool(values) for cell, values in sorted(cells.items()) if values}
    return {name: value for name, value in curves.items() if not math.isnan(value)}


def _layer_name(location: Location, has_stacks: bool) -> str:
    name = location.role if location.layer is None else f"layer_{location.layer:02d}"
    if has_stacks and location.stack:
        return f"{location.stack}_{name}"
    return name


def describe_error(error: Exception) -> str:
    """Return type and first line of an error in another package's curve report."""
    line = printable(str(error).strip().partition("\n")[0])
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
