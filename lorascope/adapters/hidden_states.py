"""Hidden states of a model: the output of every block, averaged over the tokens of each row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lorascope.adapters.host_weights import to_array
from lorascope.array_types import Float
from lorascope.inputs.tokenization import IGNORED

_STACKS = {"": "hidden_states", "encoder": "encoder_hidden_states", "decoder": "decoder_hidden_states"}
_ROWS = 32  # per forward pass


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode to record hidden states in this context, without the key-value cache."""
    modes = [(module, module.training) for module in model.modules()]
    config: Any = getattr(model, "config", None)
    caches = getattr(config, "use_cache", None)
    model.eval()
    if caches:
        config.use_cache = False
    try:
        yield
    finally:
        if caches:
            config.use_cache = caches
        for module, training in modes:
            module.training = training


@torch.no_grad()
def token_means(
    model: nn.Module, batch: Mapping[str, Tensor], of: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Float[np.ndarray, "rows layers d"]]:
    """Compute the mean hidden states over the tokens of every row, by stack.

    The last block's state is taken as the model returns it, in most model families after a norm. ``of`` is a function
    of the states to average, such as their squares; by default the states themselves.
    """
    means: dict[str, list[Tensor]] = {}
    for start in range(0, len(next(iter(batch.values()))), _ROWS):
        rows = {key: value[start : start + _ROWS] for key, value in batch.items()}
        with evaluation_mode(model):
            output = model(**rows, output_hidden_states=True)
        for stack, name in _STACKS.items():
            if name in output:
                states = torch.stack(output[name][1:]).double()  # the first is the embedding
                # Float64, because the states may have 16 bits.
                mask = _token_mask(rows, stack, states).double()
                weights = (mask / mask.sum(1, keepdim=True))[..., None]
                if of is not None:
                    states = of(states)
                means.setdefault(stack, []).append((states * weights).sum(2).transpose(0, 1))
    return {stack: to_array(torch.cat(batches)) for stack, batches in means.items()}


def _token_mask(rows: Mapping[str, Tensor], stack: str, states: Tensor) -> Tensor:
    """Return which tokens of the states (layers, rows, tokens, d) are not padding."""
    mask, labels = rows.get("attention_mask"), rows.get("labels")
    if stack == "decoder" and labels is not None and labels.ndim == 2:
        mask = labels != IGNORED
    if mask is None or mask.shape != states.shape[1:3]:  # the mask of other tokens
        return states.new_ones(states.shape[1:3])
    return mask
