"""Full fine-tuning: every weight trains. The baseline of the others."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lorascope.method import Method


@dataclass(kw_only=True)
class Full(Method, name="full"):
    """Every parameter trains."""

    lr: float | int = 1e-4
    head_lr: float | int = 1e-4

    def attach(self, model: nn.Module) -> None:
        """Leave everything trainable."""
        model.requires_grad_(True)
