"""Time of a training step of LoRA compared with PEFT's LoRA.

Run ``python benchmarks/lora_step.py --pairs 40``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import peft
import torch
from paired import compare
from torch import Tensor, nn

from lorascope.adapters.delta import attached_deltas
from lorascope.inputs import models
from lorascope.methods import LoRA

TARGETS = {"q,v": ("q", "v"), "all-linear": "all-linear"}
TARGET = 1.0


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


def contestants(targets: str) -> tuple[nn.Module, nn.Module]:
    """Return MiniLM with our LoRA and with PEFT's, of rank 8 without dropout."""
    ours, theirs = models.load("minilm"), models.load("minilm")
    method = LoRA(targets=TARGETS[targets])
    method.attach(ours)
    modules = list(attached_deltas(ours))
    config = peft.LoraConfig(r=method.rank, lora_alpha=method.alpha, target_modules=modules, task_type="SEQ_CLS")
    return ours, peft.get_peft_model(theirs, config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--targets", choices=sorted(TARGETS), default="all-linear")
    parser.add_argument("--shapes", nargs="+", default=["32x32", "8x16"], help="batch size x tokens, such as 64x128")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ours, theirs = contestants(arguments.targets)
    for shape in arguments.shapes:
        batch = batch_of(*map(int, shape.split("x")))
        ratio = compare(step_of(ours, batch), step_of(theirs, batch), arguments.pairs)
        print(ratio.row(f"LoRA step / PEFT, {shape} tokens, {arguments.targets}", TARGET), flush=True)


if __name__ == "__main__":
    main()
