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

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from lorascope.evidence.statistics import autolora as statistics
from lorascope.evidence.statistics.ranks import RANKS
from lorascope.inputs import models
from lorascope.methods import AutoLoRA, LoRA
from lorascope.methods.autolora import retained_mask
from lorascope.probes.base import Arm, Probe, ReportFigure, draw, encoder_settings, registered_settings, select
from lorascope.probes.rank_statistics import NEXT_SEED, RankAgreement, final_ranks, keep_ranks
from lorascope.probes.seed_statistics import EachRun, Runs, accuracy
from lorascope.runs.run import Run
from lorascope.schema import module_table

MOVIES, TWEETS, UNIFORM = "AutoLoRA, movies", "AutoLoRA, tweets", "LoRA, rank 4, movies"


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


def registered() -> list[Arm]:
    """Return the registered arms: AutoLoRA, its search on the domains, and LoRA of rank 4 and of random ranks."""
    method = AutoLoRA(rank=8, alpha=16.0, selection_lr=1e-2, search_steps=100)
    lora, settings = LoRA(rank=4, alpha=16.0), registered_settings()
    return [
        Arm(label=statistics.ADAPTED, method=method, settings=settings),
        # Its ranks come from the search, so one step of retraining is enough.
        Arm(label=statistics.DOMAINS, method=method, settings=registered_settings(1), task="sentiment/domains"),
        Arm(label=statistics.UNIFORM, method=lora, settings=settings),
        Arm(label=statistics.RANDOM, method=lora, settings=settings, vary=_with_random_ranks),
    ]


def _with_random_ranks(arm: Arm, seed: int) -> Arm:
    """Return the arm with the ranks that small random logits give: on average half of 8 components."""
    names = module_table.match(module_table.describe(models.load("minilm")), ("q", "v"))
    logits = np.random.default_rng(seed).standard_normal((len(names), 8))
    # The softmax of small logits is at least its mean where they are.
    kept = (logits >= logits.mean(axis=1, keepdims=True)).sum(axis=1).tolist()
    method: Any = arm.method
    return replace(arm, method=replace(method, rank=dict(zip(names, kept, strict=True))))


def rank_spread(run: Run) -> float:
    """Compute the standard deviation of the run's final ranks over modules."""
    return float(np.std(final_ranks([run])["value"].to_numpy(), ddof=1))


def random_rank_spread(run: Run) -> float:
    """Compute the standard deviation of ranks from random logits over modules."""
    return float(np.std(random_logit_ranks(run), ddof=1))


def random_logit_ranks(run: Run) -> np.ndarray:
    """Compute the ranks that AutoLoRA's threshold selects from normal random logits, one rank per module of the run."""
    k = run.meta.recipe["rank"]
    logits = np.random.default_rng(run.seed).standard_normal((len(run.ranks()), k))
    return np.array([int(retained_mask(alpha).sum()) for alpha in torch.from_numpy(logits).softmax(1)])


def figures(runs: Runs) -> list[ReportFigure]:
    """Draw the allocation on both domains, the search of the first run, and the training curves."""
    return [
        draw("rank_allocation", select(runs, MOVIES, TWEETS)),
        draw("importance", runs[MOVIES][0].parents[0], quantity="alpha"),
        draw("training_curves", select(runs, MOVIES, UNIFORM)),
    ]


PROBE = Probe(
    name="autolora",
    title="AutoLoRA: learned ranks compared with noise",
    source="Zhang et al., AutoLoRA, arXiv 2403.09113",
    question="Do ranks differ between layers more than random ones do, and between tasks more than between seeds?",
    quick_budget=160,
    arms=arms,
    registered=registered,
    keep={(RANKS, label): keep_ranks for label in (statistics.ADAPTED, statistics.DOMAINS)},
    claims={
        "autolora.spread": (EachRun(rank_spread, MOVIES), EachRun(random_rank_spread, MOVIES)),
        "autolora.tasks": (-RankAgreement(MOVIES, other=TWEETS), -RankAgreement(MOVIES)),
        "autolora.better": (EachRun(accuracy, MOVIES), EachRun(accuracy, UNIFORM)),
    },
    figures=figures,
    notes=lambda runs: [
        "Held fixed: model, data, splits, batch size, number of steps of each phase. Seeds vary the classifier head, "
        "adapter initialization, data order, dropout and the random logits.",
        NEXT_SEED,
        "Movies and tweets with the same seed share their initialization and random draws; two seeds do not. Their "
        "agreement is therefore not only due to the tasks.",
        "AutoLoRA has no rank budget: its total rank is a result. Even random logits keep about half of the initial "
        "rank if they are small, and less if they are large.",
    ],
)
