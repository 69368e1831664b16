"""Folders of mlx-lm, compared with the arithmetic of its layers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_bits import draw
from safetensors.numpy import save

import lorascope as ls
from lorascope.diagnosis.inspection import inspect

Q = "model.layers.0.self_attn.q_proj"
EMBED = "model.embed_tokens"
EXPERTS = "model.layers.0.mlp.switch_mlp.up_proj"


def write(folder: Path, tensors: dict[str, np.ndarray], name: str = "adapters.safetensors", **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(save(tensors, {"format": "mlx"}))
    settings = {"fine_tune_type": "lora", "num_layers": 2, "model": "org/base", "lora_parameters": {"scale": 2.0}}
    (folder / "adapter_config.json").write_text(json.dumps(settings | config), encoding="utf-8")
    return folder


def base(folder: Path, **weights: np.ndarray) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(save({f"{name}.weight": each for name, each in weights.items()}))
    return folder


def pair(module: str, inner: int, outer: int) -> dict[str, np.ndarray]:
    return {f"{module}.lora_a": draw(1, inner, 2), f"{module}.lora_b": draw(2, 2, outer)}


PRODUCT = draw(1, 5, 2).astype(float) @ draw(2, 2, 6)


@pytest.mark.parametrize(
    ("parameters", "factor"),
    [
        ({"scale": 3.5, "rank": 2}, 3.5),
        ({"rank": 2}, 20.0),
        ({"alpha": 8.0, "rank": 2}, 4.0),
        ({"alpha": 8, "scale": 3.0}, 12.0),
        ({"scale": 0.0}, 0.0),
    ],
)
def test_scale_is_the_factor(parameters: dict[str, float], factor: float, tmp_path: Path) -> None:
    adapter = ls.load(write(tmp_path, pair(Q, 5, 6), lora_parameters=parameters))
    assert adapter.updates()[Q].dense() == pytest.approx(factor * PRODUCT.T, rel=1e-6)
    assert adapter.meta.model == "org/base"


def test_embedding_is_read_in_the_layout_of_other_embeddings(tmp_path: Path) -> None:
    weight = draw(3, 5, 6)
    folder = write(tmp_path / "a", pair(EMBED, 5, 6))
    adapter = ls.load(folder, base(tmp_path / "b", **{EMBED: weight}))
    assert adapter.updates()[EMBED].dense() == pytest.approx(2 * PRODUCT.T, rel=1e-6)
    norm = adapter.summary(all=True)["weight_norm"].item()
    assert norm == pytest.approx(np.linalg.norm(weight + 2 * PRODUCT), rel=1e-6)


@pytest.mark.parametrize("stacked", [True, False])
def test_experts_are_one_module_each(stacked: bool, tmp_path: Path) -> None:
    a, b = draw(1, 3, 2, 5), draw(2, 3, 6, 2)
    stored = {f"{EXPERTS}.lora_a": a if stacked else a.reshape(6, 5), f"{EXPERTS}.lora_b": b}
    adapter = ls.load(write(tmp_path, stored))
    names = [f"model.layers.0.mlp.experts.{expert}.up_proj" for expert in range(3)]
    assert list(adapter.updates()) == names
    for expert, name in enumerate(names):
        dense = 2 * b[expert].astype(float) @ a[expert]
        assert adapter.updates()[name].dense() == pytest.approx(dense, rel=1e-6)
    assert adapter.meta.parameters.trained == a.size + b.size


def test_experts_of_mixtral_have_the_names_of_its_files(tmp_path: Path) -> None:
    stem = "model.layers.0.block_sparse_moe.switch_mlp"
    stored = {f"{stem}.{leaf}.lora_{side}": draw(1, 1, *((2, 5) if side == "a" else (6, 2)))
              for leaf in ("gate_proj", "up_proj", "down_proj") for side in "ab"}  # fmt: skip
    names = {f"model.layers.0.block_sparse_moe.experts.0.{leaf}" for leaf in ("w1", "w2", "w3")}
    assert ls.load(write(tmp_path, stored)).updates().keys() == names


@pytest.mark.parametrize("module", [Q, EMBED])
def test_dora_has_the_norms_of_the_rows(module: str, tmp_path: Path) -> None:
    embedding = module == EMBED
    weight = draw(3, *((5, 6) if embedding else (6, 5)))
    magnitude = draw(4, len(weight))
    folder = write(tmp_path / "a", pair(module, 5, 6) | {f"{module}.m": magnitude}, fine_tune_type="dora")
    change = 2 * (PRODUCT if embedding else PRODUCT.T)
    direction = ls.load(folder)
    assert direction.files.kind == "DoRA"
    assert not direction.updates()[module].whole
    adapted = weight + change
    tuned = magnitude[:, None] * adapted / np.linalg.norm(adapted, axis=1, keepdims=True)
    expected = (tuned - weight).T if embedding else tuned - weight
    full = ls.load(folder, base(tmp_path / "b", **{module: weight}))
    assert full.updates()[module].dense() == pytest.approx(expected, rel=1e-5)


def test_whole_weights_require_the_base(tmp_path: Path) -> None:
    before, after = draw(3, 6, 5), draw(4, 6, 5)
    stored = {f"{Q}.weight": after, f"{Q}.bias": draw(5, 6), "model.norm.weight": draw(6, 5)}
    folder = write(tmp_path / "a", stored, fine_tune_type="full")
    with pytest.raises(ValueError, match=r"require the base model: --base DIR"):
        ls.load(folder)
    adapter = ls.load(folder, base(tmp_path / "b", **{Q: before, "model.norm": draw(7, 5)}))
    assert adapter.updates()[Q].dense() == pytest.approx(after.astype(float) - before, rel=1e-6)
    assert adapter.updates()["model.norm"].shape == (5, 1)
    assert adapter.files.others == (f"{Q}.bias",)


def test_checkpoints_are_listed_and_read_by_their_path(tmp_path: Path) -> None:
    write(tmp_path, {name: 3 * each for name, each in pair(Q, 5, 6).items()}, "0000100_adapters.safetensors")
    adapter = ls.load(write(tmp_path, pair(Q, 5, 6)))
    assert dict(inspect(adapter).facts)["checkpoints"] == "1, step 100; --series shows them"
    assert adapter.files.notes == ()
    assert adapter.updates()[Q].dense() == pytest.approx(2 * PRODUCT.T, rel=1e-6)
    checkpoint = ls.load(tmp_path / "0000100_adapters.safetensors")
    assert checkpoint.updates()[Q].dense() == pytest.approx(18 * PRODUCT.T, rel=1e-6)


BROKEN: dict[str, tuple[dict[str, np.ndarray], dict[str, Any], str]] = {
    "one factor": ({f"{Q}.lora_a": draw(1, 5, 2)}, {}, "q_proj has lora_a but no lora_b"),
    "ranks": ({f"{Q}.lora_a": draw(1, 5, 3), f"{Q}.lora_b": draw(1, 2, 6)}, {}, r"got shapes \(5, 3\) and \(2, 6\)"),
    "axes": ({f"{Q}.lora_a": draw(1, 5), f"{Q}.lora_b": draw(1, 2, 6)}, {}, r"got shapes \(5,\) and \(2, 6\)"),
    "magnitude": (pair(Q, 5, 6) | {f"{Q}.m": draw(1, 4)}, {}, "must have 6 values"),
    "nothing": ({"x": draw(1, 5)}, {}, "lora_a and lora_b, got x"),
    "scale": (pair(Q, 5, 6), {"lora_parameters": {"scale": "2"}}, re.escape("$.lora_parameters.scale")),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folder_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    tensors, config, message = BROKEN[name]
    with pytest.raises(ValueError, match=rf"^cannot read {tmp_path}\S*: .*{message}") as raised:
        ls.load(write(tmp_path, tensors, **config))
    assert "\n" not in str(raised.value)
