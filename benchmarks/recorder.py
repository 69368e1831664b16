"""Overhead of the default observers in ``train``: CPU time of training with and without them.

Norms are recorded every ten steps, so a pair has ten steps with observers and ten without. One copy of the model trains
both ways, because the steps of two copies can differ by two percent. On two threads.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from measurements import MeasuredLine
from minilm_step import SHAPES, THREADS
from paired import compare, report

from lorascope.inputs import models, tasks
from lorascope.methods import Full, LoRA
from lorascope.methods.method import Method, Phase
from lorascope.observe import Observer, norms
from lorascope.training.base_weights import Base, prepare_model
from lorascope.training.run_spec import RunSpec
from lorascope.training.session import Session, clip_gradients
from lorascope.training.settings import Settings

AIM = 1.02
# Two steps per turn, because the state before a recorded step is stored one step earlier.
TURNS, STEPS = 5, 2
METHODS = {"LoRA": LoRA(targets="all-linear"), "full fine-tuning": Full()}


class Training:
    """A run that trains two steps per call, on random tokens of one shape."""

    def __init__(
        self,
        method: Method,
        observers: tuple[Observer, ...],
        shape: tuple[int, int],
        folder: Path,
        model: str = "minilm",
        task: str = "sentiment",
        device: str = "cpu",
    ) -> None:
        data = tasks.load(task)
        living = models.load(model, task=data).to(device)
        mark = prepare_model(living, data, 0)
        settings = Settings(steps=10**6, lr=1e-4, head_lr=1e-4, batch_size=shape[0], schedule="constant", warmup=0)
        plan = RunSpec(method, Phase(method), data.fit(living), settings, 0, mark.w0_hash, observers)
        self.session = Session(living, plan, Base(living), folder, [], device)
        ids = torch.randint(4, living.config.vocab_size, shape)
        labels = torch.randint(0, 2, shape[:1])
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        self.batch = {name: tensor.to(device) for name, tensor in batch.items()}
        self.session.begin()

    def __call__(self) -> None:
        session, step = self.session, self.session.step
        for _ in range(STEPS):
            step.index, step.batch = step.index + 1, self.batch
            session.optimizer.zero_grad(set_to_none=True)
            loss = session.backward()
            clip_gradients(session.optimizer, session.settings.clip)
            session.optimizer.step()
            session.record(loss, None, 1e-4)

    def without(self) -> None:
        """Train two steps without the observers."""
        observers, self.session.observers = self.session.observers, []
        self()
        self.session.observers = observers


def lines(pairs: int) -> Iterator[MeasuredLine]:
    """Yield the ratio for each method and batch."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    for name, method in METHODS.items():
        for case, shape in SHAPES.items():
            with tempfile.TemporaryDirectory() as folder:
                session = Training(method, (norms(),), shape, Path(folder) / "session")
                ratio = compare(session, session.without, pairs, 1, turns=TURNS)
                yield ratio.line(f"{name} with observers / without, `train`", case, AIM)


if __name__ == "__main__":
    report(lines, __doc__)
