"""PEFT: modules come from the configuration, and the file is then loaded without strictness.

Source: PEFT 0.21, ``PeftModel.from_pretrained``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from lorascope.diagnosis.causes.finding import Finding, first_and_count
from lorascope.diagnosis.runtimes.runtime import (
    MISSING,
    Target,
    absent_modules,
    dropped,
    misfitting_modules,
    refused,
    runtime,
    without_prefix,
)
from lorascope.schema.name_patterns import Patterns

_HEADS = re.compile(r"(^|\.)(lm_head|score|classifier|embed_out|pooler|embed_tokens|embed_positions|wte|wpe)(\.|$)")
_LAYER = re.compile(r"\.(\d+)\.")


@runtime("peft")
def check_peft(target: Target) -> Iterator[Finding]:
    """Find modules that PEFT drops, leaves at their start, or refuses."""
    modules, config = target.files.parts, target.config
    if "peft_type" not in config:
        yield refused("it has no adapter_config.json of PEFT", "add the configuration that it was trained with")
        return
    bare = without_prefix(target)
    if bare:
        yield dropped(bare, len(modules), "with one warning, because their names lack base_model.model.",
                      "rename the tensors: add base_model.model.")  # fmt: skip
    if target.base is None:
        return
    yield from absent_modules(target, "without a warning")
    yield from misfitting_modules(target)
    adapted = _targeted(target)
    if adapted is None:
        return
    if not adapted:
        named = config.get("target_modules")
        yield refused(f"target_modules={named!r} names no module of the base", "correct target_modules")
        return
    outside = [name for name in modules if name in target.modules and name not in adapted and name not in bare]
    if outside:
        yield dropped(outside, len(modules), "without a warning, because target_modules does not name them",
                      "add them to target_modules")  # fmt: skip
    lacking = sorted(adapted - modules.keys())
    if lacking and len(lacking) < len(adapted):
        message = f"{len(lacking)} of {len(adapted)} targeted modules have no factors: {first_and_count(lacking)}"
        yield MISSING.finding(f"{message}; their base weights are used unchanged", modules=len(lacking))


def _targeted(target: Target) -> set[str] | None:
    """Return the modules of the base that the configuration targets; None if that does not follow from names."""
    config, names = target.config, target.modules
    named: Any = config.get("target_modules")
    if named is None or config.get("target_parameters") or config.get("layer_replication"):
        return None
    if named == "all-linear":
        return {name for name in names if not _HEADS.search(name) and "embed" not in name}
    if isinstance(named, str):
        pattern = Patterns([named], "target_modules")
        found = {name for name in names if pattern.first(name) is not None}
    else:
        found = {name for name in names if any(name == each or name.endswith(f".{each}") for each in named)}
    excluded: Any = config.get("exclude_modules") or []
    if isinstance(excluded, str):
        unwanted = Patterns([excluded], "exclude_modules")
        found = {name for name in found if unwanted.first(name) is None}
    else:
        found = {name for name in found if not any(name == each or name.endswith(f".{each}") for each in excluded)}
    layers: Any = config.get("layers_to_transform")
    if layers is not None:
        wanted = {layers} if isinstance(layers, int) else set(layers)
        found = {name for name in found if (at := _LAYER.search(name)) and int(at[1]) in wanted}
    saved = config.get("modules_to_save") or []
    return {name for name in found if not any(name == each or name.endswith(f".{each}") for each in saved)}
