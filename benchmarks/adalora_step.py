"""Time of a training step of AdaLoRA compared with PEFT's AdaLoRA and with LoRA.

The steps are in the middle of a run, where the budget decreases: both AdaLoRA versions score components at every step,
and mask them at every step or at every third one, as in a run of 300 steps. On two threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
import peft
import torch
from measurements import MeasuredLine
from minilm_step import SHAPES, THREADS, batch_of
from paired import compare, report
from torch import Tensor, nn

from lorascope.adapters.delta import attached_deltas
from lorascope.inputs import models
from lorascope.methods import AdaLoRA, LoRA
from lorascope.methods.method import Method, Step

AIMS = {"PEFT's AdaLoRA step": 0.97, "LoRA step at the initial rank": 1.06}
MASKED = {1: "masking at each step", 3: "masking every third step"}
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


def lines(pairs: int) -> Iterator[MeasuredLine]:
    """Yield the ratios for each batch and interval of masks."""
    torch.set_num_threads(THREADS)
    for every, masked in MASKED.items():
        ours, theirs, plain = contestants(every)
        for number, (name, aim) in enumerate(AIMS.items()):
            for case, shape in SHAPES.items():
                batch = batch_of(*shape)
                other = our_step(*plain, batch) if number else peft_step(theirs, batch)
                yield compare(our_step(*ours, batch), other, pairs).line(f"AdaLoRA step / {name}, {masked}", case, aim)


if __name__ == "__main__":
    report(lines, __doc__)
