"""Probe of AutoLoRA: variation of learned ranks between layers and between tasks, compared with noise.

A threshold at the mean turns any logits, including random ones, into ranks that differ between layers. With k = 8
components, it keeps 4 on average for small random logits and 2.9 for standard normal ones. The controls are therefore
random logits and a second seed.

Source: AutoLoRA (arXiv 2403.09113), section 5.4 and figure 3 (ranks differ between layers, projections and tasks),
section 5.2 (accuracy).

Departs:

- A small encoder.
- Two domains of one dataset instead of different tasks.
- A shorter search.
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
from lorascope.probes.base import Arm, Findings, Probe, encoder_settings, make_report_figure, register
from lorascope.probes.claims import Claim
from lorascope.runs.run import Run

MOVIES, TWEETS, UNIFORM = "AutoLoRA, movies", "AutoLoRA, tweets", "LoRA, rank 4, movies"

LAYERS = Claim(
    sentence="AutoLoRA's ranks vary between modules more than ranks from random logits do.",
    statistic="standard deviation of the ranks over modules, movies",
    control="the same for ranks from random logits",
    margin=0.3,
    source="section 5.4, figure 3",
)
TASKS = Claim(
    sentence="AutoLoRA's ranks differ between tasks more than between seeds.",
    statistic="minus Kendall's tau between the ranks on movies and on tweets, same seed",
    control="minus Kendall's tau between the ranks of one seed and the next, movies",
    margin=0.1,
    source="section 5.4, figure 3",
)
BETTER = Claim(
    sentence="LoRA with AutoLoRA's ranks outperforms LoRA with rank 4 in every module.",
    statistic="test accuracy after AutoLoRA's retraining phase, movies",
    control="test accuracy of LoRA, rank 4, after the same number of steps, movies",
    margin=0.002,
    source="section 5.2",
)


def arms(quick: bool) -> list[Arm]:
    """Return the arms: AutoLoRA on queries and values for two domains, and LoRA of about the same size."""
    settings = dict(encoder_settings(quick)) | ({"steps": 12, "eval_every": 0} if quick else {"steps": 100})
    # No claim or figure of this probe needs the snapshots of factors, so only the norms are recorded.
    shared: dict[str, Any] = {"settings": settings | {"observe": encoder_settings(quick)["observe"][:1]}}
    rates: dict[str, Any] = {"lr": 1e-3, "head_lr": 1e-3}
    method = AutoLoRA(rank=8, alpha=16.0, selection_lr=1e-2, **rates)
    # A search step takes five forward and five backward passes, a retraining step one of each.
    return [
        Arm(label=MOVIES, method=method, task="sentiment/movies", cost=6.0, **shared),
        Arm(label=TWEETS, method=method, task="sentiment/tweets", cost=6.0, **shared),
        Arm(label=UNIFORM, method=LoRA(rank=4, alpha=16.0, **rates), task="sentiment/movies", cost=0.8, **shared),
    ]


def judge(runs: Mapping[str, Sequence[Run]]) -> Findings:
    """Compare the spread of ranks with random logits, agreement of tasks with agreement of seeds, and the accuracy."""
    movies, tweets = runs[MOVIES], runs[TWEETS]
    found = rank_statistics.final_ranks(movies)
    both = pd.concat([found, rank_statistics.final_ranks(tweets)])
    spread = {run.seed: _rank_spread(found[found["run"] == run.id]["value"].to_numpy()) for run in movies}
    chance = {run.seed: _rank_spread(random_logit_ranks(run)) for run in movies}
    between_tasks = rank_statistics.agreement_with_next(movies, both, tweets)
    between_seeds = rank_statistics.agreement_with_next(movies, both)
    verdicts = [
        LAYERS.judge(spread, chance),
        TASKS.judge(*({seed: -tau for seed, tau in taus.items()} for taus in (between_tasks, between_seeds))),
        BETTER.judge(rank_statistics.accuracy(movies), rank_statistics.accuracy(runs[UNIFORM])),
    ]
    search = movies[0].parents[0]
    figures = [
        make_report_figure("rank_allocation", plots.rank_allocation({MOVIES: movies, TWEETS: tweets})),
        make_report_figure("importance", plots.importance(search, quantity="alpha")),
        make_report_figure("training_curves", plots.training_curves({MOVIES: movies, UNIFORM: runs[UNIFORM]})),
    ]
    notes = [
        "Held fixed: model, data, splits, batch size, number of steps of each phase. Seeds vary the classifier head, "
        "adapter initialization, data order, dropout and the random logits.",
        rank_statistics.NEXT_SEED,
        "Movies and tweets with the same seed share their initialization and random draws; two seeds do not. Their "
        "agreement is therefore not only due to the tasks.",
        "AutoLoRA has no rank budget: its total rank is a result. Even random logits keep about half of the initial "
        "rank if they are small, and less if they are large.",
    ]
    return Findings(verdicts, figures, notes=notes)


def random_logit_ranks(run: Run) -> np.ndarray:
    """Compute the ranks that AutoLoRA's threshold selects from normal random logits, one rank per module of the run."""
    k = run.meta.recipe["rank"]
    logits = np.random.default_rng(run.seed).standard_normal((len(run.ranks()), k))
    return np.array([int(retained_mask(alpha).sum()) for alpha in torch.from_numpy(logits).softmax(1)])


def _rank_spread(ranks: np.ndarray) -> float:
    return float(np.std(ranks, ddof=1))


PROBE = register(
    Probe(
        name="autolora",
        title="AutoLoRA: learned ranks compared with noise",
        source="Zhang et al., AutoLoRA, arXiv 2403.09113",
        question="Do ranks differ between layers more than random ones do, and between tasks more than between seeds?",
        quick_budget=160,
        arms=arms,
        judge=judge,
    )
)
