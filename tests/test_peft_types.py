"""PEFT's types of adapters other than LoRA, on every kind of layer, against the merge by PEFT itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
from peft_oracle import nested, write_with_peft
from safetensors.numpy import load_file, save
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorascope as ls
from lorascope.cli.main import main
from lorascope.diagnosis.runtimes.runtime import apply_adapter
from lorascope.formats import find_reader, find_sentence
from lorascope.formats.peft_config import KINDS

pytestmark = pytest.mark.filterwarnings("ignore:Specified to not save:UserWarning")
M = "model.layers.0.dense"
LAYERS = {
    "linear": lambda: nn.Linear(4, 6),
    "wide": lambda: nn.Linear(12, 6),
    "square": lambda: nn.Linear(6, 6),
    "conv1d": lambda: Conv1D(6, 4),
    "square conv1d": lambda: Conv1D(6, 6),
    "conv": lambda: nn.Conv2d(4, 6, 3),
    "small conv": lambda: nn.Conv2d(4, 6, 1),
    "line": lambda: nn.Conv1d(4, 6, 3),
    "cube": lambda: nn.Conv3d(4, 6, 2),
    "embedding": lambda: nn.Embedding(12, 4),
    "odd": lambda: nn.Linear(5, 7),
    "norm": lambda: nn.LayerNorm(6),
}


def case(layers: str, config: str, **settings: Any) -> list[Any]:
    words = " ".join(f"{name}={value}" for name, value in settings.items())
    return [pytest.param(layer, config, settings, id=f"{config} {words} {layer}") for layer in layers.split(", ")]


def write(folder: Path, config: str, settings: dict[str, Any], layers: dict[str, nn.Module] | None = None) -> Any:
    """Write an adapter and its base with PEFT, and return the updates of PEFT's merge."""
    chosen = getattr(peft, config)(target_modules=["dense"], **settings)
    return write_with_peft(folder / "adapter", chosen, layers or {M: nn.Linear(4, 6)}, folder / "base")


CASES = [
    *case("linear, conv, small conv, line", "LoHaConfig", r=1, alpha=3),
    *case("linear, conv", "LoHaConfig", r=3, alpha=1),
    *case("conv, small conv, line", "LoHaConfig", r=2, use_effective_conv2d=True),
    *case("linear", "LoHaConfig", r=1, rank_pattern={"dense": 2}, alpha_pattern={"dense": 5}),
    *case("linear, wide, conv, small conv, line", "LoKrConfig", r=2, alpha=3),
    *case("linear, wide", "LoKrConfig", r=1, alpha=3, decompose_both=True, decompose_factor=3),
    *case("wide", "LoKrConfig", r=1, alpha=3, decompose_factor=2),
    *case("wide", "LoKrConfig", r=1, rank_pattern={"dense": 2}, alpha_pattern={"dense": 5}),
    *case("conv", "LoKrConfig", r=1, alpha=3, use_effective_conv2d=True, decompose_factor=2),
    *case("conv, line", "LoKrConfig", r=1, alpha=3, decompose_factor=2),
    *case("linear, square, conv, small conv, cube", "IA3Config", feedforward_modules=[]),
    *case("linear, square, conv, small conv, cube", "IA3Config", feedforward_modules=["dense"]),
    *case("conv1d, square conv1d", "IA3Config", feedforward_modules=[], fan_in_fan_out=True),
    *case("conv1d", "IA3Config", feedforward_modules=["dense"], fan_in_fan_out=True),
    *case("linear, wide, conv, embedding", "OFTConfig", oft_block_size=2),
    *case("linear", "OFTConfig", oft_block_size=4, num_cayley_neumann_terms=2),
    *case("linear", "OFTConfig", oft_block_size=4, num_cayley_neumann_terms=3),
    *case("linear", "OFTConfig", oft_block_size=4, num_cayley_neumann_terms=8),
    *case("wide", "OFTConfig", oft_block_size=4, use_cayley_neumann=False),
    *case("wide", "OFTConfig", oft_block_size=4, block_share=True),
    *case("wide", "OFTConfig", oft_block_size=4, coft=True, eps=0.5),
    *case("linear, wide, conv", "BOFTConfig", boft_block_size=2),
    *case("linear, wide, conv", "HRAConfig", r=3),
    *case("linear, conv", "HRAConfig", r=2, apply_GS=True),
    *case("linear, square, conv, small conv, line, cube, embedding", "HiraConfig", r=2),
    *case("conv1d, square conv1d", "HiraConfig", r=2, fan_in_fan_out=True),
    *case("linear, conv, embedding", "HiraConfig", r=3, rank_pattern={"dense": 2}),
    *case("norm, linear", "LNTuningConfig"),
    *case("linear, wide", "C3AConfig", block_size=2),
    *case("linear, wide, square", "ShiraConfig", r=1),
    *case("linear", "ShiraConfig", r=1, random_seed=3),
    *case("linear, wide, square", "MissConfig", r=3),
    *case("linear", "MissConfig", r=3, mini_r=2, init_weights="mini"),
    *case("linear, wide", "MissConfig", r=2, init_weights="bat"),
    *case("linear, wide", "DeloraConfig", r=2),
    *case("linear", "DeloraConfig", r=1, rank_pattern={"dense": 3}, lambda_pattern={"dense": 2}),
    *case("linear, wide, conv1d", "VBLoRAConfig", r=2, num_vectors=5, vector_length=2, topk=2),
    *case("linear", "VBLoRAConfig", r=2, num_vectors=5, vector_length=2, topk=3, save_only_topk_weights=True),
    *case("linear, wide, square, conv1d", "RandLoraConfig", r=2),
    *case("linear, wide", "RandLoraConfig", r=4, save_projection=False),
    *case("wide", "RandLoraConfig", r=2, save_projection=False, sparse=True),
    *case("wide", "RandLoraConfig", r=4, save_projection=False, very_sparse=True, projection_prng_key=3),
    *case("linear, wide, conv1d", "GraloraConfig", r=2, gralora_k=2, alpha=3),
    *case("wide", "GraloraConfig", r=2, gralora_k=1, alpha=3, hybrid_r=1),
    *case("wide", "GraloraConfig", r=4, gralora_k=2, alpha=3, hybrid_r=1),
    *case("linear", "RoadConfig", group_size=2),
    *case("linear", "RoadConfig", group_size=6),
    *case("linear", "RoadConfig", group_size=6, variant="road_2"),
    *case("linear", "RoadConfig", group_size=2, variant="road_4"),
    *case("linear, wide, square, conv1d, odd", "WaveFTConfig", n_frequency=6),
    *case("linear", "WaveFTConfig", n_frequency=6, use_idwt=False, random_loc_seed=-1),
    *case("linear", "WaveFTConfig", n_frequency=6, n_frequency_pattern={"dense": 3}),
    *case("linear", "WaveFTConfig", n_frequency=6, proportional_parameters=True),
    *case("linear, wide, conv1d", "UniLoraConfig", r=2, theta_d_length=8, save_indices=True),
    *case("linear", "GloraConfig", r=2),
    *case("linear", "GloraConfig", r=2, config_A_B="vector"),
    *case("linear", "GloraConfig", r=2, config_A_B="constant"),
    *case("linear", "SupertuningConfig", sparsity=0.5),
    *case("linear, wide", "SupertuningConfig", sparsity=0.5, r=2, lora_alpha=3),
    *case("linear, wide, square", "VeraConfig", r=2),
    *case("linear, wide, square", "VeraConfig", r=2, save_projection=False, projection_prng_key=7),
]


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        ("VeraConfig", {"projection_prng_key": 7}),
        ("RandLoraConfig", {"projection_prng_key": 7}),
        ("RandLoraConfig", {"sparse": True}),
        ("RandLoraConfig", {"very_sparse": True}),
    ],
)
def test_random_factors_are_drawn_for_the_largest_sides(config: str, settings: dict[str, Any], tmp_path: Path) -> None:
    layers = {"model.layers.0.dense": nn.Linear(40, 9), "model.layers.1.dense": nn.Linear(11, 30)}
    expected = write(tmp_path, config, settings | {"r": 4, "save_projection": False}, layers)
    updates = ls.load(tmp_path / "adapter", tmp_path / "base").updates()
    assert set(updates) == set(expected) == set(layers)
    for module, update in updates.items():
        assert np.linalg.norm(update.dense() - expected[module]) < 1e-6 * np.linalg.norm(expected[module])


@pytest.mark.parametrize(("layer", "config", "settings"), CASES)
def test_update_equals_the_merge_by_peft(layer: str, config: str, settings: dict[str, Any], tmp_path: Path) -> None:
    expected = write(tmp_path, config, settings, {M: LAYERS[layer](), "model.layers.1.other": nn.Linear(5, 3)})[M]
    adapter = ls.load(tmp_path / "adapter", tmp_path / "base")
    assert list(adapter.updates()) == [M]
    update, size = adapter.updates()[M], np.linalg.norm(expected)
    assert size > 0
    assert np.linalg.norm(update.dense() - expected) < 1e-6 * size
    assert update.norm() == pytest.approx(size, rel=1e-6)
    sigma = np.linalg.svd(expected, compute_uv=False)
    found = update.singular_values()
    assert found == pytest.approx(sigma[: len(found)], abs=1e-6 * sigma[0])
    assert sigma[len(found) :] == pytest.approx(0, abs=1e-6 * sigma[0])
    assert adapter.ranks()[M] >= np.count_nonzero(sigma > 1e-6 * sigma[0])
    assert adapter.summary()["relative_update"].notna().all()
    application = apply_adapter(adapter.files, adapter.base, "peft")
    assert application.findings == ()
    assert application.applied == 1
    # A base whose shapes are needed, but not its values, is optional for the others.
    if not adapter.files.needs_base:
        assert (ls.load(tmp_path / "adapter").updates()[M].dense() == update.dense()).all()


COUNTED = [
    each
    for each in CASES
    # Their files lack values that were trained: the bias of an output, and the logits that were not among the largest.
    if each.values[1] != "LNTuningConfig" and "save_only_topk_weights" not in each.values[2]
]


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT, as above
@pytest.mark.parametrize(("layer", "config", "settings"), COUNTED)
def test_number_of_parameters_is_that_of_peft(
    layer: str, config: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    chosen = getattr(peft, config)(target_modules=["dense"], **settings)
    layers = {M: LAYERS[layer]()}
    write_with_peft(tmp_path / "adapter", chosen, layers, tmp_path / "base")
    tuned = peft.get_peft_model(nested({M: LAYERS[layer]()}), chosen)
    trained = sum(each.numel() for each in tuned.parameters() if each.requires_grad)
    assert ls.load(tmp_path / "adapter", tmp_path / "base").meta.parameters.trained == trained


@pytest.mark.parametrize(
    ("config", "settings", "shown"),
    [
        ("LoHaConfig", {"r": 1, "alpha": 3}, "LoHa, rank 1, scale 3 (alpha 3)"),
        ("IA3Config", {"feedforward_modules": []}, "IA3, rank 4, scale 1"),
        ("SupertuningConfig", {"sparsity": 0.5}, "SuperTuning, rank 4, scale 1"),
        ("RandLoraConfig", {"r": 2, "randlora_alpha": 6}, "RandLoRA, rank 4, scale 3 (alpha 6)"),
    ],
)
def test_inspect_shows_the_alpha_that_the_kind_has(
    config: str, settings: dict[str, Any], shown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, config, settings)
    assert main(["inspect", str(tmp_path / "adapter"), "--base", str(tmp_path / "base")]) == 0
    assert f" {shown}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "settings", "kind"),
    [
        ("IA3Config", {"feedforward_modules": []}, "IA3"),
        ("OFTConfig", {"oft_block_size": 2}, "OFT"),
        ("HRAConfig", {"r": 2}, "HRA"),
        ("LNTuningConfig", {}, "LN_TUNING"),
    ],
)
def test_change_of_the_base_requires_the_base(
    config: str, settings: dict[str, Any], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = getattr(peft, config)(target_modules=["dense"], **settings)
    write_with_peft(tmp_path, chosen, {M: nn.Linear(4, 6)})
    assert main(["inspect", str(tmp_path)]) == 2
    line = f"{kind} changes the weights of its base: pass its base model, as base= or --base DIR"
    assert capsys.readouterr().err == f"lorascope: cannot read {tmp_path}: {line}\n"


def spoiled(
    config: str,
    settings: dict[str, Any],
    message: str,
    changed: dict[str, Any] | None = None,
    tensors: dict[str, Any] | None = None,
) -> tuple[Any, ...]:
    """Return an adapter, its error and what spoils it: changed settings, and tensors of a shape or full of a number."""
    return config, settings, message, changed or {}, tensors or {}


def outside(config: str, settings: dict[str, Any], name: str) -> tuple[Any, ...]:
    return spoiled(
        config, settings, rf"{name} of {M} must be integers from 0 to below [\d and]+, got 99$", tensors={name: 99}
    )


RANK, BLOCK, PAIR = {"r": 2}, {"oft_block_size": 2}, {"group_size": 2}
BANK = {"r": 2, "num_vectors": 5, "vector_length": 2}
SPOILED = [
    spoiled("LoHaConfig", RANK, r"hada_w1_a of .*dense must have shape \(6, 3\), got \(6, 2\)", changed={"r": 3}),
    spoiled("LoHaConfig", RANK, r"hada_w2_b of .* shape \(2, 4\), got \(2, 5\)", tensors={"hada_w2_b": (2, 5)}),
    spoiled("LoKrConfig", {"r": 9}, r"lokr_w1 of .* shape \(6, b\), got \(6,\)", tensors={"lokr_w1": (6,)}),
    spoiled("HRAConfig", RANK, "must fit its base weight, 6 x 4, got 6 x 5", tensors={"hra_u": (5, 2)}),
    spoiled("OFTConfig", BLOCK, r"oft_R of .* got shape \(2, 2\)", tensors={"oft_R.weight": (2, 2)}),
    spoiled("OFTConfig", BLOCK, "num_cayley_neumann_terms", changed={"num_cayley_neumann_terms": 10**9}),
    spoiled("RoadConfig", PAIR, "group_size must be even and divide 6, .* got 4", changed={"group_size": 4}),
    spoiled("RoadConfig", PAIR, "road_3", changed={"variant": "road_3"}),
    spoiled("VBLoRAConfig", BANK, "topk must be <= 5, .* got 6", changed={"topk": 6}),
    spoiled(
        "WaveFTConfig",
        {"n_frequency": 4},
        "1 to 6 x 4 coefficients",
        changed={"n_frequency": 25},
        tensors={"waveft_spectrum": (25,)},
    ),
    spoiled(
        "GraloraConfig", RANK | {"gralora_k": 2}, "r must be a multiple of gralora_k, got 3 and 2", changed={"r": 3}
    ),
    spoiled("DeloraConfig", RANK, "rank_pattern .* must be a regular expression", changed={"rank_pattern": {"(": 3}}),
    spoiled("C3AConfig", {"block_size": 2}, "must have <= .* 65536 x 65536", tensors={"c3a_kernel": (1, 1, 2**16)}),
    spoiled("GloraConfig", RANK, r"dense has no glora_A\.X", changed={"config_A_B": "constant"}),
    outside("ShiraConfig", {"r": 1}, "shira_indices"),
    outside("SupertuningConfig", {"sparsity": 0.5}, "supertuning_indices"),
    outside("UniLoraConfig", {"r": 2, "theta_d_length": 8, "save_indices": True}, "unilora_indices_B"),
    outside("VBLoRAConfig", BANK | {"save_only_topk_weights": True}, "vblora_logits_A_topk_indices"),
]


@pytest.mark.parametrize(("config", "settings", "message", "changed", "replaced"), SPOILED)
def test_spoiled_adapter_is_refused_in_one_line(
    config: str,
    settings: dict[str, Any],
    message: str,
    changed: dict[str, Any],
    replaced: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(tmp_path, config, settings)
    file, weights = tmp_path / "adapter" / "adapter_config.json", tmp_path / "adapter" / "adapter_model.safetensors"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changed), encoding="utf-8")
    tensors = load_file(weights)
    for name, value in replaced.items():
        key = f"base_model.model.{M}.{name}"
        assert key in tensors
        is_shape = isinstance(value, tuple)
        tensors[key] = np.ones(value, np.float32) if is_shape else np.full_like(tensors[key], value)
    weights.write_bytes(save(tensors))
    assert main(["inspect", str(tmp_path / "adapter"), "--base", str(tmp_path / "base")]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert re.search(message, line)


def test_shira_draws_its_indices_if_they_are_missing(tmp_path: Path) -> None:
    config = peft.ShiraConfig(r=1, target_modules=["dense"], random_seed=3)
    expected = write_with_peft(tmp_path / "adapter", config, {M: nn.Linear(4, 6)}, tmp_path / "base")[M]
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(save({k: v for k, v in load_file(weights).items() if "indices" not in k}))
    assert ls.load(tmp_path / "adapter", tmp_path / "base").updates()[M].dense() == pytest.approx(expected, abs=1e-6)


def test_reading_imports_neither_torch_nor_peft(tmp_path: Path) -> None:
    config = peft.IA3Config(feedforward_modules=[], target_modules=["dense"])
    write_with_peft(tmp_path / "adapter", config, {M: nn.Linear(4, 6)}, tmp_path / "base")
    code = (
        "import sys, lorascope as ls; summary = ls.load(*sys.argv[1:]).summary(); "
        "assert summary['update_norm'].gt(0).all(); sys.exit(not {'torch', 'peft'}.isdisjoint(sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "adapter", tmp_path / "base"], check=True)


def test_every_type_of_peft_is_read_or_described() -> None:
    def known(kind: str) -> bool:
        config = {"peft_type": kind}
        return find_reader(config, ()) is not None or find_sentence(config, ()) is not None

    assert all(known(kind.value) for kind in peft.PeftType)
    assert all(map(known, KINDS))
