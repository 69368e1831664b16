"""Writer of files as kohya's trainer writes them: files of LyCORIS are written again bit by bit, and read back."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_bits import as_bfloat16, bits, draw, peft_folder, read_header, same_updates, stored_as
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as torch_load_file
from tolerance import rounding

import lorascope as ls
from lorascope.cli.main import main
from lorascope.diagnosis.runtimes import apply_adapter
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


@pytest.fixture
def even(tmp_path: Path) -> Path:
    """File of LyCORIS with the modules of one alpha."""
    tensors = load_file(LYCORIS / "locon.safetensors")
    modules = [name.removesuffix("alpha") for name, value in tensors.items() if name.endswith(".alpha") and value == 3]
    file = tmp_path / "even.safetensors"
    save_file({name: array for name, array in tensors.items() if name.startswith(tuple(modules))}, file)
    return file


@pytest.mark.parametrize("through_peft", [False, True])
def test_file_of_lycoris_with_one_alpha_is_written_again_bit_by_bit(
    through_peft: bool, even: Path, tmp_path: Path
) -> None:
    """With the base, the names have dots again, so the file can pass through PEFT's form."""
    source = ls.load(even, LYCORIS / "base")
    if through_peft:
        source = ls.load(ls.export.convert(source, tmp_path / "peft", "peft"))
    out = ls.export.convert(source, tmp_path / "out.safetensors", "kohya")
    assert bits(out) == bits(even)


def test_flat_names_need_no_base(even: Path, tmp_path: Path) -> None:
    out = ls.export.convert(ls.load(even), tmp_path / "out.safetensors", "kohya")
    assert bits(out) == bits(even)


@pytest.mark.parametrize("source", [LYCORIS / "locon.safetensors", DIFFUSERS / "metadata.safetensors"])
def test_file_of_several_alphas_has_the_same_updates(source: Path, tmp_path: Path) -> None:
    base = source.parent / "base"
    before = ls.load(source, base).updates()
    out = ls.export.convert(ls.load(source), tmp_path / "out.safetensors", "kohya")
    after = ls.load(out, base).updates()
    assert after.keys() == before.keys()
    for module, update in before.items():
        close = rounding(torch.float32, depth=3)
        assert after[module].dense() == pytest.approx(update.dense(), rel=close, abs=close * update.norm())


@pytest.mark.parametrize("source", [LYCORIS / "dora_output.safetensors", DIFFUSERS / "dora.safetensors"])
def test_dora_is_refused(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.safetensors"
    assert main(["export", str(source), "--base", str(source.parent / "base"), "--kohya", str(out)]) == 2
    reason = "as kohya: diffusers drops the magnitudes of DoRA in such files; write it with --diffusers"
    assert capsys.readouterr().err == f"lorascope: cannot write adapter {source.name} {reason}\n"
    assert not out.exists()


ATTENTION = re.compile(r"_(to_q|to_k|to_v|to_out_0|[qkv]_proj|out_proj)$")


def applied_by_diffusers(file: Path) -> dict[str, np.ndarray]:
    """Return the updates that diffusers 0.42 applies of a file for a UNet and text encoders.

    Its converter loses the names of attention modules in the alphas. If the alphas of a component differ, these modules
    have the most frequent one.
    """
    tensors = {name: tensor.double().numpy() for name, tensor in torch_load_file(file).items()}
    modules = [name.removesuffix(".lora_down.weight") for name in tensors if name.endswith(".lora_down.weight")]
    updates = {}
    for module in modules:
        component = module.split("_")[1]
        alphas = {name: float(tensors[f"{name}.alpha"]) for name in modules if name.split("_")[1] == component}
        alpha = alphas[module]
        if ATTENTION.search(module):
            alpha = Counter(alphas.values()).most_common(1)[0][0]
        up, down = tensors[f"{module}.lora_up.weight"], tensors[f"{module}.lora_down.weight"]
        updates[module] = alpha / len(down) * up.reshape(len(up), -1) @ down.reshape(len(down), -1)
    return updates


UNEVEN: dict[str, dict[str, Any]] = {
    "alphas": {"alpha_pattern": {"to_k": 6, "to_v": 16}},
    "ranks": {"rank_pattern": {"to_k": 3, "to_v": 4}},
    "rsLoRA of several ranks": {"rank_pattern": {"to_k": 3, "to_v": 4}, "use_rslora": True},
    "one scale": {"rank_pattern": {"to_k": 3, "to_v": 4}, "alpha_pattern": {"to_k": 4.5, "to_v": 6}},
    "budget": {"budget": 0.6},
}


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("case", UNEVEN)
def test_diffusers_applies_the_update_of_every_module(case: str, dtype: str, tmp_path: Path) -> None:
    options = dict(UNEVEN[case])
    budget, ranks = options.pop("budget", None), {"to_k": 3, "to_v": 4} if "rank_pattern" in options else {}
    modules = {}
    for role in "to_q", "to_k", "to_v", "to_out.0":
        rank = ranks.get(role, 2)
        modules[Q.replace("to_q", role)] = draw(1, 6, rank), draw(len(role), rank, 5)
    modules[f"{Q.removesuffix('attn1.to_q')}ff.net.2"] = draw(3, 6, 2), draw(4, 2, 5)
    folder = peft_folder(tmp_path / "peft", modules, **options)
    stored_as(folder / "adapter_model.safetensors", dtype)
    adapter = ls.load(folder)
    out = ls.export.convert(adapter, tmp_path / "out.safetensors", "kohya", budget=budget)
    applied = applied_by_diffusers(out)
    expected = adapter.updates()
    if budget:
        expected = ls.load(ls.export.convert(adapter, tmp_path / "cut", "peft", budget=budget)).updates()
    assert applied.keys() == {f"lora_unet_{module.replace('.', '_')}" for module in expected}
    for module, update in expected.items():
        exact = update.dense()
        error = np.linalg.norm(applied[f"lora_unet_{module.replace('.', '_')}"] - exact) / np.linalg.norm(exact)
        assert error < 1e-6, module  # a folded factor is rounded to float32
    (alpha,) = {float(value) for name, value in torch_load_file(out).items() if name.endswith(".alpha")}
    assert read_header(out)["ss_network_alpha"] == f"{alpha:g}"
    assert apply_adapter(ls.load(out).files, None, "diffusers").findings == ()


def test_other_alphas_are_multiplied_into_the_factors(tmp_path: Path) -> None:
    """Worked: rank 2 and alpha 3, or rank 3 and alpha 8; rsLoRA of rank 6 has no alpha in float32."""
    modules = {Q: PAIR, Q.replace("to_q", "to_k"): (draw(1, 6, 3), draw(2, 3, 5))}
    patterns = {"rank_pattern": {"to_k": 3}, "alpha_pattern": {"to_k": 8}}
    out = write(tmp_path, modules, **patterns)
    flat = f"lora_unet_{Q.replace('.', '_')}"
    tensors = load_file(out)
    assert (tensors[f"{flat}.alpha"], tensors[f"{flat[:-1]}k.alpha"]) == (3, 3)
    assert np.array_equal(tensors[f"{flat}.lora_up.weight"], PAIR[0])
    assert np.array_equal(
        tensors[f"{flat[:-1]}k.lora_up.weight"], (draw(1, 6, 3).astype(float) * (8 / 3)).astype(np.float32)
    )
    assert read_header(out) == {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "Dynamic",
        "ss_network_alpha": "3",
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


def test_errors_name_the_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in (
        ["--rank-pattern"],
        ["--kohya", str(tmp_path / "out.safetensors")],
        ["--peft", str(tmp_path / "out")],
    ):
        assert main(["export", str(LYCORIS / "full.safetensors"), *options]) == 2
        error = capsys.readouterr().err
        assert " adapter full.safetensors" in error
        assert " run " not in error


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
