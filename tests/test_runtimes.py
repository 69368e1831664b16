"""Predictions of what runtimes apply of an adapter, with PEFT itself as the oracle for PEFT."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save, save_file
from tiny import tiny
from transformers import AutoModel, AutoModelForCausalLM

from lorascope.cli.main import main
from lorascope.diagnosis.runtimes import Application, apply_adapter
from lorascope.runs.loading import load_adapter

WEIGHTS = "adapter_model.safetensors"
Tensors = dict[str, np.ndarray]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Folder with an adapter on q_proj and v_proj of two layers, whose B is not zero, and its base."""
    model = tiny("llama")
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path


def change(folder: Path, tensors: Callable[[Tensors], Tensors] = dict, **config: Any) -> None:
    """Change the tensors and the configuration of the adapter in a folder."""
    file = folder / "adapter" / WEIGHTS
    file.write_bytes(save(tensors(load_file(file))))
    about = folder / "adapter" / "adapter_config.json"
    about.write_text(json.dumps(json.loads(about.read_text(encoding="utf-8")) | config), encoding="utf-8")


def by_peft(folder: Path) -> int | str:
    """Return the number of weights that PEFT's merge changes, or that it refuses."""
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = peft.PeftModel.from_pretrained(base, str(folder / "adapter")).merge_and_unload()
    except (RuntimeError, ValueError):  # a wrong shape; no target
        return "refused"
    return sum(not torch.equal(weight, before[name]) for name, weight in merged.state_dict().items())


def ours(folder: Path, runtime: str = "peft", base: bool = True) -> Application:
    adapter = load_adapter(folder / "adapter", folder / "base" if base else None)
    return apply_adapter(adapter.files, adapter.base, runtime)


def test_whole_adapter_is_applied(saved: Path) -> None:
    found = ours(saved)
    assert (found.applied, found.modules, found.findings) == (4, 4, ())
    assert by_peft(saved) == 4


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): array for name, array in tensors.items()}


def third_layer(tensors: Tensors) -> Tensors:
    return tensors | {name.replace(".layers.1.", ".layers.7."): array for name, array in tensors.items()}


def one_layer(tensors: Tensors) -> Tensors:
    return {name: array for name, array in tensors.items() if ".layers.0." in name}


def wider(tensors: Tensors) -> Tensors:
    return {name: np.pad(array, [(0, 0), (0, 2)]) if "q_proj.lora_A" in name else array
            for name, array in tensors.items()}  # fmt: skip


FAULTS: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any], list[str], int]] = {
    "a layer that the base does not have": (third_layer, {}, ["dropped"], 4),
    "another prefix": (renamed("model.model.layers", "model.layers"), {}, ["dropped"], 0),
    "no prefix": (renamed("base_model.model.", ""), {}, ["dropped"], 0),
    "a target fewer": (dict, {"target_modules": ["q_proj"]}, ["dropped"], 2),
    "a target more": (dict, {"target_modules": ["q_proj", "v_proj", "o_proj"]}, ["missing"], 4),
    "a layer fewer": (one_layer, {}, ["missing"], 2),
    "layers that are left out": (dict, {"layers_to_transform": [1]}, ["dropped"], 2),
    "an excluded target": (dict, {"exclude_modules": ["v_proj"]}, ["dropped"], 2),
    "a pattern as target": (dict, {"target_modules": r".*\.q_proj"}, ["dropped"], 2),
    "another shape": (wider, {}, ["refused"], 0),
    "no such target": (dict, {"target_modules": ["query"]}, ["refused"], 0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_peft_applies_what_is_predicted(fault: str, saved: Path) -> None:
    tensors, config, causes, count = FAULTS[fault]
    change(saved, tensors, **config)
    found = ours(saved)
    assert [finding.cause for finding in found.findings] == causes
    assert found.applied == count
    oracle = by_peft(saved)
    if causes == ["refused"]:
        assert oracle == "refused"
    else:
        assert oracle == count


def compile_model(model: torch.nn.Module) -> Any:
    return torch.compile(model)


def compile_first_layer(model: Any) -> Any:
    model.model.layers[0] = torch.compile(model.model.layers[0])
    return model


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch.compile itself
@pytest.mark.parametrize(
    ("compiling", "lost"), [(compile_model, 4), (compile_first_layer, 2)], ids=["whole model", "one layer"]
)
def test_adapter_of_a_compiled_model_is_dropped_until_its_tensors_are_renamed(
    compiling: Callable[[Any], Any], lost: int, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = compiling(AutoModelForCausalLM.from_pretrained(saved / "base"))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(saved / "adapter")
    found = ours(saved)
    (finding,) = found.findings
    assert (finding.cause, finding.evidence) == ("compiled-names", {"modules": lost, "of": 4})
    assert found.applied == 4 - lost == by_peft(saved)
    modules = {f"model.layers.{layer}.self_attn.{role}_proj" for layer in (0, 1) for role in "qv"}
    assert load_adapter_files(saved).parts.keys() == modules
    for options in [], ["--base", str(saved / "base")]:
        assert main(["doctor", str(saved / "adapter"), *options, "--json"]) == 1
        assert [row["id"] for row in json.loads(capsys.readouterr().out)["findings"]] == ["LS025"]
    assert finding.fix.startswith("rename the tensors: remove _orig_mod. from their names")
    change(saved, renamed("_orig_mod.", ""))
    assert ours(saved).findings == ()
    assert by_peft(saved) == 4


def test_renaming_that_fits_is_named(saved: Path) -> None:
    AutoModel.from_pretrained(saved / "base").save_pretrained(saved / "base")  # without the prefix ``model.``
    (first, *_) = ours(saved).findings
    assert first.fix == "rename them: model. -> no prefix"
    assert first.message == (
        "4 of 4 modules are dropped without a warning, because the base has no such module: "
        "model.layers.0.self_attn.q_proj and 3 more"
    )


def test_empty_tensors_are_named(saved: Path) -> None:
    change(saved, lambda tensors: {name: array[:0] if "lora_A" in name else array[:, :0]
                                   for name, array in tensors.items()})  # fmt: skip
    with pytest.raises(ValueError, match=r"q_proj is empty: saved under ZeRO-3 or FSDP without gathering"):
        ours(saved)


def load_adapter_files(folder: Path) -> Any:
    return load_adapter(folder / "adapter", None).files


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "does not support use_dora"),
        ({"lora_bias": True}, "does not support lora_bias"),
        ({"bias": "all"}, "does not support bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "does not support modules_to_save=['lm_head']"),
        ({"init_lora_weights": "pissa_niter_4"}, "does not support init_lora_weights='pissa_niter_4'"),
        ({"alora_invocation_tokens": [1, 2]}, "does not support alora_invocation_tokens"),
        ({"layer_replication": [[0, 1]]}, "does not support layer_replication"),
        ({"lora_alpha": None}, "lacks lora_alpha"),
    ],
)
def test_vllm_refuses(config: dict[str, Any], words: str, saved: Path) -> None:
    assert ours(saved, "vllm").findings == ()
    files = load_adapter_files(saved)
    files.config.update(config)
    found = apply_adapter(files, None, "vllm")
    assert found.applied == 0
    assert words in found.findings[0].message


def test_vllm_ignores_a_module_of_another_path(saved: Path) -> None:
    change(saved, renamed("model.model.layers", "model.language_model.model.layers"))
    found = ours(saved, "vllm")
    assert (found.applied, [finding.cause for finding in found.findings]) == (0, ["dropped"])
    assert found.findings[0].fix == "rename them: language_model.model. -> model."


def test_rank_above_the_default_of_vllm_is_refused(saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved / "base")
    peft.get_peft_model(model, peft.LoraConfig(r=17, target_modules=["q_proj"])).save_pretrained(saved / "adapter")
    (finding,) = ours(saved, "vllm").findings
    assert finding.fix == "start it with --max-lora-rank 17"


def test_llama_cpp_does_not_read_rslora(saved: Path) -> None:
    assert ours(saved, "llama.cpp").findings == ()
    change(saved, use_rslora=True)
    (finding,) = ours(saved, "llama.cpp").findings
    assert finding.evidence == {"factor": 2.0}  # sqrt(4)
    assert finding.fix == "set lora_alpha to 16 and use_rslora to false"


def test_diffusers_needs_the_component(saved: Path) -> None:
    found = ours(saved, "diffusers", base=False)
    assert (found.applied, [finding.cause for finding in found.findings]) == (0, ["dropped"])
    change(saved, renamed("base_model.model.model", "unet"))
    assert ours(saved, "diffusers", base=False).findings == ()


def test_command_line(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, base = str(saved / "adapter"), str(saved / "base")
    assert main(["doctor", adapter, "--base", base]) == 0
    assert "peft           applies 4 of 4 modules\n" in capsys.readouterr().out
    change(saved, third_layer)
    assert main(["doctor", adapter, "--base", base, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["runtime"], told["applied"], told["modules"]) == ("peft", 4, 6)
    assert main(["doctor", adapter, "--runtime", "vllm"]) == 0
    assert "names and shapes are not compared without --base DIR" in capsys.readouterr().out.replace(
        "\n" + " " * 15, " "
    )
    assert main(["doctor", adapter, "--runtime", "ollama"]) == 2
    expected = "runtime must be one of diffusers, llama.cpp, peft, vllm, got 'ollama'"
    assert capsys.readouterr().err.strip().endswith(expected)


def test_unrelated_base_is_reported_instead_of_refused(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (saved / "other").mkdir()
    save_file({"encoder.dense.weight": np.ones((3, 3), np.float32)}, saved / "other" / "model.safetensors")
    assert main(["doctor", str(saved / "adapter"), "--base", str(saved / "other")]) == 1
    assert "applies 0 of 4 modules" in capsys.readouterr().out


class UNet(torch.nn.Module):
    """Modules with the names of a UNet of diffusers."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        for name in names:
            parent: torch.nn.Module = self
            *parents, leaf = name.split(".")
            for part in parents:
                if part not in dict(parent.named_children()):
                    parent.add_module(part, torch.nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(leaf, torch.nn.Linear(5, 6))


ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
NAMES = [f"{ATTENTION}.to_q", f"{ATTENTION}.to_out.0", "down_blocks.0.resnets.0.time_emb_proj"]


def kohya_file(folder: Path, alphas: dict[str, float]) -> Path:
    """Write a file of kohya for a UNet with a base that has the modules of ``NAMES``."""
    tensors = {}
    for number, (name, alpha) in enumerate(alphas.items()):
        draw = np.random.default_rng(number)
        flat = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{flat}.lora_down.weight"] = draw.normal(size=(2, 5)).astype(np.float32)
        tensors[f"{flat}.lora_up.weight"] = draw.normal(size=(6, 2)).astype(np.float32)
        if alpha:
            tensors[f"{flat}.alpha"] = np.array(alpha, np.float32)
    (folder / "base").mkdir()
    save_file(tensors, folder / "adapter")
    weights = UNet(NAMES).state_dict()
    save_file({name: weight.numpy() for name, weight in weights.items()}, folder / "base" / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("alphas", "changed"),
    [
        ([1, 1, 1], 0),
        ([4, 4, 1], 0),  # attention has the most frequent alpha, and other modules have their own
        ([4, 1, 1], 1),
        ([1, 4, 4], 1),
        ([0, 2, 2], 0),  # no alpha counts as the rank
        ([0, 1, 1], 1),
        ([1, 1, 0], 1),
        ([0, 0, 0], 0),
    ],
)
def test_diffusers_gives_attention_the_most_frequent_alpha(alphas: list[float], changed: int, tmp_path: Path) -> None:
    """The base renames modules; with and without it, the same modules are applied differently."""
    folder = kohya_file(tmp_path, dict(zip(NAMES, alphas, strict=True)))
    for base in True, False:
        findings = ours(folder, "diffusers", base).findings
        assert [finding.cause for finding in findings] == ["applied-differently"] * bool(changed)
        if changed:
            assert (findings[0].evidence["modules"], findings[0].evidence["of"]) == (changed, 3)


@pytest.mark.parametrize("names", [NAMES, [*NAMES, NAMES[0].replace("0", "7", 1)], [NAMES[0].replace("0", "7", 1)]])
def test_diffusers_leaves_out_modules_that_the_base_lacks(names: list[str], tmp_path: Path) -> None:
    """diffusers targets the modules of the file, and PEFT names the tensors that none of them takes."""
    folder = kohya_file(tmp_path, dict.fromkeys(names, 2.0))
    found = ours(folder, "diffusers")
    model = UNet(NAMES)
    config = peft.LoraConfig(r=2, target_modules=names)
    state = {f"{name}.lora_{side}.weight": torch.ones(shape) for name in names for side, shape in
             {"A": (2, 5), "B": (6, 2)}.items()}  # fmt: skip
    if not set(names) & set(NAMES):
        with pytest.raises(ValueError, match="not found in the base model"):
            peft.inject_adapter_in_model(config, model)
        assert [finding.cause for finding in found.findings] == ["refused"]
        return
    peft.inject_adapter_in_model(config, model)
    unexpected = peft.set_peft_model_state_dict(model, state).unexpected_keys
    lost = {key.partition(".lora_")[0] for key in unexpected}
    assert found.applied == len(names) - len(lost)
    assert [finding.cause for finding in found.findings] == ["dropped"] * bool(lost)
