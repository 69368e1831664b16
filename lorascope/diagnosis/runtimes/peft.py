"""PEFT: modules come from the configuration, and the file is then loaded without strictness.

Source: PEFT 0.21, ``PeftModel.from_pretrained``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from typing import Any

from lorascope.diagnosis.causes.finding import Finding, inflect
from lorascope.diagnosis.causes.whole_weights import empty_tensors
from lorascope.diagnosis.runtimes.runtime import (
    MISSING,
    Target,
    find_absent_modules,
    find_misfitting_modules,
    join_sides,
    omission,
    refusal,
    runtime,
)
from lorascope.files.printable import first_of
from lorascope.formats.peft_config import peft_kind
from lorascope.formats.peft_whole_weights import WholeWeight, whole_weights
from lorascope.formats.stored_update import PREFIX
from lorascope.schema.name_patterns import Patterns

_HEADS = re.compile(r"(^|\.)(lm_head|score|classifier|embed_out|pooler|embed_tokens|embed_positions|wte|wpe)(\.|$)")
_PREFIX = re.compile(f"^{re.escape(PREFIX)}")
# Wrappers of PEFT around a module whose weights are stored in addition to factors.
_WRAPPER = re.compile(r"\.(modules_to_save|original_module|token_adapter)$")
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
    yield from empty_tensors.findings(target.case)
    if target.base is None:
        return
    yield from find_absent_modules(target, "without a warning")
    yield from find_misfitting_modules(target, explained=_token_counts(target))
    yield from _find_misfitting_weights(target)
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
        message = f"{len(missing)} of {len(targeted)} targeted modules have no factors: {first_of(missing)}"
        yield MISSING.finding(f"{message}; their base weights are used unchanged", modules=len(missing))


def _find_misfitting_weights(target: Target) -> Iterator[Finding]:
    """Yield the stored whole weights that do not fit the base, and those of another number of tokens with a fix."""
    tokens = _token_counts(target)
    if tokens and target.embedding is not None:
        count, verb = max(tokens.values()), inflect(len(tokens), "has", "have")
        reason = f"{first_of(tokens)} {verb} {count} tokens, and the base {target.embedding[0]}"
        fix = f"resize the embeddings of the base before loading the adapter: model.resize_token_embeddings({count})"
        yield refusal(reason, fix, tokens=count, of=target.embedding[0])
    misfits = []
    for module, weight in _saved_weights(target):
        shape = target.find_shape(module)
        if weight.kind != "tokens" and module not in tokens and shape and math.prod(shape) != weight.size:
            misfits.append(f"{module} ({join_sides(weight.tensor.shape)}, in the base {join_sides(shape)})")
    if misfits:
        reason = f"the saved weights of {first_of(misfits)} do not fit the base"
        yield refusal(reason, "load it into the model that it was trained on", modules=len(misfits))


def _saved_weights(target: Target) -> Iterator[tuple[str, WholeWeight]]:
    """Yield the weights that are not empty and replace those of a module, or rows of them, with its name."""
    for weight in whole_weights(target.files):
        if weight.kind in ("full", "copy", "tokens") and weight.size:
            yield _WRAPPER.sub("", weight.module), weight


def _token_counts(target: Target) -> dict[str, int]:
    """Return the number of tokens of each embedding or head whose number does not fit the base."""
    if target.embedding is None:
        return {}
    counts, (base_count, width) = {}, target.embedding
    for module in target.misfits:
        shape = target.files.parts[module].shape
        if target.find_shape(module) == target.embedding and width in shape:
            counts[module] = sum(shape) - width
    for module, weight in _saved_weights(target):
        count, columns = weight.tensor.shape
        if weight.kind == "tokens":  # only some tokens have stored rows
            count = max(base_count, max(weight.rows) + 1)
        if count != base_count and columns == width and target.find_shape(module) == target.embedding:
            counts[module] = count
    return counts


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
