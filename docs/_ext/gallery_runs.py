"""Small runs from which the gallery is drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lorascope as ls
from lorascope.probes import planted_teacher

LINEAR = "all-linear"
TWEETS = "sentiment/tweets"
EVERY_10 = ls.observe.norms(every=10)
SHORT: dict[str, Any] = {
    "steps": 20,
    "batch_size": 8,
    "eval_every": 0,
    "eval_size": 32,
    "test_size": 64,
    "progress": False,
    "observe": [ls.observe.norms()],
}
LONG: dict[str, Any] = SHORT | {"steps": 30, "observe": [EVERY_10]}
WITH_CURVES: dict[str, Any] = LONG | {"eval_every": 10}


def train_gallery_runs(root: Path) -> dict[str, Any]:
    """Train the runs that are missing under ``root``, and return all of them by the name that examples use."""

    def train(
        name: str, method: ls.Method, settings: dict[str, Any] = SHORT, seed: int = 0, task: str = TWEETS
    ) -> ls.Run:
        return ls.train("minilm", task, method, seed=seed, out=root / f"{name}-{seed}", **settings)

    def seeds(name: str, method: ls.Method, settings: dict[str, Any] = LONG, task: str = TWEETS) -> list[ls.Run]:
        return [train(name, method, settings, seed, task) for seed in (0, 1)]

    def experts(name: str, method: ls.HydraLoRA) -> list[ls.Run]:
        return seeds(name, replace(method, targets=("ffn_in", "ffn_out"), lr=1e-3, head_lr=1e-3), task="sentiment")

    utilization = [EVERY_10, ls.observe.utilization(every=15)]
    full = [
        train("full", ls.Full(lr=1e-4), WITH_CURVES | {"observe": [EVERY_10, ls.observe.memory()]}, seed=0),
        train("full", ls.Full(lr=1e-4), WITH_CURVES, seed=1),
    ]
    lora = ls.LoRA(rank=8, targets=LINEAR, lr=1e-3, head_lr=1e-3)
    runs: dict[str, Any] = {
        "full": full,
        "lora": seeds("lora", lora, WITH_CURVES | {"observe": [EVERY_10, ls.observe.memory()]}),
        "lora_rank_32": train("lora-rank-32", ls.LoRA(rank=32, targets=LINEAR, lr=1e-3, head_lr=1e-3)),
        "adalora": seeds("adalora", ls.AdaLoRA()),
        "hydralora": experts("hydralora", ls.HydraLoRA(num_experts=4)),
        "one_expert": experts("one-expert", ls.HydraLoRA(num_experts=1)),
        "uniform_router": experts("uniform", ls.HydraLoRA(num_experts=4, router="uniform")),
        "fourierft": train("fourierft", ls.FourierFT()),
        "lisa": train("lisa", ls.LISA(interval=5), LONG),
        "neft": train("neft", ls.NeFT(reference=full[0]), LONG | {"observe": utilization}),
        "random_neurons": train("random-neurons", ls.NeFT(select_by="random"), LONG | {"observe": utilization}),
        "adapprox": train("adapprox", ls.Adapprox(dense="embed"), LONG),
        "guided": train("guided", ls.Adapprox(dense="embed", cosine=True), LONG),
        "domains": {
            name: train(f"lora-{name}", ls.LoRA(rank=4), task=f"sentiment/{name}")
            for name in ("movies", "news", "tweets")
        },
        "bands": {
            f"band around {center}": train(f"band-{center}", ls.FourierFT(center=float(center), width=100.0))
            for center in (0, 240)
        },
        "bases": {name: train(name, ls.FourierFT(basis=name)) for name in ("random", "orthogonal")},
        "types": {
            f"W_{role}": train(f"type-{role}", ls.LoRA(rank=4, targets=(role,), lr=1e-3, head_lr=1e-3)) for role in "qv"
        },
        "lisa_grid": [
            train(f"lisa-{blocks}-{interval}", ls.LISA(n_active=blocks, interval=interval))
            for blocks in (1, 2)
            for interval in (5, 10)
        ],
        "learning_rates": {
            f"{name}, {lr:g}": train(f"{name}-{lr:g}", method(lr=lr), SHORT | {"eval_every": 20})
            for name, method in (("full", ls.Full), ("LoRA", ls.LoRA))
            for lr in (1e-4, 3e-4)
        },
        "timed": {
            name: ls.step_time.measure("minilm", TWEETS, method, steps=6, out=root / f"timed-{name}", batch_size=8)
            for name, method in (("full", ls.Full()), ("LoRA", lora))
        },
        "moments": ls.train(
            planted_teacher.student(),
            planted_teacher.task(0),
            ls.Full(lr=1e-3),
            out=root / "moments-0",
            **SHORT | {"observe": [ls.observe.second_moments(), ls.observe.factorings()]},
        ),
        "planted": ls.train(
            planted_teacher.student(),
            planted_teacher.task(0),
            ls.AdaLoRA(init_rank=max(planted_teacher.RANKS), target_rank=planted_teacher.BUDGET, targets=LINEAR),
            out=root / "planted-0",
            **SHORT | {"observe": [planted_teacher.planted(ranks=planted_teacher.planted_ranks(0))]},
        ),
    }
    return runs
