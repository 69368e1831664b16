"""Time of a training step of HydraLoRA compared with LoRA of one expert's rank.

Run ``python benchmarks/hydralora_step.py --pairs 40``.
"""

from __future__ import annotations

import argparse

import torch
from lora_step import batch_of, step_of
from paired import compare
from torch import nn

from lorascope.inputs import models
from lorascope.methods import HydraLoRA, LoRA
from lorascope.methods.base import Method

TARGET = 1.15
FEED_FORWARD = ("ffn_in", "ffn_out")


def contestant(method: Method) -> nn.Module:
    """Return MiniLM with a method's adapters."""
    model = models.load("minilm")
    method.attach(model)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--heads", type=int, nargs="+", default=[3, 10])
    parser.add_argument("--shapes", nargs="+", default=["32x32", "8x16"], help="batch size x tokens, such as 64x128")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lora = contestant(LoRA(rank=4, alpha=16, targets=FEED_FORWARD))
    for number in arguments.heads:
        hydra = contestant(HydraLoRA(rank=4, num_experts=number, targets=FEED_FORWARD))
        for shape in arguments.shapes:
            batch = batch_of(*map(int, shape.split("x")))
            ratio = compare(step_of(hydra, batch), step_of(lora, batch), arguments.pairs)
            print(ratio.row(f"HydraLoRA step, {number} experts / LoRA, {shape}", TARGET), flush=True)


if __name__ == "__main__":
    main()
