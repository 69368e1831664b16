"""Train with every method: ``python devices_training.py MODEL TABLE OUT`` uses two processes, ``train`` one.

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
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from safetensors.torch import save_file
from trainers import without_dropout
from transformers import logging

import lorascope as ls
from lorascope.inputs import models

ROWS = 8  # per batch
# The train split has 45 rows: five batches of 8 and one of 5, which gives one process 2 rows and the other 3.
COMMON: dict[str, Any] = {"epochs": 1, "batch_size": ROWS, "eval_every": 2, "progress": False, "device": "cpu"}
IN, OUT = "bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.1.output.dense"
STEPS = 6


def _lora(**fields: Any) -> ls.LoRA:
    return ls.LoRA(rank=4, lr=1e-2, head_lr=1e-2, **fields)


# Job -> method and settings. All adapters start from random factors, and all schedules act within six steps.
JOBS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora": (_lora(), {"accumulate": 2, "weight_decay": 0.1}),
    "best": (_lora(), {"test_state": "best", "label_smoothing": 0.1}),
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


def train(folder: str, table: str, out: Path, rank: int = 0) -> None:
    """Train all methods in this process, and save the weights of each."""
    logging.set_verbosity_error()
    task = ls.tasks.load(table)
    for name, (method, settings) in JOBS.items():
        model = without_dropout(models.load(folder, task)).double()
        run = ls.train(model, task, method, out=out / name, **(COMMON | settings))
        state = {key: parameter.detach().contiguous() for key, parameter in model.named_parameters()}
        save_file(state, out / f"{name}-{rank}.safetensors", {"id": run.id})


def faults(folder: str, table: str, out: Path, rank: int) -> None:
    """Check that errors of several processes are raised in all of them, before anything is written."""
    task = ls.tasks.load(table)

    def problem(method: ls.Method, **settings: Any) -> str:
        model = models.load(folder, task)
        try:
            ls.train(model, task, method, out=out / "faulty", **(COMMON | settings))
        except ValueError as error:
            return str(error)
        return "none"

    lines = [
        problem(_lora(), batch_size=12, accumulate=4),
        problem(_lora(), seed=rank),
        problem(_lora(), out=out / "lora"),
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
    folder, table, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    out.mkdir()

    def work(rank: int) -> None:
        train(folder, table, out, rank)
        faults(folder, table, out, rank)

    run_processes(2, work)


if __name__ == "__main__":
    main()
