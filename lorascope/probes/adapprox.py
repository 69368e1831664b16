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

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from lorascope import observe, plots
from lorascope.analysis import optimizer_moments
from lorascope.methods import Adapprox, Full
from lorascope.methods.base import Method
from lorascope.probes.base import Arm, Findings, Probe, make_report_figure, register
from lorascope.probes.claims import Claim
from lorascope.probes.rank_statistics import BySeed
from lorascope.runs.run import Run

RANK = 8
ADAMW, ADAFACTOR, CAME, OURS = "AdamW", "Adafactor", "CAME", "Adapprox"
GUIDED = "Adapprox, guided"
METHOD = Adapprox(dense=("embed", "pos_embed"), growth_scale=None)
RATES = {
    ADAMW: (3e-5, 1e-4, 3e-4),
    ADAFACTOR: (3e-5, 1e-4, 3e-4),
    CAME: (3e-6, 1e-5, 3e-5),
    OURS: (3e-5, 1e-4, 3e-4),
}

FEW = Claim(
    sentence="A few singular values hold more energy of Adam's second moments than row and column sums explain.",
    statistic=f"fraction of energy in the first {RANK} singular values (1 - squared best rank-{RANK} error), mean over "
    "matrices",
    control="the same for a random matrix with the same row and column sums",
    margin=0.02,
    source="figure 1",
)
ABOVE_ONE = Claim(
    sentence=f"Factors of rank {RANK} approximate second moments better than Adafactor's rank one.",
    statistic=f"minus the relative error of S-RSI at rank {RANK} on AdamW's second moments, mean over matrices",
    control="minus the relative error of the row-column product",
    margin=0.05,
    source="this project; assumed by the abstract",
)
HELD = Claim(
    sentence="Adapprox's final factors are closer to the exact second moments than a row-column product is.",
    statistic="minus the relative error of Adapprox's factors, compared with the exact average since step 0",
    control="minus the relative error of the row-column product of this exact average",
    margin=0.05,
    source="this project",
)
PARITY = Claim(
    sentence="Adapprox is non-inferior to AdamW in test loss (tolerance 0.02 nats).",
    statistic="minus the test loss (nats) of Adapprox at its best learning rate",
    control="minus the test loss (nats) of AdamW at its best learning rate, minus 0.02",
    margin=0.001,
    source="abstract",
)
OVER_ADAFACTOR, OVER_CAME = (
    Claim(
        sentence=f"Adapprox outperforms {other} in test loss.",
        statistic="minus the test loss (nats) of Adapprox at its best learning rate",
        control=f"minus the test loss (nats) of {other} at its best learning rate",
        margin=0.005,
        source="abstract",
    )
    for other in (ADAFACTOR, CAME)
)


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


def judge(runs: Mapping[str, Sequence[Run]]) -> Findings:
    """Compare spectra with random matrices, errors with rank one, and losses at the best learning rates."""
    best = {name: best_rate(runs, name) for name in RATES}
    loss = {name: {run.seed: -run.score.loss for run in runs[best[name]]} for name in RATES}
    adam, ours = runs[best[ADAMW]], runs[best[OURS]]
    # Lower losses are better, so all losses are negated; the tolerance of 0.02 nats is subtracted from the control.
    verdicts = [
        FEW.judge(energy(adam, "moment_error"), energy(adam, "moment_error_dealt")),
        ABOVE_ONE.judge(negated_error(adam, "moment_error_s_rsi", RANK), negated_error(adam, "moment_error_rank_one")),
        HELD.judge(negated_error(ours, "factor_drift"), negated_error(ours, "factor_drift_rank_one")),
        PARITY.judge(loss[OURS], {seed: value - 0.02 for seed, value in loss[ADAMW].items()}),
        OVER_ADAFACTOR.judge(loss[OURS], loss[ADAFACTOR]),
        OVER_CAME.judge(loss[OURS], loss[CAME]),
    ]
    figures = [
        make_report_figure("second_moments", plots.second_moments({best[ADAMW]: adam})),
        make_report_figure("moment_error", plots.moment_error({best[ADAMW]: adam})),
        make_report_figure("factorization_methods", plots.factorization_methods({best[ADAMW]: adam})),
        make_report_figure("factor_rank", plots.factor_rank({best[OURS]: ours})),
        make_report_figure("factor_error", plots.factor_error({best[OURS]: ours})),
        make_report_figure(
            "guidance", plots.guidance({key: found for key, found in runs.items() if key.startswith(OURS)})
        ),
        make_report_figure(
            "learning_rates", plots.learning_rates({key: runs[key] for key in runs if not key.startswith(GUIDED)})
        ),
        make_report_figure("training_curves", plots.training_curves({best[name]: runs[best[name]] for name in RATES})),
    ]
    notes = [
        "Held fixed: model, data, splits, batch size, steps, schedule, clipping. Seeds vary the classifier head, data "
        "order and dropout.",
        "Under Adapprox the embeddings and the head, which has two rows, keep a dense second moment; all other "
        "matrices are factored.",
        "The learning rate of each optimizer has the lowest mean validation loss over all seeds; the test split is not "
        "used.",
        "Any matrix of positive entries has one large singular value. The control therefore has the same row and "
        "column sums.",
    ]
    return Findings(verdicts, figures, {"Final second moments": factor_memory(ours)}, notes)


def best_rate(runs: Mapping[str, Sequence[Run]], name: str) -> str:
    """Return the label of the optimizer's arm with the lowest final validation loss, mean over seeds."""
    own = {key: found for key, found in runs.items() if key in {label(name, rate) for rate in RATES[name]}}
    return min(own, key=lambda key: sum(final_value(run, "eval_loss") for run in own[key]) / len(own[key]))


def final_value(run: Run, quantity: str, index: int | None = None) -> float:
    """Return the last value of a quantity; if it is recorded per module, the mean over the matrices of the blocks."""
    rows = optimizer_moments.final(run.table, quantity)
    return float((rows if index is None else rows.xs(index, level="index")).mean())


def negated_error(runs: Sequence[Run], quantity: str, index: int | None = None) -> BySeed:
    """Return minus the final error by seed, so that higher is better."""
    return {run.seed: -final_value(run, quantity, index) for run in runs}


def energy(runs: Sequence[Run], quantity: str) -> BySeed:
    """Compute the fraction of energy in the first ``RANK`` singular values by seed, mean over matrices."""
    return {
        run.seed: float((1 - optimizer_moments.final(run.table, quantity).xs(RANK, level="index") ** 2).mean())
        for run in runs
    }


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


PROBE = register(
    Probe(
        name="adapprox",
        title="Adapprox: low-rank second moments",
        source="Zhao et al., Adapprox, arXiv 2403.14958",
        question="Are Adam's second moments of low rank, and is a rank above one worth its cost?",
        quick_budget=44,
        arms=arms,
        judge=judge,
    )
)
