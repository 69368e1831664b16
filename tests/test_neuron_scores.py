"""Scores of two checkpoints on disk, compared with float64 formulas on the loaded weights."""

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
    """Return the model after a small random change of every weight."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            change = torch.randn(parameter.shape, generator=draw) * parameter.std(correction=0).nan_to_num()
            parameter += (size * change).to(parameter.dtype)
    return model


def save_pair(folder: Path, family: str = "llama", size: float = 1e-2, dtype=torch.float32, shard="5GB", **config):
    """Save a model and its perturbed copy, and return their paths and the models."""
    made = []
    for name, change in (("base", 0.0), ("tuned", size)):
        model = perturbed(tiny(family, **config).to(dtype), change)
        model.save_pretrained(folder / name, max_shard_size=shard)
        made.append((folder / name, model))
    return made


def by_definition(before, after, modules) -> pd.DataFrame:
    """Return 1 - cos = |u - v|^2 / 2 of unit vectors in float64, and the norms, from loaded models."""
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
def test_scores_equal_the_definition_in_every_family(tmp_path, family):
    (base, before), (tuned, after) = save_pair(tmp_path, family)
    # ViT's files have the names of older versions.
    keys = {"keys": ("layer", "role", "neuron")} if family == "vit" else {}
    check(ls.neuron_scores(base, tuned), by_definition(before, after, describe(before)), **keys)


def test_square_conv1d_is_recognized_from_other_weights(tmp_path):
    (base, before), (tuned, after) = save_pair(tmp_path, "gpt2", n_inner=32)
    check(ls.neuron_scores(base, tuned), by_definition(before, after, describe(before)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [1e-4, 1e-1])
def test_scores_are_exact_for_every_dtype_and_in_shards(tmp_path, dtype, size):
    (base, before), (tuned, after) = save_pair(tmp_path, size=size, dtype=dtype, shard="20KB")
    assert len(list(tuned.glob("*.safetensors"))) > 1
    check(ls.neuron_scores(base, tuned), by_definition(before, after, describe(before)))


def test_checkpoints_may_be_files_and_differ_in_dtype(tmp_path):
    (base, before), _ = save_pair(tmp_path / "a")
    _, (tuned, after) = save_pair(tmp_path / "b", dtype=torch.bfloat16)
    found = ls.neuron_scores(base / "model.safetensors", tuned)
    check(found, by_definition(before, after, describe(before)))


def test_names_may_have_different_prefixes_and_roles_can_be_chosen(tmp_path):
    (_, before), (tuned, after) = save_pair(tmp_path)
    before.model.save_pretrained(tmp_path / "bare")
    found = ls.neuron_scores(tmp_path / "bare", tuned, roles=("ffn_in", "ffn_out"))
    expected = by_definition(before, after, describe(before))
    check(found, expected[expected["role"] != "ffn_gate"])


def test_gate_and_input_in_one_matrix_are_scored_separately(tmp_path):
    (base, _), (tuned, _) = save_pair(tmp_path, "phi3")
    scores = ls.neuron_scores(base, tuned)
    assert scores.groupby(["module", "role"], observed=True).size().tolist() == [48] * 6


def test_consolidated_file_of_the_authors_is_ignored(tmp_path):
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
    "empty": (emptied, "tuned: it has no safetensors file of a model"),
    "shape": (rewrite(other_shape), r"up_proj: it has shape \(48, 32\) in .*base and \(46, 32\) in .*tuned"),
    "nan": (rewrite(with_nan), "tuned: 2 of 48 neurons of model.layers.1.mlp.up_proj contain NaN or infinity"),
    "packed": (rewrite(packed), f"{UP} must be stored as .*, got I8"),
    "no such weights": (rewrite(unknown), "tuned: no feed-forward weights"),
    "missing or tied": (lacks_in_base, "score model.layers.1.mlp.up_proj: .*base has no weight of it, .*tied"),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_broken_or_unrelated_checkpoint_raises_one_line(tmp_path, case):
    (base, _), (tuned, _) = save_pair(tmp_path)
    damage, message = BROKEN[case]
    damage(base, tuned)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        ls.neuron_scores(base, tuned)
    assert "\n" not in str(caught.value)


def test_role_without_neurons_raises(tmp_path):
    (base, _), (tuned, _) = save_pair(tmp_path)
    with pytest.raises(ValueError, match="roles must be from 'ffn_in', 'ffn_gate', 'ffn_out', got 'q'"):
        ls.neuron_scores(base, tuned, roles=("q",))


# Peak memory of the process, minus the peak of a first, small pair.
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
    """Save a model of equal LLaMA-like blocks, with 13 width^2 weights each."""
    draw = np.random.default_rng(0).standard_normal((3 * width, width), dtype=np.float32)
    up = draw + np.float32(change) * np.roll(draw, 1)
    block = dict.fromkeys([f"self_attn.{name}_proj" for name in "qkvo"], up[:width])
    block |= {"mlp.gate_proj": up, "mlp.up_proj": up, "mlp.down_proj": np.ascontiguousarray(up.T)}
    file.parent.mkdir(exist_ok=True)
    save_file({f"model.layers.{i}.{name}.weight": array for i in range(layers) for name, array in block.items()}, file)
    return file


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="requires the memory counters of Linux")
def test_large_checkpoints_need_less_memory_than_one_layer(tmp_path):
    pairs = [
        checkpoint(tmp_path / str(width) / f"{i}.safetensors", layers, width, i / 100)
        for layers, width in ((1, 16), (4, 640))
        for i in range(2)
    ]
    printed = subprocess.run([sys.executable, "-c", PEAK, *pairs], capture_output=True, check=True, text=True).stdout
    assert 0 < int(printed) < 4 * 13 * 640**2


def test_import_does_not_load_torch():
    code = "import sys, lorascope as ls; ls.neuron_scores; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
