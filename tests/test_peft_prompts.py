"""Adapters of PEFT that change no weights are described in one sentence."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
from safetensors.numpy import load_file, save
from tiny import tiny

import lorascope as ls
from lorascope.cli.main import main

CAUSAL = {"task_type": "CAUSAL_LM"}
PROMPTS: dict[str, tuple[str, dict[str, Any]]] = {
    "PROMPT_TUNING": ("PromptTuningConfig", {"num_virtual_tokens": 3}),
    "P_TUNING": ("PromptEncoderConfig", {"num_virtual_tokens": 3, "encoder_hidden_size": 8}),
    "PREFIX_TUNING": ("PrefixTuningConfig", {"num_virtual_tokens": 3}),
    "MULTITASK_PROMPT_TUNING": ("MultitaskPromptTuningConfig", {"num_virtual_tokens": 3, "num_tasks": 2}),
    "CPT": ("CPTConfig", {"cpt_token_ids": [3, 4, 5], "cpt_mask": [1] * 3, "cpt_tokens_type_mask": [1, 2, 3]}),
    "ADAPTION_PROMPT": ("AdaptionPromptConfig", {"adapter_len": 3, "adapter_layers": 2}),
    "CARTRIDGE": ("CartridgeConfig", {"num_virtual_tokens": 3, "num_frozen_tokens": 1}),
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LILY": ("LilyConfig", {"r": 2, "stride_A": 1, "num_B": 2, "target_modules": ["q_proj"]}),
    "POLY": ("PolyConfig", {"r": 2, "n_tasks": 2, "n_skills": 2, "target_modules": ["q_proj"]}),
    "SHADOW": ("ShadowConfig", {"r": 2, "target_modules": ["q_proj"]}),
    "BEFT": ("BeftConfig", {"target_modules": ["q_proj"]}),
}


def written(folder: Path, config: str, settings: dict[str, Any]) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(tiny("llama"), getattr(peft, config)(**CAUSAL, **settings)).save_pretrained(folder)
    return folder


def described(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the sentence that inspect prints and load raises."""
    assert main(["inspect", str(folder)]) == 0
    sentence = capsys.readouterr().out.removesuffix("\n")
    assert "\n" not in sentence
    assert main(["inspect", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(folder), "message": sentence}
    with pytest.raises(ValueError, match=r"^cannot load ") as raised:
        ls.load(folder)
    assert str(raised.value) == f"cannot load {folder}: {sentence}"
    assert main(["doctor", str(folder), "--json"]) == 0
    diagnosis = json.loads(capsys.readouterr().out)
    assert (diagnosis["findings"], diagnosis["notes"]) == ([], [sentence])
    return sentence


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompt_is_described_by_its_tokens_and_their_norms(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = described(written(tmp_path, *PROMPTS[kind]), capsys)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prompts = [tensor for name, tensor in tensors.items() if name.endswith(("prompt_embeddings", "adaption_prompt"))]
    norms = np.linalg.norm(np.vstack([prompt.reshape(3, -1) for prompt in prompts]).astype(np.float64), axis=1)
    span = f"{norms.min():.4g} to {norms.max():.4g}, median {np.median(norms):.4g}"
    assert sentence.startswith(f"{kind} changes no weights: it trains 3 virtual tokens ")
    assert sentence.endswith(f"with norms {span}")
    assert ("in each of 2 layers" in sentence) == (kind == "ADAPTION_PROMPT")
    assert f"of width {prompts[0].shape[-1]}" in sentence


@pytest.mark.parametrize("kind", OTHERS)
def test_routed_adapter_is_described_by_its_modules(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = described(written(tmp_path, *OTHERS[kind]), capsys)
    assert kind == "SHADOW" or "2 modules" in sentence


def test_prompt_without_its_tensor_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, *PROMPTS["PROMPT_TUNING"])
    must = "PROMPT_TUNING weights must include prompt_embeddings (tokens, width)\n"
    for tensors, reason in (
        ({}, must),
        ({"prompt_embeddings": np.ones(3, np.float32)}, must),
        ({"prompt_embeddings": np.ones((0, 3), np.float32)}, "prompt_embeddings is empty: saved under ZeRO-3 or FSDP "
                                                             "without gathering\n"),
    ):  # fmt: skip
        (tmp_path / "adapter_model.safetensors").write_bytes(save(tensors))
        assert main(["inspect", str(tmp_path)]) == 2
        assert capsys.readouterr().err.endswith(reason)


def test_xlora_is_described_by_its_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"peft_type": "XLORA", "adapters": {"0": "somewhere"}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    classifier = {"base_model.model.internal_xlora_classifier.last.weight": np.ones((2, 3), np.float32)}
    (tmp_path / "adapter_model.safetensors").write_bytes(save(classifier))
    assert "inspect those adapters instead" in described(tmp_path, capsys)


@pytest.mark.parametrize("block", [1, 2**22])
def test_prompt_started_from_tokens_names_them(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lorascope.formats.nearest_tokens._BLOCK", block)
    draw = np.random.default_rng(0)
    embedding = draw.standard_normal((50, 8)).astype("f4")
    embedding[4] = 0
    base = tmp_path / "base"
    base.mkdir()
    tensors = {"model.embed_tokens.weight": embedding, "model.type_embeddings.weight": embedding[:2, ::-1].copy()}
    (base / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    started = [7, 3, 49, 7]
    prompt = np.array([[3], [1], [0.2], [-1]], "f4") * embedding[started] + 1e-3 * draw.standard_normal((4, 8))
    adapter = write_prompt(tmp_path / "adapter", prompt)
    unit = embedding / np.maximum(np.linalg.norm(embedding, axis=1, keepdims=True), 1e-9)
    cosines = unit @ prompt[3] / np.linalg.norm(prompt[3])
    assert main(["inspect", str(adapter), "--base", str(base)]) == 0
    last = f"{cosines.argmax()} ({cosines.max():.2f})"
    expected = f"; nearest tokens of the base (cosine): 7 (1.00), 3 (1.00), 49 (1.00), {last}\n"
    assert capsys.readouterr().out.endswith(expected)
    vocabulary = {f"word\x1b{number}": number for number in range(50)}
    (base / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocabulary}}))
    assert main(["inspect", str(adapter), "--base", str(base)]) == 0
    assert r": 7 'word\x1b7' (1.00), 3 'word\x1b3' (1.00)" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"nearest tokens of the base .*: 7 'word"):
        ls.load(adapter, base)


def write_prompt(folder: Path, prompt: np.ndarray) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING"}))
    (folder / "adapter_model.safetensors").write_bytes(save({"prompt_embeddings": prompt.astype("f4")}))
    return folder


def test_prompt_of_another_width_or_without_finite_values_has_no_nearest_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    command = ["inspect", str(tmp_path / "adapter"), "--base", str(tmp_path / "base")]
    write_prompt(tmp_path / "adapter", np.ones((2, 5)))
    assert main(command) == 0
    assert capsys.readouterr().out.endswith("; the base has no embedding of width 5\n")
    write_prompt(tmp_path / "adapter", np.full((1, 32), np.nan))
    assert main(command) == 0
    assert capsys.readouterr().out.endswith("; nearest tokens of the base (cosine): none\n")
