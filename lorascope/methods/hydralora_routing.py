"""How routers weigh their heads on a text: gates summed over the tokens of every row, padding left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lorascope.adapters.host_weights import to_array
from lorascope.inputs.tokenization import IGNORED
from lorascope.schema.module_table import parse
from lorascope.schema.records import Item, Quantity, Record, Snapshot, register

_PAPER = "HydraLoRA, eq. 4"
for _name, _label, _definition in (
    ("gate", "mean gate", "mean weight of a head over held-out tokens"),
    ("gate_std", "deviation of a gate", "standard deviation of the weight of a head over held-out tokens"),
    ("gate_top1", "share of tokens", "share of held-out tokens whose largest gate is this head's"),
    ("head_importance", "importance of a head", "mean over held-out tokens of gate times norm of what the head adds"),
    ("head_share", "share of the importance", "importance of a head over the sum of all heads of its module"),
):
    register(_name, Quantity(_label, "", "head", "mean", _definition, _PAPER))
for _name, _label, _unit, _definition in (
    (
        "gate_entropy",
        "entropy of the gates",
        "nats",
        "mean entropy of a token's gates, at most ln of the number of heads",
    ),
    (
        "gate_cv2",
        "CV² of the mean gates",
        "",
        "variance of the N mean gates, by N - 1, over their squared mean: 0 to N",
    ),
    ("gate_switch", "switch rate", "", "share of neighbouring held-out tokens whose largest gates are of two heads"),
    (
        "gate_information",
        "I(domain; head)",
        "nats",
        "mutual information of domain and head on held-out text, by mean gates",
    ),
    ("gate_chance", "I(domain; head) by lot", "nats", "the same with the rows dealt out to the domains by lot"),
):
    register(_name, Quantity(_label, _unit, definition=_definition, source=_PAPER))

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
        return dict(zip(_group_names(groups), self._group_means(_members(groups)), strict=True))

    def information(self, groups: Sequence[str]) -> float:
        """Mutual information of group and head, in nats: 0 if all groups have the same mean gates.

        A group counts as likely as any other, and a head as likely as its mean gate within the group.
        """
        return float(_information(self._group_means(_members(groups)[None])).mean())

    def information_by_chance(self, groups: Sequence[str], seed: int = 0) -> float:
        """The same with the rows dealt out to the groups by lot, mean of ``DRAWS`` times."""
        draw, members = np.random.default_rng(seed), _members(groups)
        shuffled = np.stack([members[:, draw.permutation(members.shape[1])] for _ in range(DRAWS)])
        return float(_information(self._group_means(shuffled)).mean())

    def _group_means(
        self, members: Float[np.ndarray, "*draws groups rows"]
    ) -> Float[np.ndarray, "*draws groups heads"]:
        return (members @ self.weights) / (members @ self.tokens)[..., None]


@dataclass(frozen=True, eq=False)
class Routing(Gates):
    """The gates of one module on a text, and what its tokens do one by one.

    Parameters
    ----------
    squares : array (rows, heads)
        Sum of the squared gates over the tokens of a row.
    firsts : array (rows, heads)
        Tokens of a row whose largest gate is the head's.
    added : array (rows, heads)
        Sum over the tokens of a row of the norm of what the head adds, gated; NaN where nothing told of norms.
    switches, pairs : array (rows,)
        Neighbouring tokens of a row: those whose largest gates are of two heads, and all of them.
    """

    squares: Float[np.ndarray, "rows heads"]
    firsts: Float[np.ndarray, "rows heads"]
    added: Float[np.ndarray, "rows heads"]
    switches: Float[np.ndarray, "rows"]
    pairs: Float[np.ndarray, "rows"]

    @property
    def std(self) -> Float[np.ndarray, "heads"]:
        """Standard deviation over all tokens."""
        return np.sqrt(np.maximum(self.squares.sum(0) / self.tokens.sum() - self.mean**2, 0))

    @property
    def top1_share(self) -> Float[np.ndarray, "heads"]:
        """Share of the tokens whose largest gate is the head's."""
        return self.firsts.sum(0) / self.tokens.sum()

    @property
    def usage_cv2(self) -> float:
        """Squared coefficient of variation of the mean gates: 0 if even, their number if one head takes all."""
        return float(self.mean.var(ddof=1) / self.mean.mean() ** 2)

    @property
    def switch_rate(self) -> float:
        """Share of neighbouring tokens whose largest gates are of two heads; NaN where none has a neighbour."""
        pairs = self.pairs.sum()
        return float(self.switches.sum() / pairs) if pairs else np.nan

    @property
    def importance(self) -> Float[np.ndarray, "heads"]:
        """Mean over all tokens of the norm of what the head adds, gated."""
        return self.added.sum(0) / self.tokens.sum()

    @property
    def importance_share(self) -> Float[np.ndarray, "heads"]:
        """Importance over the sum of all heads; NaN where no head adds anything."""
        return self.importance / (self.importance.sum() or np.nan)


def gate_records(module: str, gates: Routing, groups: Sequence[str] | None, kept: bool) -> Iterable[Item]:
    """What a look at the gates of a module gives; ``kept`` says whether also the gates by group."""
    yield Record("gate", gates.mean, module)
    yield Record("gate_std", gates.std, module)
    yield Record("gate_top1", gates.top1_share, module)
    yield Record("head_importance", gates.importance, module)
    yield Record("head_share", gates.importance_share, module)
    yield Record("gate_entropy", gates.entropy, module)
    yield Record("gate_cv2", gates.usage_cv2, module)
    yield Record("gate_switch", gates.switch_rate, module)
    if groups is not None:
        yield Record("gate_information", gates.information(groups), module)
        yield Record("gate_chance", gates.information_by_chance(groups), module)
        if kept:
            found = gates.by_group(groups)
            means, labels = np.stack(list(found.values())), {"domain": list(found)}
            yield Snapshot(f"{module}/gate_by_domain", means, ("domain", "head"), labels)


def _group_names(groups: Sequence[str]) -> list[str]:
    return sorted(set(groups))


def _members(groups: Sequence[str]) -> Float[np.ndarray, "groups rows"]:
    return (np.array(_group_names(groups))[:, None] == np.array(groups)).astype(np.float64)


def _information(means: Float[np.ndarray, "draws groups heads"]) -> Float[np.ndarray, "draws"]:
    whole = means.mean(-2, keepdims=True)
    ratio = np.divide(means, whole, out=np.ones_like(means), where=means > 0)
    return (means * np.log(ratio)).sum(-1).mean(-1)


def watch(
    model: nn.Module,
    routers: Mapping[str, Callable[[Tensor], Tensor]],
    batch: Mapping[str, Tensor],
    run: Callable[[], object],
    sizes: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> dict[str, Routing]:
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
    sizes : mapping module name -> callable, optional
        Gives the norms (*batch, heads) of what each head of a module adds to these, ungated.
    """
    rows = len(next(iter(batch.values())))
    seen: dict[str, list[Routing]] = {name: [] for name in routers}

    def hook(name: str) -> Callable[[nn.Module, Any], None]:
        real = _real_tokens(model, name, batch)

        def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            norms = sizes[name](inputs[0]) if sizes else None
            seen[name].append(_sum_gates(routers[name](inputs[0]), norms, rows, real))

        return look

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
    return {name: _join_uses(parts) for name, parts in seen.items()}


def _sum_gates(
    gates: Float[Tensor, "*batch heads"],
    norms: Float[Tensor, "*batch heads"] | None,
    rows: int,
    real: Bool[Tensor, "rows tokens"] | None,
) -> Routing:
    # A module may get its tokens in a row of rows, all in one row, or one vector for each row of the batch.
    gates = gates.reshape(rows, -1, gates.shape[-1]).double()
    norms = torch.full_like(gates, torch.nan) if norms is None else norms.reshape(gates.shape)
    counted = torch.ones(gates.shape[:2], dtype=torch.bool, device=gates.device)
    if real is not None and real.shape == counted.shape:
        counted = real
    top = gates.argmax(-1)
    firsts = F.one_hot(top, gates.shape[-1]).double()
    pairs = counted[:, 1:] & counted[:, :-1]
    switches = pairs & (top[:, 1:] != top[:, :-1])
    gates = gates * counted[..., None]
    entropies = -torch.xlogy(gates, gates).sum(-1)
    # In the order of the fields; the sum over the tokens of a row leaves padding out.
    per_token = (gates, entropies, counted, gates**2, firsts * counted[..., None], gates * norms, switches, pairs)
    return Routing(*(to_array(part.double().sum(1)) for part in per_token))


def stack_gates(parts: Sequence[Gates]) -> Gates:
    """The gates on one batch after the other: all their rows."""
    return type(parts[0])(*map(np.concatenate, _field_columns(parts)))


def _join_uses(parts: Sequence[Routing]) -> Routing:
    """A module that the model uses several times over has the tokens of all its uses."""
    return Routing(*(np.sum(column, axis=0) for column in _field_columns(parts)))


def _field_columns(parts: Sequence[Gates]) -> list[list[np.ndarray]]:
    return [[getattr(part, field.name) for part in parts] for field in fields(parts[0])]


def _real_tokens(model: nn.Module, name: str, batch: Mapping[str, Tensor]) -> Bool[Tensor, "rows tokens"] | None:
    """Which tokens a module gets are no padding; None where nothing says."""
    stack, _, role = parse(name)
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    decoded = getattr(getattr(model, "config", None), "is_encoder_decoder", False) and stack == "decoder"
    if decoded and role not in ("cross_k", "cross_v") and labels is not None and labels.ndim == 2:
        return labels != IGNORED
    return None if mask is None else mask.bool()
