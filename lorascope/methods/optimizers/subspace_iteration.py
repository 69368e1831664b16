"""S-RSI and AS-RSI: low-rank factors of a matrix by randomized subspace iteration, with adaptive rank.

::

    U ~ N(0, 1),    l times: Q = orth(A U), U = A^T Q,    A ~ Q U^T = Q Q^T A
    xi = |A - Q U^T|_F / |A|_F

Q U^T is the projection of A onto the columns of Q, which converge to the leading left singular vectors. Columns beyond
the rank (oversampling) speed up the convergence and are removed at the end.

=============  =======================================================================
paper          here
=============  =======================================================================
k, k_max       ``rank``, ``cap``
l, p           ``iterations``, ``oversampling``
Omega          the normal matrix that ``sketch`` draws and ``iterate`` starts with
xi, xi_thresh  ``error``, ``tolerance``
f(xi)          ``growth``, with eta, omega, phi and tau in ``logistic``
=============  =======================================================================

Source: Adapprox (arXiv 2403.14958), algorithms 1 and 2.

Departs:

- The sketch has no more columns than the matrix has rows or columns.
- The number of columns may be rounded up, because some widths multiply faster than narrower ones.
- The text of algorithm 2 was not available. Its restart, f and their constants are from memory; phi has the sign that
  makes steps small near the tolerance and large far from it.
- Three other rules are not from the paper. ``colnorm`` computes the error of every rank from one factorization at the
  cap. ``ema`` moves a fraction of the smaller side up and down, after adaptive-rank-muon, but from the second selection
  on instead of after a thousand steps. ``fixed`` uses the initial rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorascope.array_types import Float

RULES = ("restart", "colnorm", "ema", "fixed")
LOGISTIC = (200.0, -10.0, 2.5, -9.0)
# Rule "ema": initial fraction of the smaller side, its bounds, step and smoothing, and the target error.
SHARE, SHARE_ENDS, SHARE_STEP, SHARE_SMOOTHING, SHARE_ERROR = 0.15, (0.0625, 0.6), 0.005, 0.9, 0.15


class Factorization(NamedTuple):
    """Factors Q U^T of a matrix by subspace iteration, with their relative Frobenius error and the number of trials.

    The columns of Q are orthonormal, and U = A^T Q.
    """

    Q: Float[Tensor, "m k"]
    U: Float[Tensor, "n k"]
    error: float
    trials: int


def s_rsi(
    A: Float[Tensor, "m n"],
    rank: int,
    generator: torch.Generator,
    iterations: int = 5,
    oversampling: int = 5,
    multiple: int = 1,
) -> tuple[Float[Tensor, "m k"], Float[Tensor, "n k"]]:
    """Return Q and U of a rank by subspace iteration (S-RSI); ``multiple`` rounds up the columns of the sketch."""
    columns = math.ceil((rank + oversampling) / multiple) * multiple
    Q, U = iterate(A, sketch(A, columns, generator), iterations)
    return _first_columns(Q, rank), _first_columns(U, rank)


def _first_columns(columns: Float[Tensor, "m c"], rank: int) -> Float[Tensor, "m k"]:
    """Copy the first columns: a view, which ``contiguous`` returns for one column, would keep all of them in memory."""
    return columns[:, :rank].clone(memory_format=torch.contiguous_format)


def sketch(A: Float[Tensor, "m n"], columns: int, generator: torch.Generator) -> Float[Tensor, "n c"]:
    """Draw the initial normal matrix of a subspace iteration, on the device of the generator."""
    shape = (A.shape[1], min(columns, *A.shape))
    return torch.randn(shape, generator=generator, device=generator.device, dtype=A.dtype).to(A.device)


def iterate(
    A: Float[Tensor, "m n"], start: Float[Tensor, "n c"], iterations: int
) -> tuple[Float[Tensor, "m c"], Float[Tensor, "n c"]]:
    """Run the power iterations of randomized subspace iteration and return Q and U."""
    U = start
    # Without an orthonormal Q in between, all columns would approach the leading singular vector.
    for _ in range(iterations):
        Q = torch.linalg.qr(A @ U).Q
        U = A.T @ Q
    return Q, U


def relative_error(A: Float[Tensor, "m n"], Q: Float[Tensor, "m k"], U: Float[Tensor, "n k"]) -> float:
    """Compute the error ``|A - Q U^T| / |A|`` of a subspace iteration from the difference.

    In float32 ``1 - |U|^2 / |A|^2`` is accurate only for errors above 0.01.
    """
    return float(torch.addmm(A, Q, U.T, alpha=-1).norm() / A.norm())


def growth(error: float, logistic: Sequence[float] = LOGISTIC, scale: float = 1.0) -> int:
    """Return the rank step of subspace iteration: scale (eta / (1 + exp(omega xi + phi)) + tau), rounded up, >= 1.

    An error that is not finite gives 1.
    """
    eta, omega, phi, tau = logistic
    if not math.isfinite(error):
        return 1
    exponent = min(omega * error + phi, 700.0)  # exp would overflow above 709
    return max(1, math.ceil(scale * (eta / (1 + math.exp(exponent)) + tau)))


Factor = Callable[[int], tuple[Tensor, Tensor]]


def max_factor_rank(rows: int, columns: int, max_rank: int | None) -> int:
    """Return k_max of subspace iteration: ``max_rank``, by default a quarter of the smaller side."""
    smaller = min(rows, columns)
    return min(smaller, max_rank or max(1, smaller // 4))


def choose_rank(
    A: Float[Tensor, "m n"], factor: Factor, state: dict[str, Any], options: Mapping[str, Any]
) -> Factorization:
    """Factorize a matrix by adaptive subspace iteration (AS-RSI), with the rank rule of ``AdapproxOptimizer``.

    ``factor`` returns Q and U of a rank. The rule "ema" stores its fraction in ``state``, the state of the matrix, and
    reads the error of the previous selection there.
    """
    smaller, cap = min(A.shape), max_factor_rank(A.shape[0], A.shape[1], options["max_rank"])
    match options["rank_rule"]:
        case "restart":
            # eta + tau = 191 is the largest step of f, and k_max - 1 of a matrix with a smaller side of 768.
            scale = (cap - 1) / 191 if options["growth_scale"] is None else options["growth_scale"]
            grow = partial(growth, logistic=options["growth"], scale=scale)
            return restart(A, factor, min(options["init_rank"], cap), cap, options["tolerance"], grow)
        case "colnorm":
            return colnorm(A, factor, cap, options["tolerance"])
        case "ema":
            state["share"] = next_share(state["share"], state["error"]) if "share" in state else SHARE
            rank = min(max(1, int(state["share"] * smaller)), cap)
        case _:
            rank = min(options["init_rank"], smaller)
    Q, U = factor(rank)
    return Factorization(Q, U, relative_error(A, Q, U), 1)


def restart(
    A: Float[Tensor, "m n"], factor: Factor, rank: int, cap: int, tolerance: float, grow: Callable[[float], int]
) -> Factorization:
    """Increase the rank of subspace iteration until the error is within the tolerance or the cap: the paper's rule."""
    trials = 0
    while True:
        Q, U = factor(rank)
        trials += 1
        error = relative_error(A, Q, U)
        if error <= tolerance or rank >= cap:
            return Factorization(Q, U, error, trials)
        rank = min(rank + grow(error), cap)


def colnorm(A: Float[Tensor, "m n"], factor: Factor, cap: int, tolerance: float) -> Factorization:
    """Select the smallest sufficient rank of a subspace iteration: ``xi_k^2 = 1 - sum_{j<=k} |u_j|^2 / |A|^2``."""
    Q, U = factor(cap)
    # In float32 the difference to 1 would lose its digits.
    energy = U.double().square().sum(0).cumsum(0)
    squared_errors = 1 - energy / A.double().square().sum()
    sufficient = (squared_errors <= tolerance**2).nonzero()
    rank = int(sufficient[0]) + 1 if len(sufficient) else cap
    Q, U = _first_columns(Q, rank), _first_columns(U, rank)
    return Factorization(Q, U, relative_error(A, Q, U), 1)


def next_share(share: float, error: float) -> float:
    """Return subspace iteration's next fraction by rule "ema": up if the error is too large, else down, smoothed."""
    low, high = SHARE_ENDS
    step = SHARE_STEP if error > SHARE_ERROR else -SHARE_STEP
    moved = min(max(share + step, low), high)
    return SHARE_SMOOTHING * share + (1 - SHARE_SMOOTHING) * moved
