"""Full fine-tuning: every weight trains. The baseline of the others.

Adafactor (arXiv 1804.04235) and CAME (arXiv 2307.02047), which keep second moments by row and column alone, are there
to be compared with ``Adapprox``; as in its paper all have a first moment of 0.9. Adafactor is the one of transformers,
at the rate that it is given and not relative to the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from transformers.optimization import Adafactor

from lorascope.methods.base import Method, added_later, parameter_groups
from lorascope.methods.optimizers.came import CAME
from lorascope.schema.deprecation import accept_old_fields, formerly

RULES = ("adamw", "adafactor", "came")


@accept_old_fields
@dataclass(kw_only=True)
class Full(Method, name="full"):
    """Every parameter trains.

    Parameters
    ----------
    optimizer_name : {"adamw", "adafactor", "came"}
        The optimizer.
    """

    optimizer_name: Literal["adamw", "adafactor", "came"] = field(
        default="adamw", metadata=added_later() | formerly("rule")
    )
    lr: float = 1e-4
    head_lr: float = 1e-4

    def __post_init__(self) -> None:
        if self.optimizer_name not in RULES:
            known = ", ".join(map(repr, RULES))
            raise ValueError(f"optimizer_name {self.optimizer_name!r} is unknown: it must be one of {known}")

    def attach(self, model: nn.Module) -> None:
        """Leave everything trainable."""
        model.requires_grad_(True)

    def optimizer(self, model: nn.Module, lr: float, head_lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """The optimizer of that name, over all weights."""
        if self.optimizer_name == "adamw":
            return super().optimizer(model, lr, head_lr, weight_decay)
        groups = parameter_groups(model, lr, head_lr, weight_decay)
        if self.optimizer_name == "came":
            return CAME(groups, lr)
        return Adafactor(groups, lr, beta1=0.9, scale_parameter=False, relative_step=False)
