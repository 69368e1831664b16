"""Observer of the memory of parameters, gradients and optimizer state.

Gradients exist until the next step starts, so the bytes are the same as during the optimizer step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lorascope.methods.method import Step
from lorascope.observe.observer import Observer
from lorascope.schema.records import Item, Record


@dataclass(kw_only=True)
class memory(Observer):
    """Memory use: bytes of parameters, gradients and optimizer state, summed over all tensors that exist.

    Peak memory is not included, because it must be measured in a separate process; see ``ls.step_memory.measure``.
    """

    def __call__(self, step: Step) -> Iterable[Item]:
        if not self.due(step.finished, step.total):
            return
        parameters = list(step.model.parameters())
        yield Record("parameter_bytes", storage_bytes(parameters))
        yield Record("gradient_bytes", storage_bytes(p.grad for p in parameters if p.grad is not None))
        states = filter(torch.is_tensor, tree_leaves(step.optimizer.state))
        yield Record("optimizer_bytes", storage_bytes(states))


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the memory use of tensors: the bytes of their storages; a shared storage counts once."""
    sizes = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        # Addresses are unique on one device only.
        sizes[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())
