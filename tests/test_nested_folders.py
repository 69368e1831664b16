"""Folders whose only adapter, run or series is in a subfolder."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from merged import adapt
from safetensors.torch import save_file
from tiny import tiny

from lorascope.cli.main import main
from lorascope.formats.peft_config import CONFIG
from lorascope.runs.loading import load


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    adapt(tiny("llama"), tmp_path / "adapter", target_modules=["q_proj", "v_proj"], r=4)
    return tmp_path / "adapter"


def nested(adapter: Path, *names: str) -> Path:
    """Return a folder with copies of an adapter at these paths, next to a hidden one and a base model."""
    folder = adapter.parent / "outer"
    for name in (*names, ".cache/adapter"):
        shutil.copytree(adapter, folder / name)
    (folder / "base").mkdir()
    save_file({"model.layers.0.q_proj.weight": torch.ones(2, 2)}, folder / "base" / "model.safetensors")
    return folder


@pytest.mark.parametrize("command", [["inspect"], ["doctor"], ["inspect", "--json"], ["doctor", "--runtime", "peft"]])
@pytest.mark.parametrize("name", ["final", "run1/final"])
def test_only_adapter_below_a_folder_is_opened(
    name: str, command: list[str], adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = nested(adapter, name)
    run = load(folder)
    assert run.path == folder / name
    assert run.summary().equals(load(adapter).summary())
    assert main([*command[:1], str(folder), *command[1:]]) == main([*command[:1], str(folder / name), *command[1:]])
    first, second = np.array_split(capsys.readouterr().out.splitlines(), 2)
    assert first.tolist() == second.tolist()


def test_weights_without_a_configuration_are_found_below_a_folder(adapter: Path) -> None:
    folder = nested(adapter, "run1/final")
    (folder / "run1" / "final" / CONFIG).unlink()
    assert load(folder).path == folder / "run1" / "final"


def test_only_series_below_a_folder_is_opened(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = nested(adapter, "run1/checkpoint-10", "run1/checkpoint-20")
    assert load(folder).table.equals(load(folder / "run1").table)
    assert main(["inspect", str(folder)]) == 0
    assert "checkpoints" in capsys.readouterr().out


def test_several_adapters_below_a_folder_are_listed_in_one_line(
    adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = nested(adapter, "run1/final", "run2", "run3/checkpoint-10", "run3/checkpoint-20")
    for command in ("inspect", "doctor"):
        assert main([command, str(folder)]) == 2
        message = capsys.readouterr().err
        assert message.endswith("pass one of the 3 in its subfolders, which `lorascope survey` lists: "
                                "run1/final, run2, run3\n")  # fmt: skip
        assert message.count("\n") == 1
    for number in range(10, 20):
        shutil.copytree(adapter, folder / f"run{number}")
    with pytest.raises(ValueError, match=r"one of the 13 .*: run1/final, run10, (run\d\d, ){5}run16 and 5 more$"):
        load(folder)


def test_adapter_three_folders_down_is_not_found(adapter: Path) -> None:
    with pytest.raises(ValueError, match="neither a run nor an adapter; expected one of the files"):
        load(nested(adapter, "a/b/c"))
