"""PEFT: modules come from the configuration, and the file is then loaded without strictness.

Source: PEFT 0.21, ``PeftModel.from_pretrained``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

from lorascope.diagnosis.causes.finding import Finding, first_and_count
from lorascope.diagnosis.runtimes.runtime import (
    MISSING,
    Target,
    find_absent_modules,
    find_misfitting_modules,
    omission,
    refusal,
    runtime,
)
from lorascope.formats.peft_config import peft_kind
from lorascope.formats.stored_update import PREFIX
from lorascope.schema.name_patterns import Patterns

_HEADS = re.compile(r"(^|\.)(lm_head|score|classifier|embed_out|pooler|embed_tokens|embed_positions|wte|wpe)(\.|$)")
_PREFIX = re.compile(f"^{re.escape(PREFIX)}")
_LAYER = re.compile(r"\.(\d+)\.")


@runtime("peft")
def check_peft(target: Target) -> Iterator[Finding]:
    """Find modules that PEFT drops, leaves at their start, or refuses."""
    modules, config = target.files.parts, target.config
    if "peft_type" not in config:
        yield refusal("it has no adapter_config.json of PEFT", "add the configuration that it was trained with")
        return
    bare = target.modules_of(target.keys_without(_PREFIX))
    if bare:
        yield omission(bare, len(modules), "with one warning, because their names lack base_model.model.",
                      "rename the tensors: add base_model.model.")  # fmt: skip
    if target.base is None:
        return
    yield from find_absent_modules(target, "without a warning")
    yield from find_misfitting_modules(target)
    targeted = _targeted_modules(target)
    if targeted is None:
        return
    if not targeted:
        entries = config.get("target_modules")
        yield refusal(f"target_modules={entries!r} names no module of the base", "correct target_modules")
        return
    configured = {name: target.files.configured.get(name, name) for name in modules}
    outside = []
    for name in modules:
        if name in target.modules and configured[name] not in targeted and name not in bare:
            outside.append(name)
    if outside:
        yield omission(outside, len(modules), "without a warning, because target_modules does not name them",
                      "add them to target_modules")  # fmt: skip
    missing = sorted(targeted.difference(configured.values(), target.files.configured.values()))
    # If all are missing, the names differ, which is a finding above.
    if missing and len(missing) < len(targeted):
        message = f"{len(missing)} of {len(targeted)} targeted modules have no factors: {first_and_count(missing)}"
        yield MISSING.finding(f"{message}; their base weights are used unchanged", modules=len(missing))


def _targeted_modules(target: Target) -> set[str] | None:
    """Return the modules of the base that the configuration targets; None if that does not follow from names."""
    config, entries = target.config, target.config.get("target_modules")
    # Only this type adapts the weights of norms.
    fewest_sides = 1 if peft_kind(config) == "LN_TUNING" else 2
    names = {name for name, shape in target.modules.items() if len(shape) >= fewest_sides}
    names.update(target.files.configured.values())
    if entries is None or config.get("target_parameters") or config.get("layer_replication"):
        return None
    if entries == "all-linear":
        return {name for name in names if not _HEADS.search(name) and "embed" not in name}
    targeted = _matches(names, entries, "target_modules")
    targeted -= _matches(targeted, config.get("exclude_modules") or [], "exclude_modules")
    layers: Any = config.get("layers_to_transform")
    if layers is not None:
        if isinstance(layers, int):
            layers = [layers]
        for name in sorted(targeted):
            match = _LAYER.search(name)
            if match is None or int(match[1]) not in layers:
                targeted.remove(name)
    return targeted - _matches(targeted, [*(config.get("modules_to_save") or [])], "modules_to_save")


def _matches(names: Collection[str], entries: str | Collection[str], field: str) -> set[str]:
    """Return the names that match a pattern, or that are or end with one of several entries."""
    if isinstance(entries, str):
        pattern = Patterns([entries], field)
        return {name for name in names if pattern.first(name) is not None}
    ends = tuple(map(".{}".format, entries))
    return {name for name in names if name in entries or name.endswith(ends)}
