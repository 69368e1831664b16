"""Names of modules in adapters of image models, and the modules of a base that they stand for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

import lorascope as ls
from lorascope.formats.image_names import BaseNames

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = json.loads((FIXTURES / "unet_names.json").read_text(encoding="utf-8"))
FLUX = json.loads((FIXTURES / "flux_names.json").read_text(encoding="utf-8"))
"""Modules of diffusers: module of the authors, and its first and last row."""


@pytest.mark.parametrize("component", ["", "unet."])
def test_unet_of_diffusers_has_the_modules_of_the_authors(component: str) -> None:
    names = BaseNames(f"{component}{name}" for name in NAMES.values())
    for original, name in NAMES.items():
        assert names.find(f"lora_unet_{original.replace('.', '_')}") == (f"{component}{name}",)
        assert names.find(f"diffusion_model.{original}") == (f"{component}{name}",)
        assert names.find(f"lora_unet_{name.replace('.', '_')}") == (f"{component}{name}",)


def test_unet_of_the_authors_has_its_own_modules() -> None:
    names = BaseNames(f"model.diffusion_model.{name}" for name in NAMES)
    for original in NAMES:
        assert names.find(f"lora_unet_{original.replace('.', '_')}") == (f"model.diffusion_model.{original}",)


def test_text_encoders_follow_the_prefix() -> None:
    names = BaseNames(f"{part}.text_model.fc_1" for part in ("text_encoder", "text_encoder_2"))
    assert names.find("lora_te_text_model_fc_1") == ("text_encoder.text_model.fc_1",)
    assert names.find("lora_te2_text_model_fc_1") == ("text_encoder_2.text_model.fc_1",)
    assert names.find("lora_te3_text_model_fc_1") == ()


def test_names_with_several_modules_or_none_are_not_found() -> None:
    names = BaseNames(["a.b_c", "a_b.c", "x.y"])
    assert names.find("lora_unet_a_b_c") == ()
    assert names.find("lora_unet_z") == ()
    assert names.find("unet.z") == ()
    assert names.find("x.y") == ("x.y",)


@pytest.mark.parametrize("stem", ["lora_unet_{flat}", "diffusion_model.{name}"])
def test_flux_of_diffusers_has_the_modules_of_the_authors(stem: str) -> None:
    names = BaseNames(f"transformer.{name}" for name in FLUX)
    for original in {each for each, _, _ in FLUX.values()}:
        rows = {start: f"transformer.{name}" for name, (each, start, _) in FLUX.items() if each == original}
        stored = stem.format(name=original, flat=original.replace(".", "_"))
        assert names.find(stored) == tuple(rows[start] for start in sorted(rows))
    assert names.find(stem.format(name="final_layer.x", flat="final_layer_x")) == ()


def test_fused_rows_are_the_updates_of_their_modules(tmp_path: Path) -> None:
    module, modules = "lora_unet_single_blocks_0_linear1", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    generator = np.random.default_rng(0)
    up, down = generator.standard_normal((3 * 4 + 8, 2)), generator.standard_normal((2, 5))
    tensors = {f"{module}.lora_up.weight": up, f"{module}.lora_down.weight": down}
    (tmp_path / "style.safetensors").write_bytes(save(tensors))
    weights = {
        f"single_transformer_blocks.0.{name}.weight": generator.standard_normal((8 if name == "proj_mlp" else 4, 5))
        for name in modules
    }
    (tmp_path / "base.safetensors").write_bytes(save(weights))
    adapter = ls.load(tmp_path / "style.safetensors", tmp_path / "base.safetensors")
    updates = adapter.updates()
    assert list(updates) == [f"single_transformer_blocks.0.{name}" for name in modules]
    assert np.vstack([update.dense() for update in updates.values()]) == pytest.approx(up @ down)
    assert adapter.meta.parameters.trained == up.size + down.size
    assert adapter.modules["role"].to_list() == ["q", "k", "v", "ffn_in"]
    expected = [
        np.linalg.norm(weight + update.dense())
        for weight, update in zip(weights.values(), updates.values(), strict=True)
    ]
    assert adapter.summary(all=True)["weight_norm"].to_list() == pytest.approx(expected)
    del weights["single_transformer_blocks.0.proj_mlp.weight"]
    (tmp_path / "base.safetensors").write_bytes(save(weights | {"single_transformer_blocks.0.proj_mlp.weight": down}))
    with pytest.raises(ValueError, match="must fit its base weight, 14 x 5, got 20 x 5"):
        ls.load(tmp_path / "style.safetensors", tmp_path / "base.safetensors")


def test_last_modulation_of_flux_has_its_halves_swapped(tmp_path: Path) -> None:
    """The authors store shift, then scale; diffusers stores scale, then shift."""
    generator = np.random.default_rng(0)
    up, down, weight = (generator.standard_normal(shape) for shape in ((8, 2), (2, 5), (8, 5)))
    shift, scale = np.split(up @ down, 2)
    module = "lora_unet_final_layer_adaLN_modulation_1"
    (tmp_path / "base.safetensors").write_bytes(save({"norm_out.linear.weight": weight}))
    for tensors in (
        {f"{module}.lora_up.weight": up, f"{module}.lora_down.weight": down},
        {f"{module}.diff": up @ down},
    ):
        (tmp_path / "style.safetensors").write_bytes(save(tensors))
        adapter = ls.load(tmp_path / "style.safetensors", tmp_path / "base.safetensors")
        assert list(adapter.updates()) == ["norm_out.linear"]
        change = np.vstack([scale, shift])
        assert adapter.updates()["norm_out.linear"].dense() == pytest.approx(change)
        assert adapter.summary(all=True)["weight_norm"].item() == pytest.approx(np.linalg.norm(weight + change))
    assert ls.load(tmp_path / "style.safetensors").updates()[module].dense() == pytest.approx(up @ down)
