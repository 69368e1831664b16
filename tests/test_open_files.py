"""Number of file handles, and how files are mapped into memory."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf_bytes import ADAPTER, write_gguf
from safetensors.numpy import load_file, save_file

from lorascope.files.safetensors_io import TensorFile
from lorascope.runs.loading import load

MODULES = 511
HANDLES = 64
# All commands run in one process, so that handles that one of them leaves open count for the next.
COMMANDS = """
import json, resource, sys
from lorascope.cli.main import main
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]),) * 2)
sys.exit(max(main(words) for words in json.loads(sys.argv[2])))
"""


def adapter(folder: Path, rank: int = 2) -> Path:
    draw = np.random.default_rng(0).standard_normal
    tensors = {}
    for module in range(MODULES):
        name = f"base_model.model.model.layers.{module // 2}.self_attn.{'qv'[module % 2]}_proj"
        tensors[f"{name}.lora_A.weight"] = draw((rank, 6)).astype("f4")
        tensors[f"{name}.lora_B.weight"] = draw((8, rank)).astype("f4")
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_commands_need_few_handles_for_any_number_of_modules(tmp_path: Path) -> None:
    path = str(adapter(tmp_path / "adapter"))
    commands = [
        ["inspect", path],
        ["doctor", path],
        ["report", path, "-o", str(tmp_path / "report.html")],
        ["plot", "spectrum", path, "-o", str(tmp_path / "spectrum.svg")],
        ["export", path, "--rank-pattern"],
    ]
    words = [sys.executable, "-c", COMMANDS, str(HANDLES), json.dumps(commands)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{MODULES} modules" in done.stdout


def open_handles() -> int:
    return len(os.listdir("/dev/fd"))


def test_arrays_of_a_file_share_one_handle_and_close_it(tmp_path: Path) -> None:
    file = adapter(tmp_path / "adapter") / "adapter_model.safetensors"
    before = open_handles()
    tensors = TensorFile(file)
    arrays = {name: tensors[name] for name in tensors}
    renamed = tensors.prefixed("model.")
    arrays |= {name: renamed[name] for name in renamed}
    assert open_handles() == before + 1
    for name, values in load_file(file).items():
        np.testing.assert_array_equal(arrays[name], values)
        np.testing.assert_array_equal(arrays[f"model.{name}"], values)
    arrays.clear()
    assert open_handles() == before


def test_arrays_of_a_gguf_file_share_one_handle(tmp_path: Path) -> None:
    draw = np.random.default_rng(0).standard_normal
    tensors = {}
    for block in range(40):
        tensors[f"blk.{block}.attn_q.weight.lora_a"] = draw((2, 6)).astype("f4")
        tensors[f"blk.{block}.attn_q.weight.lora_b"] = draw((8, 2)).astype("f4")
    write_gguf(tmp_path / "lora.gguf", tensors, *ADAPTER)
    before = open_handles()
    updates = load(tmp_path / "lora.gguf").updates()
    assert len(updates) == 40
    assert open_handles() <= before + 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the resident memory of Linux")
def test_large_file_is_read_in_turn_without_staying_in_memory(tmp_path: Path) -> None:
    file = tmp_path / "large.safetensors"
    save_file({f"weight.{index}": np.ones((1024, 1024), "f4") for index in range(32)}, file)
    tensors = TensorFile(file)
    first = tensors["weight.0"]  # keeps the map open
    peaks = []
    for name in tensors:
        total = float(tensors[name].sum())
        assert total == 2**20
        resident = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        peaks.append(resident * resource.getpagesize())
    assert max(peaks) - min(peaks) < 32 * 2**20
    assert first.sum() == 2**20
