"""Weights that are stored in addition to the factors, with their distance from the base."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lorascope.diagnosis.case import Case
from lorascope.diagnosis.causes.finding import DoctorRule, Found, found
from lorascope.files.printable import count_phrase
from lorascope.formats.peft_whole_weights import WholeWeight, whole_weights
from lorascope.formats.pretrained_weights import PretrainedWeights
from lorascope.schema.module_roles import parse
from lorascope.updates.linalg import as_float64

_NAMES = {"full": "saved as full weights", "copy": "saved with their base weight", "tokens": "rows of single tokens"}
_BLOCK = 2**22  # values of a weight in memory at once


@DoctorRule(id="LS107")
def other_weights(case: Case) -> Found:
    """Find weights saved next to the factors, with their distance from the base, and modules not in the base."""
    weights, base = whole_weights(case.files), case.base
    known = [each for each in weights if each.kind in _NAMES and base is not None and base.has_weight(each.module)]
    same = []
    for each in known:
        assert base is not None
        norm, message = _distance(base, each)
        if each.kind == "copy" and norm == 0:
            same.append(each)
        else:
            yield found(f"{_NAMES[each.kind]}: {each.module}, {each.size:,} parameters, {message}")
    yield from _listed(same, "copies of base weights, {}, equal to the base")
    why = "without a base" if base is None else "because they are not in the base"
    for kind, name in _NAMES.items():
        absent = [each for each in weights if each.kind == kind and each not in known]
        yield from _listed(absent, f"{name}, {{}}, not measured {why}")
    saved = {each.module for each in weights if each.kind == "full"}
    biases = [each for each in weights if each.kind == "bias" and each.module not in saved]
    yield from _listed(biases, f"biases, {{}}, {_bias_change(base, biases)}")
    updates = [each for each in weights if each.kind == "bias update"]
    scales = {module: part.scale for module, part in case.parts.items()}
    norms = [scales.get(each.module, np.nan) * np.linalg.norm(as_float64(each.tensor.read())) for each in updates]
    yield from _listed(updates, f"bias updates (lora_bias), {{}}, norm {math.hypot(*norms):.3g}")
    differences = [each for each in weights if each.kind == "bias difference"]
    norms = [np.linalg.norm(as_float64(each.tensor.read())) for each in differences]
    yield from _listed(differences, f"bias differences, {{}}, |db| {math.hypot(*norms):.3g}")
    yield from _listed([each for each in weights if each.kind == "ignored"], "tensors without effect, {}")
    yield from _listed([each for each in weights if each.kind == "unread"], "tensors that are not read, {}")
    lacking = [module for module in case.parts if base is not None and not base.has_weight(module)]
    if lacking:
        yield found("not in the base, perhaps tied", lacking)


def _listed(weights: Sequence[WholeWeight], message: str) -> Found:
    """Yield one finding about several weights, if there is one."""
    if weights:
        total = sum(each.size for each in weights)
        yield found(message.format(f"{total:,} parameters"), [each.module for each in weights])


def _bias_change(base: PretrainedWeights | None, biases: Sequence[WholeWeight]) -> str:
    """Return the norm of the change of all biases from the base, if it has them all."""
    norms = []
    for each in biases:
        old, new = None if base is None else base.bias(each.module), as_float64(each.tensor.read().reshape(-1))
        if old is None or old.shape != new.shape:
            return "not measured"
        norms.append(np.linalg.norm(new - as_float64(old)))
    return f"|db| {math.hypot(*norms):.3g}"


def _distance(base: PretrainedWeights, weight: WholeWeight) -> tuple[float, str]:
    """Return the norm of the change from the base and its description; NaN if the shapes do not fit.

    Rows of a vocabulary that are not in the base are new tokens, which have no change.
    """
    before, stored = base.shape(weight.module), weight.tensor.shape
    rows = np.array(weight.rows or range(stored[0]))
    shared = np.flatnonzero(rows < before[0])
    is_vocabulary = weight.kind == "copy" or parse(weight.module).role == "embed" or weight.module.endswith("lm_head")
    if before[1] != stored[1] or not (weight.rows or before[0] == stored[0] or (is_vocabulary and before < stored)):
        sizes = ", in the base ".join(" x ".join(map(str, sides)) for sides in (stored, before))
        return np.nan, f"not measured: it is {sizes}"
    W0, W = base.unread(weight.module), weight.tensor.file.unread(weight.tensor.name)
    norms = []
    for block in np.array_split(shared, max(1, len(shared) * stored[1] // _BLOCK)):
        old, new = as_float64(W0[rows[block]].read()), as_float64(W[block].read())
        norms.append((np.linalg.norm(new - old), np.linalg.norm(old)))
    change, start = (math.hypot(*each) for each in zip(*norms, strict=True))
    relative = change / start if start else np.inf if change else 0.0
    message = f"|dW| {change:.3g} ({100 * relative:.3g}% of |W|)"
    added = len(rows) - len(shared)
    return (np.nan, f"{message}, without {count_phrase(added, 'new row')}") if added else (change, message)
