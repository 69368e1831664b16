"""Tensors of a merged model without an update: PEFT's own merges are sound, and what a merge loses is named."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import HEADS, tiny

from lorascope.cli.main import main
from lorascope.diagnosis.merge import MergeCheck, check_merge
from lorascope.formats.pretrained_weights import PretrainedWeights
from lorascope.runs.loading import load_adapter

pytestmark = pytest.mark.filterwarnings("ignore")


def lora(*targets: str, **options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=2, target_modules=list(targets), **options)


# family, head and configuration; PEFT changes other tensors than the adapted weights
CASES = {
    "biases of all modules": ("bert", "classification", lora("query", bias="all")),
    "biases of adapted modules": ("bert", "classification", lora("query", bias="lora_only")),
    "bias of the factors": ("bert", "classification", lora("query", lora_bias=True)),
    "head": ("bert", "classification", lora("query", task_type="SEQ_CLS")),
    "norms": ("llama", "causal", lora("q_proj", modules_to_save=["norm"])),
    "token rows": ("llama", "causal", lora("q_proj", trainable_token_indices=[3, 5])),
    "token rows, tied": ("gpt2", "causal", lora("c_attn", trainable_token_indices={"wte": [3, 5]})),
    "tuned norms": ("bert", "classification", peft.LNTuningConfig(target_modules=["LayerNorm"])),
}


def write(folder: Path, family: str, head: str, config: peft.PeftConfig) -> None:
    """Write a base, an adapter whose trained tensors are drawn, and PEFT's merge of both."""
    torch.manual_seed(0)
    tiny(family).save_pretrained(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(HEADS[head].from_pretrained(folder / "base"), config)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.5)
        adapted.save_pretrained(folder / "adapter")
        adapted.merge_and_unload().save_pretrained(folder / "merged")


def checked(folder: Path, merged: str = "merged") -> MergeCheck:
    return check_merge(load_adapter(folder / "adapter", folder / "base"), PretrainedWeights(folder / merged))


def rewritten(folder: Path, change: Any, source: str = "merged") -> str:
    """Write a merged model with other tensors, and return the name of its folder."""
    shutil.copytree(folder / source, folder / "changed")
    save_file(change(load_file(folder / source / "model.safetensors")), folder / "changed" / "model.safetensors")
    return "changed"


@pytest.mark.parametrize("case", CASES)
def test_merge_of_peft_is_sound_and_a_merge_of_only_matrices_is_not(case: str, tmp_path: Path) -> None:
    family, head, config = CASES[case]
    write(tmp_path, family, head, config)
    check = checked(tmp_path)
    assert check.findings == ()
    base, merged = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "merged"))
    adapted = {f"{module.module}.weight" for module in check.modules}
    saved = {name for name in merged if not torch.equal(base[name], merged[name])} - adapted
    assert set(check.tensor_names("saved")) == saved != set()
    assert set(check.tensor_names("kept")) == base.keys() - adapted - saved
    folder = rewritten(
        tmp_path, lambda merged: {name: base[name] if name in saved else merged[name] for name in merged}
    )
    check = checked(tmp_path, folder)
    assert {finding.id for finding in check.findings} == {"LS308"}
    assert set(check.tensor_names("lost")) == saved
    words = ["doctor", str(tmp_path / "adapter"), "--base", str(tmp_path / "base")]
    assert main([*words, "--merged", str(tmp_path / folder)]) == 1


FAULTS = {
    "changed norm": (lambda tensors: tensors | {"model.norm.weight": tensors["model.norm.weight"] * 1.5}, "changed"),
    "lost norm": (lambda tensors: {n: W for n, W in tensors.items() if n != "model.norm.weight"}, "missing"),
    "added tensor": (lambda tensors: tensors | {"model.layers.0.extra.weight": torch.ones(3)}, "added"),
    "negative zero": (lambda tensors: tensors | {"zero": -torch.zeros(2)}, "changed"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_tensor_without_adapter_that_differs_is_named(fault: str, tmp_path: Path) -> None:
    write(tmp_path, "llama", "causal", lora("q_proj"))
    change, verdict = FAULTS[fault]
    for folder in ("base", "merged"):
        file = tmp_path / folder / "model.safetensors"
        save_file(load_file(file) | {"zero": torch.zeros(2)}, file)
    check = checked(tmp_path, rewritten(tmp_path, change))
    assert {finding.id for finding in check.findings} == {"LS307"}
    assert len(check.tensor_names(verdict)) == 1


def test_model_in_fewer_bits_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "llama", "causal", lora("q_proj"))
    folder = rewritten(tmp_path, lambda tensors: {name: W.bfloat16() for name, W in tensors.items()})
    check = checked(tmp_path, folder)
    assert check.findings == ()
    assert {tensor.verdict for tensor in check.tensors} == {"kept"}
    words = ["doctor", str(tmp_path / "adapter"), "--base", str(tmp_path / "base"), "--merged", str(tmp_path / folder)]
    main(words)
    assert "float32 of the base is stored as bfloat16" in " ".join(capsys.readouterr().out.split())


def test_tied_head_that_is_stored_twice_is_sound(tmp_path: Path) -> None:
    write(tmp_path, "gpt2", "causal", lora("c_attn"))
    folder = rewritten(
        tmp_path, lambda tensors: tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}
    )
    assert checked(tmp_path, folder).findings == ()


def test_head_of_another_class_is_not_compared(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny("bert", head="masked").save_pretrained(tmp_path / "base")
    model = HEADS["classification"].from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, lora("query", task_type="SEQ_CLS"))
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    check = checked(tmp_path)
    assert check.findings == ()
    assert all(name.startswith(("cls.", "bert.pooler")) for name in check.tensor_names("not compared"))
    assert len(check.tensor_names("saved")) == 2
    assert not check.is_conclusive


LYCORIS = Path(__file__).parent / "fixtures" / "lycoris"
SHAPES = {"weight": (4, 3), "bias": (4,)}


def test_differences_of_biases_are_in_the_merge_of_lycoris(tmp_path: Path) -> None:
    """The library itself has merged the file, whose modules have flattened names."""
    adapter = load_adapter(LYCORIS / "full.safetensors", LYCORIS / "base")
    base, merged = (load_file(LYCORIS / folder / "model.safetensors") for folder in ("base", "merged"))
    check = check_merge(adapter, PretrainedWeights(LYCORIS / "merged"))
    assert check.findings == ()
    biases = {name for name in base if name.endswith(".bias")}
    assert set(check.tensor_names("saved")) == biases
    assert len(biases) == 2
    shutil.copytree(LYCORIS / "merged", tmp_path / "merged")
    folder = rewritten(tmp_path, lambda tensors: tensors | {name: base[name] for name in biases})
    check = check_merge(adapter, PretrainedWeights(tmp_path / folder))
    assert set(check.tensor_names("lost")) == biases
    assert {finding.id for finding in check.findings} == {"LS308"}
    # Added twice.
    twice = {name: 2 * merged[name] - base[name] for name in biases}
    save_file(merged | twice, tmp_path / folder / "model.safetensors")
    check = check_merge(adapter, PretrainedWeights(tmp_path / folder))
    assert set(check.tensor_names("changed")) == biases


@pytest.mark.parametrize("is_merged", [True, False])
def test_difference_of_a_bias_that_the_base_lacks_is_the_bias(is_merged: bool, tmp_path: Path) -> None:
    """LyCORIS then adds a bias to the module."""
    base, merged = (load_file(LYCORIS / folder / "model.safetensors") for folder in ("base", "merged"))
    differences = load_file(LYCORIS / "full.safetensors")
    (name, difference), *_ = ((name, tensor) for name, tensor in differences.items() if name.endswith(".diff_b"))
    bias = next(key for key in base if name == f"lora_unet_{key.removesuffix('.bias').replace('.', '_')}.diff_b")
    base.pop(bias)
    merged.pop(bias)
    if is_merged:
        merged[bias] = difference
    for folder, tensors in {"base": base, "merged": merged}.items():
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
    check = check_merge(
        load_adapter(LYCORIS / "full.safetensors", tmp_path / "base"), PretrainedWeights(tmp_path / "merged")
    )
    assert (bias in check.tensor_names("saved")) == is_merged
    assert (bias in check.tensor_names("lost")) != is_merged
    assert len(check.findings) == (not is_merged)


def test_difference_of_a_joined_bias_is_not_compared(tmp_path: Path) -> None:
    """The authors of Flux join query, key and value in one module, whose rows are three modules of diffusers."""
    torch.manual_seed(0)
    modules = [f"transformer_blocks.0.attn.to_{letter}" for letter in "qkv"]
    base = {f"{module}.{end}": torch.randn(*shape) for module in modules for end, shape in SHAPES.items()}
    joined = "lora_unet_double_blocks_0_img_attn_qkv"
    differences = {f"{joined}.diff": torch.randn(12, 3), f"{joined}.diff_b": torch.randn(12)}
    merged = {}
    for end, key in {"weight": "diff", "bias": "diff_b"}.items():
        for module, rows in zip(modules, differences[f"{joined}.{key}"].split(4), strict=True):
            merged[f"{module}.{end}"] = base[f"{module}.{end}"] + rows
    for folder, tensors in {"base": base, "merged": merged}.items():
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
    save_file(differences, tmp_path / "style.safetensors")
    check = check_merge(
        load_adapter(tmp_path / "style.safetensors", tmp_path / "base"), PretrainedWeights(tmp_path / "merged")
    )
    assert check.findings == ()
    assert set(check.tensor_names("not compared")) == {f"{module}.bias" for module in modules}
    assert {module.module for module in check.modules} == set(modules)
    assert not check.is_conclusive
