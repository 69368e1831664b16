"""Options of PEFT's LoRA, compared with the weights that PEFT merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from merged import adapt
from tiny import tiny

from lorascope.cli.main import main
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
