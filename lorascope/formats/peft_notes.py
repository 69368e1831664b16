"""Cautions that follow from the configuration of a PEFT LoRA: changed base weights, and updates of some tokens only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lorascope.files.printable import printable
from lorascope.formats.peft_config import RESIDUAL_INITS

_START = {
    "pissa": "PEFT subtracts the leading singular components of each base weight while loading",
    "olora": "PEFT subtracts the leading components of each base weight's QR decomposition while loading",
    "corda": "it requires the base weights that training started from, which PEFT computes from calibration data",
    "loftq": "PEFT replaces the base weights by quantized ones while loading",
    "lora_ga": "it requires the base weights that training started from, without the initial update",
}


def lora_notes(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the cautions about an adapter with this configuration."""
    start = str(config.get("init_lora_weights", True)).lower()
    kind = next((name for name in RESIDUAL_INITS if start.startswith(name)), None)
    if kind is not None:
        change = "|dW| is the norm of B A only, not of the change from the original base"
        yield f"initialized by {printable(start)}: {_START[kind]}; {change}"
    if config.get("alora_invocation_tokens"):
        yield (
            "Activated LoRA: the update applies only from the invocation tokens onward "
            f"({printable(config['alora_invocation_tokens'])}), and PEFT cannot merge it"
        )
