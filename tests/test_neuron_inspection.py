"""Results of ``lorascope inspect`` for two whole models, with neurons rotated by known angles."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_inspect import Terminal, plain, run

from lorascope.cli.main import main
from lorascope.diagnosis.neuron_inspection import (
    NeuronInspection,
    inspect_neurons,
    neurons_screen,
    projections_screen,
)
from lorascope.files import text_layout
from lorascope.files.safetensors_io import open_tensors, write_tensors

WIDTH, FEED_FORWARD = 6, 10
ROLES = {"gate_proj": "ffn_gate", "up_proj": "ffn_in", "down_proj": "ffn_out"}


def turned(vectors: np.ndarray, angle: float) -> np.ndarray:
    """Rotate every row by an angle towards its own orthogonal direction."""
    other = np.random.default_rng(1).standard_normal(vectors.shape)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    other -= (other * vectors).sum(1, keepdims=True) / norms**2 * vectors
    other *= norms / np.linalg.norm(other, axis=1, keepdims=True)
    return np.cos(angle) * vectors + np.sin(angle) * other


def plant(folder: Path, layers: int, angles: dict[tuple[int, str, int], float], dtype: str = "f8") -> tuple[Path, Path]:
    """Write two models that differ by an angle in each of the given neurons (layer, projection, number)."""
    draw = np.random.default_rng(0)
    models: list[dict[str, np.ndarray]] = [{}, {}]
    for layer in range(layers):
        for name in ROLES:
            before = draw.standard_normal((FEED_FORWARD, WIDTH))
            after = before.copy()
            for (where, projection, neuron), angle in angles.items():
                if (where, projection) == (layer, name):
                    after[neuron] = turned(before[[neuron]], angle)[0]
            for model, rows in zip(models, (before, after), strict=True):
                matrix = rows.T if name == "down_proj" else rows
                model[f"model.layers.{layer}.mlp.{name}.weight"] = np.ascontiguousarray(matrix.astype(dtype))
    paths = folder / "base", folder / "tuned"
    for path, tensors in zip(paths, models, strict=True):
        path.mkdir(parents=True)
        write_tensors(path / "model.safetensors", tensors, {})
    return paths


ROTATED = {(0, "up_proj", 3): 0.1, (1, "down_proj", 7): 0.4, (1, "down_proj", 8): 0.2, (1, "gate_proj", 0): 0.05}


@pytest.fixture
def rotated(tmp_path: Path) -> tuple[Path, Path]:
    return plant(tmp_path, 2, ROTATED)


def test_inspect_neurons_finds_the_rotated_neurons(rotated: tuple[Path, Path]) -> None:
    base, tuned = rotated
    item = inspect_neurons(tuned, base)
    found = item.largest(4)
    assert list(found["cosine_distance"]) == pytest.approx([1 - np.cos(angle) for angle in (0.4, 0.2, 0.1, 0.05)])
    assert list(found["neuron"]) == [7, 8, 3, 0]
    assert list(found["role"].astype(str)) == ["ffn_out", "ffn_out", "ffn_in", "ffn_gate"]
    modules = item.modules.set_index(["layer", "role"])
    assert modules["turned"].to_dict() == {
        (layer, role): sum((layer, name) == at[:2] for at in ROTATED)
        for layer in (0, 1)
        for name, role in ROLES.items()
    }
    assert modules["top"].sum() == 4  # the others did not rotate, so they are not in the top tenth
    assert modules.loc[(1, "ffn_out"), "share"] == 0.5
    roles = item.roles().set_index("role")
    assert list(roles.index) == ["ffn_in", "ffn_gate", "ffn_out"]
    assert roles["neurons"].tolist() == [20] * 3
    assert roles.loc["ffn_out", "delta_norm"] == pytest.approx(item.largest(2)["delta_norm"].pow(2).sum() ** 0.5)


def test_top_tenth_is_taken_over_all_modules(tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    angles = {(0, name, n): draw.uniform(0.01, 0.1) for name in ROLES for n in range(FEED_FORWARD)}
    angles |= {(1, "up_proj", n): 0.2 + n / 100 for n in range(FEED_FORWARD)}
    base, tuned = plant(tmp_path, 2, angles)
    item = inspect_neurons(tuned, base)
    top = item.scores[item.scores["top"]]
    assert sorted(top["neuron"]) == list(range(4, 10))
    assert set(top["module"]) == {"model.layers.1.mlp.up_proj"}
    assert item.quantiles()[0.5] == pytest.approx(item.scores["cosine_distance"].median())


def test_neurons_screen_equals_the_expected_text(rotated: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(rotated[0].parent)
    expected = """\
tuned          a whole model, float64, 1 file
base           base (float64, 1 file)
size           60 neurons in 6 projections of 2 layers

in top 10%     0  1                               share  median largest    |dW|
ffn_in         555...                             25.0%    0.00 0.00500   0.240
ffn_gate       ...555                             25.0%    0.00 0.00125  0.0708
ffn_out        ...999                             50.0%    0.00  0.0789    1.05
               9 is 20.0% of a layer's neurons, . is zero

1 - cos        1% 0.00  25% 0.00  50% 0.00  75% 0.00  99% 0.0441
largest        0.0789   model.layers.1.mlp.down_proj  neuron 7
               0.0199   model.layers.1.mlp.down_proj  neuron 8
               0.00500  model.layers.0.mlp.up_proj  neuron 3
findings       3 of 6 projections have a zero update:
                 model.layers.0.mlp.gate_proj and 2 more
               26 neurons in changed projections did not change
next           lorascope inspect tuned --base base --csv > neurons.csv"""
    assert neurons_screen(inspect_neurons("tuned", "base"), plain()) == expected


@pytest.mark.parametrize("layers", [1, 2, 17, 33, 80])
def test_screen_fits_24_lines_at_any_depth(tmp_path: Path, layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    base, tuned = plant(tmp_path / ("a-rather-long-name" * 4), layers, {(layers - 1, "up_proj", 0): 0.1})
    for shown in (neurons_screen, projections_screen):
        lines = shown(inspect_neurons(tuned, base), text_layout.make_console(Terminal())).splitlines()
        assert max(map(len, lines[:-1])) <= 80
    assert len(neurons_screen(inspect_neurons(tuned, base), plain()).splitlines()) <= 24


def test_findings_of_equal_and_half_changed_models(tmp_path: Path) -> None:
    base, tuned = plant(tmp_path / "same", 2, {})
    assert inspect_neurons(tuned, base).findings == (
        "no neuron changed: the feed-forward modules of the two models are equal",
    )
    angles = {(0, name, n): 0.1 for name in ROLES for n in range(FEED_FORWARD)}
    del angles[(0, "up_proj", 2)]
    base, tuned = plant(tmp_path / "half", 2, angles, "f2")
    assert inspect_neurons(tuned, base).findings == (
        "3 of 6 projections have a zero update: model.layers.1.mlp.up_proj and 2 more",
        "1 neurons in changed projections did not change (weights of 16 bits or fewer lose small changes)",
    )


def zeroed(folder: Path, layers: int, numbers: slice) -> tuple[Path, Path]:
    """Write two models, of which the second has zeros in these neurons of the inputs."""
    base, tuned = plant(folder, layers, {})
    tensors = {name: np.array(tensor) for name, tensor in open_tensors(tuned / "model.safetensors").items()}
    for name, tensor in tensors.items():
        tensor[numbers if "up_proj" in name else slice(0)] = 0
    write_tensors(tuned / "model.safetensors", tensors, {})
    return base, tuned


def test_neurons_that_became_zero_have_changed(tmp_path: Path) -> None:
    """Zero neurons have no direction, so they did not rotate; neither did neurons that only grew."""
    up, others = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj and 1 more"
    assert inspect_neurons(*zeroed(tmp_path / "one", 1, slice(1))[::-1]).findings == (
        f"2 of 3 projections have a zero update: {others}",
        "9 neurons in changed projections did not change",
        f"1 neurons are zero before or after and have no direction: {up}",
    )
    assert inspect_neurons(*zeroed(tmp_path / "all", 1, slice(None))[::-1]).findings == (
        f"2 of 3 projections have a zero update: {others}",
        f"10 neurons are zero before or after and have no direction: {up}",
    )


def told(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["inspect", *map(str, words)]) == 2
    caught = capsys.readouterr()
    assert caught.out == ""
    assert caught.err.count("\n") == 1
    return caught.err


def test_command_prints_text_json_and_csv(rotated: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = rotated
    words = (tuned, "--base", base)
    assert "60 neurons in 6 projections of 2 layers" in run(capsys, *words)
    everything = run(capsys, *words, "--all").splitlines()
    assert sum(line.startswith("model.layers.") for line in everything) == 6
    plain = json.loads(run(capsys, *words, "--json"))
    assert (plain["largest"][0]["neuron"], plain["modules"][0]["layer"]) == (7, 0)
    table = pd.read_csv(io.StringIO(run(capsys, *words, "--csv")), keep_default_na=False)
    item = inspect_neurons(tuned, base)
    assert isinstance(item, NeuronInspection)
    assert list(table["cosine_distance"]) == list(item.scores["cosine_distance"])
    assert run(capsys, tuned / "model.safetensors", "--base", base / "model.safetensors")


def test_wrong_arguments_print_one_line(
    rotated: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = rotated
    assert "requires the model it was tuned from, --base DIR" in told(capsys, tuned)
    assert "only adapters and runs are compared" in told(capsys, tuned, tuned, "--base", base)
    assert "nowhere: the folder does not exist" in told(capsys, tuned, "--base", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "empty: it has no safetensors file" in told(capsys, tuned, "--base", tmp_path / "empty")
    file = tuned / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    assert "is truncated" in told(capsys, tuned, "--base", base)


def test_changed_neurons_next_to_zero_are_counted(tmp_path: Path) -> None:
    """Rotated near zero, grown from there, shrunk to there; one that did not change, and one long enough."""
    up = "model.layers.0.mlp.up_proj"
    unit = np.eye(FEED_FORWARD, WIDTH)
    pairs = [(1e-9 * unit[0], 1e-9 * unit[1]), (1e-9 * unit[0], unit[0]), (unit[0], 9e-9 * unit[1])]
    pairs += [(1e-9 * unit[0], 1e-9 * unit[0]), (2e-8 * unit[0], 2e-8 * unit[1])]
    folders = plant(tmp_path, 1, {})
    for side, folder in enumerate(folders):
        tensors = {name: np.array(tensor) for name, tensor in open_tensors(folder / "model.safetensors").items()}
        for row, pair in enumerate(pairs):
            tensors[f"{up}.weight"][row] = pair[side]
        write_tensors(folder / "model.safetensors", tensors, {})
    item = inspect_neurons(*folders[::-1])
    line = f"3 changed neurons have a norm below 1e-08 before or after, so their 1 - cos is not meaningful: {up}"
    assert item.findings[-1] == line
    assert line in item.to_json()["findings"]
