"""Cost of ``observe.kl`` at its defaults, as a fraction of the training without it.

Run ``python benchmarks/kl_gauge.py``. It trains LoRA of rank 8 on all linear layers at batch size 16, on one thread,
and prints CPU seconds of one run: those of the recordings, and those of the steps in between. What is done once, such
as the outputs of the base, is not counted.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise

import torch

import lorascope as ls
from lorascope.papers.setups import planted_teacher
from lorascope.schema.records import Item

CALLS: list[tuple[float, float]] = []
"""Process time at the beginning and end of each call, because ``train`` copies its observers."""


class timed_kl(ls.observe.kl):
    """The gauge with the process time of its calls."""

    def __call__(self, step: ls.Step) -> Iterator[Item]:
        """Yield the records of a step."""
        began = time.process_time()
        yield from super().__call__(step)
        CALLS.append((began, time.process_time()))


def seconds_of_calls() -> tuple[float, float]:
    """Return the time in the calls after step 0 and the time between calls, without the last step."""
    recordings = between = 0.0
    # The last step is followed by an evaluation, and the first one includes the outputs of the base.
    for (_, previous), (began, ended) in pairwise(CALLS[:-1]):
        recordings += ended - began
        between += began - previous
    return recordings, between


def measure(name: str, model: torch.nn.Module, task: ls.tasks.Task, keep: ls.tasks.Task | None, steps: int) -> None:
    CALLS.clear()
    with tempfile.TemporaryDirectory() as folder:
        ls.train(
            model,
            task,
            ls.LoRA(targets="all-linear"),
            out=f"{folder}/run",
            steps=steps + 1,  # the last one is not measured
            batch_size=16,
            eval_every=0,
            eval_size=32,
            test_size=32,
            observe=[timed_kl(keep=keep)],
            progress=False,
        )
    recordings, between = seconds_of_calls()
    ratio = recordings / between
    print(f"{name}: {recordings:.1f} s of recordings, {between:.1f} s of steps, {ratio:.0%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    encoder_task = ls.tasks.load("sentiment/movies")
    measure("MiniLM, encoder", ls.models.load("minilm", task=encoder_task), encoder_task, None, steps)
    text, other = planted_teacher.task(0), planted_teacher.task(1)
    measure("planted student, decoder", planted_teacher.student(), text, other, 10 * steps)


if __name__ == "__main__":
    main()
