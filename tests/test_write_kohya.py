"""Writer of files as kohya's trainer writes them: files of LyCORIS are written again bit by bit, and read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_bits import as_bfloat16, bits, draw, peft_folder, read_header, same_updates, stored_as
from safetensors.numpy import load_file, save_file
from tolerance import rounding

import lorascope as ls
from lorascope.cli.main import main
from lorascope.formats.image_names import to_authors

FIXTURES = Path(__file__).parent / "fixtures"
LYCORIS, DIFFUSERS = FIXTURES / "lycoris", FIXTURES / "diffusers"
NAMES = json.loads((FIXTURES / "unet_names.json").read_text(encoding="utf-8"))
Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
PAIR = (draw(1, 6, 2), draw(2, 2, 5))


def write(folder: Path, modules: Any = None, out: str = "out.safetensors", **options: Any) -> Path:
    component = options.pop("component", None)
    adapter = ls.load(peft_folder(folder / f"peft-{out}", modules or {Q: PAIR}, **options))
    return ls.export.convert(adapter, folder / out, "kohya", component=component)


@pytest.mark.parametrize("name", ["locon", "dora_output"])
@pytest.mark.parametrize("through_peft", [False, True])
def test_file_of_lycoris_is_written_again_bit_by_bit(name: str, through_peft: bool, tmp_path: Path) -> None:
    """With the base, the names have dots again, so the file can pass through PEFT's form."""
    source = ls.load(LYCORIS / f"{name}.safetensors", LYCORIS / "base")
    if through_peft:
        source = ls.load(ls.export.convert(source, tmp_path / "peft", "peft"))
    out = ls.export.convert(source, tmp_path / "out.safetensors", "kohya")
    assert bits(out) == bits(LYCORIS / f"{name}.safetensors")


def test_flat_names_need_no_base(tmp_path: Path) -> None:
    out = ls.export.convert(ls.load(LYCORIS / "locon.safetensors"), tmp_path / "out.safetensors", "kohya")
    assert bits(out) == bits(LYCORIS / "locon.safetensors")


@pytest.mark.parametrize("name", ["metadata", "dora"])
def test_file_of_diffusers_returns_unchanged(name: str, tmp_path: Path) -> None:
    source = DIFFUSERS / f"{name}.safetensors"
    between = ls.export.convert(ls.load(source), tmp_path / "between.safetensors", "kohya")
    read = ls.load(between, DIFFUSERS / "base")
    assert same_updates(read, ls.load(source, DIFFUSERS / "base"))
    assert bits(ls.export.convert(read, tmp_path / "back.safetensors", "diffusers")) == bits(source)


def test_each_module_has_its_alpha(tmp_path: Path) -> None:
    """Worked: rank 2 and alpha 3, or rank 3 and alpha 8; rsLoRA of rank 6 has no alpha in float32."""
    modules = {Q: PAIR, Q.replace("to_q", "to_k"): (draw(1, 6, 3), draw(2, 3, 5))}
    patterns = {"rank_pattern": {"to_k": 3}, "alpha_pattern": {"to_k": 8}}
    out = write(tmp_path, modules, **patterns)
    flat = f"lora_unet_{Q.replace('.', '_')}"
    tensors = load_file(out)
    assert (tensors[f"{flat}.alpha"], tensors[f"{flat[:-1]}k.alpha"]) == (3, 8)
    assert read_header(out) == {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "Dynamic",
        "ss_network_alpha": "Dynamic",
        "ss_sd_model_name": "org/base",
    }
    rooted = write(tmp_path, {Q: (draw(1, 6, 6), draw(2, 6, 5))}, "r.safetensors", r=6, lora_alpha=16, use_rslora=True)
    alpha = load_file(rooted)[f"{flat}.alpha"]
    assert alpha.dtype == np.float64
    assert alpha / 6 == pytest.approx(16 / np.sqrt(6), rel=rounding(torch.float64, depth=3))


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_dtypes_are_kept(dtype: str, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a", {Q: PAIR})
    stored_as(folder / "adapter_model.safetensors", dtype)
    out = bits(ls.export.convert(ls.load(folder), tmp_path / "out.safetensors", "kohya"))
    before = bits(folder / "adapter_model.safetensors")
    flat = f"lora_unet_{Q.replace('.', '_')}"
    assert out[f"{flat}.lora_up.weight"] == before[f"base_model.model.{Q}.lora_B.weight"]
    assert out[f"{flat}.lora_down.weight"] == before[f"base_model.model.{Q}.lora_A.weight"]
    assert out[f"{flat}.alpha"][0] == "F32"
    if dtype == "BF16":
        stored = ls.load(tmp_path / "out.safetensors").updates()[flat].low_rank.B
        assert np.array_equal(stored, as_bfloat16(PAIR[0]))


def test_sdxl_has_the_names_of_its_authors(tmp_path: Path) -> None:
    """A second transformer block shows SDXL; the names follow diffusers' conversion of its checkpoints."""
    for authors, name in NAMES.items():
        assert to_authors(name.replace(".", "_")) == authors.replace(".", "_")
    attention = "down_blocks.2.attentions.1.transformer_blocks.1.attn2.to_k"
    modules = {attention: PAIR, "mid_block.resnets.1.time_emb_proj": PAIR, "time_embedding.linear_1": PAIR}
    found = {name.rpartition(".")[0] for name in load_file(write(tmp_path, modules)) if name.endswith(".alpha")}
    names = ("input_blocks_8_1_transformer_blocks_1_attn2_to_k", "middle_block_2_emb_layers_1", "time_embed_0")
    assert found == {f"lora_unet_{name}" for name in names}


FC, T5 = "text_model.encoder.layers.0.mlp.fc1", "encoder.block.0.layer.0.SelfAttention.q"
PREFIXES = {
    "Stable Diffusion": ({"unet": Q, "text_encoder": FC}, {"lora_unet", "lora_te"}),
    "two CLIPs": ({"text_encoder": FC, "text_encoder_2": FC}, {"lora_te1", "lora_te2"}),
    "Flux": ({"transformer": "transformer_blocks.0.attn.to_q", "text_encoder": FC, "text_encoder_2": T5},
             {"lora_transformer", "lora_te1", "lora_te3"}),
    "Cascade": ({"prior": "down_blocks.0.0.q", "text_encoder": FC}, {"lora_prior_unet", "lora_prior_te"}),
}  # fmt: skip


@pytest.mark.parametrize("name", PREFIXES)
def test_components_have_their_prefixes(name: str, tmp_path: Path) -> None:
    modules, expected = PREFIXES[name]
    tensors = {f"{component}.{module}.lora_{side}.weight": each
               for component, module in modules.items() for side, each in zip("BA", PAIR, strict=True)}  # fmt: skip
    save_file(tensors, tmp_path / "in.safetensors")
    out = ls.export.convert(ls.load(tmp_path / "in.safetensors"), tmp_path / "out.safetensors", "kohya")
    flat = {f"_{module.replace('.', '_')}" for module in modules.values()}
    keys = {key.rpartition(".alpha")[0] for key in load_file(out) if key.endswith(".alpha")}
    assert {key.removesuffix(end) for key in keys for end in flat if key.endswith(end)} == expected


def test_component_of_a_text_encoder_is_given(tmp_path: Path) -> None:
    out = write(tmp_path, {FC: PAIR}, component="text_encoder_2")
    assert f"lora_te2_{FC.replace('.', '_')}.alpha" in load_file(out)


REFUSED = {
    "scale 0": ({"modules": {Q: PAIR}, "lora_alpha": 0}, "to_q has scale 0, and alpha 0 means the rank there"),
    "one name": ({"modules": {"down_blocks.0.a.b_c": PAIR, "down_blocks.0.a_b.c": PAIR}},
                 "would both be lora_unet_down_blocks_0_a_b_c"),
    "ending": ({"out": "out.bin"}, r"the file must end in .safetensors, got .*out.bin"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_lost_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as raised:
        write(tmp_path, **options)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dora_input", "is not stored as the factors A and B"),
        ("loha", r"\(LoHa\) is not stored as the factors A and B"),
        ("locon_tucker", "is not stored as the factors A and B"),
    ],
)
def test_other_algorithms_are_refused(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        ls.export.convert(ls.load(LYCORIS / f"{name}.safetensors"), tmp_path / "out.safetensors", "kohya")


def test_component_without_a_prefix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="belongs to transformer_2, which has no prefix there"):
        write(tmp_path, {"transformer_blocks.0.q": PAIR}, component="transformer_2")
    named = ls.load(DIFFUSERS / "metadata.safetensors")
    with pytest.raises(ValueError, match="its modules have names of components, so --component text_encoder is not"):
        ls.export.convert(named, tmp_path / "out.safetensors", "kohya", component="text_encoder")


def test_cut_equals_the_peft_folder(tmp_path: Path) -> None:
    source = ls.load(LYCORIS / "locon.safetensors", LYCORIS / "base")
    cut = ls.export.convert(source, tmp_path / "cut.safetensors", "kohya", budget=0.75)
    folder = ls.export.convert(source, tmp_path / "cut", "peft", budget=0.75)
    assert same_updates(ls.load(cut, LYCORIS / "base"), ls.load(folder))


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = str(LYCORIS / "locon.safetensors"), tmp_path / "out.safetensors"
    assert main(["export", source, "--kohya", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert main(["export", source, "--kohya", str(out)]) == 2
    assert f"cannot create {out}: it exists" in capsys.readouterr().err
    mixed = ["export", source, str(DIFFUSERS / "metadata.safetensors"), "--kohya", str(tmp_path / "sum.safetensors")]
    assert main(mixed) == 2
    assert "their modules have different names; convert one first" in capsys.readouterr().err
