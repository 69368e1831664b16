"""Adapters of image models by kohya, LyCORIS and diffusers, compared with the updates that the libraries apply."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_bits import draw
from safetensors.numpy import load_file, save

import lorascope as ls
from lorascope.cli.main import main
from lorascope.diagnosis.inspection import inspect
from lorascope.runs.loading import is_whole_model

LYCORIS = Path(__file__).parent / "fixtures" / "lycoris"
DENSE = load_file(LYCORIS / "dense.safetensors")
ALGORITHMS = sorted({key.split("/")[0] for key in DENSE})
KINDS = {"locon": "LoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr", "full": "Full", "ia3": "IA3"} | {
    "glora": "GLoRA",
    "oft": "OFT",
    "boft": "OFT",
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_lycoris_updates_match_the_library(name: str) -> None:
    adapter = ls.load(LYCORIS / f"{name}.safetensors", LYCORIS / "base")
    assert adapter.files.kind == KINDS[name.split("_")[0]]
    assert {f"{name}/{module}" for module in adapter.updates()} == {key for key in DENSE if key.startswith(f"{name}/")}
    for module, update in adapter.updates().items():
        expected = DENSE[f"{name}/{module}"].astype(np.float64)
        expected = expected.reshape(len(expected), -1)
        assert np.linalg.norm(update.dense() - expected) < 1e-5 * np.linalg.norm(expected)
        sigma = np.linalg.svd(expected, compute_uv=False)
        assert update.singular_values() == pytest.approx(sigma[: len(update.singular_values())], abs=1e-5 * sigma[0])
        assert "dora" in name or update.rank >= np.sum(sigma > 1e-5 * sigma[0])
    summary = adapter.summary(all=True).set_index("module")
    norms = {key.split("/")[1]: np.linalg.norm(DENSE[key]) for key in DENSE if key.startswith(f"{name}/")}
    assert summary["update_norm"].to_dict() == pytest.approx(norms, rel=1e-5)


DIFFUSERS = Path(__file__).parent / "fixtures" / "diffusers"
MERGED = load_file(DIFFUSERS / "dense.safetensors")


@pytest.mark.parametrize("name", ["metadata", "plain", "dora", "bare", "old"])
def test_diffusers_updates_match_the_library(name: str) -> None:
    adapter = ls.load(DIFFUSERS / f"{name}.safetensors", DIFFUSERS / "base")
    assert adapter.files.kind == ("DoRA" if name == "dora" else "LoRA")
    written, prefix = {"old": "plain", "bare": "metadata"}.get(name, name), "" if name == "bare" else "unet."
    expected = {
        key.removeprefix(f"{written}/"): value for key, value in MERGED.items() if key.startswith(f"{written}/")
    }
    assert {module.removeprefix(prefix) for module in adapter.updates()} == expected.keys()
    for module, update in adapter.updates().items():
        dense = expected[module.removeprefix(prefix)].astype(np.float64)
        assert np.linalg.norm(update.dense() - dense.reshape(len(dense), -1)) < 1e-5 * np.linalg.norm(dense)
    assert any("alpha was not kept" in note for note in adapter.files.notes) == (name in ("plain", "old"))


UP, DOWN = draw(1, 6, 2), draw(2, 2, 5)
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
FLAT = BLOCK.replace(".", "_")
SPELLINGS = {
    "kohya": (f"lora_unet_{FLAT}_attn1_to_q", ".lora_up.weight", ".lora_down.weight", ""),
    "text encoder": ("lora_te1_text_model_encoder_layers_0_mlp_fc1", ".lora_up.weight", ".lora_down.weight", ""),
    "Wan-Fun": ("lora_unet__blocks_0_self_attn_q", ".lora_up.weight", ".lora_down.weight", ""),
    "OneTrainer": ("lora_transformer_transformer_blocks_0_attn_to_q", ".lora_up.weight", ".lora_down.weight", ""),
    "OneTrainer, dots": ("transformer.transformer_blocks.0.attn.to_q", ".lora_up.weight", ".lora_down.weight", ""),
    "ComfyUI": ("diffusion_model.double_blocks.0.img_attn.qkv", ".lora_B.weight", ".lora_A.weight", ""),
    "ComfyUI, adapter": ("diffusion_model.blocks.0.x", ".lora_B.default.weight", ".lora_A.default.weight", ""),
    "ComfyUI, encoder": ("text_encoders.t5xxl.encoder.block.0.x", ".lora_B.weight", ".lora_A.weight", ""),
    "DiffSynth": ("double_blocks.0.img_attn.qkv", ".lora_B.weight", ".lora_A.weight", ""),
    "diffusers": (f"unet.{BLOCK}.attn1.to_q", ".lora_B.weight", ".lora_A.weight", ""),
    "diffusers, dots": (f"unet.{BLOCK}.ff.net.2", ".lora.up.weight", ".lora.down.weight", ""),
    "linear layer": ("text_encoder.x.q_proj", ".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight", ""),
    "processor": (
        f"unet.{BLOCK}.attn1.processor.to_q",
        "_lora.up.weight",
        "_lora.down.weight",
        f"unet.{BLOCK}.attn1.to_q",
    ),
    "processor, output": (
        f"unet.{BLOCK}.attn1.processor.to_out",
        "_lora.up.weight",
        "_lora.down.weight",
        f"unet.{BLOCK}.attn1.to_out.0",
    ),
    "PEFT inside": (
        "transformer.base_model.model.blocks.0.x",
        ".lora_B.weight",
        ".lora_A.weight",
        "transformer.blocks.0.x",
    ),
    "XLabs": (
        "double_blocks.0.processor.qkv",
        "_lora1.up.weight",
        "_lora1.down.weight",
        "double_blocks.0.img_attn.qkv",
    ),
}


def store(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(save(tensors, metadata))
    return path


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_name_the_same_update(name: str, tmp_path: Path) -> None:
    stored, up, down, module = SPELLINGS[name]
    tensors = {f"{stored}{up}": UP, f"{stored}{down}": DOWN}
    adapter = ls.load(store(tmp_path / "style.safetensors", tensors))
    assert list(adapter.updates()) == [module or stored]
    assert adapter.updates()[module or stored].dense() == pytest.approx(UP.astype(float) @ DOWN, rel=1e-6)


@pytest.mark.parametrize("name", sorted(SPELLINGS.keys() - {"XLabs"}))  # which has no alpha
def test_spellings_of_alpha_scale_the_update(name: str, tmp_path: Path) -> None:
    stored, up, down, module = SPELLINGS[name]
    tensors = {f"{stored}{up}": UP, f"{stored}{down}": DOWN}
    alpha = {f"{stored}{'_lora' if '_lora.' in up else ''}.alpha": np.array(6, np.float32)}
    scaled = ls.load(store(tmp_path / "style.safetensors", tensors | alpha))
    assert scaled.updates()[module or stored].dense() == pytest.approx(3 * UP.astype(float) @ DOWN, rel=1e-6)
    assert not scaled.files.notes


def lora(module: str, **parts: np.ndarray) -> dict[str, np.ndarray]:
    factors = {f"{module}.lora_up.weight": UP, f"{module}.lora_down.weight": DOWN}
    return factors | {f"{module}.{name}": np.asarray(part) for name, part in parts.items()}


Q = f"lora_unet_{FLAT}_attn1_to_q"


@pytest.mark.parametrize(
    ("tensors", "metadata", "note"),
    [
        (lora(Q, alpha=np.float32(0)), {}, "alpha is 0 in 1 modules"),
        (lora(Q, alpha=np.float32(2)), {"ss_network_args": '{"split_qkv": "True"}'}, "split_qkv"),
        (lora(Q, alpha=np.float32(2)), {"ss_network_alpha": "8"}, "header says alpha 8, the tensors 2: "),
        (lora(Q, dora_scale=np.ones((6, 1), np.float32)), {}, "ComfyUI divides dora_scale"),
    ],
)
def test_traps_are_notes(tensors: dict[str, np.ndarray], metadata: dict[str, str], note: str, tmp_path: Path) -> None:
    adapter = ls.load(store(tmp_path / "style.safetensors", tensors, metadata))
    assert len(adapter.files.notes) == 1
    assert note in adapter.files.notes[0]
    assert adapter.updates()[Q].dense() == pytest.approx(UP.astype(float) @ DOWN, rel=1e-6)


def test_header_that_agrees_or_has_no_number_gives_no_note(tmp_path: Path) -> None:
    for stated in ("2", "2.0", "None", "x"):
        tensors = lora(Q, alpha=np.float32(2))
        assert not ls.load(store(tmp_path / "style.safetensors", tensors, {"ss_network_alpha": stated})).files.notes


def test_direction_without_a_base_is_not_whole(tmp_path: Path) -> None:
    for shape in ((6, 1), (1, 5)):
        update = ls.load(store(tmp_path / "a.safetensors", lora(Q, dora_scale=np.ones(shape, np.float32)))).updates()[Q]
        assert not update.whole
        assert update.dense() == pytest.approx(UP.astype(float) @ DOWN, rel=1e-6)


def test_text_encoders_of_a_pipeline_have_their_own_weights(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model_index.json").write_text("{}", encoding="utf-8")
    name, weights = "text_model.encoder.layers.0.mlp.fc1", (draw(3, 6, 5), draw(4, 6, 5))
    for folder, weight in zip(("text_encoder", "text_encoder_2"), weights, strict=True):
        store(tmp_path / "base" / folder / "model.safetensors", {f"{name}.weight": weight})
    flat = {f"lora_te{number}_{name.replace('.', '_')}" for number in (1, 2)}
    file = store(tmp_path / "style.safetensors", {key: each for module in flat for key, each in lora(module).items()})
    adapter = ls.load(file, tmp_path / "base")
    assert list(adapter.updates()) == [f"text_encoder.{name}", f"text_encoder_2.{name}"]
    norms = adapter.summary(all=True)["weight_norm"]
    expected = [np.linalg.norm(weight.astype(float) + UP.astype(float) @ DOWN) for weight in weights]
    assert norms.to_list() == pytest.approx(expected, rel=1e-6)


def test_biases_and_other_tensors_are_listed(tmp_path: Path) -> None:
    more = {"set_weight": UP, "diff_b": draw(1, 6)}
    tensors = lora(Q, **more) | {"bundle_emb.word.string_to_param": UP, "lora_unet_x.w_norm": draw(1, 4)}
    adapter = ls.load(store(tmp_path / "style.safetensors", tensors))
    word = "bundle_emb.word.string_to_param"
    assert set(adapter.files.others) == {f"{Q}.set_weight", f"{Q}.diff_b", word}
    findings = inspect(adapter).findings
    assert f"saved as full weights, 12 parameters, not measured without a base: {Q}" in findings
    assert f"tensors that are not read, 12 parameters: {word}" in findings
    assert f"bias differences, 6 parameters, |db| {np.linalg.norm(more['diff_b']):.3g}: {Q}" in findings


def test_differences_of_weights_norms_and_biases_are_measured(tmp_path: Path) -> None:
    tensors = {"lora_unet_x.w_norm": draw(1, 4), "lora_unet_x.b_norm": draw(2, 4), f"{Q}.diff": draw(3, 6, 5)}
    adapter = ls.load(store(tmp_path / "style.safetensors", tensors | {f"{Q}.diff_b": draw(4, 6)}))
    assert adapter.files.kind == "Full"
    assert adapter.updates()["lora_unet_x"].dense().tolist() == draw(1, 4).astype(float)[:, None].tolist()
    assert adapter.updates()[Q].dense().tolist() == draw(3, 6, 5).astype(float).tolist()
    norm = np.hypot(np.linalg.norm(draw(2, 4)), np.linalg.norm(draw(4, 6)))
    assert f"bias differences, 10 parameters, |db| {norm:.3g}: {Q} and 1 more" in inspect(adapter).findings


def test_replaced_weight_is_the_difference_from_the_base(tmp_path: Path) -> None:
    name = f"unet.{BLOCK}.attn1.to_q"
    store(tmp_path / "base" / "model_index.json", {}).write_text("{}", encoding="utf-8")
    weights = {f"{BLOCK}.attn1.to_{side}.weight": draw(each, 6, 5) for each, side in enumerate("qk")}
    store(tmp_path / "base" / "unet" / "model.safetensors", weights)
    tensors = {f"{Q}.set_weight": draw(7, 6, 5), "lora_unet_x.set_weight": UP} | lora(f"lora_unet_{FLAT}_attn1_to_k")
    file = store(tmp_path / "style.safetensors", tensors)
    adapter = ls.load(file, tmp_path / "base")
    change = draw(7, 6, 5).astype(float) - weights[f"{BLOCK}.attn1.to_q.weight"]
    assert adapter.updates()[name].dense() == pytest.approx(change, rel=1e-12)
    absent = "saved as full weights, 12 parameters, not measured because they are not in the base: lora_unet_x"
    assert absent in inspect(adapter).findings
    assert set(ls.load(file).files.others) == {f"{Q}.set_weight", "lora_unet_x.set_weight"}


BROKEN = {
    "one factor": ({f"{Q}.lora_up.weight": UP}, r"to_q has no lora_down"),
    "alpha alone": ({f"{Q}.alpha": np.float32([1])}, r"has alpha, the parts of no algorithm"),
    "alpha of two": (lora(Q, alpha=np.ones(2, np.float32)), r"to_q.alpha must be one number, got shape \(2, 1\)"),
    "alpha NaN": (lora(Q, alpha=np.float32(np.nan)), r"to_q.alpha must be finite, got nan"),
    "ranks": ({f"{Q}.lora_up.weight": UP, f"{Q}.lora_down.weight": DOWN[:1]}, r"factors of one rank, got 1 and 2"),
    "rank 0": ({f"{Q}.lora_up.weight": UP[:, :0], f"{Q}.lora_down.weight": DOWN[:0]}, r"a rank >= 1, got 0"),
    "kernel": (
        {f"{Q}.lora_up.weight": draw(1, 6, 2, 1, 3), f"{Q}.lora_mid.weight": draw(1, 2, 2, 3, 3)}
        | {f"{Q}.lora_down.weight": draw(1, 2, 5, 1, 1)},
        r"B with a kernel of 1, got shape \(6, 2, 1, 3\)",
    ),
    "twice": (lora(Q) | {f"{Q}.lora_B.weight": UP}, r"to_q has B twice"),
    "two algorithms": (lora(Q, diff=UP @ DOWN), r"the parts of LoRA and Full"),
    "magnitudes": (lora(Q, dora_scale=np.ones((4, 1), np.float32)), r"must have 6 magnitudes .*, got shape \(4, 1\)"),
    "Kronecker": ({f"{Q}.lokr_w1": UP}, r"to_q has no lokr_w2_a"),
    "Hadamard": (
        {f"{Q}.hada_w{n}_{s}": UP if s == "a" else DOWN[:n] for n in (1, 2) for s in "ab"},
        r"hada_w1_b of lora_unet_down\S+ must have shape",
    ),
    "no base": (
        {f"{Q}.oft_blocks": np.ones((3, 2, 2), np.float32)},
        r"OFT changes the weights of its base.*--base DIR",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    tensors, message = BROKEN[name]
    file = store(tmp_path / "style.safetensors", tensors)
    with pytest.raises(ValueError, match=rf"^cannot read {file}: .*{message}") as raised:
        ls.load(file)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("{", "as JSON"),
        ("[]", "Expected `object`"),
        ('{"unet.r": "2"}', "Expected `int`"),
        ('{"unet.r": 3}', "must have rank 3, got 2"),
        ('{"unet.rank_pattern": {"(": 2}}', "rank_pattern"),
    ],
)
def test_broken_metadata_is_refused_in_one_line(metadata: str, message: str, tmp_path: Path) -> None:
    tensors = {f"unet.{BLOCK}.to_q.lora_A.weight": DOWN, f"unet.{BLOCK}.to_q.lora_B.weight": UP}
    file = store(tmp_path / "style.safetensors", tensors, {"lora_adapter_metadata": metadata})
    with pytest.raises(ValueError, match=f"^cannot read .*{re.escape(message)}") as raised:
        ls.load(file)
    assert "\n" not in str(raised.value)


def test_folder_with_several_adapters_asks_for_one(tmp_path: Path) -> None:
    for number in (1, 2):
        store(tmp_path / f"style-00000{number}.safetensors", lora(Q))
    with pytest.raises(ValueError, match=r"has 2 adapters, pass the path of one: style-000001.safetensors, style-0000"):
        ls.load(tmp_path)


def test_models_do_not_count_as_adapters(tmp_path: Path) -> None:
    names = ("model.diffusion_model.input_blocks.0.0.weight", "act.alpha", "decoder.diff", "a1.weight", "transformer.x")
    file = store(tmp_path / "model.safetensors", dict.fromkeys(names, UP))
    assert is_whole_model(file)
    assert not is_whole_model(store(tmp_path / "lokr.safetensors", {f"{Q}.lokr_w1": UP, f"{Q}.lokr_w2": UP}))


def test_alpha_tensors_come_before_the_metadata(tmp_path: Path) -> None:
    tensors = lora(f"unet.{BLOCK}.to_q", alpha=np.float32(6))
    metadata = {"lora_adapter_metadata": '{"unet.r": 2, "unet.lora_alpha": 2}'}
    adapter = ls.load(store(tmp_path / "style.safetensors", tensors, metadata))
    assert adapter.updates()[f"unet.{BLOCK}.to_q"].dense() == pytest.approx(3 * UP.astype(float) @ DOWN, rel=1e-6)


@pytest.mark.parametrize("on_input", [np.zeros(0, np.int64), np.zeros(2, np.int64)])
def test_ia3_without_one_axis_is_refused(on_input: np.ndarray, tmp_path: Path) -> None:
    base = store(tmp_path / "base.safetensors", {f"{BLOCK}.attn1.to_q.weight": draw(1, 6, 5)})
    file = store(tmp_path / "a.safetensors", {f"{Q}.weight": draw(2, 6), f"{Q}.on_input": on_input})
    with pytest.raises(ValueError, match="must have one value on_input, got shape"):
        ls.load(file, base)


@pytest.mark.parametrize("flat_name", ["down_blocks_0_", "_orig_mod_down_blocks_0_", "down_blocks_0__orig_mod_"])
def test_flattened_names_of_a_compiled_model_are_named(flat_name: str, tmp_path: Path, capsys: Any) -> None:
    """kohya writes the dots of _orig_mod. as underscores too, and the base has no such module."""
    tensors = load_file(LYCORIS / "locon.safetensors")
    renamed = {name.replace("down_blocks_0_", flat_name): tensor for name, tensor in tensors.items()}
    file = store(tmp_path / "style.safetensors", renamed)
    is_compiled = "_orig_mod_" in flat_name
    found, expected = (ls.load(path, LYCORIS / "base") for path in (file, LYCORIS / "locon.safetensors"))
    for module, update in expected.updates().items():
        assert np.array_equal(found.updates()[module].dense(), update.dense())
    assert ls.load(file).ranks() == ls.load(LYCORIS / "locon.safetensors").ranks()
    for options in [], ["--base", str(LYCORIS / "base")]:
        assert main(["doctor", str(file), *options, "--json"]) == is_compiled
        findings = json.loads(capsys.readouterr().out)["findings"]
        assert [finding["id"] for finding in findings] == ["LS025"] * is_compiled
        for finding in findings:
            start = "1 of 2 modules has a name with _orig_mod_, so programs leave them out: lora_unet_down_blocks_0_att"
            assert finding["message"].startswith(start)
            assert "or _orig_mod_ from those of kohya" in finding["fix"]
    ls.export.convert(found, tmp_path / "plain.safetensors", "kohya")
    assert load_file(tmp_path / "plain.safetensors").keys() >= tensors.keys()
