"""Adapters of PEFT whose files are the factors of a plain LoRA, from which a training can start."""

from __future__ import annotations

from lorascope.formats.peft_config import RESIDUAL_INITS, peft_kind
from lorascope.formats.stored_update import StoredLoRA
from lorascope.runs.adapter import Adapter


def plain_lora_problem(adapter: Adapter) -> str:
    """Return why the files of an adapter are more than the factors of a LoRA, or empty."""
    config = adapter.files.config
    if not peft_kind(config):
        return "it is not a folder of PEFT"
    method = adapter.files.kind.lower()
    if method != "lora":
        return f"its method is {method}, not lora"
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        return "it has trained biases"
    if str(config.get("init_lora_weights")).startswith(RESIDUAL_INITS):
        return "its factors are relative to other base weights"
    for module, stored in adapter.files.parts.items():
        if type(stored) is not StoredLoRA:
            return f"its update of {module} is not a product of two factors"
    return ""
