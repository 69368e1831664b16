"""Train with every method: ``python devices_training.py ROOT OUT`` uses two processes, ``train`` one.

The two are forks of one process with the environment of ``torchrun``, so that the imports run once. Models compute in
float64 and have no dropout, so that both trainings differ by the order of sums only.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from safetensors.torch import save_file
from trainers import without_dropout
from transformers import logging

import lorascope as ls
from lorascope.inputs import models
from lorascope.methods.method import Step
from lorascope.observe.observer import Observer

ROWS = 8  # per batch
# The train split has 45 rows: five batches of 8 and one of 5, which gives one process 2 rows and the other 3.
# In batches of 44 the last one has a single row, so that one process has none.
COMMON: dict[str, Any] = {"epochs": 1, "batch_size": ROWS, "eval_every": 2, "progress": False, "device": "cpu"}
STEPS = 6


def lora(**fields: Any) -> ls.LoRA:
    """Return LoRA with rates at which six steps change the weights."""
    return ls.LoRA(rank=4, lr=1e-2, head_lr=1e-2, **fields)


# Job -> method and settings. All adapters start from random factors, and all schedules act within six steps.
JOBS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora": (lora(), {"accumulate": 2, "weight_decay": 0.1}),
    "best": (lora(), {"test_state": "best", "label_smoothing": 0.1}),
    "one row": (lora(), {"batch_size": 44, "epochs": 3}),
    "autolora one row": (ls.AutoLoRA(rank=3, selection_lr=0.1, lr=1e-2), {"batch_size": 20, "epochs": 2}),
    "dora": (ls.DoRA(rank=2, lr=1e-2), {}),
    "vera": (ls.VeRA(rank=4, lr=1e-2), {}),
    "pissa": (ls.PiSSA(rank=2, lr=1e-2), {}),
    "adalora": (ls.AdaLoRA(init_rank=3, target_rank=1, initial_steps=0, final_steps=2, mask_every=1, lr=1e-2), {}),
    "fourierft": (ls.FourierFT(coefficients=16, lr=1e-2), {}),
    "hydralora": (ls.HydraLoRA(rank=2, lr=1e-2), {}),
    "full": (ls.Full(lr=1e-3), {}),
    "lisa": (ls.LISA(n_active=1, interval=2, lr=1e-3), {}),
    "adapprox": (ls.Adapprox(min_dim=8, reselect_every=2, growth_scale=None, lr=1e-3), {}),
    "alora": (ls.ALoRA(init_rank=2, prune=5, score_rows=4, lr=1e-2), {"steps": STEPS, "epochs": None}),
    "alora sensitivity": (
        ls.ALoRA(init_rank=2, prune=5, scores="sensitivity", fresh_moments=True, lr=1e-2),
        {"steps": STEPS, "epochs": None},
    ),
    "neft": (ls.NeFT(num_neurons=24, lr=1e-2), {}),
    "neft random": (ls.NeFT(num_neurons=24, select_by="random", lr=1e-2, clip_before=0.5), {}),
    "neft probed": (ls.NeFT(num_neurons=24, select_by="probed", lr=1e-2), {}),
    **{
        f"autolora {form}": (
            ls.AutoLoRA(rank=3, selection_lr=0.1, hypergradient=form, lr=1e-2),
            {"attention": "eager"},
        )
        for form in ("finite_difference", "exact", "first_order", "betty")
    },
}


@dataclass(kw_only=True)
class At(Observer):
    """Observer that presses Ctrl-C or stops the training after a step; it runs in the first process only."""

    step: int
    does: str
    job: str = ""

    def __call__(self, step: Step) -> tuple[()]:
        if step.finished == self.step and self.does == "stop":
            step.stop = "enough"
        elif step.finished == self.step and self.job not in _PRESSED:
            _PRESSED.append(self.job)
            os.kill(os.getpid(), signal.SIGINT)
        return ()


_PRESSED: list[str] = []  # jobs that were interrupted


def train(root: Path, out: Path, rank: int = 0, interrupted: bool = False) -> None:
    """Train all methods in this process, and save the weights of each."""
    logging.set_verbosity_error()

    def job(name: str, *details: Any, **options: Any) -> None:
        train_job(root, out / name, rank, *details, **options)

    for name, (method, settings) in JOBS.items():
        job(name, method, settings)
    # The rows of plain text have different numbers of targets. Smoothing avoids the model's loss in float32.
    job("text", ls.LoRA(rank=2, lr=1e-2), {"accumulate": 2, "label_smoothing": 0.1}, "gpt2")
    # New components are drawn between steps with dropout. The adapters of one process have other masks.
    alora = ls.ALoRA(init_rank=2, prune=5, score_rows=4, dropout=0.3, lr=1e-2)
    job("dropout", alora, {"steps": STEPS, "epochs": None}, dropout=True)
    if not interrupted:
        _PRESSED.append("resumed")
        _PRESSED.append("handed over")
    for name in ("resumed", "handed over"):
        with suppress(KeyboardInterrupt):
            job(name, lora(), pressing(name))
            assert not interrupted, "Ctrl-C had no effect"
    if interrupted:  # a single process will finish the other one
        assert not (out / f"resumed-{rank}.safetensors").exists()
        job("resumed", lora(), pressing("resumed"))


def train_job(
    root: Path,
    out: Path,
    rank: int,
    method: ls.Method,
    settings: dict[str, Any],
    family: str = "bert",
    dropout: bool = False,
) -> None:
    """Train with one method, and save the weights next to the run."""
    task = ls.tasks.load(str(root / f"{family}.csv"))
    model = models.load(str(root / family), task).double()
    if not dropout:
        without_dropout(model)
    ls.train(model, task, method, out=out, **(COMMON | settings))
    state = {key: parameter.detach().contiguous() for key, parameter in model.named_parameters()}
    save_file(state, f"{out}-{rank}.safetensors")


def pressing(job: str) -> dict[str, Any]:
    """Return the settings of a job whose first process presses Ctrl-C at step 3, once."""
    return {"observe": [ls.observe.norms(), At(step=3, does="press", job=job)]}


def faults(root: Path, out: Path, rank: int) -> None:
    """Write the errors of several processes, which all of them raise before anything is written."""
    task = ls.tasks.load(str(root / "bert.csv"))

    def problem(method: ls.Method, **settings: Any) -> str:
        model = models.load(str(root / "bert"), task)
        try:
            ls.train(model, task, method, **({"out": out / "faulty"} | COMMON | settings))
        except (ValueError, RuntimeError) as error:
            return str(error)
        return "none"

    lines = [
        problem(lora(), batch_size=12, accumulate=4),
        problem(lora(), seed=rank),
        problem(lora(), out=out / "lora"),
        problem(lora(), out=out / "stopped", observe=[At(step=2, does="stop")]),
    ]
    (out / f"faults-{rank}.txt").write_text("\n".join(lines))


def fork(rank: int, world: int, port: int, work: Callable[[int], None]) -> int:
    """Start one of the processes; return its id."""
    child = os.fork()
    if child:
        return child
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in variables.items()} | {"MASTER_ADDR": "127.0.0.1"}
    try:
        work(rank)
        torch.distributed.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def run_processes(world: int, work: Callable[[int], None]) -> None:
    """Run a function of the rank in several processes, and exit if one of them fails."""
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    left = {fork(rank, world, port, work) for rank in range(world)}
    while left:
        child, status = os.wait()
        left.discard(child)
        if status:  # the others would wait for it forever
            for other in left:
                os.kill(other, signal.SIGKILL)
            sys.exit(1)


def main() -> None:
    root, out = map(Path, sys.argv[1:])
    out.mkdir()

    def work(rank: int) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job of a shell
        train(root, out, rank, interrupted=True)
        faults(root, out, rank)

    run_processes(2, work)


if __name__ == "__main__":
    main()
