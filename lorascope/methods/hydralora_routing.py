"""Gate weights of HydraLoRA routers on a text: sums over the tokens of every row, without padding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorascope.adapters.hidden_states import evaluation_mode
from lorascope.adapters.host_weights import to_array
from lorascope.array_types import Bool, Float, Shaped
from lorascope.inputs.tokenization import IGNORED
from lorascope.schema.module_table import parse
from lorascope.schema.records import Item, Quantity, Record, Snapshot, register

_OVER = "over held-out tokens"
_ENTROPY = "mean entropy of a token's gate weights, at most ln of the number of experts"
_CV2 = "variance (N - 1) of the N mean gate weights divided by their squared mean: 0 to N"
_INFORMATION = "mutual information of group (domain or task) and expert on held-out text, from mean gate weights"
_TOP1 = "fraction of held-out tokens with the largest gate weight on this expert"
_IMPORTANCE = f"gate weight times norm of its output, mean {_OVER}"
register(
    "train HydraLoRA",
    "HydraLoRA, eq. 4",
    gate=Quantity("mean gate weight", "", "head", "mean", f"mean gate weight of an expert {_OVER}"),
    gate_std=Quantity(
        "std of the gate weight", index="head", definition=f"standard deviation of the gate weight of an expert {_OVER}"
    ),
    gate_top1=Quantity("fraction of tokens", "", "head", "mean", _TOP1),
    head_importance=Quantity("importance of an expert", "", "head", "mean", _IMPORTANCE),
    head_share=Quantity(
        "relative importance", index="head", definition="importance of an expert divided by the sum over its module"
    ),
    gate_entropy=Quantity("entropy of the gate weights", "nats", definition=_ENTROPY),
    gate_cv2=Quantity("CV² of the mean gate weights", definition=_CV2),
    gate_switch=Quantity(
        "switch rate", definition="fraction of neighboring held-out tokens with different top experts"
    ),
)
register(
    "train HydraLoRA on a task with groups",
    "HydraLoRA, eq. 4",
    gate_information=Quantity("I(group; expert)", "nats", definition=_INFORMATION),
    gate_chance=Quantity(
        "I(group; expert), shuffled", "nats", definition="mutual information with rows shuffled among groups"
    ),
)

DRAWS = 200
"""Number of shuffles over which the information at chance level is averaged."""


@dataclass(frozen=True, eq=False)
class Routing:
    """Routing of one HydraLoRA module on a text: gate weights, with statistics over its tokens, not counting padding.

    Parameters
    ----------
    weights, squares : array (rows, heads)
        Gate weights and their squares, summed over the tokens of a row.
    entropies : array (rows,)
        Entropies of the gate weights in nats, summed over the tokens of a row.
    tokens : array (rows,)
        Number of tokens of a row.
    firsts : array (rows, heads)
        Number of tokens of a row whose largest gate weight is the expert's.
    added : array (rows, heads)
        Norm of the expert's output times its gate weight, summed over the tokens of a row; NaN without norms.
    switches, pairs : array (rows,)
        Number of pairs of neighboring tokens of a row: those with different top experts, and all pairs.
    """

    weights: Float[np.ndarray, "rows heads"]
    entropies: Float[np.ndarray, "rows"]
    tokens: Float[np.ndarray, "rows"]
    squares: Float[np.ndarray, "rows heads"]
    firsts: Float[np.ndarray, "rows heads"]
    added: Float[np.ndarray, "rows heads"]
    switches: Float[np.ndarray, "rows"]
    pairs: Float[np.ndarray, "rows"]

    @property
    def mean(self) -> Float[np.ndarray, "heads"]:
        """Mean gate weights over all tokens."""
        return self.weights.sum(0) / self.tokens.sum()

    def statistics(self) -> dict[str, Any]:
        """Compute the quantities that are recorded for every router, by name; see their registered definitions.

        ``gate_switch`` is NaN if no token has a neighbor, and ``head_share`` if no expert adds to the output.
        """
        tokens, pairs, mean = self.tokens.sum(), self.pairs.sum(), self.mean
        importance = self.added.sum(0) / tokens
        variance = np.maximum(self.squares.sum(0) / tokens - mean**2, 0)  # rounding can make it negative
        return {
            "gate": mean,
            "gate_std": np.sqrt(variance),
            "gate_top1": self.firsts.sum(0) / tokens,
            "head_importance": importance,
            "head_share": importance / (importance.sum() or np.nan),  # all experts are zero at the start
            "gate_entropy": float(self.entropies.sum() / tokens),
            "gate_cv2": float(mean.var(ddof=1) / mean.mean() ** 2),
            "gate_switch": float(self.switches.sum() / pairs) if pairs else np.nan,
        }

    def information(self, groups: Sequence[str]) -> float:
        """Compute the mutual information of group and expert in nats; 0 if all groups have the same mean gate weights.

        All groups are equally likely, and the probability of an expert is its mean gate weight within the group.
        """
        return self._mean_information(np.array(groups)[None])

    def information_by_chance(self, groups: Sequence[str], seed: int = 0) -> float:
        """Compute the same with the rows shuffled among the groups, as a mean over ``DRAWS`` shuffles."""
        generator, labels = np.random.default_rng(seed), np.array(groups)
        shuffled = [labels[generator.permutation(len(labels))] for _ in range(DRAWS)]
        return self._mean_information(np.stack(shuffled))

    def group_means(self, groups: Shaped[np.ndarray, "*draws rows"]) -> Float[np.ndarray, "*draws groups heads"]:
        """Return the mean gate weights over the tokens of every group of rows, in the order of the sorted groups."""
        members = (np.unique(groups)[:, None] == groups[..., None, :]).astype(np.float64)
        return (members @ self.weights) / (members @ self.tokens)[..., None]

    def _mean_information(self, groups: Shaped[np.ndarray, "draws rows"]) -> float:
        means = self.group_means(groups)
        overall = means.mean(-2, keepdims=True)
        ratio = np.divide(means, overall, out=np.ones_like(means), where=means > 0)  # 0 log 0 counts as 0
        return float((means * np.log(ratio)).sum(-1).mean(-1).mean())


def gate_records(module: str, routing: Routing, groups: Sequence[str] | None, has_snapshots: bool) -> Iterable[Item]:
    """Yield records of the routing of a HydraLoRA module; ``has_snapshots`` adds a snapshot of the gates by group."""
    for quantity, value in routing.statistics().items():
        yield Record(quantity, value, module)
    if groups is not None:
        yield Record("gate_information", routing.information(groups), module)
        yield Record("gate_chance", routing.information_by_chance(groups), module)
        if has_snapshots:
            means, labels = routing.group_means(np.array(groups)), {"domain": sorted(set(groups))}
            yield Snapshot(f"{module}/gate_by_domain", means, ("domain", "head"), labels)


def watch(
    model: nn.Module,
    routers: Mapping[str, Callable[[Tensor], Tensor]],
    batch: Mapping[str, Tensor],
    run: Callable[[], object],
    sizes: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> dict[str, Routing]:
    """Record the routing of every HydraLoRA router on a batch, in evaluation mode and without gradients.

    ``routers`` maps the input ``(*batch, in)`` of a module to gate weights ``(*batch, heads)``, and ``sizes`` to the
    norm of each expert's output at gate weight 1. ``run`` runs one forward pass of the model on the batch, whose masks
    or labels mark padding.
    """
    rows = len(next(iter(batch.values())))
    # A list, because a model may call a module several times in one pass.
    calls: dict[str, list[Routing]] = {name: [] for name in routers}

    def hook(name: str) -> Callable[[nn.Module, Any], None]:
        real = _real_tokens(model, name, batch)

        def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            norms = sizes[name](inputs[0]) if sizes else None
            calls[name].append(_sum_gates(routers[name](inputs[0]), norms, rows, real))

        return record

    hooks = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in routers]
    try:
        with evaluation_mode(model), torch.no_grad():
            run()
    finally:
        for handle in hooks:
            handle.remove()
    return {name: _combine(partial(np.sum, axis=0), routings) for name, routings in calls.items()}


def _sum_gates(
    gates: Float[Tensor, "*batch heads"],
    norms: Float[Tensor, "*batch heads"] | None,
    rows: int,
    real: Bool[Tensor, "rows tokens"] | None,
) -> Routing:
    # The input of a module may be (rows, tokens, in), all tokens in one row, or one vector per row of the batch.
    gates = gates.reshape(rows, -1, gates.shape[-1]).double()
    norms = torch.full_like(gates, torch.nan) if norms is None else norms.reshape(gates.shape)
    # The mask does not fit an input of one vector per row, all of which are real.
    is_token = torch.ones(gates.shape[:2], dtype=torch.bool, device=gates.device)
    if real is not None and real.shape == is_token.shape:
        is_token = real
    top = gates.argmax(-1)
    pairs = is_token[:, 1:] & is_token[:, :-1]
    # Padding is zero, so that sums over the tokens of a row exclude it.
    gates = gates * is_token[..., None]
    firsts = F.one_hot(top, gates.shape[-1]).double() * is_token[..., None]

    def sum_tokens(values: Tensor) -> Float[np.ndarray, "rows *heads"]:
        return to_array(values.double().sum(1))

    return Routing(
        weights=sum_tokens(gates),
        entropies=sum_tokens(-torch.xlogy(gates, gates).sum(-1)),
        tokens=sum_tokens(is_token),
        squares=sum_tokens(gates**2),
        firsts=sum_tokens(firsts),
        added=sum_tokens(gates * norms),
        switches=sum_tokens(pairs & (top[:, 1:] != top[:, :-1])),
        pairs=sum_tokens(pairs),
    )


def stack_gates(routings: Sequence[Routing]) -> Routing:
    """Concatenate the rows of HydraLoRA's routing on several batches."""
    return _combine(np.concatenate, routings)


def _combine(join: Callable[[list[np.ndarray]], np.ndarray], routings: Sequence[Routing]) -> Routing:
    """Join each field of several ``Routing``."""
    joined = {}
    for field in fields(Routing):
        joined[field.name] = join([getattr(routing, field.name) for routing in routings])
    return Routing(**joined)


def _real_tokens(model: nn.Module, name: str, batch: Mapping[str, Tensor]) -> Bool[Tensor, "rows tokens"] | None:
    """Return which tokens of a module's input are not padding; None if the batch does not mark padding."""
    stack, _, role = parse(name)
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    # Ignored labels mark the padding of a decoder; keys and values of cross-attention come from the encoder.
    is_decoded = getattr(getattr(model, "config", None), "is_encoder_decoder", False) and stack == "decoder"
    if is_decoded and role not in ("cross_k", "cross_v") and labels is not None and labels.ndim == 2:
        return labels != IGNORED
    return None if mask is None else mask.bool()
