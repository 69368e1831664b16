"""Train the examples that the package contains: ``python data/write_examples.py`` writes ``examples`` next to itself.

All of them adapt the base of the planted teachers, a decoder with random weights, to text that a teacher wrote. The
ranks of a teacher's update are known, so the figures can be compared with the truth.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import load_file, save_file

import lorascope as ls
from lorascope.papers.setups import planted_teacher
from lorascope.runs.writer import remove_states

EXAMPLES = Path(__file__).resolve().with_name("examples")
STEPS = 400
CHECKPOINTS = (50, 100, 200, 400)
# High rates, at which so few steps learn most of the planted updates.
RATES = {"lr": 1e-2, "head_lr": 1e-2}
NORMS = ls.observe.norms(every=100)
NEURONS = ls.observe.neurons(every=200)


def two_teachers() -> ls.tasks.Task:
    """Return text of two planted teachers, with the teacher as domain."""
    parts = []
    for seed in (0, 1):
        rows = pd.concat(planted_teacher.task(seed).splits.values())
        parts.append(rows[["text"]].assign(domain=f"teacher {seed}"))
    return ls.tasks.from_frame(pd.concat(parts), "text of two planted teachers")


def train(
    out: Path,
    method: ls.Method,
    observe: Sequence[Any] = (NORMS,),
    task: ls.tasks.Task | None = None,
    steps: int = STEPS,
    **settings: Any,
) -> ls.Run:
    """Train the base with a method."""
    task = task or planted_teacher.task(0)
    model = planted_teacher.student()
    model.config._name_or_path = "planted-base"  # the name, not a folder of this machine
    fixed = {"eval_every": 100, "eval_size": 64, "test_size": 128, "device": "cpu", "progress": False}
    return ls.train(model, task, method, steps=steps, observe=observe, out=out, **fixed | settings)


def train_run(name: str, out: Path, full: Path) -> ls.Run:
    """Train the run of an example; NeFT's reads the run of full fine-tuning."""
    if name == "lora":
        return train(out, ls.LoRA(rank=4, targets="all-linear", **RATES))
    if name == "full":
        return train(out, ls.Full(lr=1e-3, head_lr=1e-3), [NORMS, NEURONS])
    if name == "adalora":
        truth = planted_teacher.planted(ranks=planted_teacher.planted_ranks(0))
        method = ls.AdaLoRA(
            init_rank=max(planted_teacher.RANKS),
            target_rank=planted_teacher.BUDGET,
            mask_every=20,
            targets="all-linear",
            **RATES,
        )
        return train(out, method, [NORMS, truth])
    if name == "alora":
        return train(out, ls.ALoRA(init_rank=planted_teacher.BUDGET, score_rows=16, **RATES))
    if name == "hydralora":
        return train(out, ls.HydraLoRA(rank=2, **RATES), task=two_teachers())
    if name == "fourierft":
        return train(out, ls.FourierFT(alpha=5, lr=1e-1, head_lr=1e-2), [NORMS, ls.observe.coefficients(every=200)])
    utilization = ls.observe.utilization(every=200, size=64)
    return train(out, ls.NeFT(reference=full, lr=3e-3, head_lr=3e-3), [NORMS, NEURONS, utilization])


def write_adapter(run: ls.Run, out: Path) -> None:
    """Write the adapter of a run as a PEFT folder, in float16."""
    ls.export.to_peft(run, out)
    (out / "README.md").unlink()  # it shows how to load the base, which is not published
    file = out / "adapter_model.safetensors"
    arrays = load_file(file)
    save_file({name: array.astype(np.float16) for name, array in arrays.items()}, file, {"format": "pt"})


# Name -> what it is.
RUNS = {
    "lora": "run of LoRA, with norms and factors every 100 steps",
    "full": "run of full fine-tuning, with the sensitivity of neurons and its null",
    "adalora": "run of AdaLoRA, with its ranks, scores and the planted ranks",
    "alora": "run of ALoRA, with its ranks and ablation scores",
    "hydralora": "run of HydraLoRA on two domains, with router weights",
    "fourierft": "run of FourierFT, with the sensitivity of coefficients",
    "neft": "run of NeFT from full, with the utilization of neurons",
}
ADAPTERS = {
    "adapter": "PEFT adapter: LoRA of rank 8",
    "adapter_seed_1": "PEFT adapter: the same with another seed",
}
SERIES = "PEFT adapters: four checkpoints of one training"


def write_all(folder: Path, cache: Path) -> None:
    """Train all examples in a cache, and write them and their list into a folder."""
    about = {}

    def describe(name: str, description: str, run: ls.Run) -> None:
        made = f"{run.label}; {run.meta.settings['steps']} steps on {run.task}, seed {run.seed}"
        about[name] = {"description": description, "made": made}

    for name, description in RUNS.items():
        run = train_run(name, cache / name, cache / "full")
        describe(name, description, run)
        shutil.copytree(run.path, folder / name)
        if not run.ranks():
            # Whole models would be a third of all examples, and no figure reads them.
            remove_states(ls.load(folder / name))
    for seed, (name, description) in enumerate(ADAPTERS.items()):
        run = train(cache / name, ls.LoRA(rank=8, targets="all-linear", **RATES), seed=seed)
        describe(name, description, run)
        write_adapter(run, folder / name)
    for steps in CHECKPOINTS:
        # With a constant rate, a longer training begins with all steps of a shorter one.
        name, method = f"checkpoint-{steps}", ls.LoRA(rank=4, targets="all-linear", **RATES)
        run = train(cache / name, method, steps=steps, schedule="constant", warmup=20)
        write_adapter(run, folder / "checkpoints" / name)
    describe("checkpoints", SERIES, run)
    text = json.dumps(about, indent=1)
    (folder / "examples.json").write_text(f"{text}\n", encoding="utf-8")


def main() -> None:
    """Replace the folder of examples."""
    shutil.rmtree(EXAMPLES, ignore_errors=True)
    EXAMPLES.mkdir()
    with TemporaryDirectory() as cache:
        write_all(EXAMPLES, Path(cache))


if __name__ == "__main__":
    main()
