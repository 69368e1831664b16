"""Observers: what is read from a model at a step, as records.

An observer is a dataclass whose fields are its settings; it is called at step 0 and after every step, and decides by
``every`` whether it has something to say. ``norms`` is there by default.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorascope.delta import adapted, host_weight, to_array
from lorascope.method import Step
from lorascope.records import Factors, Item, Record, Snapshot
from lorascope.update import Dense, LowRank, effective_rank, spectra, stable_rank

Update = LowRank | Dense

NORMS = {"weight": "weight_norm", "update": "update_norm", "learned": "learned_norm", "step": "step_norm"}

# Marks a tensor that is no module's weight matrix among the modules; it counts in its block alone.
PARAMETER = "parameter "

# Elements of one tile of a pass over dense weights: three float32 tiles stay in the second-level cache.
TILE = 1 << 16


@dataclass(kw_only=True)
class Observer:
    """Something that looks at a step.

    Parameters
    ----------
    every : int
        Steps between two looks; step 0 and the last step are always looked at.
    """

    every: int = 10

    def due(self, finished: int, total: int) -> bool:
        """Is the state after ``finished`` steps to be looked at?"""
        return finished % self.every == 0 or finished == total

    def __call__(self, step: Step) -> Iterable[Item]:
        """Look at a step."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """The JSON form, part of a run's identity."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        return {"name": type(self).__name__} | fields

    def state(self) -> dict[str, Any]:
        """What is remembered between steps: each attribute ending in ``_``."""
        return {key: value for key, value in vars(self).items() if key.endswith("_")}

    def restore(self, state: dict[str, Any]) -> None:
        """Put back what ``state`` gave."""
        for key, value in state.items():
            setattr(self, key, value)


@dataclass(kw_only=True)
class factors(Observer):
    """The adapters' factors themselves, as snapshots."""

    every: int = 50

    def __call__(self, step: Step) -> Iterable[Item]:
        return factors_of(step.model) if self.due(step.finished, step.total) else ()


def factors_of(model: nn.Module) -> list[Factors]:
    """The factors of every adapter of a model."""
    kept = []
    for module, delta in adapted(model).items():
        update = delta.update()
        arrays = {name: to_array(factor) for name, factor in delta.factors().items()}
        scale = float(update.scale) if isinstance(update, LowRank) else None
        kept.append(Factors(module, arrays, scale, getattr(update, "exact", True)))
    return kept


@dataclass(kw_only=True)
class norms(Observer):
    """Norms and ranks of every update, by module and by block.

    A module's row is about its weight matrix; a block's row is about all tensors of the block, norms and biases
    included. Only what trains is recorded. Ranks of factored updates are taken each time, those of dense updates at
    the end and at multiples of ``spectra_every``, since they cost a decomposition.

    Parameters
    ----------
    every : int
        Steps between two looks.
    spectra_every : int or None
        Steps between two decompositions of dense updates; None leaves it at the last step.
    """

    spectra_every: int | None = None

    def __post_init__(self) -> None:
        self.first_: dict[str, Any] = {}
        self.before_: dict[str, Any] = {}
        self.base_squares_: dict[str, float] = {}

    def __call__(self, step: Step) -> Iterator[Item]:
        if step.finished == 0:
            self.base_squares_ = {name: float(_squares(weight)) for name, weight in step.base.items()}
            self.first_ = {name: _plain(update) for name, update in _updates(step.model).items() if update.norm() > 0}
        if self.due(step.finished, step.total) or step.best:
            with torch.no_grad():
                yield from self._look(step)
        self.before_ = {}
        if not step.last and self.due(step.finished + 1, step.total):
            self.before_ = {
                "dense": {name: parameter.detach().clone() for name, parameter in dense_parameters(step).items()},
                "factored": {name: _plain(update) for name, update in _updates(step.model).items()},
            }

    def _look(self, step: Step) -> Iterator[Item]:
        updates = _updates(step.model)
        squares = self._dense_squares(step) | self._adapter_squares(step, updates)
        for module, found in squares.items():
            if not module.startswith(PARAMETER):
                yield from _norm_records(module, found)
        yield from self._block_records(step, squares)
        for module, delta in adapted(step.model).items():
            yield Record("adapter_norm", float(_root(_squares(factor) for factor in delta.factors().values())), module)
            yield Record("rank", updates[module].rank, module)
        yield from self._rank_records(step, updates)

    def _dense_squares(self, step: Step) -> dict[str, dict[str, float]]:
        """Squared norms of every densely trained tensor: under its module if it is a weight, else under its name."""
        module_of = {f"{module}.weight": module for module in step.modules["module"]}
        earlier = self.before_.get("dense", {})
        return {
            module_of.get(name, PARAMETER + name): _dense_squares(parameter, step.base[name], earlier.get(name))
            for name, parameter in dense_parameters(step).items()
        }

    def _adapter_squares(self, step: Step, updates: Mapping[str, Update]) -> dict[str, dict[str, float]]:
        """The same for every adapted module, its frozen weight included."""
        found = {}
        earlier = self.before_.get("factored", {})
        for module, update in updates.items():
            host = step.model.get_submodule(module)
            base = self.base_squares_[_weight_name(step.model, host)]
            squared = update.norm() ** 2
            found[module] = {
                "base": base,
                "weight": max(0.0, base + 2 * _inner(host_weight(host), update) + squared),
                "update": squared,
                "learned": (update - _update(self.first_[module])).norm() ** 2 if module in self.first_ else squared,
            }
            if module in earlier:
                found[module]["step"] = (update - _update(earlier[module])).norm() ** 2
        return found

    def _block_records(self, step: Step, squares: Mapping[str, dict[str, float]]) -> Iterator[Record]:
        blocks = step.modules.loc[step.modules["role"] == "block", "module"]
        for block in blocks:
            inside = [found for name, found in squares.items() if name.removeprefix(PARAMETER).startswith(f"{block}.")]
            if not inside:
                continue
            total = {key: sum(found.get(key, math.nan) for found in inside) for key in inside[0]}
            still = sum(s for name, s in self.base_squares_.items() if name.startswith(f"{block}.")) - total["base"]
            total["base"] += still
            total["weight"] += still
            yield from _norm_records(block, total)

    def _rank_records(self, step: Step, updates: Mapping[str, Update]) -> Iterator[Item]:
        decompose = step.last or bool(self.spectra_every and step.finished % self.spectra_every == 0)
        chosen = dict(updates) if decompose else {n: u for n, u in updates.items() if isinstance(u, LowRank)}
        if decompose and step.finished > 0:
            chosen |= _dense_updates(step)
        sigmas = dict(zip(chosen, spectra(list(chosen.values())), strict=True))
        for module, sigma in sigmas.items():
            yield Record("stable_rank", stable_rank(sigma), module)
            yield Record("effective_rank", effective_rank(sigma), module)
            if decompose:
                yield Snapshot(f"{module}/singular_values", sigma, ("component",))


def dense_parameters(step: Step) -> dict[str, nn.Parameter]:
    """Parameters of the base that the optimizer changes themselves, by name."""
    trained = {id(parameter) for group in step.optimizer.param_groups for parameter in group["params"]}
    return {name: p for name, p in step.model.named_parameters() if id(p) in trained and name in step.base}


def _dense_updates(step: Step) -> Iterator[tuple[str, Dense]]:
    changed = dense_parameters(step)
    for module in step.modules.loc[step.modules["in_features"].notna(), "module"]:
        name = f"{module}.weight"
        if name in changed:
            update = (changed[name].detach().double() - step.base[name].double()).flatten(1)
            yield module, Dense(update.cpu().numpy())


def _updates(model: nn.Module) -> dict[str, Update]:
    return {module: delta.update() for module, delta in adapted(model).items()}


def _plain(update: Update) -> dict[str, Any]:
    """A copy of an update that a checkpoint can keep."""
    if isinstance(update, Dense):
        return {"matrix": np.array(update.matrix)}
    return {"B": np.array(update.B), "A": np.array(update.A), "scale": float(update.scale)}


def _update(plain: Mapping[str, Any]) -> Update:
    return Dense(plain["matrix"]) if "matrix" in plain else LowRank(plain["B"], plain["A"], plain["scale"])


def _weight_name(model: nn.Module, host: nn.Module) -> str:
    return next(name for name, parameter in model.named_parameters() if parameter is host.weight)


def _inner(weight: Float[Tensor, "out in"], update: Update) -> float:
    """<W, dW>, without forming a factored dW."""
    if isinstance(update, Dense):
        return float((weight.double() * torch.from_numpy(update.matrix).to(weight.device)).sum())
    A = torch.from_numpy(np.asarray(update.A)).to(weight.device, weight.dtype)
    B = torch.from_numpy(np.asarray(update.B)).to(weight.device, weight.dtype)
    return float(update.scale * ((weight @ A.T).double() * B.double()).sum())


def _squares(tensor: Tensor) -> float:
    """Sum of squares: float32 within a tile, float64 over tiles."""
    return math.fsum(float(torch.dot(tile, tile)) for tile in tensor.detach().float().reshape(-1).split(TILE))


def _dense_squares(
    weight: Float[Tensor, "..."], base: Float[Tensor, "..."], before: Float[Tensor, "..."] | None
) -> dict[str, float]:
    """Squared norms of a weight, its update and its last step, in one pass over tiles that stay in the cache."""
    tiles = [tensor.detach().reshape(-1).split(TILE) for tensor in (weight, base)]
    squares = np.zeros(4)
    for number, (now, first) in enumerate(zip(*tiles, strict=True)):
        update = now.float() - first.float()
        for place, tile in enumerate((first.float(), now.float(), update)):
            squares[place] += float(torch.dot(tile, tile))
        if before is not None:
            last = now.float() - before.reshape(-1)[number * TILE : (number + 1) * TILE].float()
            squares[3] += float(torch.dot(last, last))
    found = {"base": squares[0], "weight": squares[1], "update": squares[2], "learned": squares[2]}
    return found if before is None else found | {"step": squares[3]}


def _norm_records(module: str, squares: Mapping[str, float]) -> Iterator[Record]:
    for key, quantity in NORMS.items():
        if key in squares and not math.isnan(squares[key]):
            yield Record(quantity, math.sqrt(squares[key]), module)
    if squares["base"] > 0:
        yield Record("relative_update", math.sqrt(squares["update"] / squares["base"]), module)


def _root(squares: Iterable[float]) -> float:
    return math.sqrt(math.fsum(squares))
