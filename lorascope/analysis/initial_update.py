"""Learned updates of methods whose initial update is nonzero, such as FourierFT or PEFT's LoRA with random factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

from lorascope.runs.layout import Lazy
from lorascope.runs.result import Result
from lorascope.updates import fourier

_ROUNDING = 1e-3  # relative to the largest norm; a smaller initial update is rounding error, such as DoRA's W - W_0


def at_start(read: Callable[[int], Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return initial updates or factors, as ``Run.updates`` or ``Run.factors`` reads at step 0; empty if not saved."""
    try:
        return read(0)
    except ValueError:  # no snapshot of step 0
        return {}


def learned_updates(run: Result, step: int | None = None) -> Mapping[str, Any]:
    """Return the learned updates of a run by module: ΔW minus the initial update ΔW₀, computed on access.

    If the initial update was not saved, the result is ΔW. FourierFT's coefficients on a random or orthogonal basis are
    included, although the run does not store these updates.
    """
    updates, first, on_other_bases = run.updates(step), at_start(run.updates), _updates_on_other_bases(run, step)

    def make(module: str) -> Any:
        if module in on_other_bases:
            return on_other_bases[module]
        update, start = updates[module], first.get(module)
        return update if start is None or start.norm() == 0 else update - start

    return Lazy([*updates, *on_other_bases], make)


def _updates_on_other_bases(run: Result, step: int | None = None) -> Mapping[str, Any]:
    """Return the learned updates on a random or orthogonal basis by module, computed on access.

    On these bases a run saves coefficients and a seed, but no updates. The mapping is empty for all other runs, and if
    the initial coefficients were not saved.
    """
    recipe = run.meta.recipe
    if recipe.get("basis") not in ("random", "orthogonal"):
        return {}
    first, last = at_start(run.factors), run.factors(step)
    sides = run.modules.set_index("module")[["out_features", "in_features"]]
    bases_of_shape = cache(partial(fourier.bases, seed=recipe["entry_seed"], kind=recipe["basis"]))

    def make(module: str) -> Any:
        outer, inner = map(int, sides.loc[module])
        change = last[module]["coefficients"] - first[module]["coefficients"]
        return fourier.on_bases(change, last[module]["entries"], *bases_of_shape((outer, inner)), recipe["alpha"])

    return Lazy([module for module in last if module in first], make)


def lacks_initial_update(run: Result) -> bool:
    """Return whether the initial update is nonzero, as far as the run records it, and was not saved."""
    if at_start(run.updates) or _updates_on_other_bases(run):
        return False
    if run.meta.states["last"].step is not None:  # an adapter folder has no steps, and its table is slow to build
        norms = run.table[run.table["quantity"] == "update_norm"]
        first = norms.loc[norms["step"].eq(0).fillna(False), "value"]
        if len(first):
            return bool(first.max() > _ROUNDING * norms["value"].max())
    return not run.fact("starts_at_zero", True)
