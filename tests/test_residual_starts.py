"""PiSSA and OLoRA of PEFT: the change from the original base weights, compared with PEFT's own merge."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from merged import adapt
from safetensors.torch import load_file, save_file
from tiny import tiny
from torch import nn
from transformers import AutoModelForCausalLM

from lorascope.cli.main import main
from lorascope.diagnosis.merge import MergeCheck, check_merge
from lorascope.formats.pretrained_weights import PretrainedWeights
from lorascope.runs.adapter import Adapter
from lorascope.runs.loading import load, load_adapter

pytestmark = pytest.mark.filterwarnings("ignore")
LORA = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "up_proj"]}
GPT2 = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}
# family, dtype, options
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "PiSSA": ("llama", "float32", {"init_lora_weights": "pissa"}),
    "OLoRA": ("llama", "float32", {"init_lora_weights": "olora"}),
    "OLoRA in capitals": ("llama", "float32", {"init_lora_weights": "OLoRA"}),
    "PiSSA, patterns": ("llama", "float32", {"init_lora_weights": "pissa", "use_rslora": True} | PATTERNS),
    "OLoRA, patterns": ("llama", "float32", {"init_lora_weights": "olora", "use_rslora": True} | PATTERNS),
    "PiSSA, Conv1D": ("gpt2", "float32", {"init_lora_weights": "pissa"} | GPT2),
    # PEFT's OLoRA fits only square weights that are stored as (in, out).
    "OLoRA, Conv1D": ("gpt2", "float32", {"init_lora_weights": "olora"} | GPT2 | {"target_modules": ["attn.c_proj"]}),
    "PiSSA, all singular values": ("llama", "float32", {"init_lora_weights": "pissa", "r": 16}),
    "PiSSA, bfloat16": ("llama", "bfloat16", {"init_lora_weights": "pissa"}),
    "OLoRA, bfloat16": ("llama", "bfloat16", {"init_lora_weights": "olora"}),
    "PiSSA, float16": ("llama", "float16", {"init_lora_weights": "pissa"}),
    "PiSSA, DoRA": ("llama", "float32", {"init_lora_weights": "pissa", "use_dora": True}),
    "OLoRA, DoRA": ("llama", "float32", {"init_lora_weights": "olora", "use_dora": True}),
}
ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def base_model(folder: Path, dtype: str = "float32") -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=getattr(torch, dtype))


def write(folder: Path, family: str, dtype: str, options: dict[str, Any], size: float = 0.02, seed: int = 0) -> None:
    """Write a base, an adapter whose factors have changed by ``size`` of their values, and PEFT's merge of both."""
    tiny(family).to(getattr(torch, dtype)).save_pretrained(folder / "base")
    adapted = peft.get_peft_model(base_model(folder, dtype), peft.LoraConfig(**LORA | options))
    torch.manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += size * parameter.data.abs().mean() * torch.randn_like(parameter)
    adapted.save_pretrained(folder / "adapter")
    loaded = peft.PeftModel.from_pretrained(base_model(folder, dtype), str(folder / "adapter"))
    loaded.merge_and_unload().save_pretrained(folder / "merged")


def opened(folder: Path) -> Adapter:
    return load_adapter(folder / "adapter", folder / "base")


def checked(folder: Path, merged: str = "merged") -> MergeCheck:
    return check_merge(opened(folder), PretrainedWeights(folder / merged))


@pytest.mark.parametrize("size", [0.0, 0.3])
@pytest.mark.parametrize(("family", "dtype", "options"), CASES.values(), ids=CASES)
def test_change_from_the_original_base_equals_the_merge_of_peft(
    family: str, dtype: str, options: dict[str, Any], size: float, tmp_path: Path
) -> None:
    write(tmp_path, family, dtype, options, size)
    adapter = opened(tmp_path)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    assert adapter.updates()
    for module, update in adapter.updates().items():
        stored, W = adapter.files.parts[module], before[f"{module}.weight"].double()
        change = after[f"{module}.weight"].double() - W
        if stored.transposed:
            W, change = W.T, change.T
        # PEFT rounds the residual and the merged weight to the dtype of the base.
        initial = stored.start.product()  # type: ignore[attr-defined]
        entries = W.abs().numpy() + np.abs(initial) + np.abs(update.dense() + initial)
        tolerance = 2 * stored.start.factors.error + 2 * ROUNDING[dtype] * np.linalg.norm(entries)  # type: ignore[attr-defined]
        assert np.linalg.norm(update.dense() - change.numpy()) <= tolerance
        assert update.norm() == pytest.approx(np.linalg.norm(update.dense()), rel=1e-6)
        if not options.get("use_dora"):
            assert np.linalg.matrix_rank(update.dense(), tol=1e-9) <= adapter.ranks()[module] == update.rank
    check = checked(tmp_path)
    assert check.findings == ()
    assert {module.verdict for module in check.modules} <= {"consistent", "unknown"}
    assert not check.is_conclusive
    if size:
        assert {module.verdict for module in check.modules} == {"consistent"}


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_untrained_adapter_changes_nothing(start: str, tmp_path: Path) -> None:
    write(tmp_path, "llama", "float32", {"init_lora_weights": start}, size=0.0)
    table = opened(tmp_path).summary()
    assert (table["relative_update"] < 1e-4).all()


def test_adapter_without_a_base_is_unchanged(tmp_path: Path) -> None:
    write(tmp_path, *CASES["PiSSA"])
    adapter = load(tmp_path / "adapter")
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for module, update in adapter.updates().items():
        A, B = (factors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
        assert update.dense() == pytest.approx((3 * B @ A).numpy(), rel=1e-12)
    assert any("|dW| is the norm of B A only" in note for note in adapter.files.notes)
    assert any("|dW| is the change from the original base" in note for note in opened(tmp_path).files.notes)


def test_embedding_of_pissa_is_plain_lora(tmp_path: Path) -> None:
    options = {"target_modules": ["embed_tokens", "q_proj"], "init_lora_weights": "pissa"}
    write(tmp_path, "llama", "float32", options)
    adapter = opened(tmp_path)
    table = "model.embed_tokens"
    change = [load_file(tmp_path / name / "model.safetensors")[f"{table}.weight"] for name in ("merged", "base")]
    update = adapter.updates()[table].dense().T
    assert update == pytest.approx((change[0] - change[1]).numpy(), abs=1e-6)
    assert adapter.ranks()[table] == 4
    assert adapter.ranks()["model.layers.0.self_attn.q_proj"] == 8
    assert checked(tmp_path).findings == ()


@pytest.mark.parametrize("start", ["pissa_niter_4", "loftq", "corda", "lora_ga"])
def test_start_that_cannot_be_repeated_is_not_compared(start: str, tmp_path: Path) -> None:
    write(tmp_path, *CASES["PiSSA"])
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"pissa"', f'"{start}"'))
    adapter = opened(tmp_path)
    assert any("|dW| is the norm of B A only" in note for note in adapter.files.notes)
    check = checked(tmp_path)
    assert {module.verdict for module in check.modules} == {"changed base"}
    assert check.findings == ()
    assert not check.is_conclusive


def test_randomized_start_of_peft_differs_at_every_loading(tmp_path: Path) -> None:
    write(tmp_path, "llama", "float32", {"init_lora_weights": "pissa_niter_1"}, size=0.0)
    merged = [load_file(tmp_path / "merged" / "model.safetensors")]
    loaded = peft.PeftModel.from_pretrained(base_model(tmp_path), str(tmp_path / "adapter"))
    merged.append(loaded.merge_and_unload().state_dict())
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (merged[0][name] - merged[1][name]).norm() > 1e-3 * merged[0][name].norm()
    assert any("randomized SVD" in note for note in opened(tmp_path).files.notes)
    assert checked(tmp_path).findings == ()


def rewritten(folder: Path, weight_of: Any) -> None:
    """Write a merged model whose adapted weights are a function of base weight, merged weight and s B A."""
    base, merged = (load_file(folder / name / "model.safetensors") for name in ("base", "merged"))
    factors = load_file(folder / "adapter" / "adapter_model.safetensors")
    for module in opened(folder).files.parts:
        A, B = (factors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
        name = f"{module}.weight"
        merged[name] = weight_of(base[name], merged[name], 3 * B @ A).contiguous()
    shutil.copytree(folder / "base", folder / "rewritten")
    save_file(merged, folder / "rewritten" / "model.safetensors", {"format": "pt"})


MISTAKES: dict[str, tuple[Any, str, str]] = {
    "base": (lambda W, merged, d: W, "not merged", ""),
    "start is not subtracted": (lambda W, merged, d: W + d, "wrong adapter", "added to the base"),
    "merged twice": (lambda W, merged, d: merged + d, "wrong scale", "2 times the update, so it was merged twice"),
    "subtracted": (lambda W, merged, d: merged - 2 * d, "wrong scale", "-1 times the update"),
    "rounded": (lambda W, merged, d: merged.bfloat16().float(), "rounded", "smaller dtype"),
    "noise": (lambda W, merged, d: merged + 0.01 * torch.randn_like(W), "wrong adapter", "the change of the weight"),
}


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize(("weight_of", "verdict", "words"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(weight_of: Any, verdict: str, words: str, start: str, tmp_path: Path) -> None:
    write(tmp_path, "llama", "float32", {"init_lora_weights": start}, size=0.3)
    rewritten(tmp_path, weight_of)
    check = checked(tmp_path, "rewritten")
    assert {module.verdict for module in check.modules} == {verdict}
    assert all(words in finding.message for finding in check.findings)
    assert check.findings


def test_merge_of_another_seed_is_the_wrong_adapter(tmp_path: Path) -> None:
    write(tmp_path / "a", "llama", "float32", {"init_lora_weights": "pissa"}, size=0.3)
    write(tmp_path / "b", "llama", "float32", {"init_lora_weights": "pissa"}, size=0.3, seed=1)
    shutil.copytree(tmp_path / "b" / "merged", tmp_path / "a" / "other")
    assert {module.verdict for module in checked(tmp_path / "a", "other").modules} == {"wrong adapter"}


def test_command_of_a_sound_merge_exits_with_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, *CASES["PiSSA"])
    folders = [str(tmp_path / name) for name in ("adapter", "base", "merged")]
    assert main(["doctor", folders[0], "--base", folders[1], "--merged", folders[2]]) == 3
    assert "LS306" not in capsys.readouterr().out


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_base_with_nan_has_an_unknown_change(start: str, tmp_path: Path) -> None:
    model = tiny("llama")
    adapt(copy.deepcopy(model), tmp_path / "adapter", **LORA | {"init_lora_weights": start})
    model.model.layers[0].self_attn.q_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "base")
    norms = {module: values["update_norm"] for module, values in opened(tmp_path).measures.items()}
    assert [module for module, norm in norms.items() if np.isnan(norm)] == ["model.layers.0.self_attn.q_proj"]
