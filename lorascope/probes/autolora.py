"""AutoLoRA: do learned ranks differ between layers and tasks by more than noise does?

Source: AutoLoRA (arXiv 2403.09113), section 5.4 and figure 3 (ranks differ between layers, projections and tasks),
section 5.2 (accuracy).

Departs: a small encoder, two domains of one data set in place of different tasks, and a shorter search. A threshold at
the mean makes of any logits, random ones too, ranks around k / 2 that differ from layer to layer; the controls are
such: logits drawn by lot, and another seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from lorascope import plots
from lorascope.methods import AutoLoRA, LoRA
from lorascope.methods.autolora import retained_mask
from lorascope.probes import rank_statistics
from lorascope.probes.base import Arm, Findings, Probe, encoder_settings, exhibit, register
from lorascope.probes.claims import Claim
from lorascope.runs.run import Run

MOVIES, TWEETS, UNIFORM = "AutoLoRA, movies", "AutoLoRA, tweets", "LoRA, rank 4, movies"

LAYERS = Claim(
    sentence="The ranks that AutoLoRA finds differ between layers and projections.",
    statistic="standard deviation of the ranks over modules, movies",
    control="that of the ranks that random logits lead to",
    margin=0.3,
    source="section 5.4, figure 3",
)
TASKS = Claim(
    sentence="The ranks that AutoLoRA finds differ between tasks.",
    statistic="Kendall's tau between movies and tweets at one seed, its sign turned",
    control="that between two seeds on movies, its sign turned",
    margin=0.1,
    source="section 5.4, figure 3",
)
BETTER = Claim(
    sentence="LoRA of the ranks that AutoLoRA finds does better than of rank 4 everywhere.",
    statistic="test accuracy of AutoLoRA's retrained phase, movies",
    control="test accuracy of LoRA, rank 4, at the same steps",
    margin=0.002,
    source="section 5.2",
)


def arms(quick: bool) -> list[Arm]:
    """AutoLoRA on queries and values for two domains, and LoRA with about its parameters."""
    settings = dict(encoder_settings(quick)) | ({"steps": 12, "eval_every": 0} if quick else {"steps": 100})
    shared: dict[str, Any] = {"settings": settings | {"observe": encoder_settings(quick)["observe"][:1]}}
    rates: dict[str, Any] = {"lr": 1e-3, "head_lr": 1e-3}
    method = AutoLoRA(rank=8, alpha=16.0, selection_lr=1e-2, **rates)
    # A step of the search makes five passes forward and six back, a step of the retraining one of each.
    return [
        Arm(label=MOVIES, method=method, task="sentiment/movies", cost=6.0, **shared),
        Arm(label=TWEETS, method=method, task="sentiment/tweets", cost=6.0, **shared),
        Arm(label=UNIFORM, method=LoRA(rank=4, alpha=16.0, **rates), task="sentiment/movies", cost=0.8, **shared),
    ]


def judge(runs: Mapping[str, Sequence[Run]]) -> Findings:
    """Spread of the ranks against random logits, agreement between tasks against that between seeds, accuracy."""
    movies, tweets = runs[MOVIES], runs[TWEETS]
    found = rank_statistics.final_ranks(movies)
    both = pd.concat([found, rank_statistics.final_ranks(tweets)])
    spread = {run.meta["seed"]: _rank_spread(found[found["run"] == run.id]["value"].to_numpy()) for run in movies}
    chance = {run.meta["seed"]: _rank_spread(random_logit_ranks(run)) for run in movies}
    between_tasks = rank_statistics.agreement_with_next(movies, both, tweets)
    between_seeds = rank_statistics.agreement_with_next(movies, both)
    verdicts = [
        LAYERS.judge(spread, chance),
        TASKS.judge(*({seed: -tau for seed, tau in taus.items()} for taus in (between_tasks, between_seeds))),
        BETTER.judge(rank_statistics.accuracy(movies), rank_statistics.accuracy(runs[UNIFORM])),
    ]
    search = movies[0].parents[0]
    exhibits = [
        exhibit("rank_allocation", plots.rank_allocation({MOVIES: movies, TWEETS: tweets})),
        exhibit("importance", plots.importance(search, quantity="alpha")),
        exhibit("training_curves", plots.training_curves({MOVIES: movies, UNIFORM: runs[UNIFORM]})),
    ]
    notes = [
        "Held fixed: model, text, splits, batch size, number of steps of each phase. Seeds vary head, adapters, data "
        "order, dropout, and the random logits.",
        rank_statistics.NEXT_SEED,
        "Movies and tweets at one seed share their start and the order of their draws, which two seeds do not: what "
        "they agree on is not the task's alone.",
        "AutoLoRA has no budget: its total rank is an outcome, about half of its start whatever it learns.",
    ]
    return Findings(verdicts, exhibits, notes=notes)


def random_logit_ranks(run: Run) -> np.ndarray:
    """Ranks of as many modules from normal logits: the threshold at the mean, applied to noise."""
    k = run.meta["recipe"]["rank"]
    logits = np.random.default_rng(run.meta["seed"]).standard_normal((len(run.ranks()), k))
    return np.array([int(retained_mask(alpha).sum()) for alpha in torch.from_numpy(logits).softmax(1)])


def _rank_spread(ranks: np.ndarray) -> float:
    return float(np.std(ranks, ddof=1))


PROBE = register(
    Probe(
        name="autolora",
        title="AutoLoRA: do learned ranks mean anything?",
        source="Zhang et al., AutoLoRA, arXiv 2403.09113",
        question="Do ranks differ between layers and between tasks by more than noise and seeds make them differ?",
        quick_budget=160,
        arms=arms,
        judge=judge,
    )
)
