"""A training step of MiniLM on a fixed batch, which several benchmarks time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

THREADS = 2
SHAPES = {"32 x 32 tokens": (32, 32), "8 x 16 tokens": (8, 16)}
"""Batch size and tokens of each case."""


def batch_of(size: int, length: int) -> dict[str, Tensor]:
    """Return random token ids without padding, and labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (size, length), generator=generator)
    labels = torch.randint(2, (size,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def step_of(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], Any]:
    """Return a full optimizer step on a fixed batch."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, foreach=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(**batch).loss.backward()
        optimizer.step()

    return step
