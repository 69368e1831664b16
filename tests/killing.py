"""Warm process that trains in forks of itself and can kill them: ``python killing.py MODEL TABLE``.

It reads jobs from standard input, one JSON object per line, and prints the exit status of each fork. The method of a
job is one of ``METHODS``, or the configuration of a registered method as JSON.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import lorascope as ls
from lorascope import observe
from lorascope.adapters import delta
from lorascope.inputs import models, tasks
from lorascope.methods import AdaLoRA, Full, LoRA
from lorascope.methods.method import Phase, from_config
from lorascope.methods.pissa import ResidualDelta

SETTINGS = {
    "steps": 5, "batch_size": 4, "eval_every": 2, "eval_size": 8, "test_size": 8, "checkpoint_every": 2,
    "device": "cpu", "progress": False,
}  # fmt: skip


@dataclass(kw_only=True)
class TwoPhases(Full):
    """Trains LoRA on the two modules of block 1 with the largest updates in a first phase of full fine-tuning."""

    def phases(self, base):
        found = yield Phase(Full(lr=1e-2), "search", steps=3)
        largest = found.summary().query("layer == 1").nlargest(2, "update_norm")["module"].tolist()
        yield Phase(LoRA(rank=2, targets=tuple(largest), dropout=0.1), "retrain", split="train")


@dataclass(kw_only=True)
class Growing(LoRA):
    """Adds a component to a random module every second step, and evaluates search rows before each step."""

    search_share: float = 0.3

    def attach(self, model):
        super().attach(model)
        self.generator_ = torch.Generator().manual_seed(7)
        self.losses_ = {"seen": [], "last": torch.zeros(())}

    def before_step(self, step):
        loss = step.loss(step.validation(size=3)).detach()
        self.losses_ = {"seen": [*self.losses_["seen"], float(loss)], "last": loss}

    def after_step(self, step):
        if step.index % 2:
            return
        found = list(delta.attached_deltas(step.model).values())
        chosen = found[int(torch.randint(len(found), (), generator=self.generator_))]
        rank = chosen.A.shape[0]
        delta.resize(chosen.A, step.optimizer, list(range(rank)), torch.randn(1, chosen.A.shape[1]), 0)
        delta.resize(chosen.B, step.optimizer, list(range(rank)), torch.zeros(chosen.B.shape[0], 1), 1)

    def records(self, step):
        yield ls.Snapshot("/search_loss", torch.tensor(self.losses_["seen"]).numpy(), ("step",))


@dataclass(kw_only=True)
class Freezing(Full):
    """Freezes one of two blocks, resampled every third step."""

    def attach(self, model):
        super().attach(model)
        self.generator_ = torch.Generator().manual_seed(7)

    def before_step(self, step):
        if step.index % 3 == 0:
            frozen = int(torch.randint(2, (), generator=self.generator_))
            for name, parameter in step.model.named_parameters():
                parameter.requires_grad_(f"layer.{frozen}." not in name)


@dataclass(kw_only=True)
class RandomStart(LoRA):
    """Trains B, A from random B0, A0 on the residual W_0 - s B0 A0, as PiSSA does from singular vectors."""

    def delta(self, name, host):
        (outer, inner), (rank, scale, dropout) = delta.host_weight(host).shape, self.factor_options(name)
        return ResidualDelta(host, torch.randn(outer, rank) / 4, torch.randn(rank, inner) / 4, scale, dropout)


METHODS = {
    "full": Full(lr=1e-2),
    "lora": LoRA(rank=2, targets="all-linear", dropout=0.2, lr=1e-2),
    "two phases": TwoPhases(),
    "growing": Growing(rank=1, lr=1e-2),
    "freezing": Freezing(lr=1e-2),
    "residual": RandomStart(rank=2, alpha=1, targets="all-linear", dropout=0.1, lr=1e-2),
    "adalora": AdaLoRA(init_rank=3, target_rank=1, initial_steps=0, final_steps=2, mask_every=1, dropout=0.1, lr=1e-2),
}


def observers():
    return [observe.norms(every=3), observe.factors(every=4)]


def at_each_change(folder: Path, act: Callable[[int], None]) -> None:
    """Call ``act`` with a running number amid every write, and before every removal and new folder.

    An audit hook of the interpreter sees all of them, regardless of the code that writes.
    """
    count = 0
    inside = False

    def moment() -> None:
        nonlocal count, inside
        inside = True
        act(count)
        inside = False
        count += 1

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        if inside or event not in ("os.remove", "os.rmdir", "os.mkdir"):
            return
        path = Path(str(arguments[0]))
        if path.is_relative_to(folder) and path.exists() == (event != "os.mkdir"):
            moment()

    def half_written(handle: int, sync: Callable[[int], None] = os.fsync) -> None:
        partial = next(folder.rglob(".*.part"))
        whole = partial.read_bytes()
        os.truncate(partial, len(whole) // 2)
        moment()
        partial.write_bytes(whole)
        sync(handle)

    os.fsync = half_written
    sys.addaudithook(audit)


def train(job, model, task) -> None:
    out = Path(job["out"])
    if "copies" in job:  # a copy of the folder equals what a kill at the same moment would leave

        def copy(number: int) -> None:
            if out.exists():
                shutil.copytree(out, Path(job["copies"]) / f"{number:03d}")

        at_each_change(out, copy)
    if "kill at" in job:
        at_each_change(out, lambda number: number == job["kill at"] and os.kill(os.getpid(), signal.SIGKILL))
    if "kill after" in job:  # amid the first write after such a file exists
        at_each_change(out, lambda _: any(out.glob(job["kill after"])) and os.kill(os.getpid(), signal.SIGKILL))
    method = METHODS[job["method"]] if job["method"] in METHODS else from_config(json.loads(job["method"]))
    ls.train(model, task, method, observe=observers(), out=out, **SETTINGS)


def main() -> None:
    torch.set_num_threads(1)
    task = tasks.load(sys.argv[2])
    model = models.load(sys.argv[1], task=task)
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                train(job, model, task)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
                os._exit(1)
            os._exit(0)
        if "seconds" in job:
            time.sleep(job["seconds"])
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    random.seed(0)
    main()
