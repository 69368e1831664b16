"""Observer of the adapters' factors, stored as snapshots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lorascope.adapters.delta import adapters
from lorascope.adapters.host_weights import shared_copies, to_array, to_host
from lorascope.methods.method import Step
from lorascope.observe.observer import Observer
from lorascope.schema.records import Factors, Item, Record


@dataclass(kw_only=True)
class factors(Observer):
    """Snapshots of the factors of all adapters."""

    every: int = 50

    def __call__(self, step: Step) -> Iterable[Item]:
        if not self.due(step.finished, step.total):
            return ()
        return factors_of(step.model, step.adapter_names)


def incomplete_norm_records(model: nn.Module, names: Sequence[str] | None = None) -> list[Record]:
    """Return the norms of the updates that their factors do not give without W_0; see ``factors_of``."""
    records = []
    for module, delta in adapters(model, names).items():
        update = delta.update()
        if update.needs_weight:
            records.append(Record("update_norm", update.norm(), module))
    return records


def factors_of(model: nn.Module, names: Sequence[str] | None = None) -> list[Factors]:
    """Return the factors of every adapter for a snapshot, from lorascope or PEFT; see ``adapters`` for ``names``."""
    deltas = adapters(model, names)
    snapshots = []
    factors: dict[str, dict[str, Tensor]] = {}
    tensors: list[Tensor] = []
    for module, delta in deltas.items():
        factors[module] = delta.factors()
        tensors.extend(factors[module].values())
    with shared_copies():
        to_host(tensors)  # in one transfer; the copies below are then shared
        for module, delta in deltas.items():
            update = delta.update()
            arrays = {name: to_array(factor) for name, factor in factors[module].items()}
            scale = None
            # A form without required factors, such as a dense update, has no scale.
            if update.required and update.required <= arrays.keys():
                scale = float(update.scale)
            snapshots.append(Factors(module, arrays, scale, update.exact, update.form))
    return snapshots
