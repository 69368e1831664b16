"""PEFT's types of adapters other than LoRA, on every kind of layer, against the merge by PEFT itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
from peft_oracle import write_with_peft
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorascope as ls

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


CASES = [
    *case("linear, conv, small conv, line", "LoHaConfig", r=1, alpha=3),
    *case("linear, conv", "LoHaConfig", r=3, alpha=1),
    *case("conv, small conv, line", "LoHaConfig", r=2, use_effective_conv2d=True),
    *case("linear", "LoHaConfig", r=1, rank_pattern={"dense": 2}, alpha_pattern={"dense": 5}),
    *case("linear, wide, conv, small conv, line", "LoKrConfig", r=2, alpha=3),
    *case("linear, wide", "LoKrConfig", r=1, alpha=3, decompose_both=True, decompose_factor=3),
    *case("wide", "LoKrConfig", r=1, alpha=3, decompose_factor=2),
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


@pytest.mark.parametrize("settings", [{"projection_prng_key": 7}, {"sparse": True}, {"very_sparse": True}])
@pytest.mark.parametrize("config", ["VeraConfig", "RandLoraConfig"])
def test_random_factors_are_drawn_for_the_largest_sides(config: str, settings: dict[str, Any], tmp_path: Path) -> None:
    if config == "VeraConfig" and "projection_prng_key" not in settings:
        return
    layers = {"model.layers.0.dense": nn.Linear(40, 9), "model.layers.1.dense": nn.Linear(11, 30)}
    chosen = getattr(peft, config)(target_modules=["dense"], r=4, save_projection=False, **settings)
    expected = write_with_peft(tmp_path / "adapter", chosen, layers, tmp_path / "base")
    for module, update in ls.load(tmp_path / "adapter", tmp_path / "base").updates().items():
        assert np.linalg.norm(update.dense() - expected[module]) < 1e-6 * np.linalg.norm(expected[module])


@pytest.mark.parametrize(("layer", "config", "settings"), CASES)
def test_update_equals_the_merge_by_peft(layer: str, config: str, settings: dict[str, Any], tmp_path: Path) -> None:
    chosen = getattr(peft, config)(target_modules=["dense"], **settings)
    layers = {M: LAYERS[layer](), "model.layers.1.other": nn.Linear(5, 3)}
    expected = write_with_peft(tmp_path / "adapter", chosen, layers, tmp_path / "base")[M]
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
    # A base whose shapes are needed, but not its values, is optional for the others.
    if not adapter.files.needs_base:
        assert (ls.load(tmp_path / "adapter").updates()[M].dense() == update.dense()).all()
