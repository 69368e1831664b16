"""Adapprox: do few directions carry Adam's second moment, and is a higher rank than one of use?

Source: Adapprox (arXiv 2403.14958), figure 1 (singular values of second moments), abstract (few singular values;
training no worse than under AdamW, and better than under Adafactor and CAME). That more than one direction is of use
to the approximation, and that it holds over the steps, are claims of this project.

Departs: fine-tuning of a small encoder in place of pre-training of GPT-2, and few steps. The embeddings keep a dense
second moment, since factoring 30,522 rows at every step costs more than the model, and so does the head, which has
fewer rows than ``min_dim``. Growth of ranks is scaled to the width.
Each optimizer has the best of three rates, by validation loss; all have the same schedule, clipping and no decay.
Guidance, of which the paper's text could not be had, is tried at one rate and judged by nothing.
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
from lorascope.probes.base import Arm, Findings, Probe, exhibit, register
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
    sentence="Few singular values carry Adam's second moment, more than its rows and columns make them.",
    statistic=f"1 - squared error of the best rank {RANK}: energy in so many singular values, mean over the matrices",
    control="the same of a random matrix with the same sums by row and by column",
    margin=0.02,
    source="figure 1",
)
ABOVE_ONE = Claim(
    sentence=f"Factors of rank {RANK} say more of it than Adafactor's rank one.",
    statistic=f"minus the relative error of S-RSI at rank {RANK}, on AdamW's second moments",
    control="minus that of row sums times column sums",
    margin=0.05,
    source="this project; what the abstract takes for granted",
)
HELD = Claim(
    sentence="What Adapprox holds in the end is nearer to the exact average than row sums times column sums of that.",
    statistic="minus the relative error of its factors against the exact average since the start",
    control="minus that of the exact average's own row sums times column sums",
    margin=0.05,
    source="this project",
)
PARITY = Claim(
    sentence="Adapprox does no worse than AdamW, within 0.02 nats.",
    statistic="minus the test loss under Adapprox, at its best rate",
    control="minus the test loss under AdamW, at its best rate, less 0.02",
    margin=0.001,
    source="abstract",
)
OVER_ADAFACTOR, OVER_CAME = (
    Claim(
        sentence=f"Adapprox does better than {other}.",
        statistic="minus the test loss under Adapprox, at its best rate",
        control=f"minus the test loss under {other}, at its best rate",
        margin=0.005,
        source="abstract",
    )
    for other in (ADAFACTOR, CAME)
)


def label(optimizer: str, rate: float) -> str:
    """Of an arm; the figure of rates takes it apart."""
    return f"{optimizer} at {rate:g}"


def arms(quick: bool) -> list[Arm]:
    """Four optimizers at three rates each, and guidance at one; quick: at the middle ones, and ours at a low rank."""
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
    costs = {ADAMW: 4.0 if quick else 1.2, OURS: 2.2, GUIDED: 2.2}  # of few steps the looks are the larger part
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
    """Spectra against random ones, errors against rank one, losses at the best rates."""
    best = {name: best_rate(runs, name) for name in RATES}
    loss = {name: {run.meta["seed"]: -run.meta["test"]["loss"] for run in runs[best[name]]} for name in RATES}
    adam, ours = runs[best[ADAMW]], runs[best[OURS]]
    verdicts = [
        FEW.judge(energy(adam, "moment_error"), energy(adam, "moment_error_dealt")),
        ABOVE_ONE.judge(negated_error(adam, "moment_error_s_rsi", RANK), negated_error(adam, "moment_error_rank_one")),
        HELD.judge(negated_error(ours, "factor_drift"), negated_error(ours, "factor_drift_rank_one")),
        PARITY.judge(loss[OURS], {seed: value - 0.02 for seed, value in loss[ADAMW].items()}),
        OVER_ADAFACTOR.judge(loss[OURS], loss[ADAFACTOR]),
        OVER_CAME.judge(loss[OURS], loss[CAME]),
    ]
    exhibits = [
        exhibit("second_moments", plots.second_moments({best[ADAMW]: adam})),
        exhibit("moment_error", plots.moment_error({best[ADAMW]: adam})),
        exhibit("factorization_methods", plots.factorization_methods({best[ADAMW]: adam})),
        exhibit("factor_rank", plots.factor_rank({best[OURS]: ours})),
        exhibit("factor_error", plots.factor_error({best[OURS]: ours})),
        exhibit("guidance", plots.guidance({key: found for key, found in runs.items() if key.startswith(OURS)})),
        exhibit("learning_rates", plots.learning_rates({key: runs[key] for key in runs if not key.startswith(GUIDED)})),
        exhibit("training_curves", plots.training_curves({best[name]: runs[best[name]] for name in RATES})),
    ]
    notes = [
        "Held fixed: model, text, splits, batch size, steps, schedule, clipping. Seeds vary head, data order, dropout.",
        "Under Adapprox the embeddings and the head, which has two rows, keep a dense second moment; all other "
        "matrices are factored.",
        "The rate of each optimizer is the one of the lowest mean validation loss over all seeds; the test split has "
        "no part in it.",
        "A matrix of positive entries has one large singular value whatever it holds: hence a control of equal sums.",
    ]
    return Findings(verdicts, exhibits, {"Second moments held at the end": factor_memory(ours)}, notes)


def best_rate(runs: Mapping[str, Sequence[Run]], name: str) -> str:
    """The arm of an optimizer with the lowest mean validation loss at the end."""
    own = {key: found for key, found in runs.items() if key in {label(name, rate) for rate in RATES[name]}}
    return min(own, key=lambda key: sum(last(run, "eval_loss") for run in own[key]) / len(own[key]))


def last(run: Run, quantity: str, index: int | None = None) -> float:
    """The last value of a quantity, mean over the matrices in the blocks where it is one of modules."""
    rows = optimizer_moments.final(run.table, quantity)
    return float((rows if index is None else rows.xs(index, level="index")).mean())


def negated_error(runs: Sequence[Run], quantity: str, index: int | None = None) -> BySeed:
    """An error, turned, since lower is better."""
    return {run.meta["seed"]: -last(run, quantity, index) for run in runs}


def energy(runs: Sequence[Run], quantity: str) -> BySeed:
    """Share of the squared norm in the first singular values, mean over the matrices."""
    return {
        run.meta["seed"]: float((1 - optimizer_moments.final(run.table, quantity).xs(RANK, level="index") ** 2).mean())
        for run in runs
    }


def factor_memory(runs: Sequence[Run]) -> pd.DataFrame:
    """Rank and bytes of the factors by role at the end, beside what dense second moments of the same would take."""
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
        title="Adapprox: second moments of low rank",
        source="Zhao et al., Adapprox, arXiv 2403.14958",
        question="Do few directions carry Adam's second moment, and does keeping more than one of them pay?",
        quick_budget=44,
        arms=arms,
        judge=judge,
    )
)
