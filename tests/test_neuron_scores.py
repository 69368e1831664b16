"""Scores of two checkpoints on the disk, against the sheet's float64 form on the living weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny import FAMILIES, tiny
from tolerance import TEXT, TINY, rounding

import lorascope as ls
from lorascope.adapters.host_weights import host_weight
from lorascope.analysis.neurons import COLUMNS
from lorascope.schema.module_roles import FFN
from lorascope.schema.module_table import describe


def perturbed(model, size, seed=1):
    """The model after a small random change of every weight."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            change = torch.randn(parameter.shape, generator=draw) * parameter.std(correction=0).nan_to_num()
            parameter += (size * change).to(parameter.dtype)
    return model


def save_pair(folder: Path, family: str = "llama", size: float = 1e-2, dtype=torch.float32, shard="5GB", **config):
    """A model and its perturbed copy on the disk; gives both paths and both models."""
    made = []
    for name, change in (("base", 0.0), ("tuned", size)):
        model = perturbed(tiny(family, **config).to(dtype), change)
        model.save_pretrained(folder / name, max_shard_size=shard)
        made.append((folder / name, model))
    return made


def by_definition(before, after, modules) -> pd.DataFrame:
    """1 - cos = |u - v|^2 / 2 of unit vectors in float64, and the norms, from living models."""
    rows = []
    for row in modules[modules["role"].isin(FFN)].itertuples():
        w0, w = (host_weight(model.get_submodule(row.module)).detach().double().numpy() for model in (before, after))
        half = len(w0) // 2
        parts = {row.role: (0, w0, w)}
        if row.role == "ffn_out":
            parts = {row.role: (0, w0.T, w.T)}
        elif "gate_up" in row.module:
            parts = {"ffn_gate": (0, w0[:half], w[:half]), "ffn_in": (half, w0[half:], w[half:])}
        for role, (first, a, b) in parts.items():
            norms = [np.linalg.norm(x, axis=1) for x in (a, b, b - a)]
            distance = ((a / norms[0][:, None] - b / norms[1][:, None]) ** 2).sum(1) / 2
            places = {"module": row.module, "stack": row.stack, "layer": row.layer, "role": role}
            values = dict(zip(COLUMNS[5:], (distance, *norms), strict=True))
            rows.append(pd.DataFrame(places | {"neuron": first + np.arange(len(a))} | values))
    return pd.concat(rows, ignore_index=True)


def check(found: pd.DataFrame, expected: pd.DataFrame, keys=("module", "stack", "layer", "role", "neuron")) -> None:
    assert list(found.columns) == list(COLUMNS)
    both = found.astype({"module": str, "stack": str, "role": str}).merge(expected, on=list(keys), how="outer")
    assert len(both) == len(found) == len(expected)
    for column in COLUMNS[5:]:
        np.testing.assert_allclose(
            both[f"{column}_x"], both[f"{column}_y"], rtol=rounding(terms=TINY, growth=TEXT), err_msg=column
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_are_those_of_the_linear_maps_in_every_family(tmp_path, family):
    (base, before), (tuned, after) = save_pair(tmp_path, family)
    # ViT's files keep the names of older versions.
    keys = {"keys": ("layer", "role", "neuron")} if family == "vit" else {}
    check(ls.neuron_scores(base, tuned), by_definition(before, after, describe(before)), **keys)


def test_a_square_conv1d_is_told_by_its_neighbours(tmp_path):
    (base, before), (tuned, after) = save_pair(tmp_path, "gpt2", n_inner=32)
    check(ls.neuron_scores(base, tuned), by_definition(before, after, describe(before)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [1e-4, 1e-1])
def test_every_dtype_keeps_its_digits_in_shards_too(tmp_path, dtype, size):
    (base, before), (tuned, after) = save_pair(tmp_path, size=size, dtype=dtype, shard="20KB")
    assert len(list(tuned.glob("*.safetensors"))) > 1
    check(ls.neuron_scores(base, tuned), by_definition(before, after, describe(before)))


def test_the_files_themselves_and_the_dtypes_may_differ(tmp_path):
    (base, before), _ = save_pair(tmp_path / "a")
    _, (tuned, after) = save_pair(tmp_path / "b", dtype=torch.bfloat16)
    found = ls.neuron_scores(base / "model.safetensors", tuned)
    check(found, by_definition(before, after, describe(before)))


def test_names_may_begin_differently_and_roles_can_be_chosen(tmp_path):
    (_, before), (tuned, after) = save_pair(tmp_path)
    before.model.save_pretrained(tmp_path / "bare")
    found = ls.neuron_scores(tmp_path / "bare", tuned, roles=("ffn_in", "ffn_out"))
    expected = by_definition(before, after, describe(before))
    check(found, expected[expected["role"] != "ffn_gate"])


def test_gate_and_input_in_one_matrix_are_chosen_apart(tmp_path):
    (base, _), (tuned, _) = save_pair(tmp_path, "phi3")
    scores = ls.neuron_scores(base, tuned)
    assert scores.groupby(["module", "role"], observed=True).size().tolist() == [48] * 6


def test_a_layout_of_the_authors_beside_the_weights_is_left_aside(tmp_path):
    (base, before), (tuned, after) = save_pair(tmp_path)
    save_file({"layers.0.feed_forward.w1.weight": np.ones((3, 2), "f4")}, tuned / "consolidated.safetensors")
    check(ls.neuron_scores(base, tuned), by_definition(before, after, describe(before)))


UP = "model.layers.1.mlp.up_proj.weight"


def rewrite(change):
    def broken(base, tuned):
        tensors = load_file(tuned / "model.safetensors")
        change(tensors)
        save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})

    return broken


def cut(base, tuned):
    file = tuned / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def shard_lost(base, tuned):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tuned / "model.safetensors").rename(tuned / "model-00001-of-00002.safetensors")
    (tuned / "model.safetensors.index.json").write_text(json.dumps(index))


def pickled(base, tuned):
    (tuned / "model.safetensors").rename(tuned / "pytorch_model.bin")


def emptied(base, tuned):
    (tuned / "model.safetensors").unlink()


def other_shape(tensors):
    tensors[UP] = tensors[UP][:-2]


def with_nan(tensors):
    tensors[UP][3:5, 1] = np.nan


def packed(tensors):
    tensors[UP] = tensors[UP].astype(np.int8)


def unknown(tensors):
    for name in list(tensors):
        if ".mlp." in name:
            del tensors[name]


def lacks_in_base(base, tuned):
    tensors = load_file(base / "model.safetensors")
    del tensors[UP]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


BROKEN = {
    "truncated": (cut, "tuned/model.safetensors: it is truncated"),
    "shard missing": (shard_lost, "missing 1 of 2 shards.* model-00002-of-00002.safetensors"),
    "pickle": (pickled, "pytorch_model.bin: pickles are never loaded"),
    "empty": (emptied, "tuned: it has no safetensors file"),
    "shape": (rewrite(other_shape), r"up_proj has the shape \(48, 32\) in .*base and \(46, 32\) in .*tuned"),
    "nan": (rewrite(with_nan), "tuned: 2 of 48 neurons of model.layers.1.mlp.up_proj hold NaN or infinity"),
    "packed": (rewrite(packed), f"{UP} must be stored as .*, got I8"),
    "no such weights": (rewrite(unknown), "tuned holds no feed-forward weights by a known name"),
    "missing or tied": (lacks_in_base, "base holds no weight of model.layers.1.mlp.up_proj, as .*tied"),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_what_cannot_be_scored_is_told_in_one_line(tmp_path, case):
    (base, _), (tuned, _) = save_pair(tmp_path)
    damage, told = BROKEN[case]
    damage(base, tuned)
    with pytest.raises((ValueError, FileNotFoundError), match=told) as caught:
        ls.neuron_scores(base, tuned)
    assert "\n" not in str(caught.value)


def test_a_role_without_neurons_is_refused(tmp_path):
    (base, _), (tuned, _) = save_pair(tmp_path)
    with pytest.raises(ValueError, match="'q' has no neurons; ffn_in, ffn_gate, ffn_out have"):
        ls.neuron_scores(base, tuned, roles=("q",))


# The high-water mark of the process alone, above what a first pair has taken.
PEAK = """
import re, sys
from pathlib import Path
import lorascope as ls
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[1])
ls.neuron_scores(*sys.argv[1:3])
before = peak()
ls.neuron_scores(*sys.argv[3:])
print(1024 * (peak() - before))
"""


def checkpoint(file: Path, layers: int, width: int, change: float) -> Path:
    """A model of blocks like LLaMA's, all alike, of 13 width^2 weights each."""
    draw = np.random.default_rng(0).standard_normal((3 * width, width), dtype=np.float32)
    up = draw + np.float32(change) * np.roll(draw, 1)
    block = dict.fromkeys([f"self_attn.{name}_proj" for name in "qkvo"], up[:width])
    block |= {"mlp.gate_proj": up, "mlp.up_proj": up, "mlp.down_proj": np.ascontiguousarray(up.T)}
    file.parent.mkdir(exist_ok=True)
    save_file({f"model.layers.{i}.{name}.weight": array for i in range(layers) for name, array in block.items()}, file)
    return file


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the kernel's count of memory")
def test_two_large_checkpoints_take_less_memory_than_one_of_their_layers(tmp_path):
    pairs = [
        checkpoint(tmp_path / str(width) / f"{i}.safetensors", layers, width, i / 100)
        for layers, width in ((1, 16), (4, 640))
        for i in range(2)
    ]
    told = subprocess.run([sys.executable, "-c", PEAK, *pairs], capture_output=True, check=True, text=True).stdout
    assert 0 < int(told) < 4 * 13 * 640**2


def test_torch_is_not_needed():
    code = "import sys, lorascope as ls; ls.neuron_scores; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
