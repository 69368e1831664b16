"""Adapprox: low-rank second moments.

Does Adapprox cost nothing against AdamW where second moments have rank 4, and more where they have no structure? Does
it beat Adafactor at rank 4, and gain less at rank 1? Each optimizer has its best learning rate. All have the same
schedule, and no weight decay.

Source: Adapprox (arXiv 2403.14958), abstract (training no worse than with AdamW, and better than with Adafactor).

Departs:

- A quadratic with known second moments instead of the pre-training of a network.
- The growth of ranks is scaled to the width.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pandas as pd

from lorascope.papers.arms import ComputedArm, Scored
from lorascope.papers.judging import truth_names
from lorascope.papers.judging.study_statistics import LogLoss, pair
from lorascope.papers.paper_study import PaperStudy

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from lorascope.methods.method import Method

OURS, ADAMW, ADAFACTOR, CAME = "Adapprox", "AdamW", "Adafactor", "CAME"


MOMENTS = (truth_names.MOMENTS_RANK_4, truth_names.MOMENTS_UNSTRUCTURED)
"""Truths of Adapprox's pair: second moments of a low rank, or without structure."""
RANKED = (truth_names.MOMENTS_RANK_4, truth_names.MOMENTS_RANK_1)
"""Truths of the pair on its rank: rank 1, as Adafactor's, does not suffice, or it does."""


def study_arms() -> list[ComputedArm]:
    """Return the arms of Adapprox's pairs: four optimizers on a quadratic with known second moments."""
    from lorascope.methods import Adapprox, Full

    ours = Adapprox(growth_scale=None)
    optimizers = {
        OURS: ours,
        ADAMW: Full(),
        ADAFACTOR: Full(optimizer_name="adafactor"),
        f"{OURS}, rank 1": replace(ours, rank_rule="fixed"),
        f"{OURS}, no clipping": replace(ours, clip_threshold=math.inf),
    }
    return [
        ComputedArm(
            label=f"{label}, {truth}",
            method=method,
            setup="lorascope.papers.setups.quadratic",
            compute=partial(_minimize, truth),
        )
        for truth in dict.fromkeys(MOMENTS + RANKED)
        for label, method in optimizers.items()
    ]


def _minimize(truth: str, method: Method, seed: int, rate: float) -> Scored:
    from lorascope.papers.setups.quadratic import descend

    descent = descend(method, truth, seed, rate)
    row = {"phase": "", "task": "", "loss": descent.final, "first_loss": descent.losses[0]}
    losses = pd.DataFrame({"phase": "", "step": range(len(descent.losses)), "loss": descent.losses})
    return Scored(row, tables={"losses": losses})


JUDGED = {
    "pair.adapprox": pair(OURS, ADAMW, ADAFACTOR, truths=MOMENTS, of=LogLoss),
    "pair.factored": pair(OURS, ADAFACTOR, ADAMW, truths=RANKED, of=LogLoss),
}


PAPER = PaperStudy(
    name="Adapprox",
    authors="Zhao et al.",
    question="Does Adapprox match AdamW where second moments have low rank, and does it beat Adafactor there?",
)
run = PAPER.run
