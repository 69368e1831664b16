"""Adapters that programs refuse or that cannot be read: ``doctor`` names the fault, with PEFT itself as the oracle."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save, save_file
from test_runtimes import Tensors, by_peft, change, saved
from transformers import AutoModelForCausalLM

from lorascope.cli.main import main
from lorascope.formats.adapter_faults import AdapterFault, BaseMisfit

__all__ = ["saved"]


def diagnosis(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    """Return the JSON of ``doctor``, whose exit code has to follow from the findings."""
    code = main(["doctor", str(folder / "adapter"), *options, "--json"])
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert code == bool(content["findings"])
    return content


def ids(content: dict[str, Any]) -> list[str]:
    return [finding["id"] for finding in content["findings"]]


VOCABULARIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "copies": ({}, {}),
    "trained whole": ({"modules_to_save": ["embed_tokens", "lm_head"]}, {}),
    "only the head": ({"modules_to_save": ["lm_head"]}, {"save_embedding_layers": False}),
    "with factors": ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, {}),
    "single tokens": ({"trainable_token_indices": [1, 66]}, {"save_embedding_layers": False}),
}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")  # PEFT's
@pytest.mark.parametrize("change_of_tokens", [3, -3])
@pytest.mark.parametrize("stored", VOCABULARIES)
def test_adapter_of_another_vocabulary_is_refused_until_the_base_is_resized(
    stored: str, change_of_tokens: int, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, saving = VOCABULARIES[stored]
    if stored == "single tokens" and change_of_tokens < 0:
        pytest.skip("the base has all tokens")
    model = AutoModelForCausalLM.from_pretrained(saved / "base")
    count = model.config.vocab_size + change_of_tokens
    model.resize_token_embeddings(count)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"]} | config))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(saved / "adapter", **saving)
    content = diagnosis(saved, capsys, "--base", str(saved / "base"))
    assert (ids(content), content["applied"]) == (["LS203"], 0)
    (finding,) = content["findings"]
    assert finding["evidence"] == {"tokens": count, "of": model.config.vocab_size - change_of_tokens}
    assert finding["fix"].endswith(f"model.resize_token_embeddings({count})")
    if stored == "single tokens":
        with pytest.raises(IndexError):
            by_peft(saved)
    else:
        assert by_peft(saved) == "refused"
    base = AutoModelForCausalLM.from_pretrained(saved / "base")
    base.resize_token_embeddings(count)
    base.save_pretrained(saved / "base")
    assert not ids(diagnosis(saved, capsys, "--base", str(saved / "base")))
    assert by_peft(saved) != "refused"


def flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1)


def without_b(tensors: Tensors) -> Tensors:
    return {name: array for name, array in tensors.items() if "layers.1.self_attn.q_proj.lora_B" not in name}


def shorter_a(tensors: Tensors) -> Tensors:
    return {name: array[:2] if "q_proj.lora_A" in name else array for name, array in tensors.items()}


def wider_a(tensors: Tensors) -> Tensors:
    return {name: np.pad(array, [(0, 0), (0, 2)]) if "q_proj.lora_A" in name else array
            for name, array in tensors.items()}  # fmt: skip


TENSOR_FAULTS: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any], str, str]] = {
    "empty, as under ZeRO-3": (
        lambda tensors: {name: flat(array)[:0] for name, array in tensors.items()},
        {},
        "LS026",
        "model.layers.0.self_attn.q_proj and 3 more are empty: saved under ZeRO-3 or FSDP without gathering",
    ),
    "flat": (
        lambda tensors: {name: flat(array) for name, array in tensors.items()},
        {},
        "LS026",
        "model.layers.0.self_attn.q_proj is flat: saved under ZeRO-3 or FSDP without gathering",
    ),
    "no partner": (without_b, {}, "LS027", "model.layers.1.self_attn.q_proj has lora_A but no lora_B"),
    "rank of the configuration": (
        dict,
        {"r": 8},
        "LS028",
        "factors of model.layers.0.self_attn.q_proj must have rank 8 (adapter_config.json), got 4 and 4",
    ),
    "two ranks": (
        shorter_a,
        {},
        "LS029",
        "factors of model.layers.0.self_attn.q_proj must have one rank, got 2 (lora_A) and 4 (lora_B)",
    ),
    "width of the base": (
        wider_a,
        {},
        "LS203",
        "the update of 2 of 4 modules does not fit the weight: model.layers.0.self_attn.q_proj (32 x 34, in the base "
        "32 x 32) and 1 more",
    ),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_fault_of_tensors_is_a_finding(fault: str, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors, config, id, message = TENSOR_FAULTS[fault]
    change(saved, tensors, **config)
    content = diagnosis(saved, capsys, "--base", str(saved / "base"))
    assert [(finding["id"], finding["message"]) for finding in content["findings"]] == [(id, message)]
    assert content["findings"][0]["fix"]
    if id != "LS203":  # without a base, its shapes are not known
        assert ids(diagnosis(saved, capsys)) == [id]
    # PEFT applies all other modules if a partner is missing.
    assert by_peft(saved) == (3 if fault == "no partner" else "refused")


def test_fault_is_a_finding_for_a_merged_model_and_in_sarif(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(saved, dict, r=8)
    base, sarif = str(saved / "base"), saved / "findings.sarif"
    assert ids(diagnosis(saved, capsys, "--base", base, "--merged", base, "--sarif", str(sarif))) == ["LS028"]
    (run,) = json.loads(sarif.read_text(encoding="utf-8"))["runs"]
    assert [result["ruleId"] for result in run["results"]] == ["LS028"]


def test_empty_copy_of_an_embedding_is_a_finding(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "base_model.model.model.embed_tokens.weight"
    change(saved, lambda tensors: tensors | {name: np.empty(0, np.float32)})
    assert by_peft(saved) == "refused"
    assert ids(diagnosis(saved, capsys)) == ["LS026"]
    content = diagnosis(saved, capsys, "--base", str(saved / "base"))
    assert (ids(content), content["applied"]) == (["LS026"], 0)


def test_saved_head_of_other_labels_is_refused(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = saved / "base" / "model.safetensors"
    file.write_bytes(save(load_file(file) | {"score.weight": np.ones((2, 32), np.float32)}))
    change(saved, lambda tensors: tensors | {"base_model.model.score.weight": np.ones((3, 32), np.float32)})
    content = diagnosis(saved, capsys, "--base", str(saved / "base"))
    message = "the saved weights of score (3 x 32, in the base 2 x 32) do not fit the base"
    assert [finding["message"] for finding in content["findings"]] == [message]


UP, DOWN = np.ones((4, 2), np.float32), np.ones((2, 6), np.float32)
OTHER_FORMATS: dict[str, tuple[Tensors, dict[str, Any] | None, str]] = {
    "kohya without up": ({"lora_unet_mid.lora_down.weight": DOWN}, None, "LS027"),
    "kohya with two ranks": ({"lora_unet_mid.lora_down.weight": DOWN[:1], "lora_unet_mid.lora_up.weight": UP}, None,
                             "LS029"),
    "MLX without lora_b": ({"model.layers.0.mlp.up_proj.lora_a": UP}, {"fine_tune_type": "lora"}, "LS027"),
    "MLX with two ranks": ({"model.layers.0.mlp.up_proj.lora_a": UP, "model.layers.0.mlp.up_proj.lora_b": DOWN[:1]},
                           {"fine_tune_type": "lora"}, "LS029"),
    "LoHa with a factor of another shape": (
        {f"base_model.model.q.hada_w{factor}": array
         for factor, array in {"1_a": UP, "1_b": DOWN, "2_a": UP, "2_b": DOWN[:, :5]}.items()},
        {"peft_type": "LOHA", "r": 2},
        "LS029",
    ),
    "LoHa under ZeRO-3": (
        {f"base_model.model.q.hada_w{factor}": np.empty(0, np.float32) for factor in ("1_a", "1_b", "2_a", "2_b")},
        {"peft_type": "LOHA", "r": 2},
        "LS026",
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", OTHER_FORMATS)
def test_faults_of_other_formats_are_findings(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors, config, id = OTHER_FORMATS[form]
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(tensors, folder / ("adapters.safetensors" if "MLX" in form else "adapter_model.safetensors"))
    if config:
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert ids(diagnosis(tmp_path, capsys)) == [id]


def test_mlx_update_that_does_not_fit_the_base_is_a_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "adapter", "base":
        (tmp_path / name).mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"fine_tune_type": "lora"}', encoding="utf-8")
    module = "model.layers.0.mlp.up_proj"
    save_file({f"{module}.lora_a": DOWN.T.copy(), f"{module}.lora_b": UP.T.copy()},
              tmp_path / "adapter" / "adapters.safetensors")  # fmt: skip
    save_file({f"{module}.weight": np.ones((4, 7), np.float32)}, tmp_path / "base" / "model.safetensors")
    content = diagnosis(tmp_path, capsys, "--base", str(tmp_path / "base"))
    assert ids(content) == ["LS203"]
    assert content["findings"][0]["message"] == f"{module}.weight must have shape (4, 6), got (4, 7)"


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
def test_sound_prompt_has_no_findings(kind: str, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved / "base")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft.get_peft_model(model, config).save_pretrained(saved / "adapter")
    for options in [], ["--base", str(saved / "base")], ["--runtime", "peft"]:
        content = diagnosis(saved, capsys, *options)
        assert not content["findings"]
        assert "changes no weights" in content["notes"][0]
    assert main(["doctor", str(saved / "adapter")]) == 0
    assert capsys.readouterr().out.startswith("adapter        no findings, no weight updates\n")


def test_faults_are_pickled_for_other_processes() -> None:
    for fault in AdapterFault("rank", "a", "reason"), BaseMisfit("b", "reason"):
        copy = pickle.loads(pickle.dumps(fault))
        assert (type(copy), copy.kind, str(copy)) == (type(fault), fault.kind, str(fault))
