"""Adapters that only PEFT reads, merged into their base by PEFT."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
from peft_oracle import merged_change
from tiny import tiny

import lorascope as ls
from lorascope.cli.main import main
from lorascope.formats.peft_merge import MERGED

MODULES = [f"model.layers.{layer}.self_attn.{role}_proj" for layer in range(2) for role in "qv"]
LINEAR: dict[str, tuple[str, dict[str, Any]]] = {
    "ADAMSS": ("AdamssConfig", {"r": 2}),
    "DEFT": ("DeftConfig", {"r": 2}),
    "FROD": ("FrodConfig", {}),
    "OSF": ("OSFConfig", {}),
    "PEANUT": ("PeanutConfig", {}),
    "PSOFT": ("PsoftConfig", {"r": 2}),
    "PVERA": ("PveraConfig", {"r": 2}),
    "TINYLORA": ("TinyLoraConfig", {"r": 2}),
    # Forms of other types that have no reader.
    "BOFT": ("BOFTConfig", {"boft_block_size": 2, "boft_n_butterfly_factor": 2}),
    "UNILORA": ("UniLoraConfig", {"r": 2, "theta_d_length": 8}),
    "WAVEFT": ("WaveFTConfig", {"n_frequency": 20, "wavelet_family": "db2"}),
}


def written(folder: Path, kind: str, family: str = "llama") -> dict[str, np.ndarray]:
    """Write an adapter and its base; return the updates by PEFT."""
    model = tiny(family)
    model.save_pretrained(folder / "base")
    config, settings = LINEAR[kind]
    targets = [name.rpartition(".")[2] for name in MODULES]
    chosen = getattr(peft, config)(target_modules=targets, task_type="CAUSAL_LM", **settings)
    return merged_change(folder / "adapter", chosen, model, MODULES, 0.1)


@pytest.mark.parametrize("kind", LINEAR)
def test_update_equals_the_merged_minus_the_base_weight(kind: str, tmp_path: Path) -> None:
    expected = written(tmp_path, kind)
    adapter = ls.load(tmp_path / "adapter", tmp_path / "base")
    assert list(adapter.updates()) == MODULES
    for module, update in adapter.updates().items():
        size = np.linalg.norm(expected[module])
        assert size > 0
        assert np.linalg.norm(update.dense() - expected[module]) < 1e-5 * size
    assert adapter.meta.parameters.trained > 0


def test_every_merged_type_is_tested() -> None:
    assert set(MERGED) <= LINEAR.keys()


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["inspect", str(folder / "adapter"), *arguments]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


def test_without_base_the_error_says_to_pass_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, "PEANUT")
    assert "PEANUT changes the weights of its base" in (line := refused(tmp_path, capsys))
    assert line.endswith("as base= or --base DIR\n")


def test_without_peft_the_error_says_to_install_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, "PEANUT")
    found = importlib.util.find_spec
    monkeypatch.setattr("lorascope.formats.peft_merge.find_spec", lambda name: None if name == "peft" else found(name))
    line = refused(tmp_path, capsys, "--base", str(tmp_path / "base"))
    assert line.endswith('only PEFT reads PEANUT adapters like this one: pip install "lorascope[peft]"\n')


def test_a_base_with_other_modules_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, "PEANUT")
    tiny("llama", num_hidden_layers=1).save_pretrained(tmp_path / "short")
    line = refused(tmp_path, capsys, "--base", str(tmp_path / "short"))
    assert "PEFT finds no module for base_model.model.model.layers.1.self_attn.q_proj." in line
    tiny("bert").save_pretrained(tmp_path / "other")
    assert "not found in the base model" in refused(tmp_path, capsys, "--base", str(tmp_path / "other"))


def test_a_broken_configuration_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, "PEANUT")
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    changes = {"r": -1, "target_modules": ["other"], "auto_mapping": 3, "task_type": ["x"]}
    for (setting, value), message in zip(
        changes.items(), ["PEFT cannot merge it into"] * 2 + ["Expected"] * 2, strict=True
    ):
        file.write_text(json.dumps(config | {setting: value}), encoding="utf-8")
        assert message in refused(tmp_path, capsys, "--base", str(tmp_path / "base"))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"depth": 10**9}, r"Expected `int` <= 1024 - at `\$.depth`: 1000000000"),
        ({"r": 10**9}, r"Expected `int` <= 16384 - at `\$.r`: 1000000000"),
        ({"exclude_modules": "["}, "PEFT cannot merge it into .*unterminated character set"),
    ],
)
def test_settings_that_peft_cannot_use_are_refused_in_one_line(
    setting: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path, "PEANUT")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | setting))
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "adapter"), "--base", str(tmp_path / "base")]) == 2
    shown = capsys.readouterr().err
    assert re.search(message, shown), shown
    assert shown.count("\n") == 1
