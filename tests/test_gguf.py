"""LoRA adapters in GGUF files, written by the package gguf."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

import lorascope as ls
from lorascope.cli.main import main

Q, DOWN = "blk.0.attn_q", "blk.1.ffn_down"


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


A, B = draw(1, 2, 5), draw(2, 6, 2)


def write(file: Path, tensors: dict[str, np.ndarray], alpha: float = 6.0, kind: str = "adapter") -> Path:
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_type(kind)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def pair(module: str, dtype: type = np.float32) -> dict[str, np.ndarray]:
    return {f"{module}.weight.lora_a": A.astype(dtype), f"{module}.weight.lora_b": B.astype(dtype)}


@pytest.mark.parametrize(("alpha", "scale"), [(6.0, 3.0), (0.0, 1.0)])
def test_update_is_the_scaled_product(alpha: float, scale: float, tmp_path: Path) -> None:
    file = write(tmp_path / "lora.gguf", pair(DOWN) | pair(Q, np.float16), alpha)
    adapter = ls.load(file)
    assert list(adapter.updates()) == [Q, DOWN]
    assert adapter.updates()[DOWN].dense() == pytest.approx(scale * B.astype(float) @ A, rel=1e-6)
    assert adapter.updates()[Q].dense() == pytest.approx(scale * B.astype(float) @ A, abs=0.02)
    assert adapter.modules[["layer", "role"]].to_numpy().tolist() == [[0, "q"], [1, "ffn_out"]]
    assert "permutes" in adapter.files.notes[0]
    assert not ls.load(write(tmp_path / "down.gguf", pair(DOWN))).files.notes
    assert main(["inspect", str(file)]) == 0


def test_model_and_broken_adapters_are_refused_in_one_line(tmp_path: Path) -> None:
    model = write(tmp_path / "model.gguf", {"blk.0.attn_q.weight": B}, kind="model")
    with pytest.raises(ValueError, match="neither a run nor an adapter"):
        ls.load(model)
    for tensors, message in (
        ({f"{Q}.weight.lora_a": A}, "blk.0.attn_q has no lora_b"),
        (pair(Q) | {f"{Q}.weight.lora_a": A[:1]}, "factors of one rank, got 1 and 2"),
        ({"x": A}, "no tensor whose name ends in .lora_a"),
    ):
        with pytest.raises(ValueError, match=f"^cannot read .*{message}") as raised:
            ls.load(write(tmp_path / "lora.gguf", tensors))
        assert "\n" not in str(raised.value)


def test_damaged_files_raise_one_line(tmp_path: Path) -> None:
    whole = write(tmp_path / "lora.gguf", pair(Q)).read_bytes()
    generator = np.random.default_rng(0)
    damaged = [whole[:size] for size in range(0, len(whole), 7)]
    for _ in range(200):
        content = bytearray(whole)
        content[generator.integers(len(whole) // 2)] = generator.integers(256)
        damaged.append(bytes(content))
    file, lines = tmp_path / "damaged.gguf", []
    for content in damaged:
        file.write_bytes(content)
        try:
            ls.load(file)
        except ValueError as error:
            lines.append(str(error))
    assert len(lines) > 100
    assert not any("\n" in line for line in lines)
