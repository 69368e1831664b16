"""Turning points of a training: checkpoints at which the updates leave the direction in which they moved before.

With the displacement :math:`D_i = \\Delta W_{i+1} - \\Delta W_i` over all modules, and the Gram matrix K of all
displacements,

.. math::

    K_{ij} = \\langle D_i, D_j \\rangle_F, \\qquad c_i = \\frac{K_{i,i+1}}{\\sqrt{K_{ii} K_{i+1,i+1}}}

The drop of a checkpoint is its cosine c minus the median cosine of the checkpoints around it. A turning point is a drop
below -0.15 that is also far outside the spread of all drops, by 2.5 standard deviations as estimated from the median
absolute deviation. A change of the learning rate, of the batches or of the task turns the path as well.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorascope.array_types import Float, Int
from lorascope.files.finding_html import finding_html
from lorascope.files.lazy_pandas import pandas as pd
from lorascope.runs.receipt import Receipt
from lorascope.runs.result import Result
from lorascope.runs.series import Series
from lorascope.updates import Update
from lorascope.updates.linalg import as_float64, one_thread

FEWEST_CHECKPOINTS = 12
WINDOW = 4  # cosines on each side, with which the median is compared
# In 4 runs of a planted decoder without a change, the largest drop was -0.09, although one smaller drop was 4.9 times
# the spread; 4 with a change of the task dropped by 0.17 to 0.27 there, 3.0 to 6.8 times the spread.
SMALLEST_DROP = -0.15
SPREADS = 2.5
_MAD_TO_DEVIATION = 1.48  # of a normal distribution


@dataclass(frozen=True, eq=False)
class Turns:
    """Turning points of a series of checkpoints, see ``ls.turns``.

    Parameters
    ----------
    label : str
        Name of the series or run.
    table : DataFrame
        One row per checkpoint: ``step``; ``cosine`` of the displacements before and after it; ``drop`` of the cosine
        below the median around it; ``turn``, whether it is a turning point. The first and last checkpoint have no
        cosine, and neither has one between unequal numbers of steps.
    limit : float
        Drops below it are turning points.
    path : DataFrame
        ``step, first, second``: position on the two principal components of the updates, in units of their norm.
    explained : tuple of float
        Fraction of the updates' variance on each of the two components.
    receipt : Receipt
        What was measured.
    """

    label: str
    table: pd.DataFrame
    limit: float
    path: pd.DataFrame
    explained: tuple[float, float]
    receipt: Receipt

    def summary(self) -> pd.DataFrame:
        """Return the turning points: ``step, cosine, drop``."""
        return self.table.loc[self.table["turn"], ["step", "cosine", "drop"]].reset_index(drop=True)

    def describe(self) -> list[str]:
        """Return one line per turning point, or the one that there is none."""
        lines = []
        for turn in self.summary().itertuples():
            lines.append(f"turning point at step {turn.step}: cosine {turn.cosine:.2f}, drop {turn.drop:.2f}")
        if lines:
            return lines
        return [f"no turning point in {len(self.table)} checkpoints; largest drop {self.table['drop'].min():.2f}"]

    def to_json(self) -> dict[str, Any]:
        """Return the result as a JSON object."""
        table = self.table.astype(object).where(self.table.notna(), None)
        return {
            "run": self.label,
            "checkpoints": len(self.table),
            "turns": self.summary()["step"].tolist(),
            "limit": self.limit,
            "table": table.to_dict("records"),
            "receipt": self.receipt.to_json(),
        }

    def __repr__(self) -> str:
        heading = f"Turns of {self.label}, drops below {self.limit:.2f}"
        return "\n".join([heading, *(f"  {line}" for line in self.describe()), f"  receipt  {self.receipt}"])

    def _repr_html_(self) -> str:
        finding = f"{self.label}: {'; '.join(self.describe())}"
        return finding_html(finding, self.table, self.receipt.command_with("-o", "turns.pdf"))


def find_turns(series: Result) -> Turns:
    """Find turning points of a training: checkpoints at which the path of its updates changes direction.

    Displacements that are not neighbors are almost orthogonal also without a turn, so only neighbors are compared.

    Parameters
    ----------
    series : Result
        Series of checkpoints, or a run with ``observe.factors``. Modules that a checkpoint lacks are ignored.

    Returns
    -------
    Turns
        With ``table`` (``step, cosine, drop, turn``), ``summary()`` and ``path``.

    Raises
    ------
    ValueError
        There are fewer than 12 evenly spaced checkpoints, or they have no module in common.

    Examples
    --------
    >>> ls.turns(ls.load("out"))  # doctest: +SKIP
    """
    began = time.process_time()
    steps = np.array(series.update_steps())
    _require_checkpoints(series, len(steps), "checkpoints")
    states = [series.updates(int(step)) for step in steps]
    common = set.intersection(*map(set, states))
    shared = [module for module in states[-1] if module in common]
    if not shared:
        raise ValueError(f"checkpoints of {series.reference} must have a module in common")
    gram = gram_of_updates([[state[module] for state in states] for module in shared])
    cosines = neighbor_cosines(gram, steps)
    _require_checkpoints(series, int(np.isfinite(cosines).sum()) + 2, "evenly spaced checkpoints")
    drops = drops_of(cosines)
    limit = drop_limit(drops)
    table = pd.DataFrame({"step": steps, "cosine": cosines, "drop": drops, "turn": drops < limit})
    positions, explained = principal_path(gram)
    path = pd.DataFrame({"step": steps, "first": positions[:, 0], "second": positions[:, 1]})
    counts = {"checkpoints": str(len(steps)), "modules": str(len(shared))}
    seconds = time.process_time() - began
    receipt = Receipt(
        run=series.id,
        base=series.meta.model,
        rows=counts,
        seed=series.meta.seed,
        command=_command_of(series),
        seconds=seconds,
    )
    return Turns(series.label, table, limit, path, explained, receipt)


def _command_of(series: Result) -> str:
    """Return the command that writes the cosines and drops as a table; "" for checkpoints without a common folder."""
    if series.path is None:
        return ""
    # No other command prints every cosine; a figure is written as the table of its marks.
    words = ["lorascope", "plot", "turns", str(series.path)]
    # A run has its steps in one folder.
    if isinstance(series, Series):
        words.append("--series")
    return shlex.join([*words, "-o", "turns.csv"])


def _require_checkpoints(series: Result, number: int, kind: str) -> None:
    if number < FEWEST_CHECKPOINTS:
        raise ValueError(
            f"turning points require at least {FEWEST_CHECKPOINTS} {kind}, got {number} of {series.reference}: save "
            "more of them, such as with observe.factors(every=10)"
        )


def allows_turns(steps: Sequence[int]) -> bool:
    """Return whether there are enough evenly spaced checkpoints for turning points."""
    spans = np.diff(steps)
    # The first and last checkpoint have no cosine, but count.
    return int(np.count_nonzero(spans[1:] == spans[:-1])) + 2 >= FEWEST_CHECKPOINTS


def gram_of_updates(modules: Sequence[Sequence[Update]]) -> Float[np.ndarray, "step step"]:
    """Compute the inner products of the updates of all modules together, at each pair of steps.

    Parameters
    ----------
    modules : sequence of sequence of Update
        Updates of each module at the same steps.

    Returns
    -------
    array (step, step)
        ``<dW_i, dW_j>``, the sum over modules.
    """
    with one_thread():
        return np.sum([_gram_of_module(updates) for updates in modules], axis=0)


def _gram_of_module(updates: Sequence[Update]) -> Float[np.ndarray, "step step"]:
    products = [update.low_rank for update in updates]
    if None in products:
        entries = np.stack([update.dense().ravel() for update in updates])
        return entries @ entries.T
    # <B_i A_i, B_j A_j> is the sum of the entries of (B_i^T B_j) * (A_i A_j^T), a block of both Gram matrices.
    left, right, starts = [], [], [0]
    for product in products:
        left.append(product.scale * as_float64(product.B))
        right.append(as_float64(product.A))
        starts.append(starts[-1] + product.B.shape[1])
    B, A = np.hstack(left), np.vstack(right)
    blocks, starts = (B.T @ B) * (A @ A.T), starts[:-1]
    return np.add.reduceat(np.add.reduceat(blocks, starts, axis=0), starts, axis=1)


def neighbor_cosines(gram: Float[np.ndarray, "step step"], steps: Int[np.ndarray, "step"]) -> Float[np.ndarray, "step"]:
    """Compute the cosine of the displacements before and after each checkpoint.

    Parameters
    ----------
    gram : array (step, step)
        Inner products of the updates.
    steps : array (step,)
        Steps of the checkpoints. A longer displacement averages over more batches, so that only displacements over
        equal numbers of steps have a cosine.

    Returns
    -------
    array (step,)
        NaN at the first and last checkpoint, between unequal spans, and next to a displacement of zero.
    """
    products = np.diff(np.diff(gram, axis=0), axis=1)
    squares = np.diagonal(products)
    cosines = np.full(len(steps), np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        inner = np.diagonal(products, 1) / np.sqrt(squares[:-1] * squares[1:])
    spans = np.diff(steps)
    cosines[1:-1] = np.where((spans[:-1] == spans[1:]) & np.isfinite(inner), inner, np.nan)
    return cosines


def drops_of(cosines: Float[np.ndarray, "step"]) -> Float[np.ndarray, "step"]:
    """Return each cosine minus the median of those from 4 before to 4 after it, itself included."""
    around = pd.Series(cosines).rolling(2 * WINDOW + 1, center=True, min_periods=1).median()
    return cosines - around.to_numpy()


def drop_limit(drops: Float[np.ndarray, "step"]) -> float:
    """Return the drop below which a checkpoint is a turning point: -0.15, or lower if all drops vary."""
    spread = _MAD_TO_DEVIATION * float(np.nanmedian(np.abs(drops - np.nanmedian(drops))))
    return min(SMALLEST_DROP, -SPREADS * spread)


def principal_path(gram: Float[np.ndarray, "step step"]) -> tuple[Float[np.ndarray, "step 2"], tuple[float, float]]:
    """Return the positions of the updates on their two principal components, and the variance explained by each.

    The last position is not negative on either component.
    """
    centered = gram - gram.mean(axis=0) - gram.mean(axis=1, keepdims=True) + gram.mean()
    eigenvalues, vectors = np.linalg.eigh(centered)
    eigenvalues, vectors = np.maximum(eigenvalues[:-3:-1], 0.0), vectors[:, :-3:-1]
    signs = np.where(vectors[-1] < 0, -1.0, 1.0)
    first, second = (eigenvalues / (np.trace(centered) or 1.0)).tolist()
    return vectors * signs * np.sqrt(eigenvalues), (first, second)
