"""Observer of how far training has moved the model from its base: KL divergence, or drift of an encoder.

A divergence from the base does not show that an earlier task is forgotten, because the base never knew it: pass rows of
that task as the ones to keep, and read their loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorascope.adapters.delta import attach, detach
from lorascope.adapters.hidden_states import evaluation_mode
from lorascope.adapters.peft_layers import is_peft_layer, unwrapped_parameters
from lorascope.inputs import models
from lorascope.inputs.tasks import Task
from lorascope.inputs.text_rows import encode_rows, load_keep, load_text, require_disjoint
from lorascope.methods.field_checks import require_integer
from lorascope.methods.method import Step, task_head
from lorascope.observe.measured_rows import DistanceFromBase, Divergence, Drift, JointMeasure, TaskLoss
from lorascope.observe.observer import Observer
from lorascope.schema.records import Quantity, Record, register

_KL = "KL divergence of the base's predictions from the model's, mean over target tokens or classes, on rows {}"
_DRIFT = "half the squared distance of the unit vectors of mean last hidden states of base and model, on rows {}"
_ROWS = {"task": "of the task's validation split", "keep": "to keep"}
register(
    "train with observe=[ls.observe.kl()]",
    row_loss=Quantity("validation loss of a row", "nats", "row", definition="scaled so that its mean is the loss"),
    **{f"kl_{kind}": Quantity("KL from the base", "nats", definition=_KL.format(rows)) for kind, rows in _ROWS.items()},
    **{f"drift_{kind}": Quantity("drift", definition=_DRIFT.format(rows)) for kind, rows in _ROWS.items()},
)
# The names of the quantities, by whether the base has no trained head.
_NAMES = {False: "kl", True: "drift"}
_MAX_LENGTH = 128  # tokens of a text in the training of another program, as in ``train``


class _Gauge(NamedTuple):
    """Kind of the distance, kl or drift, and what measures it on the rows to keep and on those of the task."""

    name: str
    keep: DistanceFromBase
    task: tuple[TaskLoss, DistanceFromBase] | None = None


@dataclass(kw_only=True)
class kl(Observer):
    """KL divergence of the predictions from those of the base, on fixed rows in evaluation mode.

    It records ``kl_task`` and ``kl_keep`` in nats per target token or class. An encoder whose head is new predicts
    nothing with its base, so its mean last hidden states are compared: ``drift_task`` and ``drift_keep``. ``row_loss``
    has the loss of every validation row, from which ``ls.plots.kl`` chooses the checkpoint to keep. In the training of
    another program, only the rows to keep are measured. Nothing else that is recorded changes.

    Parameters
    ----------
    every : int
        Steps between recordings. Each takes two forward passes of ``rows`` rows: 30% of the time of LoRA in MiniLM, at
        the defaults and a batch size of 16.
    rows : int
        Maximum number of rows of each kind, 32 or more. The predictions of the base are stored: 4 bytes per target
        token and entry of the vocabulary, twice, if the base has a trained head.
    keep : str, path or Task, optional
        Text without labels on which the model should stay as it was, see ``ls.dial``.

    Raises
    ------
    ValueError
        There are fewer than 32 rows, rows to keep are among those of the task, or ``keep`` is missing and there is no
        default for the task.
    """

    rows: int = 64
    keep: str | Path | Task | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_integer(self, 32, "rows")
        self._gauge: _Gauge | None = None

    def config(self) -> dict[str, Any]:
        keep = self.keep
        if isinstance(keep, Task):
            keep = keep.hash
        return super().config() | {"keep": keep and str(keep)}

    def __call__(self, step: Step) -> Iterator[Record]:
        """Yield the distances from the base and the losses of the rows, if the step is due."""
        if not self.due(step.finished, step.total):
            return
        with evaluation_mode(step.model):
            self._gauge = gauge = self._gauge or self._prepare(step)
            if gauge.task is not None:
                losses, distances = JointMeasure(gauge.task).values().T
                loss, distance = gauge.task
                scale = len(losses) / loss.counts.sum()
                yield Record("row_loss", losses * scale, index=np.arange(len(losses)))
                yield Record(f"{gauge.name}_task", float(distances.sum() / distance.counts.sum()))
            yield Record(f"{gauge.name}_keep", float(gauge.keep.values().sum() / gauge.keep.counts.sum()))

    def _prepare(self, step: Step) -> _Gauge:
        """Encode the rows, and compute what the base returns on them."""
        model, task, length = step.model, step.task, step.max_length or _MAX_LENGTH
        if task is None:
            has_new_head = bool(task_head(model))
            if self.keep is None:
                raise ValueError("keep is required to record kl here: pass a file of text, see ls.tasks.load")
            keep = load_text(self.keep, model, has_new_head)
        else:
            has_new_head = bool(models.missing(model))
            keep = load_keep(self.keep, task, model)
        distance, name = Drift if has_new_head else Divergence, _NAMES[has_new_head]
        keep_rows = encode_rows(model, keep, "validation", self.rows, length)
        with base_weights(step):
            measured_keep = distance(model, *keep_rows)
            if task is None:
                return _Gauge(name, measured_keep)
            task_rows = encode_rows(model, task, "validation", self.rows, length)
            require_disjoint(task_rows.table, keep_rows.table)
            return _Gauge(name, measured_keep, (TaskLoss(model, *task_rows), distance(model, *task_rows)))


@contextmanager
def base_weights(step: Step) -> Iterator[None]:
    """Give the model its base weights without adapters, in this context; afterwards it has the same tensors as before.

    Weights are exchanged, not written to, because recorders count the writes to them.
    """
    model: Any = step.model
    layers: list[Any] = [layer for layer in model.modules() if is_peft_layer(layer)]
    disabled = [layer._disable_adapters for layer in layers]
    tensors = {}
    deltas = detach(model)
    parameters = unwrapped_parameters(model)
    try:
        for layer in layers:
            layer._disable_adapters = True
        for name in parameters.keys() & step.base.keys():
            tensors[name], parameters[name].data = parameters[name].data, step.base[name]
        yield
    finally:
        for name, tensor in tensors.items():
            parameters[name].data = tensor
        for layer, was_disabled in zip(layers, disabled, strict=True):
            layer._disable_adapters = was_disabled
        attach(model, deltas)
