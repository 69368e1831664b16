"""LoRA adapters in GGUF files, written by the package gguf."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from adapter_bits import draw
from gguf_bytes import ADAPTER, array, entry, header, text, value
from hostile import limits, outcome

import lorascope as ls
from lorascope.cli.main import main
from lorascope.diagnosis.survey import find_adapters, survey
from lorascope.files.gguf_io import GgufFile

Q, DOWN = "blk.0.attn_q", "blk.1.ffn_down"


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


def write_all_kinds(file: Path) -> Path:
    """Write values of every kind, and tensors of every type that is not quantized and of one that is."""
    writer = gguf.GGUFWriter(file, "llama")
    numbers = {
        "uint8": 200, "int8": -100, "uint16": 60_000, "int16": -30_000, "uint32": 2**32 - 1, "int32": -(2**31),
        "uint64": 2**63 + 7, "int64": -(2**63), "float32": 0.1, "float64": 0.1, "bool": True, "string": "Größe\x1b",
    }  # fmt: skip
    for kind, number in numbers.items():
        getattr(writer, f"add_{kind}")(f"a.{kind}", number)
    for number, values in enumerate(([1, 2], [0.5], [True, False], ["", "ab"], b"\1\2\3")):
        writer.add_array(f"array.{number}", values)
    writer.add_custom_alignment(128)
    for dtype in ("f2", "f4", "f8", "i1", "i2", "i4", "i8"):
        writer.add_tensor(dtype, (9 * draw(3, 3, 5)).astype(dtype))
    writer.add_tensor("three axes", draw(4, 2, 3, 4))
    for name in ("Q8_0", "Q4_K", "BF16"):
        kind = gguf.GGMLQuantizationType[name]
        rows = np.ones((3, 256 // gguf.GGML_QUANT_SIZES[kind][0] * gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
        writer.add_tensor(name, rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_values_and_tensors_equal_those_of_the_package_gguf(tmp_path: Path) -> None:
    file = write_all_kinds(tmp_path / "all.gguf")
    found, expected = GgufFile(file), gguf.GGUFReader(file)
    scalars = [f for f in expected.fields.values() if f.types[:1] != [gguf.GGUFValueType.ARRAY]]
    assert found.words == {f.name: f.contents() for f in scalars if not f.name.startswith("GGUF.")}
    assert {name: type(value) for name, value in found.words.items() if name == "a.bool"} == {"a.bool": bool}
    assert list(found) == [tensor.name for tensor in expected.tensors]
    for tensor in expected.tensors:
        name = tensor.tensor_type.name
        assert (found.dtype(tensor.name), found.shape(tensor.name)) == (name, tuple(map(int, tensor.shape[::-1])))
        if name == "BF16":
            assert np.array_equal(found[tensor.name], gguf.dequantize(tensor.data, tensor.tensor_type))
        elif name in ("Q8_0", "Q4_K"):
            with pytest.raises(ValueError, match=name):
                found[tensor.name]
        else:
            assert np.array_equal(found[tensor.name], tensor.data)
            assert found[tensor.name].dtype == tensor.data.dtype


def test_version_2_is_read_and_others_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "lora.gguf", pair(Q))
    whole = file.read_bytes()
    for version, byte_order in ((1, "little"), (2, "little"), (4, "little"), (3, "big")):
        file.write_bytes(whole[:4] + version.to_bytes(4, byte_order) + whole[8:])
        assert bool(outcome(lambda: ls.load(file))) == (version != 2)
    file.write_bytes(b"GGML" + whole[4:])
    assert "GGUF" in outcome(lambda: ls.load(file))


GIANT = 20 * 2**30


def of_adapter(*values: bytes, tensors: tuple[bytes, ...] = ()) -> bytes:
    return header(*ADAPTER, *values, tensors=tensors)


HOSTILE = {
    "nested array": (of_adapter(value(b"t", 9, array(9, 1) * 100_000)), 0, "nested"),
    "array of an array": (of_adapter(value(b"t", 9, array(9, 1, array(0, 1, b"1")))), 0, "nested"),
    "sparse array of bytes": (of_adapter(value(b"t", 9, array(0, GIANT))), GIANT, "header"),
    "sparse array of texts": (of_adapter(value(b"t", 9, array(8, 2**31))), GIANT, "header"),
    "array of 2**64 - 1 values": (of_adapter(value(b"t", 9, array(12, 2**64 - 1))), 0, "header"),
    "array of an unknown kind": (of_adapter(value(b"t", 9, array(13, 1))), 0, "13"),
    "unknown kind": (of_adapter(value(b"t", 99, b"")), 0, "99"),
    "text of 2**62 bytes": (of_adapter(value(b"t", 8, struct.pack("<Q", 2**62))), 0, "header"),
    "sparse text": (of_adapter(value(b"t", 8, struct.pack("<Q", GIANT))), GIANT, "header"),
    "key of 2**64 - 1 bytes": (of_adapter(struct.pack("<Q", 2**64 - 1)), 0, "header"),
    "2**40 values": (header(*ADAPTER, counts=(0, 2**40)), GIANT, ""),
    "2**40 tensors": (header(*ADAPTER, counts=(2**40, len(ADAPTER))), GIANT, ""),
    "key that occurs twice": (of_adapter(*ADAPTER[:1]), 0, "general.type.*twice"),
    "tensor that occurs twice": (of_adapter(tensors=(entry(b"x", (1,)),) * 2), 999, "x.*twice"),
    "text in another encoding": (of_adapter(value(b"\xff\x1b", 8, text(b"\xfe"))), 0, "utf-8"),
    "alignment 0": (of_adapter(value(b"general.alignment", 4, struct.pack("<I", 0))), 0, "general.alignment"),
    "alignment 3": (of_adapter(value(b"general.alignment", 4, struct.pack("<I", 3))), 0, "general.alignment"),
    "alignment of text": (of_adapter(value(b"general.alignment", 8, text(b"32"))), 0, "general.alignment"),
    "type of an adapter": (header(value(b"general.type", 8, text(b"\x1b[2J"))), 0, ""),
    "tensor of an unknown type": (of_adapter(tensors=(entry(b"x", (1,), 99),)), 999, "99"),
    "tensor of 2**32 - 1 axes": (of_adapter(tensors=(entry(b"x", (1,), axes=2**32 - 1),)), 999, "axes"),
    "tensor of a size that overflows": (of_adapter(tensors=(entry(b"x", (2**63, 2**63)),)), 999, "shape"),
    "empty tensor that overflows": (of_adapter(tensors=(entry(b"x", (0, 2**62, 2**62)),)), 999, "shape"),
    "tensor behind the end": (of_adapter(tensors=(entry(b"x", (1,), offset=2**62),)), 999, "x"),
    "tensor without values": (of_adapter(tensors=(entry(b"x", (10**6,)),)), 999, "truncated"),
    "quantized tensor without values": (of_adapter(tensors=(entry(b"x", (2**20,), 8),)), 999, "truncated"),
    "name of a tensor without end": (of_adapter(tensors=(entry(b"x" * 10**6, (1,)),)), 10**7, "characters"),
    "sparse factor": (of_adapter(tensors=(entry(b"x.weight.lora_a", (2**30, 4)),)), GIANT, "values"),
    "empty file": (b"", 0, "GGUF"),
}


@pytest.mark.parametrize(("content", "size", "match"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_file_raises_one_line_within_limits(content: bytes, size: int, match: str, tmp_path: Path) -> None:
    file = tmp_path / "lora.gguf"
    with file.open("wb") as stream:
        stream.write(content)
        stream.truncate(max(size, len(content)))
    said = outcome(lambda: ls.load(file), gigabytes=1.0)
    assert str(file) in said
    assert re.search(match, said), said


def test_long_array_of_bytes_is_skipped(tmp_path: Path) -> None:
    file = tmp_path / "lora.gguf"
    file.write_bytes(of_adapter(value(b"t", 9, array(0, 3_000_000, bytes(3_000_000)))))
    with limits(0.5):
        assert len(GgufFile(file)) == 0


def test_survey_measures_the_others_next_to_a_hostile_file(tmp_path: Path) -> None:
    write(tmp_path / "good.gguf", pair(Q))
    (tmp_path / "bad.gguf").write_bytes(HOSTILE["nested array"][0])
    rows = list(survey(find_adapters(tmp_path)))
    assert [bool(row.error) for row in rows] == [True, False]
