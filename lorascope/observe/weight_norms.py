"""Observer of norms and ranks of weights, updates and steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lorascope.adapters.delta import host_weight
from lorascope.adapters.host_weights import shared_copies
from lorascope.methods.base import Step
from lorascope.observe.base import Observer
from lorascope.observe.trainable import TrainedTensors, squares
from lorascope.schema.records import Item, Record, Snapshot
from lorascope.updates import (
    Dense,
    Update,
    constant_factors,
    effective_rank,
    from_factors,
    spectra,
    stable_rank,
)

NORMS = {"weight": "weight_norm", "update": "update_norm", "learned": "learned_norm", "step": "step_norm"}


@dataclass(kw_only=True)
class norms(Observer):
    """Norms and ranks of every update, by module and by block.

    The values of a module refer to its weight matrix, the values of a block to all its tensors, including norms and
    biases. Only trained tensors are recorded. Ranks of factored updates are recorded each time. Ranks of dense updates
    need an SVD, so they are recorded only at step 0, at the last step and at multiples of ``spectra_every``.

    Parameters
    ----------
    every : int
        Steps between recordings.
    spectra_every : int or None
        Steps between SVDs of dense updates; None computes them only at step 0 and at the last step.
    """

    spectra_every: int | None = None

    def __post_init__(self) -> None:
        self.first_: dict[str, Any] = {}
        self.before_: dict[str, Any] = {}
        self.base_squares_: dict[str, float] = {}
        self._found: TrainedTensors | None = None
        self._memory: dict[str, Tensor] = {}

    def due(self, finished: int, total: int) -> bool:
        """Return whether the state should be recorded, which includes the steps of ``spectra_every``."""
        return super().due(finished, total) or self._is_decomposition_due(finished)

    @torch.no_grad()
    @shared_copies()
    def __call__(self, step: Step) -> list[Item]:
        """Return norms and ranks after this step, if it is due or the best so far."""
        self._found = trained = self._found or TrainedTensors.of(step)
        items: list[Item] = []
        if step.finished == 0:
            # The norm of a quantized weight is not known (NaN), but the norm of its update is.
            self.base_squares_ = {
                name: squares(weight) if weight.is_floating_point() else math.nan for name, weight in step.base.items()
            }
            self.first_ = {
                module: _update_to_tree(update) for module, update in trained.updates().items() if update.norm() > 0
            }
        if self.due(step.finished, step.total) or step.best:
            items.extend(self._record_norms(step, trained))
        self.before_ = {}
        # The norm of the next step needs the state before it.
        if not step.last and self.due(step.finished + 1, step.total):
            self._remember(trained)
        return items

    def _remember(self, trained: TrainedTensors) -> None:
        """Store the tensors that the next recording is compared with, in the same memory each time.

        Freeing and allocating this memory would slow down the next step by more than the recording costs.
        """
        updates = trained.updates()
        for label, tensor in _tensors(trained, updates).items():
            if label not in self._memory:
                self._memory[label] = torch.empty_like(tensor)
            self._memory[label].copy_(tensor)
        factored = {module: _update_to_tree(update) for module, update in updates.items() if trained.is_frozen(module)}
        self.before_ = {"dense": self._memory, "factored": factored}

    def _record_norms(self, step: Step, trained: TrainedTensors) -> Iterator[Item]:
        updates = trained.updates()
        found = self._dense_squares(step, trained, updates) | self._adapter_squares(step, trained, updates)
        for label, parts in found.items():
            if label in trained.modules:
                yield from _norm_records(label, parts)
        yield from self._block_records(trained, found)
        for module, delta in trained.deltas.items():
            trainable = (factor for name, factor in delta.factors().items() if name not in constant_factors())
            adapter = math.fsum(map(squares, trainable))
            yield Record("adapter_norm", math.sqrt(adapter), module)
            yield Record("rank", delta.rank, module)
        yield from self._rank_records(step, trained, updates)

    def _dense_squares(
        self, step: Step, trained: TrainedTensors, updates: Mapping[str, Update]
    ) -> dict[str, dict[str, float]]:
        """Compute squared norms for every trained tensor of the base model."""
        found = {}
        before = self.before_.get("dense", {})
        for label, tensor in _tensors(trained, updates).items():
            name = trained.parameter_of[label]
            base = step.base[name]
            found[label] = parts = {
                "base": self.base_squares_[name],
                "weight": squares(tensor),
                "update": squares(tensor, base),
            }
            start = trained.add(label, base, _update_from_tree(self.first_[label])) if label in self.first_ else base
            parts["learned"] = parts["update"] if start is base else squares(tensor, start)
            if label in before:
                parts["step"] = squares(tensor, before[label])
        return found

    def _adapter_squares(
        self, step: Step, trained: TrainedTensors, updates: Mapping[str, Update]
    ) -> dict[str, dict[str, float]]:
        """Compute squared norms for every adapted weight that is frozen itself."""
        found = {}
        before = self.before_.get("factored", {})
        for module in filter(trained.is_frozen, updates):
            update = updates[module]
            # For a packed weight that is not a parameter, only the update is known.
            base, change = self.base_squares_.get(trained.parameter_of[module], math.nan), update.norm() ** 2
            weight = base
            if not math.isnan(base):
                # |W_0 + dW|^2 from its parts, which rounding can make negative.
                weight = max(0.0, base + 2 * update.inner_weight(host_weight(trained.hosts[module]).detach()) + change)
            found[module] = parts = {"base": base, "weight": weight, "update": change, "learned": change}
            if module in self.first_:
                parts["learned"] = (update - _update_from_tree(self.first_[module])).norm() ** 2
            if module in before:
                parts["step"] = (update - _update_from_tree(before[module])).norm() ** 2
        return found

    def _block_records(self, trained: TrainedTensors, found: Mapping[str, dict[str, float]]) -> Iterator[Record]:
        for block in trained.blocks:
            inside = [parts for label, parts in found.items() if label.startswith(f"{block}.")]
            if not inside:
                continue
            total = {key: math.fsum(parts[key] for parts in inside) for key in inside[0]}
            known = (s for name, s in self.base_squares_.items() if name.startswith(f"{block}."))
            # Frozen tensors of the block contribute their base norms.
            everything = math.nan if math.isnan(total["base"]) else math.fsum(known)
            total["weight"] += everything - total["base"]
            total["base"] = everything
            yield from _norm_records(block, total)

    def _rank_records(self, step: Step, trained: TrainedTensors, updates: Mapping[str, Update]) -> Iterator[Item]:
        first, kept = step.finished == 0, step.last or self._is_decomposition_due(step.finished)
        cheap = {name: update for name, update in updates.items() if update.thin is not None or first or kept}
        chosen = {module: update for module, update in cheap.items() if trained.is_frozen(module)}
        for label, tensor in _tensors(trained, updates).items():
            if label not in trained.modules or tensor.ndim < 2:
                continue
            if first and label not in self.first_:
                yield from _rank_pair(label, np.zeros(1))
            elif kept:
                change = tensor.double() - step.base[trained.parameter_of[label]].double()
                chosen[label] = Dense(change.flatten(1).cpu().numpy())
        for module, sigma in zip(chosen, spectra(list(chosen.values())), strict=True):
            yield from _rank_pair(module, sigma)
            if kept:
                yield Snapshot(f"{module}/singular_values", sigma, ("component",))

    def _is_decomposition_due(self, finished: int) -> bool:
        return bool(self.spectra_every and finished % self.spectra_every == 0)


def _tensors(trained: TrainedTensors, updates: Mapping[str, Update]) -> dict[str, Tensor]:
    """Return every trained tensor of the base model by label, including the update of its adapter."""
    found: dict[str, Tensor] = {label: parameter.detach() for label, parameter in trained.dense.items()}
    for module, update in updates.items():
        if not trained.is_frozen(module):
            found[module] = trained.add(module, trained.hosts[module].weight.detach(), update)
    return found


def _update_to_tree(update: Update) -> dict[str, Any]:
    """Return an update in a form that checkpoints can store; it is already a copy."""
    return {**update.to_factors(), "scale": float(update.scale), "form": update.form}


def _update_from_tree(plain: Mapping[str, Any]) -> Update:
    return from_factors(plain, plain.get("scale", 1.0), form=plain.get("form"))  # checkpoints of 0.1 have no form


def _norm_records(module: str, parts: Mapping[str, float]) -> Iterator[Record]:
    for key, quantity in NORMS.items():
        if key in parts:
            yield Record(quantity, math.sqrt(parts[key]), module)
    if parts["base"] > 0:
        yield Record("relative_update", math.sqrt(parts["update"] / parts["base"]), module)


def _rank_pair(module: str, sigma: Float[np.ndarray, "k"]) -> Iterator[Record]:
    yield Record("stable_rank", stable_rank(sigma), module)
    yield Record("effective_rank", effective_rank(sigma), module)
