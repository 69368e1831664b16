"""Weights that FSDP2 shares between processes: the same rows, arrays and states as of one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

import lorascope as ls

SCRIPT = Path(__file__).with_name("sharded_training.py")


def run(kind: str, world: int, folder: Path, how: str = "recorded") -> list[tuple[int, str]]:
    """Train in ``world`` processes, and return their exit codes and errors."""
    folder.mkdir()
    words = [[sys.executable, str(SCRIPT), kind, str(world), str(rank), str(folder), how] for rank in range(world)]
    started = [subprocess.Popen(each, stderr=subprocess.PIPE, text=True) for each in words]
    return [(process.returncode, errors) for process in started for _, errors in [process.communicate(timeout=300)]]


def train(kind: str, world: int, folder: Path, how: str = "recorded") -> dict[str, np.ndarray]:
    """Train, and return all weights at the end."""
    for code, errors in run(kind, world, folder, how):
        assert code == 0, errors[-2000:]
    return load_file(folder / "weights.safetensors")


def same_bits(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_two_processes_record_what_one_process_records(kind: str, tmp_path: Path) -> None:
    weights = {world: train(kind, world, tmp_path / str(world)) for world in (1, 2)}
    assert same_bits(*weights.values())
    assert same_bits(train(kind, 2, tmp_path / "bare", "bare"), weights[2])
    one, two = (ls.load(tmp_path / str(world) / "run") for world in (1, 2))
    tables = [run.table[run.table["quantity"] != "seconds"].drop(columns="run") for run in (one, two)]
    assert len(tables[0]) > 20
    norms = [table[table["quantity"] == "grad_norm"]["value"] for table in tables]
    np.testing.assert_allclose(*norms, rtol=1e-5)  # the order of its sum depends on the shards
    own = [table[table["quantity"] != "grad_norm"].reset_index(drop=True) for table in tables]
    pd.testing.assert_frame_equal(*own, check_exact=True)
    assert two.finished
    files = [
        {file.relative_to(run.path): load_file(file) for file in run.path.rglob("*.safetensors")} for run in (one, two)
    ]
    assert files[0].keys() == files[1].keys() != set()
    assert all(same_bits(files[0][name], files[1][name]) for name in files[0])
    if kind == "lora":
        assert {name: update.rank for name, update in two.updates().items()} == one.ranks()
    assert one.meta.parameters == two.meta.parameters


@pytest.mark.slow
@pytest.mark.parametrize("name", ["second_moments", "gradients"])
def test_observer_of_more_than_weights_is_rejected(name: str, tmp_path: Path) -> None:
    for code, errors in run(name, 2, tmp_path / "run"):
        assert code == 1
        assert f"ValueError: cannot record {name} of sharded weights: only norms and factors" in errors


def test_weights_that_cannot_be_gathered_are_rejected(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.weight.ds_id = 0  # the mark of ZeRO-3
    with pytest.raises(ValueError, match=r"cannot use sharded weight .*: shard it with fully_shard \(FSDP2\)"):
        ls.record(model, torch.optim.SGD(model.parameters()), tmp_path / "run")
    assert not (tmp_path / "run").exists()
