"""Observer of norms and ranks of weights, updates and steps."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from lorascope.adapters.delta import Delta, host_weight
from lorascope.adapters.host_weights import dequantized_weight, shared_copies, to_array
from lorascope.adapters.peft_layers import PeftDelta
from lorascope.adapters.weight_parts import WeightPart
from lorascope.array_types import Float
from lorascope.methods.field_checks import require_integer
from lorascope.methods.method import Step, added_later
from lorascope.observe.observer import Observer
from lorascope.observe.trainable import TrainedTensors, changes_since, factor_inner, joint_tile_sums, tile_sums
from lorascope.schema.records import Item, Record, Snapshot
from lorascope.updates import Dense, Update, constant_factors, from_factors, spectra
from lorascope.updates.linalg import stable_and_effective_ranks, stacks
from lorascope.updates.low_rank import batches

Factors = dict[str, Float[np.ndarray, "..."]]
NORMS = {"weight": "weight_norm", "update": "update_norm", "learned": "learned_norm", "step": "step_norm"}

T = TypeVar("T")


@dataclass(kw_only=True)
class norms(Observer):
    """Norms and ranks of every weight update, by module and by block.

    The values of a module refer to its weight matrix, the values of a block to all its tensors, including norms and
    biases. Only trained tensors are recorded. Ranks of factored updates are recorded each time. Ranks of dense updates
    need an SVD, so they are recorded only at step 0, at the last step and at multiples of ``spectra_every``.

    Norms of factors include components that AdaLoRA masks. ALoRA resizes factors, so their change is not recorded.

    Parameters
    ----------
    every : int
        Steps between recordings.
    spectra_every : int or None
        Steps between SVDs of dense updates; None computes them only at step 0 and at the last step.
    dequantize : bool
        Whether to dequantize the 4-bit or 8-bit weights of adapted modules, one at a time, so that their norms and
        relative updates are known; requires peft. By default only the norms of their updates are.
    """

    spectra_every: int | None = None
    dequantize: bool = field(default=False, metadata=added_later())

    def __post_init__(self) -> None:
        super().__post_init__()
        require_integer(self, 1, "spectra_every")
        self.first_: dict[str, Any] = {}
        self.before_: dict[str, Any] = {}
        self.base_squares_: dict[str, float] = {}
        self.part_squares_: dict[str, float] = {}
        self.initial_factors_: dict[str, Factors] = {}
        self._found: TrainedTensors | None = None
        self._memory: dict[str, Tensor] = {}

    def due(self, finished: int, total: int) -> bool:
        """Return whether the state should be recorded, which includes the steps of ``spectra_every``."""
        return super().due(finished, total) or self._is_decomposition_due(finished)

    def __call__(self, step: Step) -> list[Item]:
        """Return norms and ranks after this step, if it is due or the best so far."""
        due = self.due(step.finished, step.total) or step.best
        # The norm of the next step needs the state before it.
        due_next = not step.last and self.due(step.finished + 1, step.total)
        if not (due or due_next or step.finished == 0):
            self.before_ = {}  # not empty if the planned number of steps has changed
            return []
        items: list[Item] = []
        with torch.no_grad(), shared_copies():
            self._found = trained = self._found or TrainedTensors(step)
            if step.finished == 0:
                self._record_start(step, trained)
            if due:
                items.extend(self._record_norms(step, trained))
            self.before_ = {}
            if due_next:
                self._remember(trained)
        return items

    def _record_start(self, step: Step, trained: TrainedTensors) -> None:
        # The norm of a quantized weight is not known (NaN), but the norm of its update is.
        base_sums = {name: tile_sums(weight) for name, weight in step.base.items() if weight.is_floating_point()}
        if self.dequantize:
            for module, host in trained.hosts.items():
                if (name := trained.parameter_of[module]) and name not in base_sums:
                    base_sums[name] = tile_sums(dequantized_weight(host))
        self.base_squares_ = dict.fromkeys(step.base, math.nan) | trained.total(base_sums)
        part_sums = {}
        for module, host in trained.hosts.items():
            if isinstance(host, WeightPart):
                part_sums[module] = tile_sums(host.weight)
        # Separate from the parameters, because the sum over a block has the fused weight.
        self.part_squares_ = trained.total(part_sums) if part_sums else {}
        self.first_ = nonzero_trees(trained.updates())
        self.initial_factors_ = {}
        for module, delta in trained.deltas.items():
            if not delta.resized and (factors := _trained(delta)):
                self.initial_factors_[module] = factors

    def _remember(self, trained: TrainedTensors) -> None:
        """Store the tensors that the next recording is compared with, in the same memory each time.

        Freeing and allocating this memory would slow down the next step by more than the recording costs.
        """
        trained.copy_updates()
        for label, tensor in trained.tensors().items():
            if label not in self._memory or self._memory[label].shape != tensor.shape:
                self._memory[label] = torch.empty_like(tensor)
            self._memory[label].copy_(tensor)
        factored = {module: to_tree(update) for module, update in trained.frozen_updates().items()}
        self.before_ = {"dense": self._memory, "factored": factored}

    def _record_norms(self, step: Step, trained: TrainedTensors) -> Iterator[Item]:
        """Yield the records; sums are computed on the device of the model, and copied with the factors."""
        tensors = trained.tensors()
        sums = dict(self._dense_sums(step, trained, tensors))
        for module in trained.deltas:
            # A weight that trains itself is among the tensors, with its update added.
            if not trained.is_frozen(module) or math.isnan(self._base(trained, module)):
                continue
            inner = factor_inner(self._host_weight(trained, module), trained.deltas[module].factors())
            if inner is not None:
                sums[module, "inner"] = inner.reshape(1)
        totals = trained.total(sums)
        updates = trained.frozen_updates()
        squares = {label: {"base": self.base_squares_[trained.parameter_of[label]]} for label in tensors}
        for (label, key), total in totals.items():
            if label in squares:
                squares[label][key] = total
                if key == "update":  # replaced by the next sum if the initial update is not zero
                    squares[label]["learned"] = total
        sigmas = self._spectra(step, trained, tensors, updates)
        squares |= self._adapter_squares(trained, updates, totals, sigmas)
        for label, norms_squared in squares.items():
            if label in trained.modules:
                yield from _norm_records(label, norms_squared)
        yield from self._block_records(trained, squares)
        yield from self._factor_records(trained)
        for module, delta in trained.deltas.items():
            yield Record("rank", delta.rank, module)
        yield from self._rank_records(step, trained, tensors, sigmas)

    def _factor_records(self, trained: TrainedTensors) -> Iterator[Record]:
        factors = {module: _trained(delta) for module, delta in trained.deltas.items()}
        initial = self.initial_factors_
        for module in initial.keys() & factors.keys():
            if _shapes(initial[module]) != _shapes(factors[module]):
                del initial[module]  # a later change back would be to other components
        squares = _factor_squares(factors, initial)
        for module in factors:
            for quantity, sums in squares.items():
                if module in sums:
                    yield Record(quantity, math.sqrt(math.fsum(sums[module])), module)

    def _host_weight(self, trained: TrainedTensors, module: str) -> Float[Tensor, "out in"]:
        host = trained.hosts[module]
        if not host.weight.is_floating_point():
            return dequantized_weight(host)
        return host_weight(host)

    def _base(self, trained: TrainedTensors, module: str) -> float:
        """Return |W_0|^2 of an adapted weight, NaN if it is packed and not a parameter."""
        if module in self.part_squares_:
            return self.part_squares_[module]
        return self.base_squares_.get(trained.parameter_of[module], math.nan)

    def _dense_sums(
        self, step: Step, trained: TrainedTensors, tensors: Mapping[str, Tensor]
    ) -> Iterator[tuple[tuple[str, str], Tensor]]:
        """Yield sums of squares of every trained tensor of the base model and of its changes."""
        before = self.before_.get("dense", {})
        for label, tensor in tensors.items():
            base = step.base[trained.parameter_of[label]]
            # Sums of one tensor in one pass: of W, W - W_0, W - (W_0 + dW_0), and W minus its previous value.
            minus: dict[str, Tensor | None] = {"weight": None, "update": base}
            if label in self.first_:
                minus["learned"] = trained.add(label, base, from_tree(self.first_[label]))
            if label in before:
                minus["step"] = before[label]
            for key, sums in zip(minus, joint_tile_sums(tensor, list(minus.values())), strict=True):
                yield (label, key), sums

    def _adapter_squares(
        self,
        trained: TrainedTensors,
        updates: Mapping[str, Update],
        totals: Mapping[tuple[str, str], float],
        sigmas: Mapping[str, Float[np.ndarray, "k"]],
    ) -> dict[str, dict[str, float]]:
        """Compute squared norms for every adapted weight that is frozen itself, from its update."""
        squares: dict[str, dict[str, float]] = {}
        for module, update in updates.items():
            base = self._base(trained, module)
            # The norm of a product follows from its spectrum.
            norm = update.norm() if update.low_rank is None else math.hypot(*sigmas[module].tolist())
            change = norm**2
            weight = base  # for a packed weight that is not a parameter, only the update is known
            if not math.isnan(base):
                # |W_0 + dW|^2 from its parts, which rounding can make negative.
                if (module, "inner") in totals:
                    inner = update.scale * totals[module, "inner"]
                else:
                    inner = update.inner_weight(self._host_weight(trained, module).detach())
                weight = max(0.0, base + 2 * inner + change)
            squares[module] = {"base": base, "weight": weight, "update": change, "learned": change}
        for key, states in {"learned": self.first_, "step": self.before_.get("factored", {})}.items():
            for module, change in changes_since(updates, from_trees(states)).items():
                squares[module][key] = change**2
        return squares

    def _block_records(self, trained: TrainedTensors, squares: Mapping[str, dict[str, float]]) -> Iterator[Record]:
        for block in trained.blocks:
            rows = _inside(block, squares)
            if not rows:
                continue
            total = {key: math.fsum(map(itemgetter(key), rows)) for key in rows[0]}
            everything = total["base"]
            if not math.isnan(everything):
                # Frozen tensors of the block contribute their base norms.
                everything = math.fsum(_inside(block, self.base_squares_))
            total["weight"] += everything - total["base"]
            total["base"] = everything
            yield from _norm_records(block, total)

    def _spectra(
        self, step: Step, trained: TrainedTensors, tensors: Mapping[str, Tensor], updates: Mapping[str, Update]
    ) -> dict[str, Float[np.ndarray, "k"]]:
        """Compute the singular values of the updates whose ranks are recorded at this step."""
        first, is_kept = step.finished == 0, self._are_spectra_kept(step)
        takes_all = first or is_kept
        # The singular values of a product are cheap: they follow from its small factors.
        decomposed = {name: update for name, update in updates.items() if takes_all or update.low_rank is not None}
        for label in _matrices(trained, tensors):
            if not is_kept or (first and label not in self.first_):
                continue
            # One matrix at a time, because all of them in float64 may not fit on the device.
            change = tensors[label].double() - step.base[trained.parameter_of[label]].double()
            decomposed[label] = Dense(to_array(change.flatten(1)))
        return dict(zip(decomposed, spectra(list(decomposed.values())), strict=True))

    def _rank_records(
        self,
        step: Step,
        trained: TrainedTensors,
        tensors: Mapping[str, Tensor],
        sigmas: Mapping[str, Float[np.ndarray, "k"]],
    ) -> Iterator[Item]:
        every = dict(sigmas)
        if step.finished == 0:
            unchanged = [label for label in _matrices(trained, tensors) if label not in self.first_]
            every = dict.fromkeys(unchanged, np.zeros(1)) | every
        for module, (stable, effective) in zip(every, stable_and_effective_ranks(list(every.values())), strict=True):
            yield Record("stable_rank", stable, module)
            yield Record("effective_rank", effective, module)
        if self._are_spectra_kept(step):
            for module, sigma in sigmas.items():
                yield Snapshot(f"{module}/singular_values", sigma, ("component",))

    def _are_spectra_kept(self, step: Step) -> bool:
        return step.last or self._is_decomposition_due(step.finished)

    def _is_decomposition_due(self, finished: int) -> bool:
        return bool(self.spectra_every and finished % self.spectra_every == 0)


def _trained(delta: Delta | PeftDelta) -> Factors:
    """Return the factors of an adapter that train."""
    constants = constant_factors()
    return {name: to_array(factor) for name, factor in delta.factors().items() if name not in constants}


def _shapes(factors: Factors) -> dict[str, tuple[int, ...]]:
    return {name: factor.shape for name, factor in factors.items()}


def _matrices(trained: TrainedTensors, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the modules whose trained tensor is a matrix, or a kernel of a convolution."""
    return [label for label, tensor in tensors.items() if label in trained.modules and tensor.ndim >= 2]


def _inside(block: str, values: Mapping[str, T]) -> list[T]:
    """Return the values of the modules or parameters inside a block."""
    return [value for name, value in values.items() if name.startswith(f"{block}.")]


def _factor_squares(
    factors: Mapping[str, Factors], initial: Mapping[str, Factors]
) -> dict[str, dict[str, list[float]]]:
    """Compute the squared Frobenius norm of each factor and of its change since the initial one, by module."""
    positions = []
    for module, named_factors in factors.items():
        for name, factor in named_factors.items():
            positions.append(((factor.shape, module in initial), 2 * factor.size, (module, name)))
    squares: dict[str, dict[str, list[float]]] = {"adapter_norm": defaultdict(list), "factor_change": defaultdict(list)}
    for batch in batches(positions):
        arrays = [[factors[module][name] for module, name in batch]]
        if batch[0][0] in initial:
            arrays.append([initial[module][name] for module, name in batch])
        now, *changes = stacks(*arrays)
        for change in changes:
            np.subtract(now, change, out=change)
        for sums, stack in zip(squares.values(), (now, *changes), strict=False):
            # Numpy sums pairwise, here in float64; a dot product would depend on the alignment of the memory.
            totals = np.square(stack, out=stack).sum(axis=tuple(range(1, stack.ndim)))
            for (module, _), total in zip(batch, totals.tolist(), strict=True):
                sums[module].append(total)
    return squares


def to_tree(update: Update) -> dict[str, Any]:
    """Return a weight update in a form that checkpoints of ``norms`` can store; it is already a copy."""
    return {**update.to_factors(), "scale": float(update.scale), "form": update.form}


def from_tree(tree: Mapping[str, Any]) -> Update:
    return from_factors(tree, tree["scale"], form=tree["form"])


def nonzero_trees(updates: Mapping[str, Update]) -> dict[str, dict[str, Any]]:
    """Return the trees of the updates that are not zero."""
    return {module: to_tree(update) for module, update in updates.items() if update.norm() > 0}


def from_trees(trees: Mapping[str, Mapping[str, Any]]) -> dict[str, Update]:
    return {module: from_tree(tree) for module, tree in trees.items()}


def _norm_records(module: str, squares: Mapping[str, float]) -> Iterator[Record]:
    for key, quantity in NORMS.items():
        if key in squares:
            yield Record(quantity, math.sqrt(squares[key]), module)
    if squares["base"] > 0:
        yield Record("relative_update", math.sqrt(squares["update"] / squares["base"]), module)
