"""Time of a training step of AdaLoRA compared with PEFT's AdaLoRA and with LoRA.

Run ``python benchmarks/adalora_step.py --pairs 40``. The steps are in the middle of a run, where the budget decreases:
both AdaLoRA versions score components at every step and mask them every ``--every`` steps.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import pandas as pd
import peft
import torch
from lora_step import batch_of
from paired import compare
from torch import Tensor, nn

from lorascope.adapters.delta import attached_deltas
from lorascope.inputs import models
from lorascope.methods import AdaLoRA, LoRA
from lorascope.methods.base import Method, Step

TARGETS = {"PEFT's AdaLoRA": 0.97, "LoRA of initial rank": 1.06}
TOTAL = 100_000


def our_step(model: nn.Module, method: Method, batch: dict[str, Tensor]) -> Callable[[], Any]:
    """Return a full training step of a method, including records, while the budget decreases."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, foreach=True)
    unused = (lambda *_: torch.zeros(()), lambda *_: {}, lambda *_: None)
    step = Step(-1, TOTAL, model, optimizer, {}, pd.DataFrame(), *unused)
    indices = itertools.count(TOTAL // 5)

    def one() -> None:
        step.index = next(indices)
        optimizer.zero_grad(set_to_none=True)
        model(**batch).loss.backward()
        method.after_backward(step)
        optimizer.step()
        method.after_step(step)
        list(method.records(step))

    return one


def peft_step(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], Any]:
    """Return a full training step with PEFT's allocator and its penalty, which is part of its model's loss."""
    model.train()
    # PEFT leaves the rank that it divides by trainable, although it is not a weight.
    for name, parameter in model.named_parameters():
        if "ranknum" in name:
            parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, foreach=True)
    indices = itertools.count(TOTAL // 5)

    def one() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(**batch).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(next(indices))

    return one


def contestants(every: int) -> tuple[tuple[nn.Module, Method], nn.Module, tuple[nn.Module, Method]]:
    """Return MiniLM with our AdaLoRA, with PEFT's, and with our LoRA of the same rank on the same modules."""
    ours, theirs, plain = (models.load("minilm") for _ in range(3))
    method = AdaLoRA(mask_every=every)
    method.attach(ours)
    schedule = method.schedule(TOTAL)
    config = peft.AdaLoraConfig(
        init_r=method.init_rank, target_r=method.target_rank, lora_alpha=method.alpha, orth_reg_weight=method.gamma,
        tinit=schedule.initial, tfinal=schedule.final, deltaT=every, total_step=TOTAL,
        target_modules=list(attached_deltas(ours)), task_type="SEQ_CLS",
    )  # fmt: skip
    lora = LoRA(rank=method.init_rank, alpha=method.alpha, targets=method.targets)
    lora.attach(plain)
    return (ours, method), peft.get_peft_model(theirs, config), (plain, lora)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--every", type=int, default=1, help="steps between masks; 1 is the most expensive")
    parser.add_argument("--shapes", nargs="+", default=["32x32", "8x16"], help="batch size x tokens, such as 64x128")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ours, theirs, plain = contestants(arguments.every)
    for shape in arguments.shapes:
        batch = batch_of(*map(int, shape.split("x")))
        one = our_step(*ours, batch)
        others = (peft_step(theirs, batch), our_step(*plain, batch))
        for (name, target), other in zip(TARGETS.items(), others, strict=True):
            ratio = compare(one, other, arguments.pairs)
            print(ratio.row(f"AdaLoRA step / {name}, {shape}", target), flush=True)


if __name__ == "__main__":
    main()
