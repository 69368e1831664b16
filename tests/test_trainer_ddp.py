"""Tests of DDP: two processes train the same weights as one, and only the first writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ddp_training
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tolerance import TEXT, TINY, rounding
from trainers import METHODS, ROWS, STEPS, fresh

import lorascope as ls
from lorascope.inputs import models

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(bert, task, tmp_path_factory) -> tuple[Path, Path]:
    """Return the folders of the methods, trained by two processes and by one."""
    root = tmp_path_factory.mktemp("ddp")
    model = fresh(bert, task)
    model.save_pretrained(root / "model")
    encoded = task.encode(models.tokenizer(model), task.split("train").head(STEPS * ROWS))
    save_file(encoded.batch(range(STEPS * ROWS)), root / "rows.safetensors")
    given = [str(root / "model"), str(root / "rows.safetensors")]
    command = [sys.executable, ddp_training.__file__, *given, str(root / "two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ddp_training.train(*given, root / "one", 0, 1)
    return root / "two", root / "one"


@pytest.mark.parametrize("name", [*METHODS, "recorder only"])
def test_two_processes_train_and_record_the_same_as_one(name, trained):
    bound = rounding(terms=TINY, growth=40 * TEXT)  # of gradients that largely cancel, over the steps of Adam
    two, one = (folder / name for folder in trained)
    first, second = (load_file(two / f"rank-{rank}.safetensors") for rank in (0, 1))
    single = load_file(one / "rank-0.safetensors")
    for key, weight in first.items():
        assert torch.equal(weight, second[key]), key
        # The gradient of a key bias is only rounding noise, which Adam scales to the size of any other.
        atol = STEPS * 1e-2 if key.endswith("key.bias") else 1e-5
        torch.testing.assert_close(weight, single[key], rtol=bound, atol=atol)
    runs = [ls.load(folder / "lorascope") for folder in (two, one)]
    assert all(run.finished for run in runs)
    assert sorted(path.name for path in two.iterdir() if path.is_dir()) == ["lorascope"]
    tables = [run.table[run.table["quantity"] != "seconds"] for run in runs]
    keys = [table[["step", "module", "quantity", "index"]].astype(str).to_numpy().tolist() for table in tables]
    assert keys[0] == keys[1]
    chosen = tables[0]["quantity"].isin(["loss", "update_norm", "rank", "active", "lr", "selected"]).to_numpy()
    np.testing.assert_allclose(*(table["value"][chosen] for table in tables), rtol=2 * bound, atol=1e-6)
    assert [run.meta.settings["batch_size"] for run in runs] == [ROWS, ROWS]


def test_recorder_does_not_change_the_weights_of_two_processes(trained):
    two, _ = trained
    recorded, plain = (load_file(two / name / "rank-0.safetensors") for name in ("recorder only", "no recorder"))
    assert all(torch.equal(recorded[key], plain[key]) for key in recorded)
