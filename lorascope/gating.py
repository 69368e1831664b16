"""How routers weigh their heads on a text: gates summed over the tokens of every row, padding left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lorascope.encoding import IGNORED
from lorascope.hosts import to_array
from lorascope.names import parse

DRAWS = 100
"""Shufflings that a share of information by chance is the mean of."""


@dataclass(frozen=True, eq=False)
class Gates:
    """The gates of one module on a text.

    Parameters
    ----------
    weights : array (rows, heads)
        Sum over the tokens of a row.
    entropies : array (rows,)
        Sum over the tokens of a row, in nats.
    tokens : array (rows,)
        Tokens of a row, padding left out.
    """

    weights: Float[np.ndarray, "rows heads"]
    entropies: Float[np.ndarray, "rows"]
    tokens: Float[np.ndarray, "rows"]

    @property
    def mean(self) -> Float[np.ndarray, "heads"]:
        """Mean over all tokens."""
        return self.weights.sum(0) / self.tokens.sum()

    @property
    def entropy(self) -> float:
        """Mean entropy of a token's gates, in nats: between 0 and ln of the number of heads."""
        return float(self.entropies.sum() / self.tokens.sum())

    def by_group(self, groups: Sequence[str]) -> dict[str, Float[np.ndarray, "heads"]]:
        """Mean over the tokens of every group of rows."""
        return dict(zip(_names(groups), self._means(_members(groups)), strict=True))

    def information(self, groups: Sequence[str]) -> float:
        """Mutual information of group and head, in nats: 0 if all groups have the same mean gates.

        A group counts as likely as any other, and a head as likely as its mean gate within the group.
        """
        return float(_information(self._means(_members(groups)[None])).mean())

    def information_by_chance(self, groups: Sequence[str], seed: int = 0) -> float:
        """The same with the rows dealt out to the groups by lot, mean of ``DRAWS`` times."""
        draw, members = np.random.default_rng(seed), _members(groups)
        shuffled = np.stack([members[:, draw.permutation(members.shape[1])] for _ in range(DRAWS)])
        return float(_information(self._means(shuffled)).mean())

    def _means(self, members: Float[np.ndarray, "*draws groups rows"]) -> Float[np.ndarray, "*draws groups heads"]:
        return (members @ self.weights) / (members @ self.tokens)[..., None]


def _names(groups: Sequence[str]) -> list[str]:
    return sorted(set(groups))


def _members(groups: Sequence[str]) -> Float[np.ndarray, "groups rows"]:
    return (np.array(_names(groups))[:, None] == np.array(groups)).astype(np.float64)


def _information(means: Float[np.ndarray, "draws groups heads"]) -> Float[np.ndarray, "draws"]:
    whole = means.mean(-2, keepdims=True)
    ratio = np.divide(means, whole, out=np.ones_like(means), where=means > 0)
    return (means * np.log(ratio)).sum(-1).mean(-1)


def watch(
    model: nn.Module,
    routers: Mapping[str, Callable[[Tensor], Tensor]],
    batch: Mapping[str, Tensor],
    run: Callable[[], object],
) -> dict[str, Gates]:
    """The gates of every router on a batch, in evaluation mode and without gradients.

    Parameters
    ----------
    model : Module
    routers : mapping module name -> callable
        Gives the gates (*batch, heads) of a module's input (*batch, in).
    batch : mapping of tensors
        Says which tokens are padding.
    run : callable
        Passes the batch through the model, once.
    """
    rows = len(next(iter(batch.values())))
    seen: dict[str, list[Gates]] = {name: [] for name in routers}

    def hook(name: str) -> Callable[[nn.Module, Any], None]:
        real = _real_tokens(model, name, batch)
        return lambda _, inputs: seen[name].append(_summed(routers[name](inputs[0]), rows, real))

    hooks = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in routers]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()
            run()
    finally:
        model.train(training)
        for handle in hooks:
            handle.remove()
    return {name: _joined(parts) for name, parts in seen.items()}


def _summed(gates: Float[Tensor, "*batch heads"], rows: int, real: Bool[Tensor, "rows tokens"] | None) -> Gates:
    # A module may get its tokens in a row of rows, all in one row, or one vector for each row of the batch.
    gates = gates.reshape(rows, -1, gates.shape[-1]).double()
    counted = torch.ones(gates.shape[:2], dtype=torch.bool, device=gates.device)
    if real is not None and real.shape == counted.shape:
        counted = real
    gates = gates * counted[..., None]
    entropies = -torch.xlogy(gates, gates).sum((1, 2))
    return Gates(to_array(gates.sum(1)), to_array(entropies), to_array(counted.sum(1).double()))


def stacked(parts: Sequence[Gates]) -> Gates:
    """The gates on one batch after the other: all their rows."""
    return Gates(*map(np.concatenate, _columns(parts)))


def _joined(parts: Sequence[Gates]) -> Gates:
    """A module that the model uses several times over has the tokens of all its uses."""
    return Gates(*(np.sum(column, axis=0) for column in _columns(parts)))


def _columns(parts: Sequence[Gates]) -> list[list[np.ndarray]]:
    return [[getattr(part, field.name) for part in parts] for field in fields(Gates)]


def _real_tokens(model: nn.Module, name: str, batch: Mapping[str, Tensor]) -> Bool[Tensor, "rows tokens"] | None:
    """Which tokens a module gets are no padding; None where nothing says."""
    stack, _, role = parse(name)
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    decoded = getattr(getattr(model, "config", None), "is_encoder_decoder", False) and stack == "decoder"
    if decoded and role not in ("cross_k", "cross_v") and labels is not None and labels.ndim == 2:
        return labels != IGNORED
    return None if mask is None else mask.bool()
