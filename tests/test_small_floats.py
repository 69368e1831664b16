"""Float8 and bfloat16 in safetensors files: every code, every rounding and every use, compared with torch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merged import adapt
from safetensors.torch import load_file, save_file
from tiny import tiny

from lorascope.cli.main import main
from lorascope.diagnosis.merge import check_merge
from lorascope.diagnosis.merged_weights import PRECISION
from lorascope.files.safetensors_io import TensorFile, open_tensors
from lorascope.files.small_floats import decode, encode, float8_spacing, round_to_dtype
from lorascope.files.typed_tensors import TypedTensor, safetensors_bytes
from lorascope.formats.pretrained_weights import PretrainedWeights
from lorascope.runs.loading import load, load_adapter

FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
DTYPES = FLOAT8 | {"BF16": torch.bfloat16}
EVERY = pytest.mark.parametrize("dtype", DTYPES)
EVERY8 = pytest.mark.parametrize("dtype", FLOAT8)
QV = ["q_proj", "v_proj"]


def codes(dtype: str) -> np.ndarray:
    return np.arange(2**16, dtype=np.uint16) if dtype == "BF16" else np.arange(256, dtype=np.uint8)


def by_torch(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Return the values of codes, by torch."""
    return torch.from_numpy(bits).view(DTYPES[dtype]).float().numpy()


@EVERY
def test_all_codes_are_decoded_as_by_torch(dtype: str) -> None:
    expected = by_torch(codes(dtype), dtype)
    values = decode(codes(dtype), dtype)
    assert values.dtype == np.float32
    assert np.array_equal(values, expected, equal_nan=True)
    assert (np.signbit(values) == np.signbit(expected)).all()
    assert np.isnan(expected).any()


@EVERY
def test_all_values_are_encoded_by_their_codes(dtype: str) -> None:
    values = decode(codes(dtype), dtype)
    numbers = ~np.isnan(values)
    assert (encode(values, dtype)[numbers] == codes(dtype)[numbers]).all()
    assert np.isnan(decode(encode(values[~numbers], dtype), dtype)).all()
    assert encode(values.reshape(2, -1), dtype).shape == (2, len(values) // 2)


@EVERY
def test_rounding_equals_that_of_torch(dtype: str) -> None:
    finite = np.unique(decode(codes(dtype), dtype)[np.isfinite(decode(codes(dtype), dtype))])
    middles = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)
    drawn = np.random.default_rng(0).normal(size=4096).astype(np.float32)
    drawn = np.concatenate([drawn * np.float32(10.0**power) for power in range(-8, 8)])
    limits = np.array([np.inf, -np.inf, np.nan, 464, 465, 480, 61440, 61439, 1e-9, 0, -0.0], np.float32)
    around = [np.nextafter(middles, np.float32(bound)) for bound in (np.inf, -np.inf)]
    for values in (finite, middles, *around, drawn, limits):
        expected = torch.from_numpy(values).to(DTYPES[dtype]).float().numpy()
        assert np.array_equal(round_to_dtype(values, dtype), expected, equal_nan=True)


@EVERY8
def test_spacing_is_the_distance_of_neighbors(dtype: str) -> None:
    positive = decode(codes(dtype), dtype)[:128]
    positive = positive[np.isfinite(positive)]
    assert (float8_spacing(positive[:-1], dtype) == np.diff(positive)).all()
    assert PRECISION[dtype] == -np.log2(torch.finfo(FLOAT8[dtype]).eps)


@EVERY8
def test_tensors_are_read_as_by_safetensors(dtype: str, tmp_path: Path) -> None:
    tensors = {
        "all": torch.from_numpy(codes(dtype)).view(FLOAT8[dtype]).reshape(8, 32),
        "scalar": torch.tensor(1.5).to(FLOAT8[dtype]),
        "empty": torch.zeros(0, 3).to(FLOAT8[dtype]),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    file = open_tensors(tmp_path / "a.safetensors")
    for name, tensor in tensors.items():
        assert file.dtype(name) == dtype
        assert file[name].shape == tensor.shape
        assert np.array_equal(file[name], tensor.float().numpy(), equal_nan=True)
    rows, out = file.unread("all"), np.empty((4, 8))
    assert rows.dtype == np.float32
    rows[2:6, :8].read_into(out)
    assert np.array_equal(out, tensors["all"].float().numpy()[2:6, :8], equal_nan=True)
    assert np.array_equal(np.asarray(rows.T), tensors["all"].float().numpy().T, equal_nan=True)


@EVERY
def test_tensors_are_written_as_read(dtype: str, tmp_path: Path) -> None:
    tensor = torch.from_numpy(codes(dtype)).view(DTYPES[dtype])
    tensor = tensor[~tensor.isnan()]
    save_file({"x": tensor}, tmp_path / "a.safetensors")
    typed = TypedTensor.read(TensorFile(tmp_path / "a.safetensors"), "x")
    assert typed.exact
    (tmp_path / "b.safetensors").write_bytes(safetensors_bytes({"x": typed}, {}))
    assert load_file(tmp_path / "b.safetensors")["x"].equal(tensor)
    third = np.array([1 / 3], np.float32)
    assert TypedTensor.fitting(third, dtype).dtype == "F32"


def stored_as(folder: Path, dtype: torch.dtype, only: str = "") -> None:
    """Store the weights of a folder in another dtype."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    save_file({name: x.to(dtype) if only in name else x for name, x in tensors.items()}, file, {"format": "pt"})


@EVERY8
def test_factors_have_the_update_of_their_float32_values(dtype: str, tmp_path: Path) -> None:
    adapt(tiny("llama"), tmp_path / "a", target_modules=QV, modules_to_save=["norm"])
    stored_as(tmp_path / "a", FLOAT8[dtype])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    stored_as(tmp_path / "b", torch.float32)
    first, second = load(tmp_path / "a"), load(tmp_path / "b")
    assert {update.dtype for update in first.files.parts.values()} == {dtype}
    assert first.measures == second.measures
    for module, update in first.updates().items():
        assert np.array_equal(update.dense(), second.updates()[module].dense())


def test_inspect_and_doctor_read_float8_factors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapt(tiny("llama"), tmp_path / "a", target_modules=QV)
    tiny("llama").save_pretrained(tmp_path / "base")
    stored_as(tmp_path / "a", torch.float8_e4m3fn)
    stored_as(tmp_path / "base", torch.float8_e5m2, "_proj")
    assert main(["inspect", str(tmp_path / "a"), "--base", str(tmp_path / "base")]) == 0
    assert "float8_e4m3fn" in capsys.readouterr().out
    assert main(["doctor", str(tmp_path / "a"), "--base", str(tmp_path / "base")]) == 0


@EVERY8
def test_base_of_float8_has_the_norms_of_its_values(dtype: str, tmp_path: Path) -> None:
    adapt(tiny("llama"), tmp_path / "a", target_modules=QV)
    tiny("llama").save_pretrained(tmp_path / "base")
    stored_as(tmp_path / "base", FLOAT8[dtype])
    weights = load_file(tmp_path / "base" / "model.safetensors")
    for row in load(tmp_path / "a", tmp_path / "base").summaries():
        W = weights[f"{row.module}.weight"].double()
        assert row.update_norm / row.relative_update == pytest.approx(float(W.norm()), rel=1e-9)


def merged_weights(folder: Path, dtype: torch.dtype, change: Any) -> None:
    """Merge in float32, and store the weights in a dtype."""
    weights = {name: x.float() for name, x in load_file(folder / "base" / "model.safetensors").items()}
    for module, update in load(folder / "a").updates().items():
        weights[f"{module}.weight"] += change(torch.from_numpy(update.dense()).float())
    shutil.copytree(folder / "base", folder / "merged")
    save_file(
        {name: x.to(dtype) for name, x in weights.items()}, folder / "merged" / "model.safetensors", {"format": "pt"}
    )


@pytest.mark.parametrize(
    ("change", "verdicts"),
    [(lambda d: d, {"merged", "consistent"}), (torch.zeros_like, {"not merged"}), (lambda d: 2 * d, {"wrong scale"})],
)
@EVERY8
def test_merged_model_in_float8_is_compared(dtype: str, change: Any, verdicts: set[str], tmp_path: Path) -> None:
    adapt(tiny("llama"), tmp_path / "a", target_modules=QV, r=4, lora_alpha=0.05)
    tiny("llama").save_pretrained(tmp_path / "base")
    stored_as(tmp_path / "base", FLOAT8[dtype])
    merged_weights(tmp_path, FLOAT8[dtype], change)
    check = check_merge(load_adapter(tmp_path / "a", tmp_path / "base"), PretrainedWeights(tmp_path / "merged"))
    assert {module.verdict for module in check.modules} <= verdicts
    assert not check.tensor_names("changed")


@EVERY8
def test_merged_model_that_was_rounded_to_float8_is_named(dtype: str, tmp_path: Path) -> None:
    adapt(tiny("llama"), tmp_path / "a", target_modules=QV, r=4, lora_alpha=0.05)
    tiny("llama").save_pretrained(tmp_path / "base")
    merged_weights(tmp_path, FLOAT8[dtype], lambda d: d)
    stored_as(tmp_path / "merged", torch.float32)
    check = check_merge(load_adapter(tmp_path / "a", tmp_path / "base"), PretrainedWeights(tmp_path / "merged"))
    assert {(module.verdict, module.note) for module in check.modules} == {
        ("rounded", str(FLOAT8[dtype]).removeprefix("torch."))
    }


@pytest.mark.parametrize("scale", ["weight_scale_inv", "weight_scale", "scale_weight", "input_scale"])
def test_base_with_scales_is_reported_in_one_line(
    scale: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapt(tiny("llama"), tmp_path / "a", target_modules=QV)
    tiny("llama").save_pretrained(tmp_path / "base")
    stored_as(tmp_path / "base", torch.float8_e4m3fn, "_proj")
    file = tmp_path / "base" / "model.safetensors"
    save_file(load_file(file) | {f"model.layers.0.self_attn.q_proj.{scale}": torch.ones(1)}, file, {"format": "pt"})
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "a"), "--base", str(tmp_path / "base")]) == 2
    message = capsys.readouterr().err
    assert "got scaled F8_E4M3; use the weights before quantization" in message
    assert len(message.splitlines()) == 1
