"""Overhead of ``record`` in a plain PyTorch loop: CPU time of training with and without it.

A pair has ten steps with the recorder and ten without, because norms are recorded every ten steps. One copy of the
model trains both ways, on two threads.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from measurements import MeasuredLine
from minilm_step import SHAPES, THREADS, batch_of
from paired import compare, report
from recorder import AIM, METHODS, STEPS, TURNS

from lorascope.inputs import models, tasks
from lorascope.methods.method import Method
from lorascope.training.any_loop import LoopRecorder, record
from lorascope.training.base_weights import Base, begin_training, prepare_model
from lorascope.training.session import clip_gradients
from lorascope.training.settings import Settings


class Loop:
    """A plain PyTorch loop that trains two steps per call and records them into a folder."""

    def __init__(self, method: Method, shape: tuple[int, int], folder: Path) -> None:
        data = tasks.load("sentiment")
        self.model = models.load("minilm", task=data)
        prepare_model(self.model, data, 0)
        settings = Settings(steps=1, lr=1e-4, head_lr=1e-4)
        self.optimizer, _ = begin_training(method, self.model, Base(self.model), settings)
        self.recorder: LoopRecorder | None = record(self.model, self.optimizer, folder)
        self.batch = batch_of(*shape)
        self.model.train()

    def __call__(self) -> None:
        for _ in range(STEPS):
            self.optimizer.zero_grad()
            loss = self.model(**self.batch).loss
            loss.backward()
            norm = clip_gradients(self.optimizer, 1.0)
            self.optimizer.step()
            if self.recorder is not None:
                self.recorder.step(loss=loss, grad_norm=norm)

    def without(self) -> None:
        """Train two steps without the recorder."""
        recorder, self.recorder = self.recorder, None
        self()
        self.recorder = recorder


def lines(pairs: int) -> Iterator[MeasuredLine]:
    """Yield the ratio for each method and batch."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", "the optimizer has stepped")  # without the recorder, on purpose
    for name, method in METHODS.items():
        for case, shape in SHAPES.items():
            with tempfile.TemporaryDirectory() as folder:
                loop = Loop(method, shape, Path(folder))
                ratio = compare(loop, loop.without, pairs, 1, turns=TURNS)
                yield ratio.line(f"{name} with `record` / without, plain loop", case, AIM)


if __name__ == "__main__":
    report(lines, __doc__)
