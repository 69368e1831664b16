r"""LISA: full fine-tuning of a few random blocks, resampled every K steps. Parameters outside the blocks always train.

.. math::

    S_i &= \gamma \text{ of the } L \text{ blocks, drawn without replacement}, \qquad i = \lfloor t / K \rfloor \\
    \theta_l &\leftarrow \operatorname{AdamW}(\theta_l) \text{ for } l \in S_i \text{ or outside the blocks;
        all other blocks are frozen} \\
    P(l \in S_i) &= \gamma / L, \qquad
        \mathbb{E}[\text{blocks trained after } n \text{ draws}] = \sum_l 1 - (1 - P(l \in S_i))^n

Nothing is added to the model: its own weights train, a part of them at a time.

================  =====================================================
paper             here
================  =====================================================
gamma             ``n_active``
K                 ``interval``
w~(l) / w(l)      ``weights``, proportional to the paper's p(l)
================  =====================================================

With gamma = L every ``moment_policy`` is full fine-tuning, except "reset_all", whose moments restart at every draw.

Source: LISA (arXiv 2403.17919), algorithm 1; section 3.2 for p = {1, gamma / L, ..., gamma / L, 1} and for the ratio of
norms that it stands for.

Departs:

- K is the number of steps of an interval; the paper also uses K for the number of intervals.
- All parameters outside the blocks train, as in the authors' code: embedding and head, but also position embeddings,
  the final norm and poolers.
- By default the optimizer's state of a block is dropped when the block is frozen ("reset"), as the authors intended.
  Their code keeps the state of every block that ever trained ("keep"). The paper's runs dropped all state, because
  every interval was a separate process ("reset_all").
- On 16-bit weights the state includes a float32 copy of each weight that trains, which is dropped with the rest.
- The draws use a separate generator; the authors' code uses NumPy's global one.
- ``weights`` is an option that the paper motivates but never uses. Blocks are drawn one after the other, so the
  probability of a block is not gamma times its weight; ``marginals`` computes it.
- The default learning rates equal the defaults of ``Full``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from lorascope.array_types import Float
from lorascope.methods.field_checks import default_if_none, require_integer, require_literals
from lorascope.methods.method import Method, Step
from lorascope.schema import module_table
from lorascope.schema.records import Item, Quantity, Record, register

_PROBABILITY = "probability that a draw includes this block"
register(
    "train LISA",
    "LISA, algorithm 1",
    active=Quantity("active", definition="1 for a block that trains until the next draw, else 0"),
    coverage=Quantity("blocks trained", pool="sum", definition="number of blocks that have trained so far"),
    draw_probability=Quantity("draw probability", definition=_PROBABILITY, source="LISA, section 3.2"),
)
# AdamW's moments need about this many steps to settle after a reset.
_SETTLES = 5


@dataclass(kw_only=True)
class LISA(Method, name="lisa"):
    """Full fine-tuning of a few random blocks at a time, resampled at intervals.

    Parameters
    ----------
    n_active : int, optional
        Number of blocks that train at a time; by default 2, or all blocks of a model with fewer.
    interval : int, optional
        Steps between two draws; by default 20, or a tenth of a run with fewer than 200 steps.
    moment_policy : {"reset", "keep", "reset_all"}
        "reset" drops the optimizer's state of a block when it is frozen, "keep" stores it until the block trains
        again, "reset_all" drops all state at every draw, also that of parameters outside the blocks.
    weights : tuple of float, optional
        Relative probability of each block in model order, as any sequence; by default all blocks are equally likely.
    draw_seed : int, optional
        Seed of the draws; None uses the run's seed.
    """

    n_active: int | None = None
    interval: int | None = None
    moment_policy: Literal["reset", "keep", "reset_all"] = "reset"
    weights: tuple[float, ...] | None = None
    draw_seed: int | None = None

    def __post_init__(self) -> None:
        require_integer(self, 0, "n_active", "draw_seed")
        require_integer(self, 1, "interval")
        require_literals(self)
        if self.weights is None:
            return
        self.weights = tuple(map(float, self.weights))
        for weight in self.weights:
            if not 0 <= weight < math.inf:
                raise ValueError(f"weights must be finite and >= 0, got {weight:g}")
        if not any(self.weights):
            raise ValueError("weights must contain a number > 0, got only zeros")

    @classmethod
    def example(cls) -> LISA:
        return cls(n_active=1, interval=3, lr=1e-2)

    def attach(self, model: nn.Module) -> None:
        """Make every parameter trainable: the optimizer, which is built next, must contain all of them."""
        model.requires_grad_(True)
        described = module_table.describe(model)
        self._blocks = described["module"][described["role"] == "block"].tolist()
        blocks = len(self._blocks)
        if not blocks:
            raise ValueError("cannot use LISA on this model: it has no transformer blocks. Use Full")
        weights = np.array(default_if_none(self.weights, (1.0,) * blocks))
        if len(weights) != blocks:
            raise ValueError(f"weights must have {blocks} entries, one per block, got {len(weights)}")
        drawable = np.count_nonzero(weights)
        if self.size > drawable:
            meaning = "the number of blocks" if self.weights is None else "the number of weights > 0"
            raise ValueError(f"n_active must be <= {drawable}, {meaning}, got {self.size}")
        self._chances = weights / weights.sum()
        seed = default_if_none(self.draw_seed, torch.initial_seed())
        # Spawn a generator: the data order uses the same seed.
        self.generator_ = np.random.default_rng(np.random.SeedSequence(seed).spawn(1)[0])
        self.active_: list[int] = []
        self.trained_: list[int] = []

    @property
    def size(self) -> int:
        """Number of blocks that train at a time, gamma."""
        return default_if_none(self.n_active, min(2, len(self._blocks)))

    def period(self, total: int) -> int:
        """Return K, the number of steps between two draws in a run of ``total`` steps."""
        return default_if_none(self.interval, min(20, math.ceil(total / 10)))

    def before_step(self, step: Step) -> None:
        """If a draw is due, draw the blocks that train from now on and freeze the others."""
        if step.index % self.period(step.total):
            return
        steps = self.period(step.total)
        # A run with a single interval has no second draw, and blocks that never change their state are not reset.
        resets = self.moment_policy == "reset_all" or 0 < self.size < len(self._blocks)
        if not step.index and steps < min(_SETTLES, step.total) and self.moment_policy != "keep" and resets:
            warnings.warn(
                f"interval {steps} resets AdamW's moments before they settle, so steps have full size for any "
                f"gradient: use interval >= {_SETTLES} or moment_policy='keep'",
                stacklevel=2,
            )
        self.active_ = draw(self.generator_, self._chances, self.size)
        self.trained_ = sorted({*self.trained_, *self.active_})
        if self.moment_policy == "reset_all":
            step.optimizer.state.clear()
        for number, block in enumerate(self._blocks):
            trains = number in self.active_
            for parameter in step.model.get_submodule(block).parameters():
                parameter.requires_grad_(trains)
                if not trains:
                    parameter.grad = None  # with a gradient of zero, weight decay and momentum would still change it
                    if self.moment_policy == "reset":
                        step.optimizer.state.pop(parameter, None)

    def records(self, step: Step) -> Iterable[Item]:
        """Yield draw probabilities at the start, and the active blocks after the first step of an interval."""
        if step.finished == 0:
            for block, probability in zip(self._blocks, marginals(self._chances, self.size), strict=True):
                yield Record("draw_probability", probability, block)
        elif step.index % self.period(step.total) == 0:
            yield Record("coverage", len(self.trained_))
            for number, block in enumerate(self._blocks):
                yield Record("active", number in self.active_, block)


def draw(generator: np.random.Generator, chances: Float[np.ndarray, "block"], size: int) -> list[int]:
    """Draw ``size`` distinct blocks for LISA one by one, with these probabilities; return their sorted numbers."""
    # Equal weights draw the same blocks as no weights, for which NumPy uses another algorithm.
    uniform = bool((chances == chances[0]).all())
    blocks = generator.choice(len(chances), size, replace=False, p=None if uniform else chances)
    return sorted(blocks.tolist())


def marginals(chances: Float[np.ndarray, "block"], size: int) -> Float[np.ndarray, "block"]:
    """Compute each block's probability to be among the ``size`` distinct blocks that LISA draws one after the other.

    Clocks that ring after exponential times, with the probabilities as rates, ring in the order of such draws. So a
    block is drawn if fewer than ``size`` others ring before it. The probability of that is integrated over
    x = exp(-rate * time).
    """
    if (chances == chances[0]).all():
        return np.full(len(chances), size / len(chances))
    nodes, weights = np.polynomial.legendre.leggauss(200)
    # The substitution x = y^3 makes small powers of x smooth enough at zero for the quadrature.
    y = (nodes + 1) / 2
    x, weights = y**3, weights / 2 * 3 * y**2
    probabilities = np.zeros(len(chances))
    for block in np.flatnonzero(chances):
        before = np.zeros((size + 1, len(x)))
        before[0] = 1  # rows: number of others that have rung; the last row is not used
        for rate in np.delete(chances, block):
            rung = 1 - x ** (rate / chances[block])
            before[1:] = before[1:] * (1 - rung) + before[:-1] * rung
            before[0] *= 1 - rung
        probabilities[block] = (before[:size].sum(0) * weights).sum()
    return probabilities
