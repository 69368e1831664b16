"""Probe of Adapprox: rank of Adam's second moments, error of their factors, and loss compared with other optimizers.

Each optimizer has the best of three learning rates by validation loss. All have the same schedule and clipping, and no
weight decay.

Source: Adapprox (arXiv 2403.14958), figure 1 (singular values of second moments), abstract (few singular values;
training no worse than with AdamW, and better than with Adafactor and CAME). Two claims are this project's own: that a
rank above one improves the approximation, and that the approximation stays accurate over the steps.

Departs:

- Fine-tuning of a small encoder instead of pre-training of GPT-2, and few steps.
- The embeddings keep a dense second moment, because factoring 30,522 rows at every step costs more than the model.
- The head keeps a dense second moment, because it has fewer rows than ``min_dim``.
- The growth of ranks is scaled to the width.
- Guidance is trained at one learning rate and judged by no claim, because the paper's text on it was not available.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pandas as pd

from lorascope import observe
from lorascope.analysis import optimizer_moments
from lorascope.evidence.statistics import adapprox as statistics
from lorascope.methods import Adapprox, Full
from lorascope.methods.base import Method
from lorascope.probes import pretraining
from lorascope.probes.base import Arm, Probe, ReportFigure, draw, registered_settings, select
from lorascope.probes.seed_statistics import BySeed, EachRun, Runs, Statistic, loss
from lorascope.runs.run import Run

RANK = 8
ADAMW, ADAFACTOR, CAME, OURS = "AdamW", "Adafactor", "CAME", "Adapprox"
GUIDED = "Adapprox, guided"
METHOD = Adapprox(dense=("embed", "pos_embed"), growth_scale=None)
RATES = dict.fromkeys((ADAMW, ADAFACTOR, CAME, OURS), (3e-5, 1e-4, 3e-4)) | {CAME: (3e-6, 1e-5, 3e-5)}


def label(optimizer: str, rate: float) -> str:
    """Return the label of an arm. ``plots.learning_rates`` reads the optimizer before " at "."""
    return f"{optimizer} at {rate:g}"


def arms(quick: bool) -> list[Arm]:
    """Return the arms: four optimizers at three learning rates each, and guidance at one.

    A quick run has only the middle rates, and Adapprox has a low maximum rank.
    """
    shared: dict[str, Any] = {"steps": 100, "batch_size": 16, "test_size": 2000}
    if quick:
        shared = {"steps": 4, "batch_size": 8, "eval_every": 0, "eval_size": 32, "test_size": 64, "max_length": 32}
    ours = replace(METHOD, max_rank=RANK) if quick else METHOD
    methods: dict[str, Method] = {
        ADAMW: Full(),
        ADAFACTOR: Full(optimizer_name="adafactor"),
        CAME: Full(optimizer_name="came"),
        OURS: ours,
        GUIDED: replace(ours, cosine=True),
    }
    seen = {ADAMW: [observe.second_moments(), observe.factorings()], OURS: [observe.factor_drift()]}
    costs = {ADAMW: 4.0 if quick else 1.2, OURS: 2.2, GUIDED: 2.2}  # in a quick run, observers dominate
    tried = RATES | {GUIDED: RATES[OURS][1:2]}
    return [
        Arm(
            label=label(name, rate),
            method=replace(method, lr=rate, head_lr=rate),
            settings=shared | {"observe": seen.get(name, [])},
            cost=costs.get(name, 1.2),
        )
        for name, method in methods.items()
        for rate in ([tried[name][len(tried[name]) // 2]] if quick else tried[name])
    ]


def registered() -> list[Arm]:
    """Return the registered arms: four optimizers, in fine-tuning of minilm and in pre-training of a small GPT-2."""
    methods: dict[str, Method] = {
        OURS: METHOD,
        ADAMW: Full(),
        ADAFACTOR: Full(optimizer_name="adafactor"),
        CAME: Full(optimizer_name="came"),
    }
    tuning = registered_settings(100)
    seen = tuning | {"observe": [observe.second_moments()]}
    scratch = registered_settings(600) | {"max_length": pretraining.LENGTH}
    text = pretraining.task()
    # The embedding of the small GPT-2 is small enough to be factored.
    scratched = methods | {OURS: replace(METHOD, dense=())}
    return [
        *(
            Arm(label=name, method=method, settings=seen if name == ADAMW else tuning)
            for name, method in methods.items()
        ),
        *(
            Arm(label=f"{name}, pre-training", method=method, settings=scratch, model=pretraining.untrained, task=text)
            for name, method in scratched.items()
        ),
    ]


def best_rate(runs: Runs, name: str) -> str:
    """Return the label of the optimizer's arm with the lowest final validation loss, mean over seeds."""
    own = select(runs, *(label(name, rate) for rate in RATES[name]))
    return min(own, key=lambda key: sum(final_value(run, "eval_loss") for run in own[key]) / len(own[key]))


@dataclass(frozen=True)
class AtBestRate(Statistic):
    """Value of each run of an optimizer at its best learning rate."""

    value: Callable[[Run], float]
    optimizer: str

    def __call__(self, data: Runs) -> BySeed:
        return EachRun(self.value, best_rate(data, self.optimizer))(data)


def final_value(run: Run, quantity: str, index: int | None = None) -> float:
    """Return the last value of a quantity; if it is recorded per module, the mean over the matrices of the blocks."""
    rows = optimizer_moments.final(run.table, quantity)
    return float((rows if index is None else rows.xs(index, level="index")).mean())


def energy(run: Run, quantity: str) -> float:
    """Compute the fraction of energy in the first ``RANK`` singular values, mean over matrices."""
    return float((1 - optimizer_moments.final(run.table, quantity).xs(RANK, level="index") ** 2).mean())


def keep_tails(run: Run) -> pd.DataFrame:
    """Return the kept table ``tails``, of fractions of energy; see ``evidence.statistics.adapprox``."""
    columns = {"beyond": "moment_error", "dealt": "moment_error_dealt"}
    found = {
        name: optimizer_moments.final(run.table, quantity).xs(RANK, level="index") ** 2
        for name, quantity in columns.items()
    }
    return pd.DataFrame(found).reset_index().astype({"module": "str"})


def _final_error(optimizer: str, quantity: str, index: int | None = None) -> Statistic:
    return -AtBestRate(partial(final_value, quantity=quantity, index=index), optimizer)


def figures(runs: Runs) -> list[ReportFigure]:
    """Draw second moments, their factors, guidance, and the losses by learning rate and over training."""
    best = {name: best_rate(runs, name) for name in RATES}
    adam, ours = select(runs, best[ADAMW]), select(runs, best[OURS])
    return [
        draw("second_moments", adam),
        draw("moment_error", adam),
        draw("factorization_methods", adam),
        draw("factor_rank", ours),
        draw("factor_error", ours),
        draw("guidance", select(runs, *(key for key in runs if key.startswith(OURS)))),
        draw("learning_rates", select(runs, *(key for key in runs if not key.startswith(GUIDED)))),
        draw("training_curves", select(runs, *best.values())),
    ]


def factor_memory(runs: Sequence[Run]) -> pd.DataFrame:
    """Return final rank and bytes of the factors by role, compared with the bytes of dense second moments."""
    rows = []
    for run in runs:
        ranks = optimizer_moments.final(run.table, "factor_rank").rename("rank").reset_index()
        rows.append(ranks.astype({"module": "str"}).merge(run.modules, on="module"))
    found = pd.concat(rows)
    found["factors"] = 4 * found["rank"] * (found["out_features"] + found["in_features"])
    found["dense"] = 4 * found["out_features"] * found["in_features"]
    means = found.groupby("role", sort=False)[["rank", "factors", "dense"]].mean()
    return means.assign(**{"of dense (%)": 100 * means["factors"] / means["dense"]}).round(1).reset_index()


PROBE = Probe(
    name="adapprox",
    title="Adapprox: low-rank second moments",
    source="Zhao et al., Adapprox, arXiv 2403.14958",
    question="Are Adam's second moments of low rank, and is a rank above one worth its cost?",
    quick_budget=44,
    arms=arms,
    registered=registered,
    keep={(statistics.TAILS, ADAMW): keep_tails},
    claims={
        "adapprox.tail": (
            AtBestRate(partial(energy, quantity="moment_error"), ADAMW),
            AtBestRate(partial(energy, quantity="moment_error_dealt"), ADAMW),
        ),
        "adapprox.above_one": (
            _final_error(ADAMW, "moment_error_s_rsi", RANK),
            _final_error(ADAMW, "moment_error_rank_one"),
        ),
        "adapprox.held": (_final_error(OURS, "factor_drift"), _final_error(OURS, "factor_drift_rank_one")),
        "adapprox.parity": (-AtBestRate(loss, OURS), -AtBestRate(loss, ADAMW) - 0.02),
        "adapprox.over_adafactor": (-AtBestRate(loss, OURS), -AtBestRate(loss, ADAFACTOR)),
        "adapprox.over_came": (-AtBestRate(loss, OURS), -AtBestRate(loss, CAME)),
    },
    figures=figures,
    tables=lambda runs: {"Final second moments": factor_memory(runs[best_rate(runs, OURS)])},
    notes=lambda runs: [
        "Held fixed: model, data, splits, batch size, steps, schedule, clipping. Seeds vary the classifier head, data "
        "order and dropout.",
        "Under Adapprox the embeddings and the head, which has two rows, keep a dense second moment; all other "
        "matrices are factored.",
        "The learning rate of each optimizer has the lowest mean validation loss over all seeds; the test split is not "
        "used.",
        "Any matrix of positive entries has one large singular value. The control therefore has the same row and "
        "column sums.",
    ],
)
