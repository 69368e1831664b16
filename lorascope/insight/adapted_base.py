"""Base model with the trained weights of a run or an adapter, whose updates an instrument attaches and scales."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import nn

from lorascope.adapters.delta import Delta, attach, detach
from lorascope.experiments.component_removal import attach_components, fill_plain
from lorascope.experiments.trained_model import open_components, open_trained
from lorascope.inputs.tasks import Task
from lorascope.methods.alora import ALoRADelta
from lorascope.runs.result import Result
from lorascope.runs.run import Run
from lorascope.updates import Update


class AdaptedBase(NamedTuple):
    """Base with all trained weights but the updates, which are detached; the fitted task, and the updates themselves.

    ``deltas`` compute the updates, and ``updates`` are their matrices.
    """

    base: nn.Module
    task: Task
    deltas: Mapping[str, Delta]
    updates: Mapping[str, Update]


def open_adapted(run: Result, model: str | Path, task: str | Path | Task, state: str) -> AdaptedBase:
    """Open the model of a run for measurements with its updates attached, scaled and detached.

    Raises
    ------
    ValueError
        The model is not the base of the run, the run has no adapter or one that depends on its input, or training
        changed the weights below an adapter.
    """
    if dependent := sorted(run.input_dependent_modules(state)):
        raise ValueError(
            f"cannot scale the update of {dependent[0]} in {run.reference}: it depends on the input. Export it at "
            "fixed gates: ls.at_gates and ls.export.to_peft"
        )
    if not run.ranks(state):
        raise ValueError(f"cannot scale the update of {run.reference}: it has no adapter")
    base, fitted, deltas = open_trained(run, model, task, state)
    if not deltas:  # an adapter, or a recording of another trainer
        deltas = attach_components(base, open_components(run, state), ALoRADelta, fill_plain)
        detach(base, join=False)
    trained = [f"{name}.weight" for name in deltas]
    if isinstance(run, Run) and (changed := run.tensors(state).keys() & set(trained)):
        raise ValueError(f"cannot scale the update of {run.reference}: {min(changed)} was trained below its adapter")
    attach(base, deltas)
    updates = {name: delta.update() for name, delta in deltas.items()}
    detach(base, join=False)
    return AdaptedBase(base, fitted, deltas, updates)
