"""Small runs from which the gallery is drawn: every method once, and the variants that some figures compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lorascope as ls

STEPS = 60
SETTINGS: dict[str, Any] = {
    "steps": STEPS,
    "batch_size": 8,
    "eval_every": 15,
    "eval_size": 64,
    "test_size": 256,
    "progress": False,
}
DOMAINS = ("movies", "news", "products", "tweets")
LINEAR = "all-linear"
WEIGHTS = 4 * 384  # rank times columns of one adapted type, so that the types train equally many parameters

Runs = dict[str, Any]


def train_gallery_runs(root: Path) -> Runs:
    """Train the runs that are missing under ``root``, and return all of them by the name that examples use."""
    observers = ls.observe

    def train(name: str, method: ls.Method, seeds: int = 1, task: str = "sentiment", **settings: Any) -> Any:
        folders = [root / f"{name}-{seed}" for seed in range(seeds)]
        runs = [
            ls.train("minilm", task, method, seed=seed, out=folder, **SETTINGS | settings)
            for seed, folder in enumerate(folders)
        ]
        return runs if seeds > 1 else runs[0]

    norms = observers.norms(every=10)
    lora = ls.LoRA(rank=8, targets=LINEAR, lr=1e-3, head_lr=1e-3)
    runs: Runs = {
        "full": train(
            "full",
            ls.Full(lr=1e-4),
            seeds=2,
            observe=[
                norms,
                observers.memory(),
                observers.second_moments(),
                observers.factorings(),
                observers.utilization(),
                observers.neurons(),
            ],
        ),
        "lora": train("lora", lora, seeds=2, observe=[norms, observers.memory()]),
        "lora_rank_32": train("lora-rank-32", ls.LoRA(rank=32, targets=LINEAR, lr=1e-3, head_lr=1e-3)),
        "adalora": train("adalora", ls.AdaLoRA(targets=LINEAR), seeds=2, observe=[norms]),
        "alora": train("alora", ls.ALoRA(init_rank=3, targets=("q", "v"), prune=4, rounds=3, warm_steps=15, round_steps=15), observe=[norms]),
        "autolora": train("autolora", ls.AutoLoRA(targets=LINEAR), observe=[norms]),
        "hydralora": train("hydralora", ls.HydraLoRA(), seeds=2, observe=[norms]),
        "fourierft": train("fourierft", ls.FourierFT(targets=LINEAR), observe=[norms]),
        "lisa": train("lisa", ls.LISA(interval=5), observe=[norms]),
        "adapprox": train("adapprox", ls.Adapprox(), observe=[norms, observers.memory(), observers.factor_drift()]),
    }
    runs["neft"] = train("neft", ls.NeFT(reference=runs["full"][0].path), observe=[norms])
    runs["domains"] = [train(f"lora-{name}", ls.LoRA(rank=4), task=f"sentiment/{name}") for name in DOMAINS]
    return runs
