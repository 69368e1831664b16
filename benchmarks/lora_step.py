"""Time of a training step of LoRA compared with PEFT's LoRA.

The model is MiniLM in fp32, with rank 8 on all linear layers, on two threads.
"""

from __future__ import annotations

from collections.abc import Iterator

import peft
import torch
from measurements import MeasuredLine
from minilm_step import SHAPES, THREADS, batch_of, step_of
from paired import compare, report
from torch import nn

from lorascope.adapters.delta import attached_deltas
from lorascope.inputs import models
from lorascope.methods import LoRA

AIM = 1.0
LONG = {"64 x 128 tokens": (64, 128)}


def contestants() -> tuple[nn.Module, nn.Module]:
    """Return MiniLM with our LoRA and with PEFT's, of rank 8 without dropout."""
    ours, theirs = models.load("minilm"), models.load("minilm")
    method = LoRA(targets="all-linear")
    method.attach(ours)
    modules = list(attached_deltas(ours))
    config = peft.LoraConfig(r=method.rank, lora_alpha=method.alpha, target_modules=modules, task_type="SEQ_CLS")
    return ours, peft.get_peft_model(theirs, config)


def lines(pairs: int) -> Iterator[MeasuredLine]:
    """Yield the ratio for each batch; long ones have a fifth of the pairs."""
    torch.set_num_threads(THREADS)
    ours, theirs = contestants()
    for case, shape in (SHAPES | LONG).items():
        batch, number = batch_of(*shape), max(3, pairs // 5) if case in LONG else pairs
        ratio = compare(step_of(ours, batch), step_of(theirs, batch), number)
        yield ratio.line("LoRA step / PEFT's LoRA step", case, AIM)


if __name__ == "__main__":
    report(lines, __doc__)
