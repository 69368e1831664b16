"""View of a HydraLoRA run with fixed gate weights, such as the means on a text or a single expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from lorascope.array_types import Float
from lorascope.files.lazy_pandas import pandas as pd
from lorascope.runs.finding_lines import Lines
from lorascope.runs.layout import Lazy, identify
from lorascope.runs.result import Result, is_at_step
from lorascope.schema.records import validate
from lorascope.updates import Update, effective_rank, from_factors, stable_rank

UNIFORM = 0.1
"""Largest relative difference from uniform of the mean gates of an unlearned mixture."""
_SIZES = ("update_norm", "learned_norm", "relative_update")
_SHAPES = {"stable_rank": stable_rank, "effective_rank": effective_rank}
# weight_norm requires W₀, and step_norm the previous gate weights.
_UNKNOWN = ("weight_norm", "step_norm")


def at_gates(
    run: Result,
    gates: Mapping[str, Sequence[float] | Float[np.ndarray, "_"]],
    label: str = "given gates",
) -> Result:
    """Return a gated run, with updates at fixed gate weights: ``scale * sum(gates[i] * B[i] @ A)``.

    Parameters
    ----------
    run : Result
        HydraLoRA run, or a loaded HydraLoRA adapter.
    gates : mapping module -> (heads,)
        Gate weights, such as those of ``mean_gates`` on a text, or a one-hot vector for a single expert. Updates of
        other modules are unchanged.
    label : str
        Description of the gate weights in captions ("Updates of ... at `label`."); "given gates" by default.

    Returns
    -------
    Result
        View with one state. Update norms and ranks of all modules are available only at the last step, and quantities
        that require W₀ or the previous step are omitted. Other records are unchanged. ``restore`` loads the trained
        state.

    Raises
    ------
    ValueError
        A module has no experts or another number of them, or a gate weight is not finite.
    """
    factors = run.factors()
    fixed_gates = {}
    for module, values in gates.items():
        if module not in factors or "gates" not in factors[module]:
            routed = [name for name in factors if "gates" in factors[name]]
            raise ValueError(
                f"unknown module {module!r} in gates; expected one of the modules with experts of {run.reference}, "
                f"{', '.join(routed) or 'none'}"
            )
        weights = np.asarray(values, dtype=np.float64)
        experts = factors[module]["gates"].shape
        if weights.shape != experts:
            raise ValueError(f"gates of {module} must have {experts[0]} values, one per expert, got {weights.size}")
        if not np.isfinite(weights).all():
            raise ValueError(f"gates of {module} must be finite, got {weights.tolist()}")
        fixed_gates[module] = weights
    return GatedRun(run, fixed_gates, label)


def gate_description(run: Result) -> str:
    """Describe the gate weights of a gated run, or those recorded for input-dependent updates; "" without any.

    The gate weights are exactly equal if none were recorded on texts, as in the authors' folders and under a Trainer.
    """
    routed = run.input_dependent_modules()
    if not routed:
        return ""
    if run.gates_label:
        return run.gates_label
    gates = run.factors()[min(routed)].get("gates")
    return "mean gates" if gates is None or np.ptp(gates) else "uniform gates"


def has_nearly_uniform_gates(run: Result) -> bool:
    """Return whether all mean gates of a run are within 10% of uniform, as those of a router that learned nothing."""
    factors = run.factors()
    for module in run.input_dependent_modules():
        gates = factors[module].get("gates")
        if gates is None or np.abs(len(gates) * gates - 1).max() > UNIFORM:
            return False
    return True


class GatedRun(Result):
    """Gated run: view of a run with fixed gate weights; created by ``at_gates``."""

    def __init__(self, run: Result, gates: Mapping[str, Float[np.ndarray, "heads"]], label: str) -> None:
        self.run, self.gates, self.gates_label = run, gates, label
        self.kind, self.has_history = run.kind, run.has_history  # type: ignore[misc]
        # A view has another id than its run, because a figure takes each id only once.
        id = identify({"run": run.id, "gates": {module: values.tolist() for module, values in gates.items()}})
        super().__init__(run.path, replace(run.meta, id=id))

    def __getattr__(self, name: str) -> Any:
        """Return everything that does not depend on the gates from the run, such as its saved state."""
        if name == "run":  # copying asks for attributes before there are any
            raise AttributeError(name)
        return getattr(self.run, name)

    def _lines(self) -> Lines:
        return [*self.run._lines(), ("gates", self.gates_label)]

    @property
    def parents(self) -> list[Any]:
        return self.run.parents

    def snapshot_steps(self, name: str) -> list[int]:
        return self.run.snapshot_steps(name)

    def snapshot_names(self) -> list[str]:
        return self.run.snapshot_names()

    def update_steps(self) -> list[int]:
        return self.run.update_steps()

    def _long_snapshot(self, name: str, step: int) -> pd.DataFrame:
        return self.run._long_snapshot(name, step)

    def factors(self, step: int | None = None, state: str = "last") -> Mapping[str, dict[str, np.ndarray]]:
        """See `Result.factors`; ``gates`` are the fixed ones."""
        stored = self.run.factors(step, state)

        def read(module: str) -> dict[str, np.ndarray]:
            if module not in self.gates:
                return stored[module]
            return stored[module] | {"gates": self.gates[module]}

        return Lazy(list(stored), read)

    def updates(self, step: int | None = None, state: str = "last") -> Mapping[str, Update]:
        """See `Result.updates`; evaluated at the fixed gate weights."""
        updates, factors = self.run.updates(step, state), self.factors(step, state)

        def make(module: str) -> Update:
            update = updates[module]
            if module not in self.gates:
                return update
            return from_factors(factors[module], update.scale, update.exact, update.form)

        return Lazy(list(updates), make)

    def input_dependent_modules(self, state: str = "last") -> set[str]:
        return self.run.input_dependent_modules(state)

    def ranks(self, state: str = "last") -> dict[str, int]:
        return self.run.ranks(state)

    @cached_property
    def table(self) -> pd.DataFrame:
        """Records of the run, with update norms and ranks that depend on the gates recomputed for the last step."""
        table = self.run.table.astype({"run": "str"}).assign(run=self.id)
        is_final = is_at_step(table, self.meta.states["last"].step)
        # The gates at earlier steps are unknown, so that only the sizes at the last step can be recomputed.
        is_size_or_shape = table["quantity"].isin([*_SIZES, *_SHAPES])
        is_known = ~table["quantity"].isin(_UNKNOWN) & (is_final | ~is_size_or_shape)
        depends = is_size_or_shape & table["module"].isin(self._gated_modules_and_blocks(table))
        return validate(self._recompute_rows(table[is_known], depends[is_known]))

    def _gated_modules_and_blocks(self, table: pd.DataFrame) -> set[str]:
        names = set(self.gates)
        # The norm of a block includes those of its modules.
        for block in set(table.loc[table["role"] == "block", "module"]):
            if any(module.startswith(f"{block}.") for module in self.gates):
                names.add(block)
        return names

    def _recompute_rows(self, table: pd.DataFrame, depends: pd.Series) -> pd.DataFrame:
        """Return the table with the values that depend on the gates recomputed from the updates."""
        before, after = self.run.updates(), self.updates()
        shapes: dict[tuple[str, str], float] = {}
        changes: dict[str, float] = {}  # of squared norms
        for module in self.gates:
            sigma = after[module].singular_values()
            shapes |= {(module, name): rank(sigma) for name, rank in _SHAPES.items()}
            changes[module] = after[module].norm() ** 2 - before[module].norm() ** 2

        def value(module: str, quantity: str, old: float, size: float) -> float:
            if quantity in _SHAPES:
                return shapes[module, quantity]
            # Squared norms of the modules in a block add up.
            change = sum(change for name, change in changes.items() if f"{name}.".startswith(f"{module}."))
            new = max(0.0, size**2 + change) ** 0.5
            if quantity != "relative_update":
                return new
            if size == 0:
                return np.nan
            # ‖W − W₀‖ / ‖W₀‖ is proportional to ‖W − W₀‖.
            return old * new / size

        sizes = table[table["quantity"] == "update_norm"].set_index("module")["value"]
        rows = table.loc[depends, ["module", "quantity", "value"]].astype({"module": "str", "quantity": "str"})
        recomputed = []
        for module, quantity, old in rows.itertuples(index=False):
            size = old
            if quantity != "learned_norm":
                size = sizes[module]
            recomputed.append(value(module, quantity, old, size))
        return table.assign(value=table["value"].mask(depends, pd.Series(recomputed, rows.index)))
