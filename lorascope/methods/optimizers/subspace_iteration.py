"""S-RSI and AS-RSI: a matrix as a thin product by rounds of multiplication, and how the rank of it is chosen.

    U ~ N(0, 1),    l times: Q = orth(A U), U = A^T Q,    A ~ Q U^T = Q Q^T A
    xi = |A - Q U^T|_F / |A|_F

A product of this kind is the projection of A on the columns of Q, which the rounds turn towards the leading left
singular vectors; columns beyond the rank (oversampling) make that faster and are cut off at the end.

============  =======================================================================
paper         here
============  =======================================================================
k, k_max      ``rank``, ``cap``
l, p          ``iterations``, ``oversampling``
Omega         the normal matrix that ``sketch`` draws and ``iterate`` starts from
xi, xi_thresh ``error``, ``tolerance``
f(xi)         ``growth``, of which ``logistic`` are eta, omega, phi and tau
============  =======================================================================

Source: Adapprox (arXiv 2403.14958), algorithms 1 and 2.

Departs: the sketch has no more columns than the matrix has rows or columns; their number may be rounded up, since some
widths multiply faster than narrower ones. The text of algorithm 2 could not be
checked: its restart, f and their constants are what is remembered of it, phi with the sign that makes small steps near
the tolerance and large ones far from it. Three other rules stand beside it, none of them the paper's: ``colnorm`` reads
the error of every rank off one factoring at the cap; ``ema`` moves a share of the smaller side up and down, after
adaptive-rank-muon, but from the second choice on where that waits for a thousand steps; ``fixed`` keeps the first rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

RULES = ("restart", "colnorm", "ema", "fixed")
LOGISTIC = (200.0, -10.0, 2.5, -9.0)
# Of the rule "ema": first share of the smaller side, its ends, its step, its smoothing, and the error that it aims at.
SHARE, SHARE_ENDS, SHARE_STEP, SHARE_SMOOTHING, SHARE_ERROR = 0.15, (0.0625, 0.6), 0.005, 0.9, 0.15


class Factorization(NamedTuple):
    """A matrix A (m, n) as Q U^T, and how it came to that.

    Parameters
    ----------
    Q : (m, k)
        Orthonormal columns.
    U : (n, k)
        A^T Q.
    error : float
        Relative, in Frobenius norm.
    trials : int
        Factorings that the choice of the rank took.
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
    """Q and U of a rank, or of the smaller side where that is less; the sketch has a multiple of so many columns."""
    columns = math.ceil((rank + oversampling) / multiple) * multiple
    Q, U = iterate(A, sketch(A, columns, generator), iterations)
    return first_columns(Q, rank), first_columns(U, rank)


def first_columns(columns: Float[Tensor, "m c"], rank: int) -> Float[Tensor, "m k"]:
    """The first columns, copied: a view, as ``contiguous`` gives of one column, would keep all of them alive."""
    return columns[:, :rank].clone(memory_format=torch.contiguous_format)


def sketch(A: Float[Tensor, "m n"], columns: int, generator: torch.Generator) -> Float[Tensor, "n c"]:
    """The normal matrix to start from, drawn where the generator lives."""
    shape = (A.shape[1], min(columns, *A.shape))
    return torch.randn(shape, generator=generator, device=generator.device, dtype=A.dtype).to(A.device)


def iterate(
    A: Float[Tensor, "m n"], start: Float[Tensor, "n c"], iterations: int
) -> tuple[Float[Tensor, "m c"], Float[Tensor, "n c"]]:
    """The rounds themselves."""
    U = start
    for _ in range(iterations):
        Q = torch.linalg.qr(A @ U).Q
        U = A.T @ Q
    return Q, U


def relative_error(A: Float[Tensor, "m n"], Q: Float[Tensor, "m k"], U: Float[Tensor, "n k"]) -> float:
    """|A - Q U^T| / |A|, by the difference: in float32 1 - |U|^2 / |A|^2 holds only above a hundredth."""
    return float(torch.addmm(A, Q, U.T, alpha=-1).norm() / A.norm())


def growth(error: float, logistic: Sequence[float] = LOGISTIC, scale: float = 1.0) -> int:
    """Components to add to a rank of this error: eta / (1 + exp(omega xi + phi)) + tau, scaled, and one at least.

    An error that is no number adds one.
    """
    eta, omega, phi, tau = logistic
    if not math.isfinite(error):
        return 1
    return max(1, math.ceil(scale * (eta / (1 + math.exp(omega * error + phi)) + tau)))


Factor = Callable[[int], tuple[Tensor, Tensor]]


def factoring(
    A: Float[Tensor, "m n"], generator: torch.Generator, iterations: int, oversampling: int, multiple: int = 1
) -> Factor:
    """S-RSI of one matrix, as the rules call it."""
    return partial(s_rsi, A, generator=generator, iterations=iterations, oversampling=oversampling, multiple=multiple)


def largest_rank(rows: int, columns: int, max_rank: int | None) -> int:
    """k_max: as set, or a quarter of the smaller side."""
    smaller = min(rows, columns)
    return min(smaller, max_rank or max(1, smaller // 4))


def choose(A: Float[Tensor, "m n"], factor: Factor, state: dict[str, Any], options: Mapping[str, Any]) -> Factorization:
    """AS-RSI under the rule that the options of ``AdapproxOptimizer`` name.

    Parameters
    ----------
    A : (m, n)
    factor : callable
        Gives Q and U of a rank.
    state : dict
        Of this matrix; the rule "ema" keeps its share there, and goes by the error of the choice before.
    options : mapping
    """
    smaller, cap = min(A.shape), largest_rank(A.shape[0], A.shape[1], options["max_rank"])
    match options["rank_rule"]:
        case "restart":
            scale = (cap - 1) / 191 if options["growth_scale"] is None else options["growth_scale"]
            grow = partial(growth, logistic=options["growth"], scale=scale)
            return restart(A, factor, min(options["init_rank"], cap), cap, options["tolerance"], grow)
        case "colnorm":
            return colnorm(A, factor, cap, options["tolerance"])
        case "ema":
            state["share"] = next_share(state["share"], state["error"]) if "share" in state else SHARE
            return keep_rank(A, factor, min(max(1, int(state["share"] * smaller)), cap))
    return keep_rank(A, factor, min(options["init_rank"], smaller))


def restart(
    A: Float[Tensor, "m n"], factor: Factor, rank: int, cap: int, tolerance: float, grow: Callable[[float], int]
) -> Factorization:
    """The paper's rule: from the first rank on, more and more of it until the error is small, or the cap is reached."""
    trials = 0
    while True:
        Q, U = factor(rank)
        trials += 1
        error = relative_error(A, Q, U)
        if error <= tolerance or rank >= cap:
            return Factorization(Q, U, error, trials)
        rank = min(rank + grow(error), cap)


def colnorm(A: Float[Tensor, "m n"], factor: Factor, cap: int, tolerance: float) -> Factorization:
    """The smallest rank whose error is small, of one factoring at the cap: xi_k^2 = 1 - sum_{j<=k} |u_j|^2 / |A|^2."""
    Q, U = factor(cap)
    kept = U.double().square().sum(0).cumsum(0)
    left = 1 - kept / A.double().square().sum()
    small = (left <= tolerance**2).nonzero()
    rank = int(small[0]) + 1 if len(small) else cap
    Q, U = first_columns(Q, rank), first_columns(U, rank)
    return Factorization(Q, U, relative_error(A, Q, U), 1)


def next_share(share: float, error: float) -> float:
    """The rule "ema": a step up where the error is too large, else down, of which a tenth is taken."""
    low, high = SHARE_ENDS
    moved = min(max(share + (SHARE_STEP if error > SHARE_ERROR else -SHARE_STEP), low), high)
    return SHARE_SMOOTHING * share + (1 - SHARE_SMOOTHING) * moved


def keep_rank(A: Float[Tensor, "m n"], factor: Factor, rank: int) -> Factorization:
    """The rank as it is."""
    Q, U = factor(rank)
    return Factorization(Q, U, relative_error(A, Q, U), 1)
