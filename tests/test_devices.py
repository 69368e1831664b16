"""Tests of training in several processes: two train the same weights and records as one, and only the first writes."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import conftest
import devices_training
import numpy as np
import pandas as pd
import pytest
import torch
from devices_training import JOBS, STEPS
from safetensors.torch import load_file
from tolerance import TEXT, TINY, rounding

import lorascope as ls
from lorascope.inputs import models
from lorascope.training.processes import Processes, launched_processes, require_single

EXACT = [*JOBS, "text", "resumed", "handed over"]


def write_rows(root: Path, bert: str, gpt2: str) -> None:
    """Write 45 training rows for a classifier and for a language model, and links to their models."""
    draw, rows = random.Random(0), []
    for number in range(85):
        label = draw.choice(["negative", "positive"])
        words = draw.choices(conftest.FILLER, k=draw.randint(3, 7))
        words.insert(draw.randrange(len(words)), draw.choice(conftest.GOOD if label == "positive" else conftest.BAD))
        split = "train" if number < 45 else "validation" if number < 65 else "test"
        rows.append({"text": " ".join(words), "label": label, "split": split})
    table = pd.DataFrame(rows)
    table.to_csv(root / "bert.csv", index=False)
    table.drop(columns="label").to_csv(root / "gpt2.csv", index=False)
    for name, folder in {"bert": bert, "gpt2": gpt2}.items():
        (root / name).symlink_to(folder)


@pytest.fixture(scope="module")
def trained(bert, gpt2, tmp_path_factory) -> tuple[Path, Path]:
    """Return the folders of the runs, trained by two processes and by one."""
    root = tmp_path_factory.mktemp("devices")
    write_rows(root, bert, gpt2)
    command = [sys.executable, devices_training.__file__, str(root), str(root / "two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (root / "one").mkdir()
    devices_training.train(root, root / "one")
    assert ls.load(root / "two/handed over").meta.status == "running"
    for rank in (0, 1):  # a single process resumes it, and then restores the finished run
        settings = devices_training.pressing("handed over")
        devices_training.train_job(root, root / "two/handed over", rank, devices_training.lora(), settings)
    return root / "two", root / "one"


def values(run: ls.Run) -> pd.DataFrame:
    """Return what a run and its phases recorded, except for wall-clock times."""
    table = pd.concat([phase.table for phase in [*run.parents, run]], ignore_index=True)
    return table[~table["quantity"].isin(["seconds", "factor_seconds"])]


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_two_processes_train_the_weights_of_one(name, trained):
    # Only the order of sums over rows differs. Their rounding is amplified by the model, and by Adam's division by the
    # root of the second moment, as in the tests of DDP.
    bound = STEPS * rounding(torch.float64, terms=TINY, growth=40 * TEXT)
    first, second = (load_file(trained[0] / f"{name}-{rank}.safetensors") for rank in (0, 1))
    single = load_file(trained[1] / f"{name}-0.safetensors")
    assert first.keys() == single.keys()
    for key, weight in first.items():
        assert torch.equal(weight, second[key]), key
        torch.testing.assert_close(weight, single[key], rtol=bound, atol=bound)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_two_processes_record_the_run_of_one(name, trained):
    runs = [ls.load(folder / name) for folder in trained]
    assert runs[0].id == runs[1].id
    tables = [values(run) for run in runs]
    keys = [table[["step", "module", "quantity", "index"]].astype(str).to_numpy().tolist() for table in tables]
    assert keys[0] == keys[1]
    # Evaluations compute in float32, and so do observers with the singular values, whose squares are computed. The
    # signs of entries of Adapprox's product that are zero up to rounding are not comparable.
    signs = tables[0]["quantity"].isin(["negative_share", "negative_mass"]).to_numpy()
    pairs = [table["value"].to_numpy(np.float64)[~signs] for table in tables]
    np.testing.assert_allclose(*pairs, rtol=rounding(terms=TINY), atol=1e-9, equal_nan=True)
    assert runs[0].predictions.equals(runs[1].predictions)
    assert [run.meta.status for run in runs] == ["done", "done"]


@pytest.mark.slow
def test_dropout_and_new_components_keep_the_processes_equal(trained):
    first, second = (load_file(trained[0] / f"dropout-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(weight, second[key]) for key, weight in first.items())
    assert ls.load(trained[0] / "dropout").ranks()


@pytest.mark.slow
def test_all_processes_raise_the_error_of_the_first(trained):
    texts = [(trained[0] / f"faults-{rank}.txt").read_text().splitlines() for rank in (0, 1)]
    assert texts[0] == texts[1]
    rows, seeds, folder, stop = texts[0]
    assert rows == "batch_size must be divisible by 2 processes x accumulate 4, got 12"
    assert seeds.startswith("the 2 processes must train one run, got ")
    assert folder.startswith("cannot train recipe ")
    assert stop.startswith("enough; ")
    assert ls.load(trained[0] / "stopped").meta.status == "broken"
    assert not (trained[0] / "faulty").exists()


def test_rows_of_the_processes_are_the_batch():
    batch = {"labels": torch.arange(5), "input_ids": torch.arange(10).reshape(5, 2)}
    for size in (1, 2, 3, 7):
        shares = [Processes(rank, size).local_rows(batch) for rank in range(size)]
        for key, column in batch.items():
            assert torch.equal(torch.cat([share[key] for share in shares]), column)
        counts = [len(share["labels"]) for share in shares]
        assert max(counts) - min(counts) <= 1
        starts = [start for rank in range(size) for start in Processes(rank, size).local_starts(21, 4)]
        assert sorted(starts) == [0, 4, 8, 12, 16, 20]


def test_processes_draw_different_dropout_and_the_same_numbers_afterwards():
    masks, after = [], []
    for rank in (0, 1):
        torch.manual_seed(3)
        with Processes(rank, 2).local_draws(0, 5):
            masks.append(torch.rand(20))
        after.append(torch.rand(20))
    assert not torch.equal(*masks)
    assert torch.equal(*after)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(20), after[0])


def test_a_single_process_draws_from_the_common_generator():
    torch.manual_seed(3)
    expected = torch.rand(40)
    torch.manual_seed(3)
    with Processes().local_draws(0, 5):
        first = torch.rand(20)
    assert torch.equal(torch.cat([first, torch.rand(20)]), expected)


def test_environment_of_a_launcher(monkeypatch):
    variables = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name in variables:
        monkeypatch.delenv(name, raising=False)
    assert launched_processes() == 1
    monkeypatch.setenv("WORLD_SIZE", "4")  # of another program: no other variables
    assert launched_processes() == 1
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched_processes() == 4
    with pytest.raises(ValueError, match="cannot train a sweep in 4 processes: start it in one"):
        require_single("train a sweep")


def test_batches_must_divide(monkeypatch):
    Processes(0, 1).require_rows(12, 12)
    Processes(0, 4).require_rows(16, 2)
    with pytest.raises(ValueError, match="batch_size must be divisible by 4 processes x accumulate 2, got 12"):
        Processes(0, 4).require_rows(12, 2)


def test_sharded_weights_are_rejected(bert, task, tmp_path):
    model = models.load(bert, task)
    next(model.parameters()).ds_id = 0  # as ZeRO-3 marks a shard
    expected = "cannot use sharded .*: each process needs all weights; pass the model without fully_shard"
    with pytest.raises(ValueError, match=expected):
        ls.train(model, task, ls.LoRA(rank=1), steps=1, out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
