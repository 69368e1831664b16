"""Files of PEFT's adapters, and the settings of their configuration that several readers or runs share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from lorascope.files import hub
from lorascope.files.typed_json import Count, Finite, Positive

CONFIG = hub.CONFIG
STEM = "adapter_model"
WEIGHTS = f"{STEM}.safetensors"
KINDS = ["LORA", "ADALORA", "FOURIERFT", "VERA", "TRAINABLE_TOKENS"]
"""Types of adapters with an own reader; every `PeftFormat` adds its own."""
# Values of init_lora_weights, which may have a suffix, such as pissa_niter_16.
RESIDUAL_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
# Their peft_type is LORA as well, so only a setting shows them.
_VARIANTS = {"use_qalora": "QALoRA", "use_bdlora": "BD-LoRA", "kasa_config": "KaSA", "arrow_config": "Arrow"}


class Allocation(msgspec.Struct, frozen=True):
    """AdaLoRA's budget and schedule in a PEFT configuration, also under the names of lorascope."""

    kind: str | None = None
    target_rank: Finite = 1
    target_r: Finite = 1
    init_rank: Positive = 1
    init_r: Positive = 1
    tinit: Count = 0
    deltaT: Positive = 1
    tfinal: Count = 0
    total_step: Count | None = None


class CommonConfig(Allocation, frozen=True):
    """Settings used from the configuration of LoRA and of every other kind of PEFT adapter."""

    peft_type: str = ""
    base_model_name_or_path: str | None = None
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    lora_alpha: Finite | None = 8
    alpha: Finite | None = None  # the name of lora_alpha in LoHa, LoKr and GraLoRA
    randlora_alpha: Finite | None = None
    rank_pattern: dict[str, Any] | None = None
    alpha_pattern: dict[str, Any] | None = None


class LoraConfig(msgspec.Struct, frozen=True):
    """Settings used from PEFT's configuration of LoRA and DoRA, with its defaults."""

    r: Positive = 8
    lora_alpha: Finite = 8
    rank_pattern: dict[str, Positive] | None = None
    alpha_pattern: dict[str, Finite] | None = None
    use_rslora: bool | None = None
    fan_in_fan_out: bool | None = None


def peft_kind(config: Mapping[str, Any]) -> str:
    """Return the type of a PEFT adapter in capitals, such as LORA, or its variant; "" without a configuration."""
    for setting, variant in _VARIANTS.items():
        if config.get(setting):
            return variant
    return str(config.get("peft_type", "")).upper()
