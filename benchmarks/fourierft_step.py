"""A training step of FourierFT against PEFT's and against full fine-tuning: python benchmarks/fourierft_step.py

And against the frozen rest, which no adapter can do without: the same model, of which only the biases of the adapted
modules train, so that slopes flow as far as they do with adapters. What a step costs above it is the adapter's own.
"""

from __future__ import annotations

import argparse

import peft
import torch
from lora_step import TARGETS, batch_of, step_of
from paired import compare
from torch import nn

from lorascope.adapters.delta import attached_deltas
from lorascope.inputs import models
from lorascope.methods import FourierFT, Full

REST = "the frozen rest"
AGAINST = {"PEFT's": 0.75, "full fine-tuning": 1.1}


def contestants(coefficients: int | None, targets: str) -> dict[str, nn.Module]:
    """The same MiniLM with our FourierFT, with PEFT's on the same modules, trained in full, and by biases alone."""
    ours, theirs, full, rest = (models.load("minilm") for _ in range(4))
    method = FourierFT(coefficients=coefficients, targets=TARGETS[targets])
    method.attach(ours)
    Full().attach(full)
    rest.requires_grad_(False).classifier.requires_grad_(True)
    for module in attached_deltas(ours):
        rest.get_submodule(module).bias.requires_grad_(True)
    n = len(next(iter(attached_deltas(ours).values())).coefficients)
    config = peft.FourierFTConfig(
        n_frequency=n,
        scaling=method.alpha,
        random_loc_seed=method.entry_seed,
        target_modules=list(attached_deltas(ours)),
        task_type="SEQ_CLS",
    )
    return {"ours": ours, "PEFT's": peft.get_peft_model(theirs, config), "full fine-tuning": full, REST: rest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--coefficients", type=int, help="of each module; by default those of the method")
    parser.add_argument("--targets", choices=sorted(TARGETS), default="all-linear")
    parser.add_argument("--shapes", nargs="+", default=["32x32", "8x16"], help="such as 64x128: batch x tokens")
    parser.add_argument("--against", nargs="*", choices=list(AGAINST), default=list(AGAINST))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = contestants(arguments.coefficients, arguments.targets)
    for shape in arguments.shapes:
        batch = batch_of(*map(int, shape.split("x")))
        steps = {name: step_of(model, batch) for name, model in found.items()}
        for other in arguments.against:
            ratio = compare(steps["ours"], steps[other], arguments.pairs)
            print(ratio.row(f"FourierFT step / {other}, {shape}, {arguments.targets}", AGAINST[other]), flush=True)
        for name in ("ours", "PEFT's"):
            above = compare(steps[name], steps[REST], arguments.pairs)
            interval = f"[{above.low:.3f}, {above.high:.3f}]"
            print(f"{name} / {REST}, {shape}, {arguments.targets}: {above.median:.3f} {interval}", flush=True)


if __name__ == "__main__":
    main()
