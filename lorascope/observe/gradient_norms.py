"""Observer of the gradients with which the optimizer steps."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lorascope.adapters.host_weights import to_host
from lorascope.adapters.peft_layers import is_peft_layer, unwrap_peft_layer
from lorascope.adapters.weight_parts import WeightPart
from lorascope.array_types import Float
from lorascope.methods.method import Step, trained_parameters
from lorascope.observe.observer import Observer
from lorascope.observe.trainable import tile_sums
from lorascope.schema.records import Quantity, Record, register

register(
    "train with observe=[ls.observe.gradients()]",
    gradient_norm=Quantity(
        "gradient norm after clipping",
        pool="norm",
        definition="joint Frobenius norm of the gradients of all trained tensors of a module, as the optimizer uses "
        "them: accumulated, unscaled and clipped",
    ),
)


@dataclass(kw_only=True)
class gradients(Observer):
    """Gradient norm of every module, jointly over all its trained tensors.

    The tensors of a module are the factors of its adapter, and its weight, bias and other tensors if they train. Shared
    tensors count at the first module that has them. Gradients are those with which the optimizer steps: accumulated
    over micro-batches, without the scale of a ``GradScaler``, edited by the method, and clipped. The root of the sum of
    squares over all modules is ``grad_norm``, the norm before clipping, or the limit if that is smaller. Clipping by
    the global norm does not change the ratio of two modules.

    Step 0 and modules without a gradient, such as the frozen blocks of LISA, have no rows. If a recorder does not know
    the number of steps, the last step is recorded only if it is due, because its gradients do not exist any more when
    training ends. Where ALoRA resizes factors, the removed components do not count at that step.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seen_ = 0

    def __call__(self, step: Step) -> Iterator[Record]:
        """Yield the norms of a step, if it is due and was not seen before."""
        # A recorder that closes late calls again, when the gradients may be those of other batches.
        recorded_step, self.seen_ = self.seen_, step.finished
        if step.finished == recorded_step or not self.due(step.finished, step.total):
            return
        # A shared tensor counts at the first module that has it: of equal keys, ``dict`` keeps the last value.
        module_of = dict(reversed([*_modules_of_parameters(step.model, "")]))
        sums: dict[nn.Parameter, Tensor] = {}
        for parameter in trained_parameters(step.optimizer):
            if parameter in module_of and parameter.grad is not None:
                sums[parameter] = tile_sums(_entries(parameter.grad))
        squares: dict[str, list[float]] = defaultdict(list)
        for parameter, tiles in zip(sums, to_host(list(sums.values())), strict=True):
            squares[module_of[parameter]] += tiles.tolist()
        if not any(map(any, squares.values())):
            warnings.warn(
                "cannot record gradients: all are zero or do not exist; record a step before its gradients are reset",
                stacklevel=2,
            )
            return
        for module, tile_squares in squares.items():
            yield Record("gradient_norm", math.sqrt(math.fsum(tile_squares)), module)


def _modules_of_parameters(module: Any, path: str) -> Iterator[tuple[nn.Parameter, str]]:
    """Yield every parameter with the name of its module, which is the adapted module for an adapter.

    A parameter that the model itself has comes with its own name.
    """
    host = unwrap_peft_layer(module)
    # As in the module table, everything below a module with a weight is part of it.
    is_leaf = (
        is_peft_layer(module)
        or isinstance(module, WeightPart)
        or "weight" in dict(host.named_parameters(recurse=False))
    )
    owner = module if is_leaf else host
    for name, parameter in owner.named_parameters(recurse=is_leaf):
        yield parameter, path or name
    if not is_leaf:
        for name, child in host.named_children():
            yield from _modules_of_parameters(child, f"{path}.{name}".lstrip("."))


def _entries(gradient: Tensor) -> Float[Tensor, "..."]:
    """Return the entries of a gradient that can differ from zero."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient
