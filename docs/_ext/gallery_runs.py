"""Small runs of the gallery, for the figures that no example of the package has the records for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lorascope as ls
from lorascope.papers.setups import planted_teacher

LINEAR = "all-linear"
TWEETS = "sentiment/tweets"
# High rates, at which 40 steps learn something.
ADAPTER: dict[str, Any] = {"lr": 3e-3, "head_lr": 3e-3}
FOURIER: dict[str, Any] = {"lr": 3e-2, "head_lr": 3e-3}
DENSE: dict[str, Any] = {"lr": 3e-4, "head_lr": 1e-3}
EVERY_10 = ls.observe.norms(every=10)
SHORT: dict[str, Any] = {
    "steps": 40,
    "batch_size": 8,
    "eval_every": 0,
    "eval_size": 32,
    "test_size": 128,
    "progress": False,
    "observe": [ls.observe.norms()],
}
LONG: dict[str, Any] = SHORT | {"observe": [EVERY_10]}


def train_gallery_runs(
    root: Path,
    model: str = "minilm",
    load_task: Callable[[str], Any] = str,
    adjust: Callable[[ls.Method], ls.Method] = lambda method: method,
) -> dict[str, Any]:
    """Train the runs that are missing under ``root``, and return all of them by the name that examples use.

    ``load_task`` and ``adjust`` replace the tasks and the methods, so that a smaller model can be trained.
    """

    def train(method: ls.Method, settings: dict[str, Any] = SHORT, seed: int = 0, task: str = TWEETS) -> ls.Run:
        return ls.train(model, load_task(task), adjust(method), seed=seed, root=root, **settings)

    def seeds(method: ls.Method, settings: dict[str, Any] = LONG, task: str = TWEETS) -> list[ls.Run]:
        return [train(method, settings, seed, task) for seed in (0, 1)]

    def experts(**fields: Any) -> list[ls.Run]:
        return seeds(ls.HydraLoRA(targets=("ffn_in", "ffn_out"), **ADAPTER, **fields), task="sentiment")

    utilization = [EVERY_10, ls.observe.utilization(every=20)]
    with_memory = SHORT | {"observe": [ls.observe.norms(), ls.observe.memory()]}
    full = train(ls.Full(**DENSE), with_memory)
    lora = ls.LoRA(rank=8, targets=LINEAR, **ADAPTER)
    sensitivity = SHORT | {"observe": [ls.observe.neurons(every=10)]}
    runs: dict[str, Any] = {
        "full": full,
        "lora": train(lora, with_memory),
        "hydralora": experts(num_experts=4),
        "one_expert": experts(num_experts=1),
        "uniform_router": experts(num_experts=4, router="uniform"),
        "fourierft": train(ls.FourierFT(**FOURIER)),
        "lisa": train(ls.LISA(interval=5, **DENSE), LONG),
        "neft": train(ls.NeFT(reference=full, **DENSE), LONG | {"observe": utilization}),
        "random_neurons": train(ls.NeFT(select_by="random", **DENSE), LONG | {"observe": utilization}),
        "sensitive": seeds(lora, sensitivity),
        "sensitive_news": train(lora, sensitivity, task="sentiment/news"),
        "adapprox": train(ls.Adapprox(dense="embed", **DENSE), LONG),
        "guided": train(ls.Adapprox(dense="embed", cosine=True, **DENSE), LONG),
        "bands": {
            f"band around {center}": train(ls.FourierFT(center=float(center), width=100.0, **FOURIER))
            for center in (0, 240)
        },
        "bases": {name: train(ls.FourierFT(basis=name, **FOURIER)) for name in ("random", "orthogonal")},
        "types": {f"W_{role}": train(ls.LoRA(rank=4, targets=(role,), **ADAPTER)) for role in "qv"},
        "lisa_grid": [
            train(ls.LISA(n_active=blocks, interval=interval, **DENSE)) for blocks in (1, 4) for interval in (5, 10)
        ],
        "learning_rates": {
            f"{name} at {lr:g}": train(method(lr=lr, head_lr=lr), SHORT | {"eval_every": 40})
            for name, method in (("full fine-tuning", ls.Full), ("LoRA", ls.LoRA))
            for lr in (1e-4, 3e-4, 1e-3)
        },
        "timed": {
            name: ls.step_time.measure(model, load_task(TWEETS), method, steps=6, root=root, batch_size=8)
            for name, method in (("full", ls.Full()), ("LoRA", lora))
        },
        "moments": ls.train(
            planted_teacher.student(),
            planted_teacher.task(0),
            ls.Full(lr=1e-3),
            root=root,
            **SHORT | {"observe": [ls.observe.second_moments(), ls.observe.factorings()]},
        ),
    }
    return runs
