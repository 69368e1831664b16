"""View of a HydraLoRA run with fixed gate weights, such as the means on a text or a single expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from lorascope.array_types import Float
from lorascope.files.lazy_pandas import pandas as pd
from lorascope.runs.layout import Lazy, identify
from lorascope.runs.result import Result
from lorascope.schema.records import validate
from lorascope.updates import Update, effective_rank, from_factors, stable_rank

_SIZES = ("update_norm", "learned_norm", "relative_update")
_SHAPES = {"stable_rank": stable_rank, "effective_rank": effective_rank}
_UNKNOWN = ("weight_norm", "step_norm")  # weight_norm requires W₀, step_norm the previous gate weights


def at_gates(
    run: Result,
    gates: Mapping[str, Sequence[float] | Float[np.ndarray, "_"]],
    label: str = "given gates",
) -> Result:
    """Return a view of a run with updates at fixed gate weights: ``scale * sum(gates[i] * B[i] @ A)``.

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
    stored = run.factors()
    found = {}
    for module, values in gates.items():
        if module not in stored or "gates" not in stored[module]:
            mixed = [name for name in stored if "gates" in stored[name]]
            raise ValueError(
                f"unknown module {module!r} in gates; expected one of the modules with experts of run {run.id}, "
                f"{', '.join(mixed) or 'none'}"
            )
        found[module] = own = np.asarray(values, dtype=np.float64)
        if own.shape != (heads := stored[module]["gates"].shape):
            raise ValueError(f"gates of {module} must have {heads[0]} values, one per expert, got {own.size}")
        if not np.isfinite(own).all():
            raise ValueError(f"gates of {module} must be finite, got {own.tolist()}")
    return GatedRun(run, found, label)


def gate_description(run: Result) -> str:
    """Return a description of the gate weights of a run's input-dependent updates, "" if it has no such updates.

    The gate weights are exactly equal if none were recorded on texts, as in the authors' folders and under a Trainer.
    """
    mixed = run.input_dependent_modules()
    if not mixed or run.gates_label:
        return run.gates_label if mixed else ""
    gates = run.factors()[min(mixed)].get("gates")
    return "mean gates" if gates is None or np.ptp(gates) else "uniform gates"


class GatedRun(Result):
    """View of a run with fixed gate weights; created by ``at_gates``."""

    def __init__(self, run: Result, gates: Mapping[str, Float[np.ndarray, "heads"]], label: str) -> None:
        self.run, self.gates, self.gates_label = run, gates, label
        self.kind, self.has_history = run.kind, run.has_history  # type: ignore[misc]
        id = identify({"run": run.id, "gates": {module: values.tolist() for module, values in gates.items()}})
        super().__init__(run.path, replace(run.meta, id=id))

    def __getattr__(self, name: str) -> Any:
        """Return everything that does not depend on the gates from the run, such as its saved state."""
        if name == "run":  # copying asks for attributes before there are any
            raise AttributeError(name)
        return getattr(self.run, name)

    def _lines(self) -> list[tuple[str, str]]:
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
        return Lazy(
            list(stored),
            lambda module: stored[module] | ({"gates": self.gates[module]} if module in self.gates else {}),
        )

    def updates(self, step: int | None = None, state: str = "last") -> Mapping[str, Update]:
        """See `Result.updates`; evaluated at the fixed gate weights."""
        whole, stored = self.run.updates(step, state), self.factors(step, state)

        def make(module: str) -> Update:
            update = whole[module]
            if module not in self.gates:
                return update
            return from_factors(stored[module], update.scale, update.exact, update.form)

        return Lazy(list(whole), make)

    def input_dependent_modules(self, state: str = "last") -> set[str]:
        return self.run.input_dependent_modules(state)

    def ranks(self, state: str = "last") -> dict[str, int]:
        return self.run.ranks(state)

    @cached_property
    def table(self) -> pd.DataFrame:
        """Records of the run, with update norms and ranks that depend on the gates recomputed for the last step."""
        table = self.run.table.astype({"run": "str"}).assign(run=self.id)
        blocks = set(table.loc[table["role"] == "block", "module"])
        parents = {block for block in blocks if any(module.startswith(f"{block}.") for module in self.gates)}
        final = self.meta.states["last"].step
        ends = table["step"].isna() if final is None else (table["step"] == final).fillna(False)
        of_updates, unknown = table["quantity"].isin([*_SIZES, *_SHAPES]), table["quantity"].isin(_UNKNOWN)
        stays = ~unknown & (ends | ~of_updates)
        depends = of_updates & table["module"].isin({*self.gates, *parents})
        return validate(self._recompute_rows(table[stays], depends[stays]))

    def _recompute_rows(self, table: pd.DataFrame, depends: pd.Series) -> pd.DataFrame:
        before, after = self.run.updates(), self.updates()
        sigmas = {module: after[module].singular_values() for module in self.gates}
        shapes = {(module, name): rank(sigma) for module, sigma in sigmas.items() for name, rank in _SHAPES.items()}
        norms = {module: (before[module].norm(), after[module].norm()) for module in self.gates}

        def value(module: str, quantity: str, old: float, size: float) -> float:
            if quantity in _SHAPES:
                return shapes[module, quantity]
            inside = [pair for name, pair in norms.items() if f"{name}.".startswith(f"{module}.")]
            new = max(0.0, size**2 + sum(two**2 - one**2 for one, two in inside)) ** 0.5
            # ‖W − W₀‖ / ‖W₀‖ is proportional to ‖W − W₀‖.
            return new if quantity != "relative_update" else old * new / size if size else np.nan

        sizes = table[table["quantity"] == "update_norm"].set_index("module")["value"]
        rows = table.loc[depends, ["module", "quantity", "value"]].astype({"module": "str", "quantity": "str"})
        recomputed = [
            value(module, quantity, old, old if quantity == "learned_norm" else sizes[module])
            for module, quantity, old in rows.itertuples(index=False)
        ]
        return table.assign(value=table["value"].mask(depends, pd.Series(recomputed, rows.index)))
