"""A run at other gates than those of its last look: what HydraLoRA's update is on one text, or by one head alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import pandas as pd
from jaxtyping import Float

from lorascope.runs.layout import Lazy, identify
from lorascope.runs.run import Run
from lorascope.schema.deprecation import accept_old_parameters
from lorascope.schema.records import validate
from lorascope.updates.factor_formats import update_from
from lorascope.updates.low_rank import Dense, LowRank

_SIZES = ("update_norm", "learned_norm", "relative_update")
_SHAPES = ("stable_rank", "effective_rank")
_UNKNOWN = ("weight_norm", "step_norm")  # for want of W_0 and of the gates one step before


@accept_old_parameters(told="label")
def at_gates(
    run: Run, gates: Mapping[str, Sequence[float] | Float[np.ndarray, "_"]], label: str = "given gates"
) -> Run:
    """The same run, its updates at these gates: ``scale * sum(gates[i] * B[i] @ A)``.

    Parameters
    ----------
    run : Run
        Of HydraLoRA, or a folder of its adapter.
    gates : mapping module -> (heads,)
        Such as ``mean_gates`` gives for a text, or a single one for the part of one head. Other modules stay.
    label : str
        What figures call them: "Updates of ... at `label`."

    Returns
    -------
    Run
        Of one state: norms and ranks of updates, of all modules, stand at its end alone, and those that need W_0 or the
        step before are left out. All else is as recorded. ``restore`` puts back the trained state.

    Raises
    ------
    ValueError
        A module has no heads or another number of them, or a gate is not finite.
    """
    held = run.factors()
    found = {}
    for module, values in gates.items():
        if module not in held or "gates" not in held[module]:
            mixed = [name for name in held if "gates" in held[name]]
            raise ValueError(f"run {run.id} mixes no heads in {module!r}; it does in {', '.join(mixed) or 'none'}")
        found[module] = own = np.asarray(values, dtype=np.float64)
        if own.shape != (heads := held[module]["gates"].shape):
            raise ValueError(f"{own.size} gates are given for {module}, which has {heads[0]} heads")
        if not np.isfinite(own).all():
            raise ValueError(f"the gates of {module} hold NaN or infinity: {own.tolist()}")
    return GatedRun(run, found, label)


def gate_description(run: Run) -> str:
    """At which gates those updates of a run stand that depend on the input, in words; "" where none does.

    Gates are even to the last bit where no text was looked at, as in folders of the authors and under a Trainer.
    """
    mixed = run.input_dependent_modules()
    if not mixed or "gates" in run.meta:
        return run.meta["gates"] if mixed else ""
    gates = run.factors()[min(mixed)].get("gates")
    return "mean gates" if gates is None or np.ptp(gates) else "even gates"


class GatedRun(Run):
    """A run seen at other gates; made by ``at_gates``."""

    def __init__(self, run: Run, gates: Mapping[str, Float[np.ndarray, "heads"]], label: str) -> None:
        self.run, self.gates = run, gates
        id = identify({"run": run.id, "gates": {module: values.tolist() for module, values in gates.items()}})
        super().__init__(run.path, run.meta | {"id": id, "gates": label})

    def factors(self, step: int | None = None, state: str = "last") -> Mapping[str, dict[str, np.ndarray]]:
        """As of the run, with these gates."""
        held = self.run.factors(step, state)
        return Lazy(
            list(held),
            lambda module: held[module] | ({"gates": self.gates[module]} if module in self.gates else {}),
        )

    def updates(self, step: int | None = None, state: str = "last") -> Mapping[str, LowRank | Dense]:
        """As of the run, at these gates."""
        whole, held = self.run.updates(step, state), self.factors(step, state)

        def make(module: str) -> LowRank | Dense:
            update = whole[module]
            if module not in self.gates or not isinstance(update, LowRank):
                return update
            return update_from(held[module], update.scale, update.exact)

        return Lazy(list(whole), make)

    def input_dependent_modules(self, state: str = "last") -> set[str]:
        """As of the run."""
        return self.run.input_dependent_modules(state)

    @cached_property
    def table(self) -> pd.DataFrame:
        """The records of the run; norms and ranks of what hangs on the gates are worked out again, at the end."""
        table = self.run.table.astype({"run": "str"}).assign(run=self.id)
        blocks = set(table.loc[table["role"] == "block", "module"])
        holding = {block for block in blocks if any(module.startswith(f"{block}.") for module in self.gates)}
        final = self.meta["states"]["last"]["step"]
        ends = table["step"].isna() if final is None else (table["step"] == final).fillna(False)
        of_updates, unknown = table["quantity"].isin([*_SIZES, *_SHAPES]), table["quantity"].isin(_UNKNOWN)
        stays = ~unknown & (ends | ~of_updates)
        hangs = of_updates & table["module"].isin({*self.gates, *holding})
        return validate(self._recompute_rows(table[stays], hangs[stays]))

    def _recompute_rows(self, table: pd.DataFrame, hangs: pd.Series) -> pd.DataFrame:
        before, after = self.run.updates(), self.updates()
        shapes = {(module, name): getattr(after[module], name)() for module in self.gates for name in _SHAPES}
        norms = {module: (before[module].norm(), after[module].norm()) for module in self.gates}

        def value(module: str, quantity: str, old: float, size: float) -> float:
            if quantity in _SHAPES:
                return shapes[module, quantity]
            inside = [pair for name, pair in norms.items() if f"{name}.".startswith(f"{module}.")]
            new = max(0.0, size**2 + sum(two**2 - one**2 for one, two in inside)) ** 0.5
            # ‖W − W₀‖ / ‖W₀‖ follows ‖W − W₀‖.
            return new if quantity != "relative_update" else old * new / size if size else np.nan

        sizes = table[table["quantity"] == "update_norm"].set_index("module")["value"]
        rows = table.loc[hangs, ["module", "quantity", "value"]].astype({"module": "str", "quantity": "str"})
        anew = [
            value(module, quantity, old, old if quantity == "learned_norm" else sizes[module])
            for module, quantity, old in rows.itertuples(index=False)
        ]
        return table.assign(value=table["value"].mask(hangs, pd.Series(anew, rows.index)))
