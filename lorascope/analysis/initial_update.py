"""What training added to updates that do not start at zero, such as FourierFT's, or PEFT's LoRA of random factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorascope.analysis import fourier
from lorascope.runs.layout import Lazy
from lorascope.runs.run import Run
from lorascope.updates.factor_formats import RESIDUAL

_ROUNDING = 1e-3  # of the largest norm: below it a start is what rounding leaves of zero, as of DoRA's W - W_0


def learned_updates(run: Run, step: int | None = None) -> Mapping[str, Any]:
    """The updates of a run as far as training made them: less their start, where that was not zero and was kept.

    Of coefficients on another basis, whose updates a run does not hold, what training added is known all the same.
    """
    held, first, made = run.updates(step), _saved_initial_updates(run), fourier.on_other_bases(run, step)

    def make(module: str) -> Any:
        if (found := made.get(module)) is not None:
            return found
        update, start = held[module], first.get(module)
        return update if start is None or start.norm() == 0 else update - start

    return Lazy(list(dict.fromkeys([*held, *made])), make)


def lacks_initial_update(run: Run) -> bool:
    """Did its updates not start at zero, by all that the run tells, and was their start not kept?"""
    return not (_saved_initial_updates(run) or fourier.on_other_bases(run)) and _is_start_nonzero(run)


def _saved_initial_updates(run: Run) -> Mapping[str, Any]:
    """The updates at step 0; nothing where they were not kept."""
    try:
        return run.updates(0)
    except ValueError:  # no snapshot of step 0
        return {}


def _is_start_nonzero(run: Run) -> bool:
    """By the norms that were recorded at step 0, else by how the method says it starts."""
    if run.meta["states"]["last"]["step"] is not None:  # a folder of adapters has no steps, and its table takes long
        norms = run.table[run.table["quantity"] == "update_norm"]
        first = norms.loc[norms["step"].eq(0).fillna(False), "value"]
        if len(first):
            return bool(first.max() > _ROUNDING * norms["value"].max())
    told = run.meta.get("method", run.meta["recipe"])
    if "fourierft" in (told.get("name"), str(told.get("kind")).lower()):
        return told.get("init") != "zeros" and not told.get("init_weights")  # ours, and PEFT's word for zeros
    return str(told.get("init_lora_weights", True)).lower().startswith(("false", *RESIDUAL))
