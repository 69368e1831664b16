"""Adapters compared with their base: neurons and intruders of dense matrices and planted ones, and the findings."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_loading import save
from tiny import tiny

from lorascope.analysis.intruders import decompose_weights, find_intruders
from lorascope.cli.main import main
from lorascope.diagnosis import change_from_base
from lorascope.diagnosis.inspection import inspect
from lorascope.files.safetensors_io import write_tensors
from lorascope.files.text_layout import WIDTH
from lorascope.files.whole_files import write_json
from lorascope.formats.peft_config import CONFIG, WEIGHTS
from lorascope.formats.stored_update import PREFIX
from lorascope.runs.loading import load
from lorascope.updates import factored_change, neuron_change


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("size", [1e-6, 1.0])
def test_factored_change_equals_the_dense_change(axis: int, size: float) -> None:
    draw = np.random.default_rng(0)
    W0, B, A = draw.standard_normal((700, 90)), size * draw.standard_normal((700, 3)), draw.standard_normal((3, 90))
    W0[5], B[7] = 0.0, 0.0
    for found, expected in zip(factored_change(W0, B, A, axis), neuron_change(W0, W0 + B @ A, axis), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-22)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Save an adapter and its base."""
    folder = tmp_path_factory.mktemp("based")
    save(folder / "adapter", target_modules=["q_proj", "down_proj", "embed_tokens"], r=3)
    tiny("llama").save_pretrained(folder / "base")
    return folder / "adapter", folder / "base"


def test_every_module_equals_its_dense_computation(pair: tuple[Path, Path]) -> None:
    run = load(*pair)
    table = inspect(run).modules.set_index("module")
    weights = {name: run.base.weight(name, part.shape, part.transposed) for name, part in run.files.parts.items()}
    counted = find_intruders(decompose_weights(weights), run.updates()).groupby("module")["intruder"].sum()
    for module, W0 in weights.items():
        axis = 0 if module.endswith(("down_proj", "embed_tokens")) else 1
        W = W0 + run.updates()[module].dense()
        lengths = np.linalg.norm(W0, axis=axis) * np.linalg.norm(W, axis=axis)
        known = (1 - np.sum(W0 * W, axis) / np.where(lengths, lengths, np.nan))[lengths > 0]  # padding is zero
        assert table.loc[module, "neuron_median"] == pytest.approx(np.median(known), rel=1e-6)
        assert table.loc[module, "neuron_largest"] == pytest.approx(known.max(), rel=1e-6)
        assert table.loc[module, "intruders"] == counted[module]
    assert counted.sum() > 0


def plant(folder: Path, size: float) -> tuple[Path, Path]:
    """Write a base with known singular vectors, and an update along a direction at equal angles to all of them."""
    d, name = 32, "model.layers.0.self_attn.q_proj"
    even = np.full((d, 1), d**-0.5)
    adapter, base = folder / "adapter", folder / "base"
    factors = {"A": np.eye(1, d), "B": size * even}
    held = {f"{PREFIX}{name}.lora_{key}.weight": value.astype("f4") for key, value in factors.items()}
    write_tensors(adapter / WEIGHTS, held, {})
    write_json(adapter / CONFIG, {"peft_type": "LORA", "r": 1, "lora_alpha": 1})
    write_tensors(base / "model.safetensors", {f"{name}.weight": np.diag(np.arange(d, 0, -1)).astype("f4")}, {})
    return adapter, base


def test_planted_intruder_is_found_and_reported(tmp_path: Path) -> None:
    large, small = (inspect(load(*plant(tmp_path / str(size), size))) for size in (1000.0, 1e-3))
    assert large.modules["intruders"].item() == 1
    assert any("1 intruder dimensions in 1 of 1 modules, most in model.layers.0" in line for line in large.findings)
    assert small.modules["intruders"].item() == 0
    assert "no intruder dimensions among the 10 leading singular vectors of 1 modules" in small.findings


def test_large_weights_are_decomposed_only_with_spectra(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(change_from_base, "SIDE", 16)
    quick, whole = inspect(load(*pair)), inspect(load(*pair), spectra=True)
    assert quick.modules["intruders"].isna().all()
    assert any("of 5 large modules not computed: add --spectra" in line for line in quick.findings)
    assert whole.modules["intruders"].notna().all()
    assert quick.modules["neuron_median"].notna().all()


def test_update_with_nan_has_no_comparison(tmp_path: Path) -> None:
    table = inspect(load(*plant(tmp_path, float("nan")))).modules
    assert table[["intruders", "neuron_median", "neuron_largest"]].isna().all(axis=None)


def test_command_with_base_shows_the_comparison(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    adapter, base = map(str, pair)
    for more in ([], ["--all"]):
        assert main(["inspect", adapter, "--base", base, *more]) == 0
        shown = capsys.readouterr().out.splitlines()
        # The command to paste is one line, also with long paths.
        assert max(len(line) for line in shown if not line.startswith("next")) <= WIDTH
        assert any("intruder dimensions" in line for line in shown)
    twin = shutil.copytree(adapter, pair[0].parent / "twin")
    assert main(["inspect", adapter, str(twin), "--base", base]) == 0
    below = capsys.readouterr().out.splitlines()
    for letter in "ab":
        assert sum(line.startswith(f"{letter} ") and "intruder dimensions in" in line for line in below) == 1
    row: Any = next(line for line in shown if line.startswith("model.layers.0.self_attn.q_proj")).split()
    assert len(row) == 8
    assert main(["inspect", adapter, "--base", base, "--csv"]) == 0
    table = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert table[["scale", "dead", "intruders", "neuron_median"]].notna().all(axis=None)
