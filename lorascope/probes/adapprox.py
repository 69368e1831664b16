"""Probe of Adapprox: rank of Adam's second moments, error of their factors, and loss compared with other optimizers.

Each optimizer has the best of three learning rates by validation loss. All have the same schedule and clipping, and no
weight decay.

Source: Adapprox (arXiv 2403.14958), figure 1 (singular values of second moments), abstract (few singular values;
training no worse than with AdamW, and better than with Adafactor and CAME).

Departs:

- Fine-tuning of a small encoder, and pre-training of a small GPT-2 on little text.
- The embeddings keep a dense second moment, because factoring 30,522 rows at every step costs more than the model.
- The head keeps a dense second moment, because it has fewer rows than ``min_dim``.
- The growth of ranks is scaled to the width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pandas as pd

from lorascope import observe
from lorascope.analysis import optimizer_moments
from lorascope.evidence.statistics import adapprox as statistics
from lorascope.evidence.statistics.lora import FULL
from lorascope.methods import Adapprox, Full
from lorascope.methods.base import Method
from lorascope.pages.report_figure import ReportFigure, draw
from lorascope.probes import pretraining
from lorascope.probes.base import Arm, Probe, encoder_settings
from lorascope.runs.run import Run

RANK = 8
METHOD = Adapprox(dense=("embed", "pos_embed"), growth_scale=None)


def arms() -> list[Arm]:
    """Return the registered arms: four optimizers, in fine-tuning of minilm and in pre-training of a small GPT-2."""
    methods: dict[str, Method] = {
        statistics.OURS: METHOD,
        statistics.ADAMW: Full(),
        statistics.ADAFACTOR: Full(optimizer_name="adafactor"),
        statistics.CAME: Full(optimizer_name="came"),
    }
    tuning = encoder_settings(100)
    seen = {
        statistics.ADAMW: tuning | {"observe": [observe.second_moments()]},
        statistics.OURS: tuning | {"observe": [*tuning["observe"], observe.factor_drift()]},
    }
    scratch = encoder_settings(600) | {"max_length": pretraining.LENGTH}
    text = pretraining.task()
    # The embedding of the small GPT-2 is small enough to be factored.
    scratched = methods | {statistics.OURS: replace(METHOD, dense=())}
    return [
        *(Arm(label=name, method=method, settings=seen.get(name, tuning)) for name, method in methods.items()),
        *(
            Arm(label=f"{name}, pre-training", method=method, settings=scratch, model=pretraining.untrained, task=text)
            for name, method in scratched.items()
        ),
    ]


def keep_tails(run: Run) -> pd.DataFrame:
    """Return the kept table ``tails``, of fractions of energy; see ``evidence.statistics.adapprox``."""
    columns = {"beyond": "moment_error", "dealt": "moment_error_dealt"}
    found = {
        name: optimizer_moments.final(run.table, quantity).xs(RANK, level="index") ** 2
        for name, quantity in columns.items()
    }
    return pd.DataFrame(found).reset_index().astype({"module": "str"})


def figures(runs: Mapping[str, Run]) -> list[ReportFigure]:
    """Draw the second moments of Adam, and the ranks and errors of their factors."""
    adam, ours = {FULL: runs[FULL]}, {statistics.OURS: runs[statistics.OURS]}
    return [draw("second_moments", adam), draw("factor_rank", ours), draw("factor_error", ours)]


PROBE = Probe(
    name="adapprox",
    title="Adapprox: low-rank second moments",
    source="Zhao et al., Adapprox, arXiv 2403.14958",
    question="Are Adam's second moments of low rank, and is a rank above one worth its cost?",
    arms=arms,
    keep={(statistics.TAILS, statistics.ADAMW): keep_tails},
    figures=figures,
    notes=(
        "Under Adapprox the embeddings and the head, which has two rows, keep a dense second moment; all other "
        "matrices are factored.",
        "Any matrix of positive entries has one large singular value. The random baseline therefore has the same row "
        "and column sums.",
    ),
)
