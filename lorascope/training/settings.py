"""The settings of ``train``: checked once, stored in the run, part of its identity."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SCHEDULES = ("linear", "cosine", "constant")
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train, whatever the method; the meaning of each is told in ``train``.

    Departs:

    - In step t of a warm-up of w steps the rate is multiplied by (t + 1) / (w + 1); transformers has t / w, which is 0
      in the first step.
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
    eval_every: int | None = None
    eval_size: int = 512
    test_size: int | None = None
    max_length: int = 128

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "eval_size", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.test_size is not None and self.test_size < 1:
            raise ValueError(f"test_size={self.test_size} must be at least 1, or None for the whole split")
        for name in ("lr", "head_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be a positive number")
        for name in ("warmup", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate={self.accumulate} must divide batch_size={self.batch_size}")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip={self.clip} must be positive, or None for no clipping")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule {self.schedule!r} is unknown: {', '.join(SCHEDULES)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r} is unknown: {', '.join(PRECISIONS)}")
        if self.eval_every is not None and self.eval_every < 0:
            raise ValueError(f"eval_every={self.eval_every} must not be negative; 0 evaluates at the end only")

    @property
    def evaluation_steps(self) -> int:
        """Steps between two evaluations; a fifth of the run by default."""
        return max(1, self.steps // 5) if self.eval_every is None else self.eval_every or self.steps

    @property
    def warmup_steps(self) -> int:
        """Steps of warm-up: a share of all steps below 1, a number of steps from 1 on."""
        return math.ceil(self.warmup * self.steps) if self.warmup < 1 else int(self.warmup)

    def rate(self) -> Callable[[int], float]:
        """Factor of the learning rate at a 0-based step: a linear warm-up, then the schedule down to zero."""
        warm, total = self.warmup_steps, self.steps

        def factor(step: int) -> float:
            if step < warm:
                return (step + 1) / (warm + 1)
            left = max(0.0, (total - step) / max(1, total - warm))
            if self.schedule == "cosine":
                return 0.5 * (1 - math.cos(math.pi * left))
            return left if self.schedule == "linear" else 1.0

        return factor

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; 1 and 1.0 are the same setting."""
        real = ("lr", "head_lr", "warmup", "clip", "weight_decay")
        return {
            name: float(value) if name in real and value is not None else value
            for name, value in dataclasses.asdict(self).items()
        }
