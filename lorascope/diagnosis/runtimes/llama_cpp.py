"""llama.cpp: the conversion reads only ``lora_alpha`` and the factors.

Source: llama.cpp, ``convert_lora_to_gguf.py``, autumn 2026.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from lorascope.diagnosis.causes.finding import Finding
from lorascope.diagnosis.runtimes.runtime import (
    Target,
    alteration,
    find_misfitting_modules,
    largest_rank,
    refusal,
    runtime,
)
from lorascope.files.printable import first_of

_READ = re.compile(r"\.lora_[AB](\.weight)?$|\.lora_embedding_[AB]$|\.base_layer\.weight$|_norm")


@runtime("llama.cpp")
def check_llama_cpp(target: Target) -> Iterator[Finding]:
    """Find what the conversion for llama.cpp refuses, and options that it does not read."""
    config = target.config
    if foreign := target.keys_without(_READ):
        fix = "merge the adapter into the base, and convert that"
        yield refusal(f"it converts no tensors with these names: {first_of(foreign)}", fix)
    # An adapter with magnitudes is already refused for the names of its tensors.
    if config.get("use_rslora") and not any("lora_magnitude_vector" in key for key in target.keys):
        factor = math.sqrt(largest_rank(target))
        yield alteration(f"use_rslora is not read: the update is {factor:.3g} times too small",
                      f"set lora_alpha to {config.get('lora_alpha', 8) * factor:g} and use_rslora to false",
                      factor=factor)  # fmt: skip
    if config.get("alpha_pattern"):
        fix = "scale lora_B of these modules, and remove alpha_pattern"
        yield alteration("alpha_pattern is not read: every module gets lora_alpha / rank", fix)
    if target.absent:
        yield refusal(f"the base has no such module: {first_of(target.absent)}",
                      "convert it with the base that it was trained on", modules=len(target.absent))  # fmt: skip
    heads = [module for module in target.files.parts if module.endswith("lm_head")]
    if heads and target.base is not None and target.modules.keys().isdisjoint(heads):
        yield refusal("it adapts lm_head, and the base shares that weight with its embedding", "train without lm_head")
    yield from find_misfitting_modules(target)
