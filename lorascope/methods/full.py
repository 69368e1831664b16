"""Full fine-tuning: every weight trains. The baseline of the other methods.

Adafactor (arXiv 1804.04235) and CAME (arXiv 2307.02047), which store second moments only by row and column, are
baselines for ``Adapprox``. As in its paper, all three average a first moment with decay 0.9. Adafactor is the
implementation in transformers, with the given learning rate rather than one relative to the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from lorascope.methods.field_checks import require_literals
from lorascope.methods.method import Method, added_later, parameter_groups
from lorascope.methods.optimizers.came import CAME


@dataclass(kw_only=True)
class Full(Method, name="full"):
    """Full fine-tuning: every parameter trains.

    Parameters
    ----------
    optimizer_name : {"adamw", "adafactor", "came"}
        Optimizer of all weights; "adafactor" and "came" are baselines for ``Adapprox``.
    """

    optimizer_name: Literal["adamw", "adafactor", "came"] = field(default="adamw", metadata=added_later())

    def __post_init__(self) -> None:
        require_literals(self)

    def attach(self, model: nn.Module) -> None:
        """Make every parameter trainable."""
        model.requires_grad_(True)

    def optimizer(self, model: nn.Module, lr: float, head_lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """Return the optimizer ``optimizer_name`` over all weights."""
        if self.optimizer_name == "adamw":
            return super().optimizer(model, lr, head_lr, weight_decay)
        groups = parameter_groups(model, lr, head_lr, weight_decay)
        if self.optimizer_name == "came":
            return CAME(groups, lr)
        # Imported here because it takes two seconds: it imports PEFT and the parallelism of transformers.
        from transformers.optimization import Adafactor

        # Absolute steps: the learning rate has the same meaning as in the other optimizers.
        return Adafactor(groups, lr, beta1=0.9, scale_parameter=False, relative_step=False)
