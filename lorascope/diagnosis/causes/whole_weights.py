"""Weights that are stored in addition to the factors, with their distance from the base."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from lorascope.diagnosis.case import Case
from lorascope.diagnosis.causes.finding import DoctorRule, Findings, finding, module_names
from lorascope.files.printable import count_phrase
from lorascope.formats.peft_whole_weights import WholeWeight, whole_weights
from lorascope.formats.pretrained_weights import PretrainedWeights
from lorascope.formats.stored_update import plain_name, stored_tensors
from lorascope.schema.module_roles import parse
from lorascope.updates.linalg import as_float64

_NAMES = {"full": "saved as full weights", "copy": "saved with their base weight", "tokens": "rows of single tokens"}
_BLOCK = 2**22  # values of a weight in memory at once


@DoctorRule(
    "LS026",
    "empty-tensors",
    "error",
    needs="config",
    problem="Tensors are empty or flat, because each process saved its own part.",
    evidence="a tensor without values or a factor with one dimension, as under ZeRO-3 or FSDP without gathering",
    fix="gather while saving (DeepSpeed: stage3_gather_16bit_weights_on_model_save; FSDP: FULL_STATE_DICT), or convert "
    "the checkpoint with zero_to_fp32.py",
)
def empty_tensors(case: Case) -> Findings:
    """Find empty weights that an adapter stores in addition to factors; empty factors prevent reading it."""
    names = []
    for tensor in stored_tensors(case.files.files):
        # The factors of AdaLoRA may have no components.
        if 0 in tensor.file.shape(tensor.name) and plain_name(tensor.name) in case.files.others:
            names.append(plain_name(tensor.name))
    if names:
        count = f"{count_phrase(len(names), 'tensor')} without values, saved under ZeRO-3 or FSDP without gathering"
        yield finding(count, names, tensors=len(names))


@DoctorRule(
    "LS107",
    needs="config",
    problem="Weights are saved next to the factors.",
    evidence="number of parameters, and the distance from the base",
)
def other_weights(case: Case) -> Findings:
    """Find whole weights saved in addition to factors, with distance from the base, and modules not in the base."""
    weights, base = whole_weights(case.files), case.base
    by_kind: dict[str, list[WholeWeight]] = defaultdict(list)
    for weight in weights:
        by_kind[weight.kind].append(weight)
    reason = "without a base"
    if base is not None:
        yield from _measured_weights(weights, base)
        reason = "because they are not in the base"
    for kind, name in _NAMES.items():
        unmeasured = [weight for weight in by_kind[kind] if not _is_in_base(weight.module, base)]
        yield from _total_size(unmeasured, f"{name}, {{}}, not measured {reason}")
    full_modules = set(module_names(by_kind["full"]))
    biases = [weight for weight in by_kind["bias"] if weight.module not in full_modules]
    yield from _total_size(biases, f"biases, {{}}, {_bias_change(base, biases)}")
    norms = []
    for weight in by_kind["bias update"]:
        scale = np.nan
        if weight.module in case.stored_updates:
            scale = case.stored_updates[weight.module].scale
        norms.append(scale * _stored_norm(weight))
    yield from _total_size(by_kind["bias update"], f"bias updates (lora_bias), {{}}, norm {math.hypot(*norms):.3g}")
    change = math.hypot(*map(_stored_norm, by_kind["bias difference"]))
    yield from _total_size(by_kind["bias difference"], f"bias differences, {{}}, |db| {change:.3g}")
    yield from _total_size(by_kind["ignored"], "tensors without effect, {}")
    yield from _total_size(by_kind["unread"], "tensors that are not read, {}")
    if base is not None:
        missing = [module for module in case.stored_updates if not base.has_weight(module)]
        if missing:
            yield finding("not in the base, perhaps tied", missing)


def _measured_weights(weights: Sequence[WholeWeight], base: PretrainedWeights) -> Findings:
    """Yield the weights that are in the base, with their distance from it; copies that equal it are one finding."""
    unchanged_copies = []
    for weight in weights:
        if weight.kind not in _NAMES or not _is_in_base(weight.module, base):
            continue
        norm, message = _distance(base, weight)
        if weight.kind == "copy" and norm == 0:
            unchanged_copies.append(weight)
        else:
            yield finding(f"{_NAMES[weight.kind]}: {weight.module}, {weight.size:,} parameters, {message}")
    yield from _total_size(unchanged_copies, "copies of base weights, {}, equal to the base")


def _is_in_base(module: str, base: PretrainedWeights | None) -> bool:
    return base is not None and base.has_weight(module)


def _total_size(weights: Sequence[WholeWeight], message: str) -> Findings:
    """Yield one finding with the size of several weights, if there is one."""
    if weights:
        total = sum(weight.size for weight in weights)
        yield finding(message.format(f"{total:,} parameters"), module_names(weights))


def _stored_norm(weight: WholeWeight) -> float:
    return float(np.linalg.norm(as_float64(weight.tensor.read())))


def _bias_change(base: PretrainedWeights | None, biases: Sequence[WholeWeight]) -> str:
    """Return the norm of the change of all biases from the base, if it has them all."""
    if base is None:
        return "not measured"
    norms = []
    for bias in biases:
        before, after = base.bias(bias.module), as_float64(bias.tensor.read().reshape(-1))
        if before is None or before.shape != after.shape:
            return "not measured"
        norms.append(np.linalg.norm(after - as_float64(before)))
    return f"|db| {math.hypot(*norms):.3g}"


def _distance(base: PretrainedWeights, weight: WholeWeight) -> tuple[float, str]:
    """Return the norm of the change from the base and its description; NaN if the shapes do not fit.

    Rows of a vocabulary that are not in the base are new tokens, which have no change.
    """
    base_shape, shape = base.shape(weight.module), weight.tensor.shape
    rows = np.array(weight.rows or range(shape[0]))
    shared = np.flatnonzero(rows < base_shape[0])
    is_vocabulary = weight.kind == "copy" or parse(weight.module).role == "embed" or weight.module.endswith("lm_head")
    # A resized vocabulary may have rows that the base lacks; any other weight must have the same.
    has_rows = weight.rows or base_shape[0] == shape[0] or (is_vocabulary and base_shape < shape)
    if base_shape[1] != shape[1] or not has_rows:
        size, base_size = " x ".join(map(str, shape)), " x ".join(map(str, base_shape))
        return np.nan, f"not measured: it is {size}, in the base {base_size}"
    W0, W = base.unread(weight.module), weight.tensor.file.unread(weight.tensor.name)
    changes, starts = [], []
    for block in np.array_split(shared, max(1, len(shared) * shape[1] // _BLOCK)):
        before, after = as_float64(W0[rows[block]].read()), as_float64(W[block].read())
        changes.append(np.linalg.norm(after - before))
        starts.append(np.linalg.norm(before))
    change, start = math.hypot(*changes), math.hypot(*starts)
    relative = 0.0
    if start:
        relative = change / start
    elif change:
        relative = np.inf
    message = f"|dW| {change:.3g} ({100 * relative:.3g}% of |W|)"
    if new_rows := len(rows) - len(shared):
        return np.nan, f"{message}, without {count_phrase(new_rows, 'new row')}"
    return change, message
