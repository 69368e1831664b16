"""Check of a merged model: whether the adapter is in its weights, exactly once and correctly.

Every weight is compared with what a merge of base and update gives. PEFT merges LoRA on a CPU in float32: d is
``(B @ A) * scale``, and ``W + d`` is rounded once to the dtype of W, or d is rounded first (``safe_merge``). numpy
computes the same numbers, so an equal weight is proved. Other programs and devices sum in another order: a weight
within one unit in the last place is consistent with a merge, and not proved. It is also compared with the mistakes that
are known: no merge, a merge of another scale, dtype, module or adapter. For the merges of PiSSA and OLoRA, see
`merged_residuals`.

One weight is in memory at a time.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from lorascope.array_types import Float, Float32
from lorascope.diagnosis.causes.finding import Finding, Kind, module_names
from lorascope.diagnosis.inspection import DTYPES
from lorascope.diagnosis.merged_residuals import compare_residual
from lorascope.diagnosis.merged_weights import (
    PRECISION,
    MergedModule,
    coarser,
    compare_weight,
    float32_update,
    largest_spacing,
    summation_error,
)
from lorascope.diagnosis.runtimes.runtime import join_sides
from lorascope.diagnosis.unadapted_tensors import ComparedTensor, TensorVerdict, compare_tensors
from lorascope.files.printable import count_phrase, first_of
from lorascope.files.small_floats import round_to_dtype
from lorascope.formats.peft_experts import ExpertPart
from lorascope.formats.peft_residual import SubtractedStart, has_unknown_start
from lorascope.formats.pretrained_weights import PretrainedWeights
from lorascope.runs.adapter import Adapter
from lorascope.updates.weight_update import Update

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
_MISFIT = _mistake(
    "LS309",
    "merge-another-model",
    problem="A module of the adapter is not in the base or the merged model, or has another shape there.",
    evidence="names and shapes of the weights; all modules, if it is the base that lacks them",
    fix="compare the model that the adapter was trained on with a merge into it",
)
KINDS = (*_KINDS.values(), _CHANGED, _LOST, _MISFIT)
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
        if misfits := by_verdict["misfit"]:
            labels = first_of(module.label for module in misfits)
            message = f"{len(misfits)} of {count} modules do not fit: {labels}"
            yield _MISFIT.finding(message, module_names(misfits), modules=len(misfits), of=count)
        for verdict, statement in _TENSOR_STATEMENTS.items():
            if names := self.tensor_names(verdict):
                message = f"{count_phrase(len(names), 'tensor')} without an adapter {statement}"
                yield _CHANGED.finding(f"{message}: {first_of(names)}", weights=len(names))
        if names := self.tensor_names("lost"):
            message = f"{count_phrase(len(names), 'tensor')} of the adapter are not in the merged model"
            yield _LOST.finding(f"{message}: {first_of(names)}", weights=len(names))

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
        phrases = {"merged": "merged, bit by bit", "consistent": "within the rounding, not proved",
                   "unknown": "smaller than the rounding", "not compared": "not in the base",
                   "changed base": "not compared, because PEFT changes the base while loading",
                   "misfit": "of another model"}  # fmt: skip
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
    labels = first_of(module.label for module in affected)
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
        The adapter has no base, or a weight is quantized.
    """
    if adapter.base is None:
        raise ValueError("cannot check a merged model without its base: pass base")
    base, stored_updates = adapter.base, adapter.files.parts
    merged = base.named_alike(merged)
    updates = adapter.updates()
    is_other_base = not any(map(base.has_weight, stored_updates))
    # Samples of all updates are small enough to keep, unlike the updates.
    samples: dict[str, _Sample] = {}
    compared: list[MergedModule] = []
    for module, stored in stored_updates.items():
        if not base.has_weight(module) and not is_other_base:  # it may be tied
            compared.append(MergedModule(module, "not compared", math.nan))
        elif misfit := _misfit(module, stored.shape, {"base": base, "merged model": merged}):
            compared.append(MergedModule(module, "misfit", math.nan, misfit))
        else:
            samples[module] = _Sample.of(updates[module])
    if not samples:
        return MergeCheck(tuple(compared), ())
    experts: dict[str, _ExpertSample] = {}
    rounded: set[tuple[str, str]] = set()
    for module in samples:
        stored, dtype, merged_dtype = stored_updates[module], base.dtype(module), merged.dtype(module)
        W = np.asarray(base.weight(module, stored.shape, stored.transposed), np.float32)
        after = np.asarray(merged.weight(module, stored.shape, stored.transposed), np.float32)
        if PRECISION[merged_dtype] < PRECISION[dtype]:
            rounded.add((dtype, merged_dtype))
        start: SubtractedStart | None = getattr(stored, "start", None)
        if start is not None:
            result = compare_residual(module, updates[module], start, W, after, coarser(dtype, merged_dtype))
        elif stored.copies_weight and _is_copied(updates[module], W, after, coarser(dtype, merged_dtype)):
            result = MergedModule(module, "merged", 1.0)
        else:
            result = compare_weight(module, updates[module], W, after, dtype, merged_dtype)
            if result.verdict in _KINDS and has_unknown_start(adapter.files.config):
                result = MergedModule(module, "changed base", result.factor)
        if result.verdict == "wrong adapter" and not result.note:
            if isinstance(stored, ExpertPart):
                experts[module] = _ExpertSample.of(stored, W, after, coarser(dtype, merged_dtype))
            if owner := _owner(module, after - W, samples):
                result = MergedModule(module, "another module's", result.factor, f"that of {owner}")
        compared.append(result)
    owners = _swapped_experts(experts)
    for index, result in enumerate(compared):
        if owner := owners.get(result.module):
            compared[index] = MergedModule(result.module, "experts swapped", result.factor, f"that of {owner}")
    return MergeCheck(tuple(compared), tuple(compare_tensors(adapter, merged)), tuple(sorted(rounded)))


def _misfit(module: str, shape: tuple[int, int], models: Mapping[str, PretrainedWeights]) -> str:
    """Return why a weight of one of two models cannot contain an update of this shape; "" if it can."""
    for name, weights in models.items():
        if not weights.has_weight(module):
            return f"not in the {name}"
        weight_shape = weights.shape(module)
        if weight_shape not in (shape, shape[::-1]):
            return f"{join_sides(shape)}, in the {name} {join_sides(weight_shape)}"
    return ""


def _is_copied(
    update: Update, W: Float32[np.ndarray, "out in"], after: Float32[np.ndarray, "out in"], dtype: str
) -> bool:
    """Return whether a weight equals the one in the adapter's files: base and update, which is in float64."""
    stored = (W + update.dense()).astype(np.float32)
    return np.array_equal(round_to_dtype(stored, dtype), after)


def _owner(module: str, change: Float32[np.ndarray, "out in"], samples: Mapping[str, _Sample]) -> str | None:
    """Return the first other module whose update is in the change of a weight, None if there is none."""
    for other, sample in samples.items():
        if other != module and sample.shape == change.shape and sample.is_in(change):
            return other
    return None


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
        d = float32_update(update)
        unit = largest_spacing(dtype, W, d, W + d)
        # A merge of two roundings differs by at most two units in the last place.
        allowed = 2 * unit + summation_error(update, unit)
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
