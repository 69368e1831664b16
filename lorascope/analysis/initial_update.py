"""Learned updates of methods whose initial update is nonzero, such as FourierFT or PEFT's LoRA with random factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorascope.analysis import fourier
from lorascope.runs.formats.peft_lora import RESIDUAL
from lorascope.runs.layout import Lazy
from lorascope.runs.result import Result

_ROUNDING = 1e-3  # relative to the largest norm; a smaller initial update is rounding error, such as DoRA's W - W_0


def learned_updates(run: Result, step: int | None = None) -> Mapping[str, Any]:
    """Return the learned updates ΔW - ΔW₀ of a run by module, computed on access.

    If the initial update was not saved, the result is ΔW. FourierFT's coefficients on a random or orthogonal basis are
    included, although the run does not store these updates.
    """
    updates, first, made = run.updates(step), _saved_initial_updates(run), fourier.on_other_bases(run, step)

    def make(module: str) -> Any:
        if (found := made.get(module)) is not None:
            return found
        update, start = updates[module], first.get(module)
        return update if start is None or start.norm() == 0 else update - start

    return Lazy(list(dict.fromkeys([*updates, *made])), make)


def lacks_initial_update(run: Result) -> bool:
    """Return whether the initial update is nonzero, as far as the run records it, and was not saved."""
    return not (_saved_initial_updates(run) or fourier.on_other_bases(run)) and _is_start_nonzero(run)


def _saved_initial_updates(run: Result) -> Mapping[str, Any]:
    """Return the updates at step 0; empty if they were not saved."""
    try:
        return run.updates(0)
    except ValueError:  # no snapshot of step 0
        return {}


def _is_start_nonzero(run: Result) -> bool:
    """Return whether the initial update is nonzero, by the norms at step 0 or else by the settings of the method."""
    if run.meta.states["last"].step is not None:  # an adapter folder has no steps, and its table is slow to build
        norms = run.table[run.table["quantity"] == "update_norm"]
        first = norms.loc[norms["step"].eq(0).fillna(False), "value"]
        if len(first):
            return bool(first.max() > _ROUNDING * norms["value"].max())
    method = run.meta.method
    if "fourierft" in (method.get("name"), str(method.get("kind")).lower()):
        # "init" is our setting; "init_weights" is PEFT's, whose true value means zeros.
        return method.get("init") != "zeros" and not method.get("init_weights")
    return str(method.get("init_lora_weights", True)).lower().startswith(("false", *RESIDUAL))
