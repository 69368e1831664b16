"""Time of a training step of FourierFT compared with PEFT's FourierFT and with full fine-tuning.

Run ``python benchmarks/fourierft_step.py``. Another baseline trains only the biases of the adapted modules, so that
gradients flow as far as with adapters. The time above this baseline is the cost of the adapters.
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

REST = "biases only"
AGAINST = {"PEFT's": 0.75, "full fine-tuning": 1.1}


def contestants(coefficients: int | None, targets: str) -> dict[str, nn.Module]:
    """Return MiniLM with our FourierFT, with PEFT's on the same modules, fully trained, and with trained biases."""
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
    parser.add_argument("--coefficients", type=int, help="coefficients per module (default: the method's)")
    parser.add_argument("--targets", choices=sorted(TARGETS), default="all-linear")
    parser.add_argument("--shapes", nargs="+", default=["32x32", "8x16"], help="batch size x tokens, such as 64x128")
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
