"""Time of a training step of FourierFT compared with PEFT's FourierFT and with full fine-tuning.

Another baseline trains only the biases of the adapted modules, so that gradients flow as far as with adapters: the time
above it is the cost of the adapters. On queries and values only, the frozen part of the model is most of a step, which
limits what a faster adapter can gain. On two threads.
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
from lorascope.methods import FourierFT, Full

OURS, THEIRS, FULL, REST = "FourierFT step", "PEFT's FourierFT step", "full fine-tuning step", "step of biases only"
AIMS = {THEIRS: 0.75, FULL: 1.1}
TARGETS = {"all linear layers": "all-linear", "queries and values": ("q", "v")}


def contestants(targets: str) -> dict[str, nn.Module]:
    """Return MiniLM with our FourierFT, with PEFT's on the same modules, fully trained, and with trained biases."""
    ours, theirs, full, rest = (models.load("minilm") for _ in range(4))
    method = FourierFT(targets=TARGETS[targets])
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
    return {OURS: ours, THEIRS: peft.get_peft_model(theirs, config), FULL: full, REST: rest}


def lines(pairs: int) -> Iterator[MeasuredLine]:
    """Yield the ratios to each baseline, on each set of layers and each batch."""
    torch.set_num_threads(THREADS)
    for targets in TARGETS:
        found = contestants(targets)
        for one, other in ((OURS, THEIRS), (OURS, FULL), (OURS, REST), (THEIRS, REST)):
            for case, shape in SHAPES.items():
                batch = batch_of(*shape)
                ratio = compare(step_of(found[one], batch), step_of(found[other], batch), pairs)
                yield ratio.line(f"{one} / {other}, {targets}", case, AIMS.get(other) if one == OURS else None)


if __name__ == "__main__":
    report(lines, __doc__)
