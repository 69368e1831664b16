"""Options of PEFT's LoRA, compared with the weights that PEFT merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from merged import adapt, changes
from tiny import tiny

from lorascope.cli.main import main
from lorascope.diagnosis.inspection import inspect
from lorascope.files.safetensors_io import read_json, write_json
from lorascope.runs.formats.peft_lora import CONFIG
from lorascope.runs.loading import load

QV = ["q_proj", "v_proj"]


def configure(folder: Path, **changes: Any) -> None:
    """Change the configuration of an adapter."""
    write_json(folder / CONFIG, read_json(folder / CONFIG, dict[str, Any]) | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"init_lora_weights": "pissa"}, "initialized by pissa: PEFT subtracts the leading singular components"),
        ({"init_lora_weights": "pissa_niter_16"}, "initialized by pissa_niter_16"),
        ({"init_lora_weights": "olora"}, "QR decomposition"),
        ({"init_lora_weights": "corda"}, "calibration data"),
        ({"init_lora_weights": "loftq"}, "quantized"),
        ({"alora_invocation_tokens": [3, 4]}, "Activated LoRA: the update applies only from the invocation tokens"),
        ({"use_dora": False}, None),
        ({"init_lora_weights": "gaussian"}, None),
        ({"init_lora_weights": False}, None),
    ],
)
def test_cautions_are_shown_by_inspect_and_doctor(
    tmp_path: Path, changes: dict[str, Any], words: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    adapt(tiny("llama"), tmp_path, target_modules=QV)
    configure(tmp_path, **changes)
    notes = load(tmp_path).files.notes
    assert len(notes) == (words is not None)
    for command in ("inspect", "doctor"):
        assert main([command, str(tmp_path)]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert all(note in shown for note in notes)
        assert words is None or words in shown


WEIGHTS_BESIDE: dict[str, tuple[str, dict[str, Any], dict[str, Any], str, str]] = {
    "saved": ("llama", {}, {"modules_to_save": ["lm_head"]}, "lm_head", "saved as full weights: {}, 2,048 parameters"),
    "tokens": (
        "llama",
        {},
        {"trainable_token_indices": [9, 1]},
        "model.embed_tokens",
        "rows of single tokens: {}, 64 p",
    ),
    "tokens by module": (
        "llama",
        {},
        {"trainable_token_indices": {"lm_head": [5, 2, 7]}},
        "lm_head",
        "rows of single tokens: {}, 96 parameters",
    ),
    "tied tokens": (
        "llama",
        {"tie_word_embeddings": True},
        {"trainable_token_indices": [9, 1]},
        "model.embed_tokens",
        "rows of single tokens: {}, 64 parameters",
    ),
}


@pytest.mark.parametrize(("family", "sizes", "config", "module", "line"), WEIGHTS_BESIDE.values(), ids=WEIGHTS_BESIDE)
def test_whole_weights_are_measured_as_pefts_change(
    tmp_path: Path, family: str, sizes: dict[str, Any], config: dict[str, Any], module: str, line: str
) -> None:
    base = tiny(family, **sizes)
    base.save_pretrained(tmp_path / "base")
    adapt(base, tmp_path / "adapter", target_modules=["q_proj"], **config)
    change = changes(base, tmp_path / "adapter")[f"{module}.weight"]
    before = base.get_submodule(module).weight.detach()[change.any(1)].norm()
    found = inspect(load(tmp_path / "adapter", tmp_path / "base")).findings
    norm = float(change.norm())
    expected = f"{line.format(module)}"
    (shown,) = (each for each in found if each.startswith(expected))
    assert shown.endswith(f"|dW| {norm:.3g} ({100 * norm / float(before):.3g}% of |W|)")
    (alone,) = (each for each in inspect(load(tmp_path / "adapter")).findings if module in each)
    assert alone.endswith(f"not measured without a base: {module}")


def test_copies_of_the_base_are_named(tmp_path: Path) -> None:
    base = tiny("llama")
    base.save_pretrained(tmp_path / "base")
    adapt(base, tmp_path / "adapter", target_modules=["embed_tokens", "lm_head"])
    alone, both = (inspect(load(tmp_path / "adapter", each)).findings for each in (None, tmp_path / "base"))
    assert "copies of base weights, 4,096 parameters, equal to the base: lm_head and 1 more" in both
    assert "saved with their base weight, 4,096 parameters, not measured without a base: lm_head and 1 more" in alone


def test_biases_are_counted(tmp_path: Path) -> None:
    base = tiny("bert")
    adapt(base, tmp_path / "only", target_modules=["query"], bias="lora_only")
    query = "bert.encoder.layer.0.attention.self.query"
    assert f"biases, 64 parameters, not measured: {query} and 1 more" in inspect(load(tmp_path / "only")).findings
    adapt(base, tmp_path / "update", target_modules=["query"], lora_bias=True)
    merged = changes(base, tmp_path / "update")
    norm = sum(float(change.square().sum()) for name, change in merged.items() if name.endswith("bias")) ** 0.5
    line = f"bias updates (lora_bias), 64 parameters, norm {norm:.3g}: {query} and 1 more"
    assert line in inspect(load(tmp_path / "update")).findings


def test_rows_of_tokens_that_contradict_the_configuration_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapt(tiny("llama"), tmp_path, target_modules=["q_proj"], trainable_token_indices=[9, 1])
    configure(tmp_path, trainable_token_indices=[1])
    assert main(["inspect", str(tmp_path)]) == 2
    assert "must be those of trainable_token_indices (1), got 2 rows" in capsys.readouterr().err
