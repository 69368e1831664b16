"""Observer of the adapters' factors, stored as snapshots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from torch import nn

from lorascope.adapters.host_weights import shared_copies, to_array, to_host
from lorascope.methods.method import Step
from lorascope.observe.observer import Observer
from lorascope.observe.trainable import adapters
from lorascope.schema.records import Factors, Item


@dataclass(kw_only=True)
class factors(Observer):
    """Snapshots of the factors of all adapters."""

    every: int = 50

    def __call__(self, step: Step) -> Iterable[Item]:
        return factors_of(step.model, step.adapter_names) if self.due(step.finished, step.total) else ()


def factors_of(model: nn.Module, names: Sequence[str] | None = None) -> list[Factors]:
    """Return the factors of every adapter for a snapshot, from lorascope or PEFT; see ``adapters`` for ``names``."""
    deltas = adapters(model, names)
    snapshots = []
    with shared_copies():
        factors = {module: delta.factors() for module, delta in deltas.items()}
        to_host(list(chain.from_iterable(named_factors.values() for named_factors in factors.values())))
        for module, delta in deltas.items():
            update = delta.update()
            arrays = {name: to_array(factor) for name, factor in factors[module].items()}
            is_complete = bool(update.required) and update.required <= arrays.keys()
            scale = float(update.scale) if is_complete else None
            snapshots.append(Factors(module, arrays, scale, update.exact, update.form))
    return snapshots
