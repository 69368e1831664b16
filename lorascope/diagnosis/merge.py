"""Check of a merged model: whether the adapter is in its weights, exactly once and correctly.

Every weight is compared with what a merge of base and update gives. PEFT merges LoRA on a CPU in float32: d is
``(B @ A) * scale``, and ``W + d`` is rounded once to the dtype of W, or d is rounded first (``safe_merge``). numpy
computes the same numbers, so an equal weight is proved. Other programs and devices sum in another order: a weight
within one unit in the last place is consistent with a merge, and not proved. It is also compared with the mistakes that
are known: no merge, a merge of another scale, dtype, module or adapter.

One weight is in memory at a time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from lorascope.array_types import Float, Float32
from lorascope.diagnosis.causes.finding import Finding, first_and_count, of_kind
from lorascope.diagnosis.inspection import DTYPES
from lorascope.diagnosis.merged_experts import ExpertEntries, swapped_experts
from lorascope.files.safetensors_io import round_to_bfloat16
from lorascope.formats.peft_experts import ExpertPart
from lorascope.formats.pretrained_weights import PretrainedWeights
from lorascope.runs.adapter import Adapter
from lorascope.updates.weight_update import Update

Verdict = Literal[
    *("merged", "consistent", "unknown", "not compared"),
    *("not merged", "wrong scale", "rounded", "experts swapped", "another module's", "wrong adapter"),
]
PRECISION = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7}
"""Bits after the leading one."""
_KNOWN_FACTORS = (0.0, 2.0, -1.0, 0.5, 1 / 3)  # not merged, merged twice, subtracted; alpha = r, and three for one
_FACTOR = 0.02  # relative error of a fitted scale, below that of the closest mistake, rank 17 instead of 16
_MOST = 0.999  # of the entries, that must fit a mistake: a sum in another order rounds few entries another way
_CLOSER = 0.5  # a mistake must explain at least half of the entries that a merge does not
_FITTED = 100  # entries that are larger than their rounding, from which a scale can be fitted
_PROBES = 256  # entries by which updates of other modules are recognized
_ALIKE = 0.9  # correlation of these entries
_IDS = {
    "not merged": "LS301",
    "wrong scale": "LS302",
    "rounded": "LS303",
    "experts swapped": "LS304",
    "another module's": "LS305",
    "wrong adapter": "LS306",
}


@dataclass(frozen=True)
class MergedModule:
    """Comparison of one merged weight with base and update.

    Parameters
    ----------
    module : str
        Name of the module.
    verdict : str
        ``"merged"`` is proved bit by bit, ``"consistent"`` within one unit in the last place, ``"unknown"`` if the
        update is smaller than the rounding, ``"not compared"`` if the base has no such weight.
    factor : float
        Multiple of the update that the weight contains, by least squares; NaN if it was not compared.
    note : str
        Dtype that it was rounded to, or module whose update it contains.
    """

    module: str
    verdict: Verdict
    factor: float
    note: str = ""


@dataclass(frozen=True)
class MergeCheck:
    """Result of ``check_merge``: one comparison per adapted module, and the weights that should not have changed."""

    modules: tuple[MergedModule, ...]
    changed: tuple[str, ...]

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """One finding per fault, with the modules that have it."""
        return tuple(self._find())

    def _find(self) -> Iterator[Finding]:
        count = len(self.modules)
        for verdict in ("not merged", "rounded", "experts swapped", "another module's", "wrong adapter"):
            own = [each for each in self.modules if each.verdict == verdict]
            if own:
                names = [f"{each.module} ({each.note})" if each.note else each.module for each in own]
                yield _finding(verdict, f"{len(own)} of {count} modules: {_WORDS[verdict]}", names, own)
        scaled = [each for each in self.modules if each.verdict == "wrong scale"]
        for factor in sorted({round(each.factor, 2) for each in scaled}):
            own = [each for each in scaled if round(each.factor, 2) == factor]
            how = f"{len(own)} of {count} modules contain {factor:g} times the update{_reason(factor)}"
            yield _finding("wrong scale", how, [each.module for each in own], own)
        if self.changed:
            how = (
                f"{len(self.changed)} weights without an adapter differ from the base: {first_and_count(self.changed)}"
            )
            yield of_kind("LS307", how, {"weights": len(self.changed)})

    @property
    def known(self) -> bool:
        """Whether every weight is proved to be merged, or a fault was found."""
        return bool(self.findings) or all(each.verdict == "merged" for each in self.modules)

    def summary(self) -> str:
        """Return the number of modules of each verdict in one line."""
        counts = Counter(each.verdict for each in self.modules)
        words = {"merged": "merged, bit by bit", "consistent": "within one unit in the last place, not proved",
                 "unknown": "smaller than the rounding", "not compared": "not in the base"}  # fmt: skip
        return "; ".join(f"{number} {words.get(verdict, verdict)}" for verdict, number in counts.most_common())


_WORDS = {
    "not merged": "the weight equals the weight of the base",
    "rounded": "the weight was rounded to a smaller dtype",
    "experts swapped": "experts swapped, the weight equals the merged weight of another expert",
    "another module's": "the weight contains the update of another module",
    "wrong adapter": "the change of the weight is not the update",
}


def _finding(verdict: str, message: str, names: Sequence[str], own: Sequence[MergedModule]) -> Finding:
    factors = {"factor": round(float(np.median([each.factor for each in own])), 3)}
    evidence, modules = {"modules": len(own)} | factors, tuple(each.module for each in own)
    return of_kind(_IDS[verdict], f"{message}: {first_and_count(names)}", evidence, modules=modules)


def _reason(factor: float) -> str:
    return {2.0: ", so it was merged twice", -1.0: ", so it was subtracted"}.get(factor, "")


def check_merge(adapter: Adapter, merged: PretrainedWeights) -> MergeCheck:
    """Compare a merged model with base and adapter, one weight at a time.

    Parameters
    ----------
    adapter : Adapter
        Opened with its base.
    merged : PretrainedWeights
        The merged model, whose weights have the names of the base.

    Raises
    ------
    ValueError
        The adapter has no base, the base has none of its modules, or the merged model lacks one.
    """
    if adapter.base is None:
        raise ValueError("cannot check a merged model without its base: pass base")
    base, parts = adapter.base, adapter.files.parts
    merged = base.named_alike(merged)
    names = [module for module in parts if base.has_weight(module)]
    if not names:
        raise ValueError(f"cannot check the merge: {base.folder} has no weight of {first_and_count(list(parts))}")
    probes = {module: _Probe.of(adapter.updates()[module]) for module in names}
    found = [MergedModule(module, "not compared", math.nan) for module in parts if module not in probes]
    experts: dict[str, ExpertEntries] = {}
    for module in names:
        part = parts[module]
        weights = [model.weight(module, part.shape, part.transposed) for model in (base, merged)]
        W, after = (np.asarray(weight, np.float32) for weight in weights)
        compared = _compare(module, adapter.updates()[module], W, after, base.dtype(module), merged.dtype(module))
        if compared.verdict == "wrong adapter":
            if isinstance(part, ExpertPart):
                coarse = _coarser(base.dtype(module), merged.dtype(module))
                experts[module] = _entries(part, W, after, coarse)
            others = {other: probe for other, probe in probes.items() if other != module and probe.shape == W.shape}
            owner = next((name for name, probe in others.items() if probe.is_in(after - W)), None)
            if owner is not None:
                compared = MergedModule(module, "another module's", compared.factor, f"that of {owner}")
        found.append(compared)
    owners = swapped_experts(experts)
    named = (
        MergedModule(each.module, "experts swapped", each.factor, f"that of {owners[each.module]}")
        if each.module in owners
        else each
        for each in found
    )
    return MergeCheck(tuple(named), tuple(_changed(adapter, merged)))


def _entries(
    part: ExpertPart,
    W: Float32[np.ndarray, "out in"],
    after: Float32[np.ndarray, "out in"],
    dtype: str,
) -> ExpertEntries:
    """Return a few entries of an expert; a merge of two roundings differs by at most two units in the last place."""
    update, places = part.update(), _places(W.shape)
    d = _float32_update(update)
    unit = np.maximum.reduce([_spacing(each, dtype) for each in (W, d, W + d)])
    arrays = (after, W + d, 2 * unit + _summation_error(update, unit))
    return ExpertEntries(part.parameter, *(each.reshape(-1)[places] for each in arrays))


def _changed(adapter: Adapter, merged: PretrainedWeights) -> Iterator[str]:
    """Yield the weights that are neither adapted nor saved with the adapter, and differ from the base."""
    base = adapter.base
    assert base is not None
    stored = {name.removesuffix(".weight") for module in adapter.files.parts for name in base.stored_names(module)}
    own = set(adapter.files.parts) | stored | {name.rpartition(".")[0] for name in adapter.files.others}
    for module in base.modules():
        if module in own or any(each.endswith(f".{module}") or module.endswith(f".{each}") for each in own):
            continue
        if not merged.has_weight(module):
            if not _is_tied(base, merged, module):
                yield module
        elif merged.stored_shape(module) != base.stored_shape(module) or _differs(base, merged, module):
            yield module


def _is_tied(base: PretrainedWeights, merged: PretrainedWeights, module: str) -> bool:
    """Return whether a weight that the merged model lacks equals another one of the base that it has."""
    W, shape = base.unread(module).stored, base.stored_shape(module)
    return any(
        np.array_equal(W, base.unread(other).stored)
        for other in base.modules()
        if other != module and base.stored_shape(other) == shape and merged.has_weight(other)
    )


def _differs(base: PretrainedWeights, merged: PretrainedWeights, module: str) -> bool:
    """Return whether a weight of one shape has other values, apart from a rounding to the dtype of the merged model."""
    W, after = base.unread(module), merged.unread(module)
    if W.stored.dtype == after.stored.dtype:
        return not np.array_equal(W.stored, after.stored, equal_nan=not W.brain)
    expected = _round(np.asarray(W.read(), np.float32), merged.dtype(module))
    return not np.array_equal(expected, np.asarray(after.read(), np.float32), equal_nan=True)


def _compare(
    module: str,
    update: Update,
    W: Float32[np.ndarray, "out in"],
    after: Float32[np.ndarray, "out in"],
    dtype: str,
    merged_dtype: str,
) -> MergedModule:
    d = _float32_update(update)
    coarse = _coarser(dtype, merged_dtype)
    whole = [_round(W + d, each) for each in dict.fromkeys((coarse, merged_dtype))]
    merges = [*whole, _round(W + _round(d, coarse), coarse)]
    visible = not all(np.array_equal(each, W) for each in merges)
    unit = np.maximum.reduce([_spacing(each, coarse) for each in (W, d, whole[0])])
    factor = _fit_factor(after, W, d, unit)
    if update.low_rank is not None and any(np.array_equal(after, each) for each in merges):
        return MergedModule(module, "merged" if visible or not d.any() else "unknown", factor)
    if not visible and _misfit(after, W, unit) == 0:
        return MergedModule(module, "unknown", factor)
    ranked = np.sqrt(max(update.rank, 1))
    factors = [*_KNOWN_FACTORS, *((factor,) if factor else ()), 1 / ranked, ranked]
    mistakes = {each: _round((whole[0] + d) if each == 2.0 else W + np.float32(each) * d, coarse) for each in factors}
    unequal = {each: float((after != mistake).mean()) for each, mistake in mistakes.items()}
    closest = min(unequal, key=unequal.__getitem__)
    right = min(float((after != each).mean()) for each in merges)
    fits_mistake = _misfit(after, mistakes[closest], unit) <= 1 - _MOST and abs(closest - 1) > _FACTOR
    if fits_mistake and unequal[closest] < _CLOSER * right:
        return MergedModule(module, "wrong scale" if closest else "not merged", closest)
    if min(_misfit(after, each, unit + _summation_error(update, unit)) for each in merges) == 0:
        return MergedModule(module, "consistent", factor)
    for smaller in ("F16", "BF16"):
        fits = PRECISION[smaller] < PRECISION[coarse] and np.array_equal(after, _round(after, smaller))
        if fits and _misfit(after, _round(W + d, smaller), _spacing(whole[0], smaller)) == 0:
            return MergedModule(module, "rounded", factor, DTYPES[smaller])
    scaled = _round(W + np.float32(factor) * d, coarse)
    if factor and _misfit(after, scaled, unit + _FACTOR * abs(factor) * np.abs(d)) <= 1 - _MOST:
        return MergedModule(module, "wrong scale", factor)
    return MergedModule(module, "wrong adapter", factor)


def _summation_error(update: Update, unit: Float32[np.ndarray, "out in"]) -> Float32[np.ndarray, "..."]:
    """Bound the error of an update in float32, for any order of its sums.

    A product of rank r has r terms per entry. Other updates take operations between entries of a row, such as its norm.
    """
    if (product := update.low_rank) is None:
        return 2 * unit.max(axis=1, keepdims=True)
    B, A = (np.abs(np.asarray(each, np.float32)) for each in (product.B, product.A))
    return np.float32(product.rank * abs(product.scale) * 2.0**-24) * (B @ A)


def _misfit(
    after: Float32[np.ndarray, "out in"],
    expected: Float32[np.ndarray, "out in"],
    allowed: Float32[np.ndarray, "out in"],
) -> float:
    """Return the fraction of entries that differ from the expected ones by more than is allowed."""
    return float((~(np.abs(after - expected) <= allowed)).mean())


def _fit_factor(
    after: Float32[np.ndarray, "out in"],
    W: Float32[np.ndarray, "out in"],
    d: Float32[np.ndarray, "out in"],
    unit: Float32[np.ndarray, "out in"],
) -> float:
    """Return the multiple of the update in a change, by least squares over entries larger than their rounding."""
    delta, wide = after.astype(np.float64) - W, d.astype(np.float64)
    large = np.abs(d) > unit
    if large.sum() >= _FITTED:
        delta, wide = delta[large], wide[large]
    energy = float(np.vdot(wide, wide))
    return float(np.vdot(delta, wide)) / energy if energy else 0.0


def _float32_update(update: Update) -> Float32[np.ndarray, "out in"]:
    """Return the update as PEFT computes it on a CPU: factors and scale in float32."""
    if (product := update.low_rank) is not None:
        B, A = np.asarray(product.B, np.float32), np.asarray(product.A, np.float32)
        return (B @ A) * np.float32(product.scale)
    return update.dense().astype(np.float32)


def _coarser(one: str, other: str) -> str:
    return min(one, other, key=PRECISION.__getitem__)


def _round(values: Float32[np.ndarray, "..."], dtype: str) -> Float32[np.ndarray, "..."]:
    """Round to the nearest values of a dtype, to even between two."""
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    if dtype != "BF16":
        return values
    return round_to_bfloat16(values)


def _spacing(values: Float32[np.ndarray, "..."], dtype: str) -> Float32[np.ndarray, "..."]:
    """Return the unit in the last place of each value."""
    if dtype == "F16":
        with np.errstate(over="ignore", invalid="ignore"):
            return np.abs(np.spacing(values.astype(np.float16))).astype(np.float32)
    unit = np.abs(np.spacing(values))
    return unit * np.float32(2.0 ** (PRECISION["F32"] - PRECISION["BF16"])) if dtype == "BF16" else unit


def _places(shape: tuple[int, int]) -> np.ndarray:
    """Return the same random entries for all matrices of a shape."""
    return np.random.default_rng(0).integers(0, shape[0] * shape[1], _PROBES)


@dataclass(frozen=True)
class _Probe:
    """A few entries of an update, by which it is recognized in the change of another weight."""

    shape: tuple[int, int]
    places: np.ndarray
    values: Float[np.ndarray, "probes"]

    @classmethod
    def of(cls, update: Update) -> _Probe:
        places = _places(update.shape)
        rows, columns = np.divmod(places, update.shape[1])
        if (product := update.low_rank) is not None:
            values = np.einsum("pk,kp->p", np.asarray(product.B, np.float64)[rows], np.asarray(product.A)[:, columns])
        else:
            values = update.dense()[rows, columns]
        return cls(update.shape, places, values)

    def is_in(self, delta: Float[np.ndarray, "out in"]) -> bool:
        """Return whether the change of a weight is a multiple of this update."""
        change = delta.reshape(-1)[self.places]
        size = np.linalg.norm(change) * np.linalg.norm(self.values)
        return bool(size > 0 and abs(float(change @ self.values)) / size > _ALIKE)
