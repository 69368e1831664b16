"""Updates cut to their largest components, and the path share of every component, while the adapters stay attached."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lorascope.adapters.activation_patching import Batch, replaced_forwards
from lorascope.adapters.delta import base_output
from lorascope.array_types import Float
from lorascope.insight.instrument_costs import NODES
from lorascope.insight.update_parts import PartDirections, ScaledUpdates
from lorascope.observe.measured_rows import TaskLoss


@contextmanager
def cut_updates(model: nn.Module, components: Mapping[str, PartDirections], ranks: Mapping[str, int]) -> Iterator[None]:
    """Keep only the largest components of every update in this context.

    A module that keeps all of its components computes bit by bit what it did, and a module without components what it
    does without its adapter.

    Parameters
    ----------
    model : Module
        Model with its adapters attached.
    components : mapping module -> PartDirections
        All components of the updates, the largest first.
    ranks : mapping module -> int
        Number of components to keep.
    """
    forwards: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
    for name, directions in components.items():
        host, rank = model.get_submodule(name), ranks[name]
        if rank >= len(directions.size):
            continue
        # Subtracting all components would leave their rounding errors.
        if rank == 0:
            forwards[host] = partial(base_output, host)
            continue
        removed = PartDirections(directions.U[:, rank:], directions.size[rank:], directions.V[:, rank:])
        forwards[host] = partial(_output_without, host.forward, removed)
    with replaced_forwards(forwards):
        yield


def _output_without(forward: Callable[[Tensor], Tensor], removed: PartDirections, x: Tensor) -> Tensor:
    return forward(x) - removed.output(x, torch.ones_like(removed.size))


def component_shares(
    updates: ScaledUpdates, loss: TaskLoss, blocks: Sequence[Batch], bar: tqdm
) -> dict[str, Float[np.ndarray, "block _"]]:
    """Return the path share of every component on each block of rows, summed over the targets of the block.

    The removal of every single component would take a pass per component; see ``lorascope.insight.dial`` for shares.
    """
    shares = {}
    for module, directions in updates.directions.items():
        shares[module] = np.zeros((len(blocks), len(directions.size)))
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    for node, weight in zip(nodes, weights, strict=True):
        # The quadrature is on [-1, 1], the path on [0, 1].
        with updates.gated((node + 1) / 2) as gates:
            for index, block in enumerate(blocks):
                bar.update()
                gradients = torch.autograd.grad(loss.measure(block).sum(), [*gates.values()], materialize_grads=True)
                for module, gradient in zip(gates, gradients, strict=True):
                    shares[module][index] -= weight / 2 * gradient.double().numpy()
    return shares
