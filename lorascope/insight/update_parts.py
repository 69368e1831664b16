"""Parts of an update whose scale can change: components, modules, groups of modules, and intruder dimensions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorascope.adapters.activation_patching import JointMove, Move, replaced_forwards
from lorascope.adapters.delta import Delta, base_output
from lorascope.adapters.host_weights import host_weight, to_array
from lorascope.analysis.dial import WHOLE
from lorascope.analysis.intruders import decompose_weights, find_intruders
from lorascope.array_types import Bool, Float
from lorascope.schema import module_table
from lorascope.updates import Update

KINDS = ("module", "component", "layer", "role", "intruder", WHOLE)
_LEADING = 10  # singular vectors of a trained weight among which intruders are found


class PartDirections(NamedTuple):
    """Rank-one parts of one module's update: sum of ``size[i] * U[:, i] V[:, i]^T``."""

    U: Float[Tensor, "out k"]
    size: Float[Tensor, "k"]
    V: Float[Tensor, "in k"]

    def output(self, x: Tensor, gates: Float[Tensor, "k"]) -> Tensor:
        """Return what these parts add to the module's output at input ``x``, each times its gate."""
        inputs = x @ self.V if x.is_floating_point() else F.embedding(x, self.V)
        return (inputs * (gates * self.size)) @ self.U.T


@dataclass(frozen=True)
class UpdatePart:
    """Part of an update: all of some modules, or one direction of one module.

    Parameters
    ----------
    name : str
    modules : tuple of str
        Modules of the part.
    layer, role : optional
        Position of the part, if it has one.
    direction : int, optional
        Index of the part among the measured directions of the module; None for whole modules.
    component : int, optional
        Number of the singular vector, from 1.
    energy : float
        Fraction of the squared norm of the whole update.
    control : bool
        Whether the part is a control of another part.
    """

    name: str
    modules: tuple[str, ...]
    layer: int | None = None
    role: str | None = None
    direction: int | None = None
    component: int | None = None
    energy: float = 0.0
    control: bool = False

    def to_row(self) -> dict[str, Any]:
        """Return the part as a row of a table, with a module if it is inside only one."""
        module = self.modules[0] if len(self.modules) == 1 else None
        return {
            "part": self.name,
            "module": module,
            "layer": self.layer,
            "role": self.role,
            "component": self.component,
            "energy": self.energy,
            "control": self.control,
        }


class PartsOfUpdate(NamedTuple):
    """Parts in the order of the model, and the directions of those that are not whole modules."""

    parts: list[UpdatePart]
    directions: dict[str, PartDirections]


def group_parts(model: nn.Module, updates: Mapping[str, Update], by: str) -> PartsOfUpdate:
    """Divide an update into modules, layers or roles."""
    energies = _energies(updates)
    groups: dict[str, list[_Position]] = {}
    for position in _positions(model, updates):
        names = {"module": position.module, "layer": position.layer_name, "role": position.role}
        groups.setdefault(names[by], []).append(position)
    parts = []
    for name, positions in groups.items():
        modules = tuple(position.module for position in positions)
        energy = sum(energies[module] for module in modules)
        first = positions[0]
        layer = first.layer if by != "role" else None
        role = first.role if by != "layer" else None
        parts.append(UpdatePart(name, modules, layer, role, energy=energy))
    return PartsOfUpdate(parts, {})


def component_parts(model: nn.Module, updates: Mapping[str, Update]) -> PartsOfUpdate:
    """Divide an update into the singular components of every module, the largest first."""
    energies, parts, directions = _energies(updates), [], {}
    for module, layer, role, _ in _positions(model, updates):
        U, sigma, V = updates[module].svd()
        nonzero = sigma > 0  # the SVD pads an update of lower rank
        U, sigma, V = U[:, nonzero], sigma[nonzero], V[:, nonzero]
        directions[module] = to_directions(model, module, U, sigma, V)
        shares = energies[module] * sigma**2 / (sigma @ sigma)
        for index, energy in enumerate(shares.tolist()):
            name = f"{module} {index + 1}"
            parts.append(UpdatePart(name, (module,), layer, role, index, index + 1, energy))
    return PartsOfUpdate(parts, directions)


def add_random_controls(components: PartsOfUpdate, controlled: Set[UpdatePart]) -> PartsOfUpdate:
    """Add a control after some components: random directions inside the span of the update, with the same sigma.

    In a module with singular vectors U (out, k) and V (in, k), the control of component i is ``sigma_i (U a) (V b)^T``
    with random unit vectors a and b (k,). One component spans no other direction, so it has no control.
    """
    generator = torch.Generator().manual_seed(0)
    directions = {}
    for module, (U, size, V) in components.directions.items():
        a, b = F.normalize(torch.randn(2, len(size), len(size), generator=generator), dim=1).to(U)
        directions[module] = PartDirections(torch.cat([U, U @ a], 1), size.repeat(2), torch.cat([V, V @ b], 1))
    parts = []
    for part in components.parts:
        parts.append(part)
        number = len(components.directions[part.modules[0]].size)
        if part in controlled and part.direction is not None and number > 1:
            index = number + part.direction
            parts.append(replace(part, name=f"{part.name}, control", direction=index, control=True))
    return PartsOfUpdate(parts, directions)


def intruder_parts(model: nn.Module, updates: Mapping[str, Update]) -> PartsOfUpdate:
    """Return the intruder dimensions of an update, each followed by its control: the non-intruder closest in size.

    Part j of a module is ``u_j (u_j^T dW v_j) v_j^T`` with singular vectors u_j and v_j of W0 + dW. The control is the
    singular vector of the same module that is no intruder and whose part has the most similar size; it may be much
    smaller, which the column ``energy`` of the dial shows.
    """
    energies, parts, directions = _energies(updates), [], {}
    for module, layer, role, _ in _positions(model, updates):
        weight = to_array(host_weight(model.get_submodule(module)).detach().double())
        update = updates[module].dense()
        rows = find_intruders(decompose_weights({module: weight}), {module: updates[module]}, _LEADING)
        if not rows["intruder"].any():
            continue
        U, _, Vt = np.linalg.svd(weight + update, full_matrices=False)
        U, V = U[:, : len(rows)], Vt[: len(rows)].T
        sizes = np.einsum("oj,oi,ij->j", U, update, V)
        norm = updates[module].norm()
        pairs = _match_controls(np.abs(sizes), rows["intruder"].to_numpy(bool))
        for index, (vector, is_control) in enumerate(pairs):
            kind = "control" if is_control else "intruder"
            energy = energies[module] * float(sizes[vector] / norm) ** 2
            name = f"{module} {vector + 1}, {kind}"
            parts.append(UpdatePart(name, (module,), layer, role, index, vector + 1, energy, is_control))
        vectors = [vector for vector, _ in pairs]
        directions[module] = to_directions(model, module, U[:, vectors], sizes[vectors], V[:, vectors])
    return PartsOfUpdate(parts, directions)


def _match_controls(sizes: Float[np.ndarray, "k"], is_intruder: Bool[np.ndarray, "k"]) -> list[tuple[int, bool]]:
    """Return the intruders, each followed by the unused non-intruder of the most similar size, which is marked True."""
    pairs = []
    candidates = np.flatnonzero(~is_intruder).tolist()
    for intruder in np.flatnonzero(is_intruder).tolist():
        pairs.append((intruder, False))
        if candidates:
            distances = np.abs(sizes[candidates] - sizes[intruder])
            pairs.append((candidates.pop(int(distances.argmin())), True))
    return pairs


def _energies(updates: Mapping[str, Update]) -> dict[str, float]:
    """Return the fraction of the squared norm of all updates in each module."""
    squares = {module: update.norm() ** 2 for module, update in updates.items()}
    total = sum(squares.values()) or 1.0  # an update of zero has no energy to divide
    return {module: square / total for module, square in squares.items()}


def to_directions(
    model: nn.Module,
    module: str,
    U: Float[np.ndarray, "out k"],
    size: Float[np.ndarray, "k"],
    V: Float[np.ndarray, "in k"],
) -> PartDirections:
    """Return the sum of ``size[i] * U[:, i] V[:, i]^T`` as tensors like the module's weight."""
    weight: Any = model.get_submodule(module).weight
    return PartDirections(*(torch.from_numpy(np.ascontiguousarray(array)).to(weight) for array in (U, size, V)))


class _Position(NamedTuple):
    """Position of a module; outside of layers, the name of its layer is its role."""

    module: str
    layer: int | None
    role: str
    layer_name: str


def _positions(model: nn.Module, updates: Mapping[str, Update]) -> list[_Position]:
    """Return the positions of the updated modules, in the order of the model."""
    table = module_table.describe(model)
    positions = []
    row: Any
    for row in table[table["module"].isin(list(updates))].itertuples():
        if pd.isna(row.layer):
            positions.append(_Position(row.module, None, row.role, row.role))
        else:
            layer_name = f"{row.stack} layer {row.layer}".strip()
            positions.append(_Position(row.module, int(row.layer), row.role, layer_name))
    return positions


class ScaledUpdates:
    """Adapted model whose updates can be scaled for measurements, while its adapters stay attached.

    Parameters
    ----------
    model : Module
        Model with ``deltas`` attached.
    deltas : mapping module -> Delta
        Its updates, none of which depends on the input.
    directions : mapping module -> PartDirections
        Rank-one parts whose slopes are wanted.
    """

    def __init__(self, model: nn.Module, deltas: Mapping[str, Delta], directions: Mapping[str, PartDirections]) -> None:
        self.model, self.deltas, self.directions = model, deltas, directions

    @contextmanager
    def scaled(self, part: UpdatePart, scale: float) -> Iterator[None]:
        """Scale a part in this context.

        At 0, whole modules compute bit by bit what they do without their adapters, and at 1 what they do with them.
        """
        forwards: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
        for name in part.modules:
            host = self.model.get_submodule(name)
            if part.direction is None:
                forwards[host] = partial(_scaled_output, host, host.forward, scale)
            else:
                forwards[host] = partial(_rescaled_output, host.forward, self._rescaling(part, name, scale))
        with replaced_forwards(forwards):
            yield

    @contextmanager
    def gated(self, scale: float) -> Iterator[dict[str, Tensor]]:
        """Scale all updates by one number in this context, and add each part times its gate, which is 0.

        The gradient with respect to a gate is the slope of its part. There is one gate tensor per module: of shape (k,)
        for k directions, or () for the whole update of the module.
        """
        forwards, gates = {}, {}
        for name in self.deltas:
            host: Any = self.model.get_submodule(name)
            directions = self.directions.get(name)
            shape = () if directions is None else directions.size.shape
            gate = gates[name] = torch.zeros(shape, dtype=host.weight.dtype, requires_grad=True)
            forwards[host] = partial(_gated_output, host, scale, directions, gate)
        with replaced_forwards(forwards):
            yield gates

    def rescaling(self, part: UpdatePart, scale: float) -> Move | JointMove:
        """Return the move of the outputs of a part's modules that gives the part another scale."""
        if len(part.modules) == 1:
            return self._rescaling(part, part.modules[0], scale)
        outputs = {}
        for name in part.modules:
            host = self.model.get_submodule(name)
            outputs[name] = partial(_scaled_output, host, host.forward, scale)
        return JointMove(outputs)

    def _rescaling(self, part: UpdatePart, name: str, scale: float) -> Move:
        if part.direction is None:
            return partial(_move_module, self.model.get_submodule(name), scale)
        directions = self.directions[name]
        gates = torch.zeros_like(directions.size)
        gates[part.direction] = scale - 1
        return lambda x, y: y + directions.output(x, gates)


def _rescaled_output(forward: Callable[[Tensor], Tensor], rescale: Move, x: Tensor) -> Tensor:
    return rescale(x, forward(x))


def _scaled_output(host: Any, forward: Callable[[Tensor], Tensor], scale: float, x: Tensor) -> Tensor:
    # Neither end needs the product of the other, and at 1 the adapter rounds as in the run.
    if scale == 0:
        return base_output(host, x)
    if scale == 1:
        return forward(x)
    base = base_output(host, x)
    return (base + scale * host.delta(x)).to(base.dtype)


def _gated_output(host: Any, scale: float, directions: PartDirections | None, gate: Tensor, x: Tensor) -> Tensor:
    # The whole output would contain the base's a second time, with its gradient.
    base, contribution = base_output(host, x), host.delta(x)
    if directions is None:
        return (base + (scale + gate) * contribution).to(base.dtype)
    return (base + scale * contribution).to(base.dtype) + directions.output(x, gate)


def _move_module(host: Any, scale: float, x: Tensor, y: Tensor) -> Tensor:
    # Subtracting the whole update would leave its rounding error.
    if scale == 0:
        return base_output(host, x)
    return (y + (scale - 1) * host.delta(x)).to(y.dtype)


def slopes_of(parts: Sequence[UpdatePart], gradients: Mapping[str, Tensor]) -> Float[np.ndarray, "part"]:
    """Return the slope of every part from the gradients of the gates of ``ScaledUpdates``, by module."""
    slopes = np.zeros(len(parts))
    for index, part in enumerate(parts):
        for module in part.modules:
            gradient = gradients[module]
            # The gate of a whole module is one number.
            slopes[index] += float(gradient if part.direction is None else gradient[part.direction])
    return slopes
