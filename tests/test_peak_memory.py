"""Peak memory of a training in run.json and on the card, in a process that allocates a known amount."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lorascope as ls
from lorascope.pages.card import collect
from lorascope.training.peak_memory import peak_memory

ALLOCATED = 256 * 2**20
MEASURE = """
import sys
import torch
from lorascope.training.peak_memory import peak_memory
before = peak_memory("cpu")
torch.ones(int(sys.argv[1]), dtype=torch.uint8)
during = peak_memory("cpu")
print(before, during, peak_memory("cpu"))
"""


@pytest.mark.skipif(peak_memory("cpu") is None, reason="Windows has no high-water mark")
def test_the_peak_of_a_process_includes_freed_memory_but_not_the_memory_of_its_parent() -> None:
    hold = torch.ones(4 * ALLOCATED, dtype=torch.uint8)  # this process has more than the other one
    command = [sys.executable, "-c", MEASURE, str(ALLOCATED)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    before, during, after = map(int, output.split())
    assert during == pytest.approx(before + ALLOCATED, rel=0.1)
    assert after >= during
    assert peak_memory("cpu") > len(hold) > after - before


def test_a_run_stores_its_peak_and_the_card_shows_it(bert: str, task: ls.Task, tmp_path: Path) -> None:
    run = ls.train(bert, task, "lora", steps=2, batch_size=4, out=tmp_path / "run", progress=False, device="cpu")
    stored = json.loads((tmp_path / "run/run.json").read_text(encoding="utf-8"))
    peak = stored["peak_memory"]
    assert run.meta.peak_memory == peak <= peak_memory("cpu")
    assert peak > sum(p.nbytes for p in ls.models.load(bert, task).parameters())
    (subject,) = collect([run]).subjects
    assert subject["facts"]["memory"] == f"{peak / 2**30:.2f} GiB at the peak of the process"
    del stored["peak_memory"]  # as in runs of earlier versions
    (tmp_path / "run/run.json").write_text(json.dumps(stored), encoding="utf-8")
    old = ls.load(tmp_path / "run")
    assert old.meta.peak_memory is None
    assert "memory" not in collect([old]).subjects[0]["facts"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_peak_on_a_gpu_excludes_what_was_freed_before(bert: str, task: ls.Task, tmp_path: Path) -> None:
    torch.empty(ALLOCATED, dtype=torch.uint8, device="cuda")
    run = ls.train(bert, task, "lora", steps=2, batch_size=4, out=tmp_path / "run", progress=False, device="cuda")
    assert 0 < run.meta.peak_memory < ALLOCATED
