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
]


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
