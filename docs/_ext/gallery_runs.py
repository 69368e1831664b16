"""Small runs of the gallery, for the figures that no example of the package has the records for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import lorascope as ls
from lorascope.analysis.head_count import repeated_selection
from lorascope.analysis.score_agreement import correlate
from lorascope.papers.setups import planted_teacher
from lorascope.schema.module_roles import ATTENTION, FFN

LINEAR = "all-linear"
TWEETS = "sentiment/tweets"
# High rates, at which 40 steps learn something.
ADAPTER: dict[str, Any] = {"lr": 3e-3, "head_lr": 3e-3}
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
# The student of a planted teacher learns in a second or two, so that methods differ and three seeds are cheap.
STUDENT: dict[str, Any] = SHORT | {
    "steps": 100,
    "batch_size": 16,
    "eval_every": 100,
    "eval_size": 64,
    "test_size": 256,
    "observe": [],
}
STUDENT_LR: dict[str, Any] = {"lr": 1e-2, "head_lr": 1e-2}
EXPERTS: dict[str, Any] = {"rank": 1, "lr": 2e-2, "head_lr": 2e-2}
SPARSE: dict[str, Any] = {"targets": ATTENTION, "alpha": 5.0, "lr": 1e-1}
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def two_teachers() -> ls.tasks.Task:
    """Return text of two planted teachers, with the teacher as domain."""
    parts = []
    for seed in (0, 1):
        rows = pd.concat(planted_teacher.task(seed).splits.values())
        parts.append(rows[["text"]].assign(domain=f"teacher {seed}"))
    return ls.tasks.from_frame(pd.concat(parts), "text of two planted teachers")


def few_sentences() -> ls.tasks.Task:
    """Return an eighth of the text of a planted teacher, which a student learns by heart."""
    text = planted_teacher.task(0).table[["text"]]
    return ls.tasks.from_frame(text.iloc[::8].reset_index(drop=True), "few sentences of a planted teacher")


def train_students(root: Path) -> dict[str, Any]:
    """Train three seeds of the student of a planted teacher with each method; return them by the name in examples."""

    def seeds(method: ls.Method, task: ls.tasks.Task | None = None, **settings: Any) -> list[ls.Run]:
        task = task or planted_teacher.task(0)
        return [
            ls.train(planted_teacher.student(), task, method, seed=seed, root=root, **STUDENT | settings)
            for seed in (0, 1, 2)
        ]

    domains = two_teachers()

    def experts(num_experts: int, **fields: Any) -> list[ls.Run]:
        return seeds(ls.HydraLoRA(num_experts=num_experts, **fields, **EXPERTS), domains)

    by_number = {number: experts(number) for number in (1, 2, 4, 8)}
    lora = {rank: seeds(ls.LoRA(rank=rank, targets=LINEAR, **STUDENT_LR)) for rank in (1, 2, 4, 8)}
    full = {lr: seeds(ls.Full(lr=lr)) for lr in RATES}
    # Ranks of equal parameters: the matrices of the feed-forward layers are larger by half.
    ranks = {LINEAR: 1, **dict.fromkeys(ATTENTION, 9), **dict.fromkeys(FFN, 6)}
    drift = {"observe": [ls.observe.factor_drift(every=10)]}
    factored = seeds(ls.Adapprox(min_dim=32, lr=3e-3), **drift)
    steps = {"observe": [ls.observe.factors(every=2)]}
    return {
        "types": {
            targets: seeds(ls.LoRA(rank=rank, targets=targets, **STUDENT_LR), observe=[ls.observe.norms()])
            for targets, rank in ranks.items()
        },
        "uniform_draw": seeds(ls.FourierFT(**SPARSE)),
        "bands": {
            f"band around {center}": seeds(ls.FourierFT(center=float(center), width=8.0, **SPARSE))
            for center in (0, 10, 20, 30)
        },
        "bases": {name: seeds(ls.FourierFT(basis=name, **SPARSE)) for name in ("random", "orthogonal")},
        "sizes": {
            **{f"LoRA {rank}": runs for rank, runs in lora.items()},
            **{
                f"FourierFT {n}": seeds(ls.FourierFT(coefficients=n, **SPARSE | {"targets": LINEAR}))
                for n in (24, 96, 384)
            },
            "full fine-tuning": full[3e-3],
        },
        "learning_rates": {
            **{f"full fine-tuning at {lr:g}": runs for lr, runs in full.items()},
            **{f"LoRA at {lr:g}": seeds(ls.LoRA(rank=4, targets=LINEAR, lr=lr, head_lr=lr)) for lr in RATES},
        },
        "experts": {f"{number} expert{'s' * (number > 1)}": runs for number, runs in by_number.items()},
        "equal_lora": {"LoRA, rank 4": seeds(ls.LoRA(rank=4, targets=FFN, **STUDENT_LR), domains)},
        "ablated": {
            "HydraLoRA": by_number[4],
            "uniform router": experts(4, router="uniform"),
            "one expert": by_number[1],
            "separate A": experts(4, shared_a=False),
        },
        "schedules": {
            label: seeds(ls.LoRA(rank=4, targets=LINEAR, **STUDENT_LR), schedule=label.split()[0], **steps)
            for label in ("constant rate", "linear decay", "cosine decay")
        },
        "draws": {
            "equal weights": seeds(ls.LISA(n_active=2, interval=5, lr=3e-3)),
            "weights 4, 3, 2, 1": seeds(ls.LISA(n_active=2, interval=5, weights=(4, 3, 2, 1), lr=3e-3)),
        },
        "lisa_grid": [
            run
            for blocks in (0, 1, 2)
            for interval in (5, 50)
            for run in seeds(ls.LISA(n_active=blocks, interval=interval, lr=3e-3))
        ],
        "factored": factored,
        "guided": {
            "Adapprox": factored,
            "with guidance": seeds(ls.Adapprox(min_dim=32, lr=3e-3, cosine=True), **drift),
        },
        "gauged": ls.train(
            planted_teacher.student(),
            few_sentences(),
            ls.LoRA(rank=4, targets=LINEAR, **STUDENT_LR),
            root=root,
            **STUDENT | {"observe": [ls.observe.kl(every=5, keep=planted_teacher.task(1))]},
        ),
        "moments": seeds(ls.Full(lr=1e-3), observe=[ls.observe.second_moments(), ls.observe.factorings()]),
    }


def read_sentences(root: Path) -> Any:
    """Train an adapter on tweets, and return the words of its largest component on tweets that it has not seen."""
    settings = SHORT | {"steps": 60, "batch_size": 16, "test_size": 32, "max_length": 32, "observe": []}
    run = ls.train("minilm", TWEETS, ls.LoRA(rank=4, lr=1e-3, head_lr=1e-2), root=root, **settings)
    return ls.read(run, "minilm", TWEETS, top=1, progress=False)


def measure_adapter(root: Path) -> dict[str, Any]:
    """Return what instruments measure of an adapter that learned the text of a planted teacher, and forks of students.

    They are forked halfway, with a learning rate of 3e-3 instead of 1e-2.
    """
    base, task = planted_teacher.base(), planted_teacher.task(0)
    adapter = ls.example("adapter")
    method = ls.LoRA(rank=4, targets=LINEAR, **STUDENT_LR)
    settings = STUDENT | {"eval_every": 5, "keep_checkpoints": (STUDENT["steps"] // 2,)}
    forks = []
    for seed in (0, 1, 2):
        trunk = ls.train(base, task, method, seed=seed, root=root, **settings)
        forks.append(ls.fork(trunk, base, task, step=STUDENT["steps"] // 2, lr=3e-3, progress=False))
    dialed = ls.dial(adapter, base, task, planted_teacher.task(1), by="module", progress=False)
    tweets = ls.tasks.load(TWEETS).table["text"]
    return {
        "dialed": dialed,
        "correlations": correlate_scores(dialed),
        "clusters": repeated_selection(tweets, repetitions=3, most=5, sample=150),
        "priced": ls.price(adapter, base, task, ranks=(1, 2, 4), progress=False),
        "forked": forks,
    }


def correlate_scores(dialed: Any) -> pd.DataFrame:
    """Return the rank correlations of scores of the modules of an update, and of the effect of removing them."""
    modules = dialed.summary().query("part != 'whole'").assign(run=dialed.label, component=-1)
    scores = {"energy": "energy", "learn_share": "path share", "learn_slope": "slope", "learn": "effect of removal"}
    table = modules.rename(columns=scores).melt(["run", "module", "component"], [*scores.values()], "score")
    # The slope is negative where more of a module would lower the loss further.
    return correlate(table.assign(value=table["value"].where(table["score"] != "slope", -table["value"])))


def train_changed_task(root: Path) -> ls.Run:
    """Train LoRA at a constant rate on the text of one planted teacher, and from step 100 of 200 on that of another."""
    folder = root / "changed-task"
    if (folder / "run.json").exists() and (run := ls.load(folder)).finished:
        return run
    torch.manual_seed(0)
    model = planted_teacher.student()
    method = ls.LoRA(rank=4, targets=LINEAR)
    method.attach(model)
    optimizer = method.optimizer(model, lr=3e-3, head_lr=3e-3, weight_decay=0.0)
    draw, batches = np.random.default_rng(0), []
    for task in (planted_teacher.task(0), planted_teacher.task(1)):
        rows = task.encode(ls.models.processor(model), task.split("train"), planted_teacher.LENGTH)
        batches += [rows.batch(draw.choice(len(rows), 16, replace=False)) for _ in range(100)]
    with ls.record(model, optimizer, folder, [ls.observe.factors(every=10)], steps=200, seed=0) as recorder:
        for batch in batches:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            recorder.step(loss)
            optimizer.zero_grad()
    return ls.load(folder)


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

    utilization = [EVERY_10, ls.observe.utilization(every=20)]
    with_memory = SHORT | {"observe": [ls.observe.norms(), ls.observe.memory()]}
    full = train(ls.Full(**DENSE), with_memory)
    lora = ls.LoRA(rank=8, targets=LINEAR, **ADAPTER)
    sensitivity = SHORT | {"observe": [ls.observe.neurons(every=10)]}
    runs: dict[str, Any] = {
        "full": full,
        "lora": train(lora, with_memory),
        "lisa": train(ls.LISA(interval=5, **DENSE), LONG),
        "neft": train(ls.NeFT(reference=full, **DENSE), LONG | {"observe": utilization}),
        "random_neurons": train(ls.NeFT(select_by="random", **DENSE), LONG | {"observe": utilization}),
        "sensitive": [train(lora, sensitivity, seed) for seed in (0, 1)],
        "sensitive_news": train(lora, sensitivity, task="sentiment/news"),
        "adapprox": train(ls.Adapprox(dense="embed", **DENSE), LONG),
        "timed": {
            name: ls.step_time.measure(model, load_task(TWEETS), method, steps=6, root=root, batch_size=8)
            for name, method in (("full", ls.Full()), ("LoRA", lora))
        },
    }
    return runs | train_students(root) | {"changed_task": train_changed_task(root)} | measure_adapter(root)
