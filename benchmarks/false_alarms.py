"""False alarms of the doctor, and of alarms in training, on healthy runs of varied settings.

Run ``python benchmarks/false_alarms.py --runs 200``. The model is the student of ``planted_teacher``, which
learns the text of its teacher. Every method has the same number of runs, up to one. Learning rates are within a factor
of three of the default of the method. No run has a fault on purpose, so each finding counts as a false alarm.

``--loss squared-error`` and ``--loss policy-gradient`` train LoRA in a plain loop instead, on a small network with
noisy batches: a regression whose loss is of any size, and a bandit whose loss has both signs.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import warnings
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from torch import Tensor, nn

import lorascope as ls
from lorascope.diagnosis.case import Case
from lorascope.diagnosis.causes import RULES
from lorascope.diagnosis.causes.finding import run_rules
from lorascope.papers.setups import planted_teacher
from lorascope.runs.run import Run

Z = 1.959964  # normal quantile of a 95% interval
# Settings that a method needs for short runs on few modules; all others are its defaults.
OWN: dict[str, dict[str, Any]] = {
    "adapprox": {"dense": "embed"},
    "alora": {"warm_steps": 4, "round_steps": 4, "rounds": 2, "prune": 2, "score_rows": 4},
    "fourierft": {"coefficients": 100},
    "neft": {"targets": ("ffn_in", "ffn_out")},
    "lisa": {"n_active": 1, "interval": 3},
}


def draw_settings(number: int) -> tuple[ls.Method, dict[str, Any]]:
    """Return method and settings of a run, drawn from a generator of its number."""
    draw = np.random.default_rng([25, number])
    kind = list(ls.METHODS.values())[number % len(ls.METHODS)]
    names = {field.name for field in fields(kind)}
    rank = int(draw.choice([2, 4, 8, 16]))
    options: dict[str, Any] = {
        "rank": rank,
        "init_rank": rank,
        "target_rank": max(1, rank // 2),
        "alpha": float(rank * draw.choice([0.5, 1.0, 2.0])),
        "targets": ("q", "v") if draw.random() < 0.5 else "all-linear",
    } | OWN.get(kind.name, {})
    method = kind(**{name: value for name, value in options.items() if name in names})
    factor = float(3 ** draw.uniform(-1, 1))
    method = replace(method, lr=method.lr * factor, head_lr=method.head_lr * factor)
    settings = {
        "steps": int(draw.choice([15, 30])),
        "batch_size": int(draw.choice([4, 8])),
        "schedule": str(draw.choice(["linear", "cosine", "constant"])),
        "warmup": float(draw.choice([0.0, 0.06, 0.2])),
        "weight_decay": float(draw.choice([0.0, 0.01])),
        "seed": int(draw.integers(1000)),
    }
    return method, settings


def train(number: int, out: Path) -> list[Run]:
    """Train one run with alarms at every step, and return it with the runs of its earlier phases."""
    method, settings = draw_settings(number)
    observers = [ls.observe.norms(), ls.observe.alarms(every=1)]
    short = {"eval_every": 0, "eval_size": 8, "test_size": 8, "progress": False, "device": "cpu"}
    run = ls.train(
        planted_teacher.student(), planted_teacher.task(0), method, observe=observers, out=out, **short, **settings
    )
    return [*run.parents, run]


def squared_error(outputs: Tensor, rows: Tensor, scale: float) -> Tensor:
    """Return the loss of a regression whose target depends on two features."""
    return (scale * (outputs[:, 0] - rows[:, 0] - rows[:, 1])).square().mean()


def policy_gradient(outputs: Tensor, rows: Tensor, scale: float) -> Tensor:
    """Return the loss of a bandit that earns ``scale`` for the right action, with the mean as its baseline."""
    policy = torch.distributions.Categorical(logits=outputs)
    actions = policy.sample()
    rewards = scale * (actions == (rows[:, 0] > 0)).float()
    return -((rewards - rewards.mean()) * policy.log_prob(actions)).mean()


LOSSES = {"squared-error": squared_error, "policy-gradient": policy_gradient}


def train_in_loop(number: int, out: Path, loss: str) -> list[Run]:
    """Train LoRA in a plain loop, with alarms at every step, and return the run."""
    draw = np.random.default_rng([26, number])
    torch.manual_seed(number)
    network = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(16, 16), nn.Tanh())), nn.Linear(16, 3))
    rank = int(draw.choice([2, 4, 8]))
    adapter = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["0", "2", "4", "6"], modules_to_save=["8"])
    model = peft.get_peft_model(network, adapter)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=float(5e-3 * 3 ** draw.uniform(-1, 1)))
    scale, size, steps = float(10 ** draw.uniform(-1, 1.5)), int(draw.choice([4, 8, 32])), int(draw.choice([30, 80]))
    with ls.record(model, optimizer, out, [ls.observe.norms(), ls.observe.alarms(every=1)], steps=steps) as recorder:
        for _ in range(steps):
            rows = torch.randn(size, 16)
            value = LOSSES[loss](model(rows), rows, scale)
            value.backward()
            optimizer.step()
            recorder.step(loss=value)
            optimizer.zero_grad()
    return [ls.load(out)]


def wilson(count: int, total: int) -> tuple[float, float]:
    """Return the 95% interval of Wilson for a proportion."""
    share, square = count / total, Z * Z / total
    half = Z * math.sqrt(share * (1 - share) / total + square / (4 * total))
    return max(0.0, (share + square / 2 - half) / (1 + square)), (share + square / 2 + half) / (1 + square)


def row(label: str, doctor: int, alarms: int, total: int) -> str:
    """Return a row of the table."""
    cells = [f"{count} ({100 * low:.1f}% to {100 * high:.1f}%)" for count in (doctor, alarms)
             for low, high in [wilson(count, total)]]  # fmt: skip
    return f"| {label} | {cells[0]} | {cells[1]} |"


def examine(number: int, loss: str) -> tuple[set[str], set[str]]:
    """Return the findings of the doctor about one run, with their messages, and the ids of the alarms in it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        runs = train_in_loop(number, out, loss) if loss in LOSSES else train(number, out)
        # Without the recorded alarms, which `ls.diagnose` adds: they have a separate column.
        checks = [rule for rule in RULES if rule.fix]
        found = {f"{each.id} {each.cause}: {each.message}" for run in runs for each in run_rules(checks, Case(run))}
        values = [run.table["value"][run.table["quantity"] == "alarm"] for run in runs]
    return found, {f"LS{int(value):03}" for column in values for value in column}


def main() -> None:
    """Train the runs and print the number of runs with each finding; Ctrl-C prints those so far."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200, help="number of runs")
    parser.add_argument("--loss", choices=["cross-entropy", *LOSSES], default="cross-entropy", help="loss of the runs")
    parsed = parser.parse_args()
    warnings.filterwarnings("ignore")
    doctor, alarms, total = Counter[str](), Counter[str](), 0
    try:
        for number in range(parsed.runs):
            found, raised = examine(number, parsed.loss)
            if found or raised:
                method, settings = draw_settings(number)
                drawn = "" if parsed.loss in LOSSES else f" {method.label()}, lr {method.lr:.2g}, {settings}:"
                print(f"run {number}:{drawn} {found} {raised}", flush=True)
            doctor.update({each[:5] for each in found} | ({"any"} if found else set()))
            alarms.update(raised | ({"any"} if raised else set()))
            total += 1
    except KeyboardInterrupt:
        print(f"stopped after {total} of {parsed.runs} runs")
    print("| finding | doctor | alarms |\n|---|---|---|")
    for id in ("any", *sorted((doctor | alarms).keys() - {"any"})):
        print(row(id, doctor[id], alarms[id], total))


if __name__ == "__main__":
    main()
