"""Adapprox: low-rank second moments.

Are Adam's second moments of low rank, and is the loss as low as with other optimizers? Each optimizer has the best of
three learning rates by validation loss. All have the same schedule and clipping, and no weight decay.

Source: Adapprox (arXiv 2403.14958), figure 1 (singular values of second moments), abstract (few singular values;
training no worse than with AdamW, and better than with Adafactor and CAME).

Departs:

- Fine-tuning of a small encoder, and pre-training of a small GPT-2 on little text.
- The embeddings keep a dense second moment, because factoring 30,522 rows at every step costs more than the model.
- The head keeps a dense second moment, because it has fewer rows than ``min_dim``.
- The growth of ranks is scaled to the width.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lorascope.analysis import optimizer_moments
from lorascope.papers.judging import truth_names
from lorascope.papers.judging.statistics import Constant, LogLikelihood, OfRun
from lorascope.papers.judging.study_statistics import LogLoss, pair
from lorascope.papers.paper_study import PaperStudy
from lorascope.papers.probe import Arm, ComputedArm, Probe, Scored, encoder_settings
from lorascope.runs.run import Run

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from lorascope.methods.method import Method

OURS, ADAMW, ADAFACTOR, CAME = "Adapprox", "AdamW", "Adafactor", "CAME"
PRE_OURS, PRE_ADAMW, PRE_ADAFACTOR, PRE_CAME = (f"{name}, pre-training" for name in (OURS, ADAMW, ADAFACTOR, CAME))
TAILS = "tails"
"""Kept table ``module, beyond, dealt``: energy beyond eight singular values, of a second moment and shuffled."""

RANK = 8


def arms() -> list[Arm]:
    """Return the registered arms of the Adapprox paper: four optimizers that fine-tune minilm and pre-train GPT-2."""
    from lorascope import observe
    from lorascope.methods import Adapprox, Full
    from lorascope.papers.setups import pretraining

    # Without a scale, ranks grow in proportion to the largest rank allowed. The paper's constants fit a width of 768.
    ours = Adapprox(dense=("embed", "pos_embed"), growth_scale=None)
    methods: dict[str, Method] = {
        OURS: ours,
        ADAMW: Full(),
        ADAFACTOR: Full(optimizer_name="adafactor"),
        CAME: Full(optimizer_name="came"),
    }
    tuning = encoder_settings(100)
    observed = {
        ADAMW: tuning | {"observe": [observe.second_moments()]},
        OURS: tuning | {"observe": [*tuning["observe"], observe.factor_drift()]},
    }
    fine_tuned = [
        Arm(label=name, method=method, settings=observed.get(name, tuning)) for name, method in methods.items()
    ]
    # The embedding of the small GPT-2 is small enough to be factored.
    methods[OURS] = replace(ours, dense=())
    scratch = encoder_settings(600) | {"max_length": pretraining.LENGTH}  # the model has no further positions
    model, text = pretraining.untrained_model, pretraining.plain_text()
    return fine_tuned + [
        Arm(label=f"{name}, pre-training", method=method, settings=scratch, model=model, task=text)
        for name, method in methods.items()
    ]


def log_tail_ratio(table: pd.DataFrame) -> float:
    """Compute Adapprox's log10 of energy beyond eight in the shuffled matrix over the real one, mean over matrices."""
    return float(np.log10(table["dealt"] / table["beyond"]).mean())


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


CLAIMS = {
    "adapprox.pretraining": (LogLikelihood(PRE_OURS), LogLikelihood(PRE_ADAMW)),
    "adapprox.pre_adafactor": (LogLikelihood(PRE_OURS), LogLikelihood(PRE_ADAFACTOR)),
    "adapprox.pre_came": (LogLikelihood(PRE_OURS), LogLikelihood(PRE_CAME)),
    "adapprox.tail": (OfRun(log_tail_ratio, TAILS, ADAMW), Constant(0.0)),
    "adapprox.parity": (LogLikelihood(OURS), LogLikelihood(ADAMW)),
    "adapprox.over_adafactor": (LogLikelihood(OURS), LogLikelihood(ADAFACTOR)),
    "adapprox.over_came": (LogLikelihood(OURS), LogLikelihood(CAME)),
}


def keep_tails(run: Run) -> pd.DataFrame:
    """Return the kept table ``tails`` of the Adapprox paper, of fractions of energy; see ``TAILS``."""
    errors = {"beyond": "moment_error", "dealt": "moment_error_dealt"}
    at_rank = {
        name: optimizer_moments.final_values(run.table, error).xs(RANK, level="index") for name, error in errors.items()
    }
    # The recorded errors are relative norms, and their squares are fractions of energy.
    return (pd.DataFrame(at_rank) ** 2).reset_index().astype({"module": "str"})


_NAMES = (OURS, ADAMW, ADAFACTOR, CAME)

PROBE = Probe(
    name="adapprox",
    title="Adapprox: low-rank second moments",
    source="Zhao et al., Adapprox, arXiv 2403.14958",
    question="Are Adam's second moments of low rank, and is a rank above one worth its cost?",
    arms=arms,
    keep={(TAILS, ADAMW): keep_tails},
)

PAPER = PaperStudy(
    name="Adapprox",
    authors="Zhao et al.",
    question="Does Adapprox match AdamW where second moments have low rank, and does it beat Adafactor there?",
)
run = PAPER.run
