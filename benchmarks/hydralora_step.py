"""Time of a training step of HydraLoRA compared with LoRA of one expert's rank.

The adapters are on the feed-forward layers of MiniLM. On one thread.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from measurements import MeasuredLine
from minilm_step import SHAPES, batch_of, step_of
from paired import compare, report
from torch import nn

from lorascope.inputs import models
from lorascope.methods import HydraLoRA, LoRA
from lorascope.methods.method import Method

AIM, EXPERTS = 1.15, (3, 10)
FEED_FORWARD = ("ffn_in", "ffn_out")


def contestant(method: Method) -> nn.Module:
    """Return MiniLM with a method's adapters."""
    model = models.load("minilm")
    method.attach(model)
    return model


def lines(pairs: int) -> Iterator[MeasuredLine]:
    """Yield the ratio for each number of experts and each batch."""
    torch.set_num_threads(1)
    lora = contestant(LoRA(rank=4, alpha=16, targets=FEED_FORWARD))
    for number in EXPERTS:
        hydra = contestant(HydraLoRA(rank=4, num_experts=number, targets=FEED_FORWARD))
        for case, shape in SHAPES.items():
            batch = batch_of(*shape)
            ratio = compare(step_of(hydra, batch), step_of(lora, batch), pairs)
            yield ratio.line(f"HydraLoRA step with {number} experts / LoRA step", case, AIM)


if __name__ == "__main__":
    report(lines, __doc__)
