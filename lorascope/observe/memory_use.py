"""Observer of the memory of parameters, gradients and optimizer state.

Gradients exist until the next step starts, so the bytes are the same as during the optimizer step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lorascope.methods.base import Step
from lorascope.observe.base import Observer
from lorascope.schema.records import Item, Record


@dataclass(kw_only=True)
class memory(Observer):
    """Bytes of parameters, gradients and optimizer state, summed over all tensors that exist.

    Peak memory is not included, because it must be measured in a separate process; see ``ls.memory.measure``.
    """

    def __call__(self, step: Step) -> Iterable[Item]:
        if not self.due(step.finished, step.total):
            return
        parameters = list(step.model.parameters())
        yield Record("parameter_bytes", storage_bytes(parameters))
        yield Record("gradient_bytes", storage_bytes(p.grad for p in parameters if p.grad is not None))
        yield Record("optimizer_bytes", storage_bytes(_tensors_in(step.optimizer.state)))


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the number of bytes of the tensors' storages; a shared storage counts once."""
    storages = [(tensor.device, tensor.untyped_storage()) for tensor in tensors]
    return sum({(device, storage.data_ptr()): storage.nbytes() for device, storage in storages}.values())


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in a nested state."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(part)
