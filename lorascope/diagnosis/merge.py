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
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

import numpy as np

from lorascope.array_types import Float, Float32
from lorascope.diagnosis.causes.finding import Finding, Kind, first_and_count, module_names
from lorascope.diagnosis.inspection import DTYPES
from lorascope.diagnosis.unadapted_tensors import ComparedTensor, TensorVerdict, compare_tensors
from lorascope.files.printable import count_phrase
from lorascope.files.safetensors_io import round_to_dtype
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
_COMMON_FACTORS = (0.0, 2.0, -1.0, 0.5, 1 / 3)  # not merged, merged twice, subtracted; alpha = r, and three for one
_FACTOR_ERROR = 0.02  # relative error of a fitted scale, below that of the closest mistake, rank 17 instead of 16
_FITTING = 0.999  # of the entries must fit a mistake: a sum in another order rounds few entries another way
_CLOSER = 0.5  # a mistake must explain at least half of the entries that a merge does not
_FEWEST_FITTED = 100  # entries that are larger than their rounding, from which a scale can be fitted
_SAMPLED = 256  # entries by which updates of other modules are recognized
_CORRELATION = 0.9  # of these entries

_mistake = partial(Kind, severity="error", needs="merged model")
_KINDS = {
    "not merged": _mistake(
        "LS301",
        "merge-not-merged",
        problem="The adapter is not in the merged weight.",
        evidence="the weight equals the weight of the base",
        fix="merge the adapter again, and check that it is active (PEFT: peft_config, set_adapter)",
    ),
    "wrong scale": _mistake(
        "LS302",
        "merge-wrong-scale",
        problem="The weight has another multiple of the update.",
        evidence="the multiple by least squares: 2 if it was merged twice, -1 if it was subtracted",
        fix="merge once, with the scale of the adapter's configuration",
    ),
    "rounded": _mistake(
        "LS303",
        "merge-rounded",
        problem="The weight was rounded to a smaller dtype.",
        evidence="all entries are values of the smaller dtype",
        fix="merge in the dtype of the base",
    ),
    "experts swapped": _mistake(
        "LS304",
        "merge-experts-swapped",
        problem="Experts have each other's merged weights.",
        evidence="the weight equals the merged weight of another expert",
        fix="keep the order of the experts when their weights are stacked",
    ),
    "another module's": _mistake(
        "LS305",
        "merge-another-module",
        problem="The weight contains another module's update.",
        evidence=f"correlation above {_CORRELATION:g} of its change with that update",
        fix="map the modules by their names, and merge again",
    ),
    "wrong adapter": _mistake(
        "LS306",
        "merge-wrong-adapter",
        problem="The change of the weight is not the update.",
        evidence="entries differ from base + update by more than the rounding, at any scale",
        fix="merge this adapter into this base",
    ),
}
_CHANGED = _mistake(
    "LS307",
    "merge-other-weights",
    problem="A tensor without an adapter was changed, removed or added.",
    evidence="entries that are not equal bit by bit, and tensors that only one of the models has",
    fix="merge into this base; these tensors are not adapted",
)
_LOST = _mistake(
    "LS308",
    "merge-lost-weights",
    problem="A tensor that was trained and saved with the adapter is not in the merged model.",
    evidence="biases, heads, norms or token rows that differ from those of the adapter",
    fix="merge with PeftModel.merge_and_unload, which also replaces the tensors that were saved",
)
KINDS = (*_KINDS.values(), _CHANGED, _LOST)
_TENSOR_STATEMENTS: dict[TensorVerdict, str] = {
    "changed": "differ from the base",
    "missing": "are missing",
    "added": "are not in the base",
}
_STATEMENTS = {
    "not merged": "the weight equals the weight of the base",
    "rounded": "the weight was rounded to a smaller dtype",
    "experts swapped": "experts swapped, the weight equals the merged weight of another expert",
    "another module's": "the weight contains the update of another module",
    "wrong adapter": "the change of the weight is not the update",
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

    @property
    def label(self) -> str:
        """Name, with the note if there is one."""
        if not self.note:
            return self.module
        return f"{self.module} ({self.note})"


@dataclass(frozen=True)
class MergeCheck:
    """Result of ``check_merge``.

    Parameters
    ----------
    modules : tuple of MergedModule
        One comparison per adapted module.
    tensors : tuple of ComparedTensor
        Comparison of every other tensor of both models.
    rounded : tuple of (str, str)
        Dtypes of the base and of the merged model where the latter has fewer bits, such as ``("F32", "BF16")``.
    """

    modules: tuple[MergedModule, ...]
    tensors: tuple[ComparedTensor, ...]
    rounded: tuple[tuple[str, str], ...] = ()

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """One finding per fault, with the modules that have it."""
        return tuple(self._find())

    def _find(self) -> Iterator[Finding]:
        count = len(self.modules)
        by_verdict: dict[str, list[MergedModule]] = defaultdict(list)
        by_factor: dict[float, list[MergedModule]] = defaultdict(list)
        for module in self.modules:
            by_verdict[module.verdict].append(module)
            if module.verdict == "wrong scale":
                by_factor[round(module.factor, 2)].append(module)
        for verdict, statement in _STATEMENTS.items():
            if affected := by_verdict[verdict]:
                yield _finding(f"{len(affected)} of {count} modules: {statement}", affected)
        for factor, affected in sorted(by_factor.items()):
            reason = {2.0: ", so it was merged twice", -1.0: ", so it was subtracted"}.get(factor, "")
            yield _finding(f"{len(affected)} of {count} modules contain {factor:g} times the update{reason}", affected)
        for verdict, statement in _TENSOR_STATEMENTS.items():
            if names := self.tensor_names(verdict):
                message = f"{count_phrase(len(names), 'tensor')} without an adapter {statement}"
                yield _CHANGED.finding(f"{message}: {first_and_count(names)}", weights=len(names))
        if names := self.tensor_names("lost"):
            message = f"{count_phrase(len(names), 'tensor')} of the adapter are not in the merged model"
            yield _LOST.finding(f"{message}: {first_and_count(names)}", weights=len(names))

    @property
    def is_conclusive(self) -> bool:
        """Whether every tensor of both models is proved to be right, or a fault was found."""
        if self.findings:
            return True
        return all(module.verdict == "merged" for module in self.modules) and not self.tensor_names("not compared")

    def tensor_names(self, verdict: TensorVerdict) -> list[str]:
        """Return the names of the tensors without an update that have a verdict."""
        return [tensor.name for tensor in self.tensors if tensor.verdict == verdict]

    def summary(self) -> str:
        """Return the number of modules and of other tensors of each verdict in one line."""
        phrases = {"merged": "merged, bit by bit", "consistent": "within one unit in the last place, not proved",
                   "unknown": "smaller than the rounding", "not compared": "not in the base"}  # fmt: skip
        tensor_phrases = {"kept": "equal to the base", "saved": "equal to the adapter"}
        statements = _count_verdicts(self.modules, phrases)
        if self.tensors:
            statements.append(f"other tensors: {', '.join(_count_verdicts(self.tensors, tensor_phrases))}")
        for dtype, merged_dtype in self.rounded:
            statements.append(f"{DTYPES[dtype]} of the base is stored as {DTYPES[merged_dtype]}")
        return "; ".join(statements)


def _count_verdicts(rows: Sequence[MergedModule | ComparedTensor], phrases: Mapping[str, str]) -> list[str]:
    """Return the number of rows of each verdict with its phrase, the most frequent verdict first."""
    counts = Counter(row.verdict for row in rows)
    return [f"{number} {phrases.get(verdict, verdict)}" for verdict, number in counts.most_common()]


def _finding(message: str, affected: Sequence[MergedModule]) -> Finding:
    """Return the finding about modules with one verdict."""
    labels = first_and_count(module.label for module in affected)
    factor = round(float(np.median([module.factor for module in affected])), 3)
    kind = _KINDS[affected[0].verdict]
    return kind.finding(f"{message}: {labels}", module_names(affected), modules=len(affected), factor=factor)


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
    base, stored_updates = adapter.base, adapter.files.parts
    merged = base.named_alike(merged)
    updates = adapter.updates()
    # Samples of all updates are small enough to keep, unlike the updates.
    samples: dict[str, _Sample] = {}
    compared: list[MergedModule] = []
    for module in stored_updates:
        if base.has_weight(module):
            samples[module] = _Sample.of(updates[module])
        else:
            compared.append(MergedModule(module, "not compared", math.nan))
    if not samples:
        raise ValueError(f"cannot check the merge: {base.folder} has no weight of {first_and_count(stored_updates)}")
    experts: dict[str, _ExpertSample] = {}
    rounded: set[tuple[str, str]] = set()
    for module in samples:
        stored, dtype, merged_dtype = stored_updates[module], base.dtype(module), merged.dtype(module)
        W = np.asarray(base.weight(module, stored.shape, stored.transposed), np.float32)
        after = np.asarray(merged.weight(module, stored.shape, stored.transposed), np.float32)
        if PRECISION[merged_dtype] < PRECISION[dtype]:
            rounded.add((dtype, merged_dtype))
        result = _compare(module, updates[module], W, after, dtype, merged_dtype)
        if result.verdict == "wrong adapter":
            if isinstance(stored, ExpertPart):
                experts[module] = _ExpertSample.of(stored, W, after, _coarser(dtype, merged_dtype))
            if owner := _owner(module, after - W, samples):
                result = MergedModule(module, "another module's", result.factor, f"that of {owner}")
        compared.append(result)
    owners = _swapped_experts(experts)
    for index, result in enumerate(compared):
        if owner := owners.get(result.module):
            compared[index] = MergedModule(result.module, "experts swapped", result.factor, f"that of {owner}")
    return MergeCheck(tuple(compared), tuple(compare_tensors(adapter, merged)), tuple(sorted(rounded)))


def _owner(module: str, change: Float32[np.ndarray, "out in"], samples: Mapping[str, _Sample]) -> str | None:
    """Return the first other module whose update is in the change of a weight, None if there is none."""
    for other, sample in samples.items():
        if other != module and sample.shape == change.shape and sample.is_in(change):
            return other
    return None


def _compare(
    module: str,
    update: Update,
    W: Float32[np.ndarray, "out in"],
    after: Float32[np.ndarray, "out in"],
    dtype: str,
    merged_dtype: str,
) -> MergedModule:
    """Compare a weight after the merge with the weight of the base and its update."""
    d = _float32_update(update)
    coarse = _coarser(dtype, merged_dtype)
    rounded = {target: round_to_dtype(W + d, target) for target in {coarse, merged_dtype}}
    rounded_once = rounded[coarse]
    merges = [*rounded.values(), round_to_dtype(W + round_to_dtype(d, coarse), coarse)]
    unequal_to_merge = min(float((after != merge).mean()) for merge in merges)
    is_visible = not all(np.array_equal(merge, W) for merge in merges)
    unit = _largest_spacing(coarse, W, d, rounded_once)
    factor = _fit_factor(after, W, d, unit)

    # A weight that fits a merge bit by bit is merged, even if it also fits a mistake.
    if update.low_rank is not None and unequal_to_merge == 0:
        return MergedModule(module, "merged" if is_visible or not d.any() else "unknown", factor)
    if not is_visible and _misfit(after, W, unit) == 0:
        return MergedModule(module, "unknown", factor)

    root = np.sqrt(max(update.rank, 1))  # rsLoRA's scale is alpha / sqrt(r) instead of alpha / r
    factors = [*_COMMON_FACTORS, factor, 1 / root, root]
    mistakes = {multiple: round_to_dtype(W + np.float32(multiple) * d, coarse) for multiple in factors}
    mistakes[2.0] = round_to_dtype(rounded_once + d, coarse)  # a second merge adds to the rounded first one
    unequal = {multiple: float((after != mistake).mean()) for multiple, mistake in mistakes.items()}
    closest = min(unequal, key=unequal.__getitem__)
    fits_mistake = _misfit(after, mistakes[closest], unit) <= 1 - _FITTING and abs(closest - 1) > _FACTOR_ERROR
    if fits_mistake and unequal[closest] < _CLOSER * unequal_to_merge:
        return MergedModule(module, "wrong scale" if closest else "not merged", closest)

    allowed = unit + _summation_error(update, unit)
    if any(_misfit(after, merge, allowed) == 0 for merge in merges):
        return MergedModule(module, "consistent", factor)
    # All entries are values of a dtype that is smaller than those of both models.
    for smaller in ("F16", "BF16"):
        fits = PRECISION[smaller] < PRECISION[coarse] and np.array_equal(after, round_to_dtype(after, smaller))
        if fits and _misfit(after, round_to_dtype(W + d, smaller), _spacing(rounded_once, smaller)) == 0:
            return MergedModule(module, "rounded", factor, DTYPES[smaller])

    # The fitted scale is not one of the mistakes: its error counts, in proportion to the update.
    scaled = round_to_dtype(W + np.float32(factor) * d, coarse)
    if factor and _misfit(after, scaled, unit + _FACTOR_ERROR * abs(factor) * np.abs(d)) <= 1 - _FITTING:
        return MergedModule(module, "wrong scale", factor)
    return MergedModule(module, "wrong adapter", factor)


def _summation_error(update: Update, unit: Float32[np.ndarray, "out in"]) -> Float32[np.ndarray, "..."]:
    """Bound the error of an update in float32, for any order of its sums.

    A product of rank r has r terms per entry. Other updates take operations between entries of a row, such as its norm.
    """
    if (product := update.low_rank) is None:
        return 2 * unit.max(axis=1, keepdims=True)
    B, A = np.asarray(product.B, np.float32), np.asarray(product.A, np.float32)
    # Each of the operations on an entry rounds by at most 2**-24 of its value.
    return np.float32(product.rank * abs(product.scale) * 2.0**-24) * (np.abs(B) @ np.abs(A))


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
    if large.sum() >= _FEWEST_FITTED:
        delta, wide = delta[large], wide[large]
    energy = float(np.vdot(wide, wide))
    if energy == 0:  # a zero update is in the change zero times
        return 0.0
    return float(np.vdot(delta, wide)) / energy


def _float32_update(update: Update) -> Float32[np.ndarray, "out in"]:
    """Return the update as PEFT computes it on a CPU: factors and scale in float32."""
    if (product := update.low_rank) is not None:
        B, A = np.asarray(product.B, np.float32), np.asarray(product.A, np.float32)
        return (B @ A) * np.float32(product.scale)
    return update.dense().astype(np.float32)


def _coarser(left: str, right: str) -> str:
    return min(left, right, key=PRECISION.__getitem__)


def _spacing(values: Float32[np.ndarray, "..."], dtype: str) -> Float32[np.ndarray, "..."]:
    """Return the unit in the last place of each value."""
    if dtype == "F16":
        with np.errstate(over="ignore", invalid="ignore"):
            return np.abs(np.spacing(values.astype(np.float16))).astype(np.float32)
    unit = np.abs(np.spacing(values))
    if dtype == "BF16":
        return unit * np.float32(2.0 ** (PRECISION["F32"] - PRECISION["BF16"]))
    return unit


def _largest_spacing(dtype: str, *arrays: Float32[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
    """Return the unit in the last place of the largest of several values, by entry."""
    return np.maximum.reduce([_spacing(values, dtype) for values in arrays])


def _sampled_positions(shape: tuple[int, int]) -> np.ndarray:
    """Return the same random entries for all matrices of a shape."""
    return np.random.default_rng(0).integers(0, shape[0] * shape[1], _SAMPLED)


@dataclass(frozen=True)
class _Sample:
    """A few entries of an update, by which it is recognized in the change of another weight."""

    shape: tuple[int, int]
    positions: np.ndarray
    values: Float[np.ndarray, "entries"]

    @classmethod
    def of(cls, update: Update) -> _Sample:
        positions = _sampled_positions(update.shape)
        rows, columns = np.divmod(positions, update.shape[1])
        if (product := update.low_rank) is not None:
            values = np.einsum("pk,kp->p", np.asarray(product.B, np.float64)[rows], np.asarray(product.A)[:, columns])
        else:
            values = update.dense()[rows, columns]
        return cls(update.shape, positions, values)

    def is_in(self, change: Float[np.ndarray, "out in"]) -> bool:
        """Return whether the change of a weight is a multiple of this update."""
        values = change.reshape(-1)[self.positions]
        size = np.linalg.norm(values) * np.linalg.norm(self.values)
        return bool(size > 0 and abs(float(values @ self.values)) / size > _CORRELATION)


@dataclass(frozen=True, eq=False)
class _ExpertSample:
    """A few entries of the weight of one expert, at the same positions for all experts of a tensor.

    Base and update of an expert belong together, so its change is not an update if its whole weight has another
    position. ``allowed`` is the difference from base + update, ``expected``, that rounding may cause.
    """

    parameter: str
    merged: Float[np.ndarray, "entries"]
    expected: Float[np.ndarray, "entries"]
    allowed: Float[np.ndarray, "entries"]

    @classmethod
    def of(
        cls, stored: ExpertPart, W: Float32[np.ndarray, "out in"], after: Float32[np.ndarray, "out in"], dtype: str
    ) -> _ExpertSample:
        update, positions = stored.update(), _sampled_positions(W.shape)
        d = _float32_update(update)
        unit = _largest_spacing(dtype, W, d, W + d)
        # A merge of two roundings differs by at most two units in the last place.
        allowed = 2 * unit + _summation_error(update, unit)
        return cls(stored.parameter, *(values.reshape(-1)[positions] for values in (after, W + d, allowed)))

    def is_at(self, other: _ExpertSample) -> bool:
        """Return whether the position of another expert of the tensor has this expert's weight."""
        if self.parameter != other.parameter or self.merged.shape != other.merged.shape:
            return False
        return bool((np.abs(other.merged - self.expected) <= self.allowed).all())


def _swapped_experts(experts: Mapping[str, _ExpertSample]) -> dict[str, str]:
    """Return the experts that have the weight of another expert, and that other expert."""
    owners = {}
    for module, expert in experts.items():
        for name, other in experts.items():
            if name != module and other.is_at(expert):
                owners[module] = name
                break
    return owners
