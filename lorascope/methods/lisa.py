"""LISA: full fine-tuning of a few blocks at a time, drawn anew every K steps, and of all outside the blocks throughout.

    S_i = gamma of the L blocks, drawn without replacement,    i = floor(t / K)
    theta_l <- AdamW(theta_l) for l outside the blocks or in S_i,    all other blocks stay as they are
    P(l in S_i) = gamma / L,    E[blocks trained after n draws] = sum_l 1 - (1 - P(l in S_i))^n

Nothing is added to the model: what trains is the model itself, one part at a time.

================  =====================================================
paper             here
================  =====================================================
gamma             ``n_active``
K                 ``interval``
w~(l) / w(l)      ``weights``, proportional to the paper's p(l)
================  =====================================================

Source: LISA (arXiv 2403.17919), algorithm 1; section 3.2 for p = {1, gamma / L, ..., gamma / L, 1} and for the ratio of
norms that it stands for.

Departs: K is the number of steps of an interval, which the paper also uses for that of intervals. Everything outside
the blocks trains, not embedding and head alone: position embeddings, the final norm and poolers as well, as in the
authors' code. That code keeps the optimizer's state of every block that ever trained (``moment_policy="keep"``); the
authors meant it to be dropped ("reset", the default here); the paper's runs, whose intervals were processes of their
own, dropped all of it ("reset_all"). The draws have a generator of their own, where the code uses NumPy's global one.
Weights are an option that the paper motivates and never uses; blocks are drawn one after the other by them, so that
the chance of a block is not gamma times its weight but what ``marginals`` says. The rates are those of full fine-tuning
here. With gamma = L every policy is full fine-tuning but "reset_all", whose moments begin anew at every draw.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from lorascope.methods.base import Method, Step
from lorascope.schema import module_table
from lorascope.schema.deprecation import accept_old_fields, formerly
from lorascope.schema.records import Item, Quantity, Record, register

_ALGORITHM = "LISA, algorithm 1"
register(
    "active",
    Quantity("active", definition="1 for a block that trains until the next draw, else 0", source=_ALGORITHM),
)
register(
    "coverage",
    Quantity("blocks trained", pool="sum", definition="number of blocks that have trained so far", source=_ALGORITHM),
)
register(
    "draw_probability",
    Quantity("probability of a draw", definition="chance that a draw takes this block", source="LISA, section 3.2"),
)
# Below this many steps, AdamW's moments that start anew never settle.
_SETTLES = 5


@accept_old_fields
@dataclass(kw_only=True)
class LISA(Method, name="lisa"):
    """Full fine-tuning that trains a few blocks at a time, drawn anew at intervals.

    Parameters
    ----------
    n_active : int, optional
        Blocks that train at a time; two by default, or all of a model that has fewer.
    interval : int, optional
        Steps between two draws; 20 by default, or a tenth of a run below 200 steps.
    moment_policy : {"reset", "keep", "reset_all"}
        The optimizer's state of a block that is frozen is dropped, or kept until it trains again; or at every draw all
        state is dropped, also that of what trains throughout.
    weights : tuple of float, optional
        One a block, in model order: how much likelier to be drawn. Any sequence will do. All alike by default.
    draw_seed : int, optional
        Of the draws alone. None takes the run's seed.
    """

    n_active: int | None = None
    interval: int | None = None
    moment_policy: Literal["reset", "keep", "reset_all"] = field(default="reset", metadata=formerly("moments"))
    weights: tuple[float, ...] | None = None
    draw_seed: int | None = None
    lr: float = 1e-4
    head_lr: float = 1e-4

    def __post_init__(self) -> None:
        for name, least in (("n_active", 0), ("interval", 1), ("draw_seed", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} {value} is too small: it must be {least} or more")
        if self.moment_policy not in ("reset", "keep", "reset_all"):
            known = "'reset', 'keep', 'reset_all'"
            raise ValueError(f"moment_policy {self.moment_policy!r} is unknown: it must be one of {known}")
        if self.weights is None:
            return
        self.weights = tuple(map(float, self.weights))
        for weight in self.weights:
            if not 0 <= weight < math.inf:
                raise ValueError(f"weights: {weight:g} is none: they must be 0 or more, and finite")
        if not any(self.weights):
            raise ValueError("weights: all are 0, so that no block could be drawn: give one above 0")

    def attach(self, model: nn.Module) -> None:
        """Leave everything trainable: what the optimizer is built without could never train."""
        model.requires_grad_(True)
        described = module_table.describe(model)
        self._blocks = described["module"][described["role"] == "block"].tolist()
        self._chances = self._block_weights()
        seed = torch.initial_seed() if self.draw_seed is None else self.draw_seed
        # Spawned, since the order of the data is drawn by generators of the same seed.
        self.generator_ = np.random.default_rng(np.random.SeedSequence(seed).spawn(1)[0])
        self.active_: list[int] = []
        self.trained_: list[int] = []

    def _block_weights(self) -> Float[np.ndarray, "block"]:
        """The weights of the blocks as parts of one; a ValueError where they, or n_active, do not fit the model."""
        blocks = len(self._blocks)
        if not blocks:
            raise ValueError("the model has no blocks to draw from: train it in full, by Full")
        weights = np.ones(blocks) if self.weights is None else np.array(self.weights, dtype=np.float64)
        if len(weights) != blocks:
            raise ValueError(f"weights: {len(weights)} do not fit {blocks} blocks: give one for each")
        if self.size > (drawable := np.count_nonzero(weights)):
            which = "there are" if self.weights is None else "have a weight above 0"
            raise ValueError(f"n_active {self.size} is too large: only {drawable} of {blocks} blocks {which}")
        return weights / weights.sum()

    @property
    def size(self) -> int:
        """Blocks that train at a time, gamma."""
        return min(2, len(self._blocks)) if self.n_active is None else self.n_active

    def period(self, total: int) -> int:
        """Steps between two draws in a run of so many steps, K."""
        return min(20, math.ceil(total / 10)) if self.interval is None else self.interval

    def before_step(self, step: Step) -> None:
        """Where it is due, draw the blocks that train from now on and freeze the others."""
        if step.index % self.period(step.total):
            return
        if not step.index:
            self._warn(step.total)
        self.active_ = draw(self.generator_, self._chances, self.size)
        self.trained_ = sorted({*self.trained_, *self.active_})
        if self.moment_policy == "reset_all":
            step.optimizer.state.clear()
        for number, block in enumerate(self._blocks):
            trains = number in self.active_
            for parameter in step.model.get_submodule(block).parameters():
                parameter.requires_grad_(trains)
                if not trains:
                    parameter.grad = None  # a gradient of zero would still be decayed, and moved by its momentum
                    if self.moment_policy == "reset":
                        step.optimizer.state.pop(parameter, None)

    def _warn(self, total: int) -> None:
        steps = self.period(total)
        if steps < min(_SETTLES, total) and self.moment_policy != "keep":
            warnings.warn(
                f"interval {steps} lets AdamW's moments start anew before they settle, so that steps are of "
                f"full size whatever the gradient: take {_SETTLES} steps or more, or moment_policy='keep'",
                stacklevel=2,
            )

    def records(self, step: Step) -> Iterable[Item]:
        """At the start each block's chance; after the first step of an interval what trains in it."""
        if step.finished == 0:
            chances = zip(self._blocks, marginals(self._chances, self.size), strict=True)
            yield from (Record("draw_probability", chance, block) for block, chance in chances)
        elif step.index % self.period(step.total) == 0:
            yield Record("coverage", len(self.trained_))
            for number, block in enumerate(self._blocks):
                yield Record("active", number in self.active_, block)


def draw(generator: np.random.Generator, chances: Float[np.ndarray, "block"], size: int) -> list[int]:
    """The numbers of so many blocks, one after the other by these chances, none twice; in order."""
    uniform = bool((chances == chances[0]).all())
    drawn = generator.choice(len(chances), size, replace=False, p=None if uniform else chances)
    return sorted(map(int, drawn))


def marginals(chances: Float[np.ndarray, "block"], size: int) -> Float[np.ndarray, "block"]:
    """Probability of each block to be among so many that are drawn one after the other, none twice.

    Clocks that ring after exponential times, at rates as the chances, ring in the order of such draws. So a block is
    taken if fewer than ``size`` others ring before it: a sum over how many do, integrated over x = exp(-rate * time).
    """
    if (chances == chances[0]).all():
        return np.full(len(chances), size / len(chances))
    nodes, parts = np.polynomial.legendre.leggauss(200)
    # In x = y^3 the powers of x below, some of them small, are smooth enough at zero.
    y = (nodes + 1) / 2
    x, parts = y**3, parts / 2 * 3 * y**2
    found = np.zeros(len(chances))
    for block in np.flatnonzero(chances):
        before = np.zeros((size + 1, len(x)))
        before[0] = 1  # by number of others that have rung; the last row is never asked for
        for rate in np.delete(chances, block):
            rung = 1 - x ** (rate / chances[block])
            before[1:] = before[1:] * (1 - rung) + before[:-1] * rung
            before[0] *= 1 - rung
        found[block] = (before[:size].sum(0) * parts).sum()
    return found
