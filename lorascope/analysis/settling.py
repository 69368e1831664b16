"""Distance of every update to its last one over the steps, and the step from which a module has settled.

The distance is relative: ``|dW_t - dW_T|_F / |dW_T|_F``, where T is the last step whose updates are stored. A module
has settled at the first of these steps from which on the distance is at most a threshold, 10% by default.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lorascope.array_types import Float
from lorascope.files.lazy_pandas import pandas as pd
from lorascope.runs.result import Result
from lorascope.schema.module_roles import parse
from lorascope.updates.linalg import one_thread

THRESHOLD = 0.1


@dataclass(frozen=True)
class Distances:
    """Distances of the updates of some modules to their last ones, from which settling is determined.

    Parameters
    ----------
    steps : tuple of int
        Steps whose updates are stored, in order.
    values : mapping module -> array (step,)
        ``|dW_t - dW_T|_F``; NaN at steps without the module.
    norms : mapping module -> float
        ``|dW_T|_F``.
    """

    steps: tuple[int, ...]
    values: dict[str, Float[np.ndarray, "step"]]
    norms: dict[str, float]

    def relative(self, modules: Iterable[str]) -> Float[np.ndarray, "step"]:
        """Return the relative distance of several modules as one vector of all weights; 0 if nothing changes."""
        names = list(modules)
        distance = np.sqrt(np.sum([self.values[name] ** 2 for name in names], axis=0))
        norm = np.sqrt(np.sum([self.norms[name] ** 2 for name in names]))
        with np.errstate(divide="ignore", invalid="ignore"):  # modules whose last update is zero
            return np.where(distance == 0, 0.0, distance / norm)

    def settled(self, modules: Iterable[str], threshold: float = THRESHOLD) -> int:
        """Return the first step from which on the relative distance of several modules is at most a threshold.

        It is at most the last step, where the distance is 0. The value means that the modules were within the threshold
        at this stored step, and not at the one before it.
        """
        far = np.flatnonzero(~(self.relative(modules) <= threshold))  # negated, so that NaN counts as far
        if not len(far):
            return self.steps[0]
        return self.steps[far[-1] + 1]

    @cached_property
    def layers(self) -> dict[tuple[str, int | None, str], list[str]]:
        """Modules by stack and layer, and outside the blocks also by role."""
        layers: dict[tuple[str, int | None, str], list[str]] = {}
        for module in self.values:
            stack, layer, role = parse(module)
            if layer is not None:
                role = ""
            layers.setdefault((stack, layer, role), []).append(module)
        return layers


def update_distances(run: Result) -> Distances:
    """Compute how updates settle: the distance of every stored update of a run to its last one.

    The squared distance is ``|dW_t|^2 + |dW_T|^2 - 2 <dW_t, dW_T>``: its rounding error is about 1e-8 of the norm.
    Updates are read one module at a time.

    Raises
    ------
    ValueError
        The run stored its updates at fewer than two steps.
    """
    steps = run.update_steps()
    if len(steps) < 2:
        raise ValueError(f"{run.kind} {run.label} must have updates at two steps or more, got steps {steps}")
    updates = [run.updates(step) for step in steps]
    values, norms = {}, {}
    with one_thread():
        for module in updates[-1]:
            last = updates[-1][module]
            size = last.norm()
            squares = []
            for step_updates in updates[:-1]:
                square = np.nan
                if module in step_updates:
                    update = step_updates[module]
                    square = update.norm() ** 2 + size**2 - 2 * update.inner(last)
                squares.append(square)
            # Rounding can make the square of a small distance negative.
            values[module] = np.append(np.sqrt(np.maximum(squares, 0.0)), 0.0)
            norms[module] = size
    return Distances(tuple(steps), values, norms)


def settling_steps(run: Result, threshold: float = THRESHOLD) -> pd.DataFrame:
    """Compute the settling step, from which each module and each layer has settled, see `Distances.settled`.

    Parameters
    ----------
    run : Result
        Series of checkpoints, or a run with ``observe.factors``.
    threshold : float
        Largest relative distance of a settled update, 0.1 by default.

    Returns
    -------
    DataFrame
        ``run, module, stack, layer, role``; ``norm`` of the update at the last step; ``last_change``, the relative
        distance of the last two stored updates; ``settled`` and ``layer_settled``, the steps of the module and of its
        layer.
    """
    distances = update_distances(run)
    by_layer: dict[str, int] = {}
    for names in distances.layers.values():
        by_layer |= dict.fromkeys(names, distances.settled(names, threshold))
    rows = []
    for module, norm in distances.norms.items():
        change, step = distances.relative([module])[-2], distances.settled([module], threshold)
        rows.append((run.id, module, *parse(module), norm, change, step, by_layer[module]))
    columns = ["run", "module", "stack", "layer", "role", "norm", "last_change", "settled", "layer_settled"]
    return pd.DataFrame(rows, columns=columns).astype({"layer": "Int16"})
