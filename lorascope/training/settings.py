"""Settings of ``train``: validated on creation, stored in the run, and part of its identity."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorascope.adapters.quantization import QUANTIZATIONS, require_bitsandbytes
from lorascope.inputs.computation import ATTENTIONS, DTYPES, enable_checkpointing, set_attention
from lorascope.inputs.images import AUGMENTATIONS
from lorascope.inputs.metrics import Metric, resolve
from lorascope.inputs.tasks import Task
from lorascope.methods.field_checks import LARGEST_FLOAT, is_number, require, require_choice, require_integer
from lorascope.methods.method import Method, python_number, require_quantizable
from lorascope.training.generation import Generation, read_generation

SCHEDULES = ("linear", "cosine", "constant")
PRECISIONS = ("fp32", "bf16")
TEST_STATES = ("last", "best")
WARMUP_STARTS = ("nonzero", "zero")
# By default not stored, because runs keep the ids that they had before there was a choice.
_ADDED_LATER = {
    "metric": None,
    "epochs": None,
    "test_state": "last",
    "warmup_start": "nonzero",
    "model_options": None,
    "label_smoothing": 0.0,
    "betas": [0.9, 0.999],
    "eps": 1e-8,
    "attention": None,
    "gradient_checkpointing": False,
    "generation": None,
    "dtype": None,
    "quantize": None,
    "augment": "none",
}
_NUMBERS = ("lr", "head_lr", "warmup", "clip", "weight_decay", "epochs", "label_smoothing", "eps")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Training settings that all methods share; ``train`` documents each of them.

    With ``epochs``, ``steps`` is 0 until :meth:`resolve` knows the number of rows.

    Departs:

    - The learning rate in step t of a warm-up of w steps is multiplied by (t + 1) / (w + 1). In transformers the factor
      is t / w, which is 0 in the first step, as with ``warmup_start="zero"``.
    """

    steps: int
    lr: float
    head_lr: float
    batch_size: int = 16
    schedule: str = "linear"
    warmup: float = 0.06
    clip: float | None = 1.0
    weight_decay: float = 0.0
    accumulate: int = 1
    precision: str = "fp32"
    eval_every: int | str | None = None
    eval_size: int | None = 512
    test_size: int | None = None
    max_length: int = 128
    metric: str | Metric | Sequence[str | Metric] | None = None
    epochs: float | None = None
    test_state: str = "last"
    warmup_start: str = "nonzero"
    model_options: Mapping[str, Any] | None = None
    label_smoothing: float = 0.0
    betas: Sequence[float] = (0.9, 0.999)
    eps: float = 1e-8
    attention: str | None = None
    gradient_checkpointing: bool = False
    generation: Generation | Mapping[str, Any] | None = None
    dtype: str | None = None
    quantize: str | None = None
    augment: str = "none"

    def __post_init__(self) -> None:
        require_integer(self, 1, "batch_size", "accumulate", "test_size", "max_length")
        if self.eval_size is not None:
            require_integer(self, 1, "eval_size")
        require_integer(self, 1 if self.epochs is None else 0, "steps")
        if self.epochs is not None:
            require(self, "epochs", "a number > 0", is_number(self.epochs) and 0 < self.epochs < math.inf)
        if self.eval_every == "epoch":
            require(self, "eval_every", "an integer >= 0 without epochs", self.epochs is not None)
        else:
            require_integer(self, 0, "eval_every")
        for name in ("lr", "head_lr", "warmup", "weight_decay", "clip"):
            value = getattr(self, name)
            require(self, name, "a number", is_number(value) or (name == "clip" and value is None))
        for name in ("lr", "head_lr"):
            # Optimizers multiply float32 weights by the rate.
            require(self, name, "> 0 and finite in float32", 0 < getattr(self, name) <= LARGEST_FLOAT)
        for name in ("warmup", "weight_decay"):
            require(self, name, ">= 0 and finite", 0 <= getattr(self, name) < math.inf)
        is_allowed = self.warmup < 1 or float(self.warmup).is_integer()
        require(self, "warmup", "a fraction below 1 or an integer number of steps", is_allowed)
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate must divide batch_size={self.batch_size}, got {self.accumulate}")
        require(self, "clip", "> 0 or None (no clipping)", self.clip is None or self.clip > 0)
        require_choice(self, "schedule", SCHEDULES)
        require_choice(self, "precision", PRECISIONS)
        require_choice(self, "test_state", TEST_STATES)
        require_choice(self, "warmup_start", WARMUP_STARTS)
        require_choice(self, "augment", AUGMENTATIONS)
        self._require_torch_values()
        allowed = f"one of {', '.join(map(repr, ATTENTIONS))} or None"
        require(self, "attention", allowed, self.attention in (*ATTENTIONS, None))
        checkpointing = self.gradient_checkpointing
        require(self, "gradient_checkpointing", "True or False", isinstance(checkpointing, bool))
        if self.dtype is not None:
            require_choice(self, "dtype", DTYPES)
        if self.quantize is not None:
            require_choice(self, "quantize", QUANTIZATIONS)
        _ = self.metrics  # an unknown one raises
        if self.text_generation is not None and self.text_generation.every and not self.metrics:
            raise ValueError("every of generation requires a metric of texts, such as metric='bleu'")

    def _require_torch_values(self) -> None:
        """Raise a ValueError unless the settings of loss and optimizer are valid in torch."""
        smoothing, eps = self.label_smoothing, self.eps
        is_fraction = is_number(smoothing) and 0 <= smoothing <= 1
        require(self, "label_smoothing", "a number from 0 to 1", is_fraction)
        is_pair = isinstance(self.betas, Sequence) and len(self.betas) == 2
        are_betas = is_pair and all(is_number(beta) and 0 <= beta < 1 for beta in self.betas)
        require(self, "betas", "two numbers in [0, 1)", are_betas)
        # With 0, an entry whose gradient is zero, as all of A have in the first step, would become NaN.
        require(self, "eps", "a finite number > 0", is_number(eps) and 0 < eps < math.inf)

    def require_base_of(self, method: Method) -> None:
        """Raise a ValueError if the settings quantize a base that this method needs, or without bitsandbytes."""
        if self.quantize is not None:
            require_quantizable(method)
            require_bitsandbytes(self.quantize)

    def set_computation(self, model: nn.Module) -> None:
        """Set how a model computes its attention and the gradients of its blocks, unless by default."""
        set_attention(model, self.attention, self.precision)
        if self.gradient_checkpointing:
            enable_checkpointing(model)

    def set_adam(self, optimizer: torch.optim.Optimizer, method: str) -> None:
        """Set betas and eps of a new optimizer; without their defaults, raise a ValueError if it is not AdamW."""
        stored = self.to_dict()
        if "betas" not in stored and "eps" not in stored:
            return
        if not isinstance(optimizer, torch.optim.AdamW):
            kind = type(optimizer).__name__
            raise ValueError(f"cannot set betas or eps of {method}: its optimizer is {kind}, not AdamW")
        for group in (optimizer.defaults, *optimizer.param_groups):
            group["betas"], group["eps"] = tuple(map(float, self.betas)), float(self.eps)

    def resolve(self, rows: int) -> Settings:
        """Return the settings of a phase that trains on a number of rows, with steps instead of epochs."""
        if self.epochs is None:
            return self
        epoch_steps = self.epoch_steps(rows)
        settings = dataclasses.replace(self, steps=math.ceil(self.epochs * epoch_steps))
        if self.eval_every == "epoch":
            settings = dataclasses.replace(settings, eval_every=epoch_steps)
        return settings

    def epoch_steps(self, rows: int) -> int:
        """Return the number of steps per epoch, the last one with a shorter batch."""
        return math.ceil(rows / self.batch_size)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Metrics to record, of which the first selects the best state; empty for the default of the task."""
        if self.metric is None:
            return ()
        return resolve(self.metric)

    @property
    def text_generation(self) -> Generation | None:
        """Settings of the generation of texts, also from the table of a sweep file or a run; None without it."""
        if self.generation is None:
            return None
        return read_generation(self.generation)

    @property
    def evaluation_steps(self) -> int:
        """Number of steps between two evaluations; all steps of the run if ``eval_every`` is 0."""
        if self.eval_every is None:
            return max(1, self.steps // 5)
        assert isinstance(self.eval_every, int)  # resolved
        return self.eval_every or self.steps

    @property
    def warmup_steps(self) -> int:
        """Number of warm-up steps."""
        return math.ceil(self.warmup * self.steps) if self.warmup < 1 else int(self.warmup)

    def rate(self) -> Callable[[int], float]:
        """Return the learning rate factor as a function of the 0-based step: linear warm-up, then the schedule."""
        warm, total = self.warmup_steps, self.steps

        def factor(step: int) -> float:
            if step < warm and self.warmup_start == "zero":
                return step / warm
            if step < warm:
                return (step + 1) / (warm + 1)
            left = max(0.0, (total - step) / max(1, total - warm))
            if self.schedule == "cosine":
                return 0.5 * (1 - math.cos(math.pi * left))
            return left if self.schedule == "linear" else 1.0

        return factor

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Settings:
        """Return the settings of a run from its JSON form, which may have further keys."""
        # Runs without a metric do not store it.
        names = {field.name for field in dataclasses.fields(cls)} & stored.keys()
        return cls(**{name: stored[name] for name in names})

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, in which 1 and 1.0 are the same setting."""
        values = dataclasses.asdict(dataclasses.replace(self, metric=None, generation=None))
        for name, value in values.items():
            values[name] = python_number(value)
            if name in _NUMBERS and value is not None:
                values[name] = float(value)
        values["betas"] = list(map(float, self.betas))
        if self.text_generation is not None:
            values["generation"] = self.text_generation.to_dict()
        for name, default in _ADDED_LATER.items():
            if values[name] == default:
                del values[name]
        if self.metrics:
            values["metric"] = [metric.name for metric in self.metrics]
        return values


def require_length(steps: object, epochs: object) -> None:
    """Raise a ValueError unless either the steps or the epochs of a training are set."""
    if steps is not None and epochs is not None:
        raise ValueError("pass steps or epochs, got both")
    if steps is None and epochs is None:
        raise ValueError("pass steps or epochs, such as steps=300, got neither")


def require_smoothing(label_smoothing: float, task: Task) -> None:
    """Raise a ValueError if the labels of a task cannot be smoothed."""
    labels = {"regression": "numbers", "span": "spans"}.get(task.kind)
    if label_smoothing and labels is not None:
        name = task.name
        raise ValueError(f"label_smoothing must be 0 for {name}, whose labels are {labels}, got {label_smoothing}")


def require_images(augment: str, task: Task) -> None:
    """Raise a ValueError if a task has no images to augment."""
    if augment != "none" and task.kind != "image":
        raise ValueError(f"augment must be 'none' for {task.name}, which has no images, got {augment!r}")
