"""Test S-RSI and rank selection: worked numbers, exact recovery, projections, and bounds by the SVD."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from tolerance import rounding

from lorascope.methods.optimizers import subspace_iteration
from lorascope.methods.optimizers.adapprox import AdapproxOptimizer

A = torch.tensor([[4, 2, 1], [2, 2, 1], [1, 1, 3], [0, 1, 2]], dtype=torch.float64)
START = torch.tensor([[1, 0], [0, 1], [1, -1]], dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def error(matrix, Q, U) -> float:
    return float((matrix - Q @ U.T).norm() / matrix.norm())


def tail(matrix, rank: int) -> float:
    sigma = torch.linalg.svdvals(matrix.double())
    return float(sigma[rank:].norm() / sigma.norm())


SKETCH = 10  # condition number of the sketches that are orthogonalized here


def options(**given):
    """Return the options of a parameter group with the optimizer's defaults."""
    return AdapproxOptimizer([torch.nn.Parameter(torch.zeros(2, 2))], **given).param_groups[0]


def chosen(matrix, seed=0, state=None, iterations=5, oversampling=5, **given):
    factor = partial(
        subspace_iteration.s_rsi, matrix, generator=seeded(seed), iterations=iterations, oversampling=oversampling
    )
    return subspace_iteration.choose_rank(matrix, factor, {} if state is None else state, options(**given))


@pytest.mark.parametrize(
    ("iterations", "q", "u", "xi"),
    [
        (1, (0.680414, 0.408248, 0.544331, 0.272166), (4.082483, 2.993821, 3.265986), 0.459293),
        (5, (0.712364, 0.481092, 0.446485, 0.248474), (4.258125, 3.081871, 3.029858), 0.446980282),
    ],
)
def test_iterate_matches_the_worked_example(iterations, q, u, xi):
    Q, U = (factor[:, :1] for factor in subspace_iteration.iterate(A, START, iterations))
    sign = torch.sign(Q[0, 0])
    assert (sign * Q[:, 0]).tolist() == pytest.approx(q, abs=1e-6)
    assert (sign * U[:, 0]).tolist() == pytest.approx(u, abs=1e-6)
    assert subspace_iteration.relative_error(A, Q, U) == pytest.approx(xi, abs=1e-6)


def test_errors_match_the_worked_example():
    Q, U = (factor[:, :1] for factor in subspace_iteration.iterate(A, START, 2))
    assert subspace_iteration.relative_error(A, Q, U) == pytest.approx(0.447370, abs=1e-6)
    assert subspace_iteration.relative_error(A, *subspace_iteration.s_rsi(A, 2, seeded(), 20)) == pytest.approx(
        0.120645, abs=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("shape", "rank"), [((64, 48), 1), ((64, 48), 5), ((300, 40), 8), ((40, 300), 8), ((768, 768), 16)]
)
def test_matrix_of_the_given_rank_is_recovered(shape, rank, dtype):
    X, Y = (torch.randn(side, rank, generator=seeded(side), dtype=dtype) for side in shape)
    assert error(X @ Y.T, *subspace_iteration.s_rsi(X @ Y.T, rank, seeded())) < rounding(
        dtype, max(shape), growth=SKETCH
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_form_a_projection(dtype):
    bound = rounding(dtype, 80, growth=SKETCH)
    matrix = torch.rand(80, 50, generator=seeded(1), dtype=dtype)
    Q, U = subspace_iteration.s_rsi(matrix, 7, seeded())
    assert Q.shape == (80, 7)
    assert U.shape == (50, 7)
    assert torch.allclose(Q.T @ Q, torch.eye(7, dtype=dtype), atol=bound)
    assert torch.allclose(U, matrix.T @ Q, rtol=bound, atol=bound)
    assert float((Q.T @ (matrix - Q @ U.T)).abs().max()) < bound
    assert torch.linalg.matrix_rank(Q @ U.T) == 7
    xi = subspace_iteration.relative_error(matrix, Q, U)
    assert xi > 1e-2  # smaller errors would make the next line fail in float32
    assert xi**2 == pytest.approx(1 - float(U.square().sum() / matrix.square().sum()), abs=bound)


@pytest.mark.parametrize(("dtype", "slack"), [(torch.float32, 1e-4), (torch.float64, 1e-12)])
@pytest.mark.parametrize("spectrum", ["harmonic", "geometric"])
@pytest.mark.parametrize("rank", [1, 8, 32])
def test_error_is_close_to_the_best_rank_k_error(spectrum, rank, dtype, slack):
    sigma = torch.tensor([1 / (i + 1) if spectrum == "harmonic" else 0.8**i for i in range(150)], dtype=torch.float64)
    left, right = (torch.linalg.qr(torch.randn(n, 150, generator=seeded(n), dtype=torch.float64)).Q for n in (200, 150))
    exact = (left * sigma) @ right.T
    matrix, least = exact.to(dtype), tail(exact, rank)
    ratios = [error(matrix, *subspace_iteration.s_rsi(matrix, rank, seeded(seed))) / least for seed in range(20)]
    assert min(ratios) * least > least - slack
    assert np.mean(ratios) < 1.03
    assert max(ratios) < 1.25
    hasty = [error(matrix, *subspace_iteration.s_rsi(matrix, rank, seeded(seed), 1)) / least for seed in range(20)]
    assert np.mean(hasty) > np.mean(ratios)


def test_error_of_a_flat_spectrum_equals_the_best_rank_k_error():
    flat = torch.linalg.qr(torch.randn(60, 40, generator=seeded(2), dtype=torch.float64)).Q
    assert error(flat, *subspace_iteration.s_rsi(flat, 10, seeded())) == pytest.approx(tail(flat, 10), rel=1e-12)


def test_factors_depend_on_the_seed_and_follow_the_scale():
    matrix = torch.rand(40, 30, generator=seeded(3))
    Q, U = subspace_iteration.s_rsi(matrix, 4, seeded(5))
    again = subspace_iteration.s_rsi(matrix, 4, seeded(5))
    assert torch.equal(Q, again[0])
    assert torch.equal(U, again[1])
    assert not torch.equal(U, subspace_iteration.s_rsi(matrix, 4, seeded(6))[1])
    scaled = subspace_iteration.s_rsi(8 * matrix, 4, seeded(5))
    assert torch.equal(Q, scaled[0])
    assert torch.equal(8 * U, scaled[1])


def test_sketch_is_at_most_as_wide_as_the_matrix():
    Q, U = subspace_iteration.s_rsi(torch.rand(4, 9), 3, seeded())
    assert (Q.shape, U.shape) == ((4, 3), (9, 3))
    assert subspace_iteration.sketch(torch.rand(4, 9), 8, seeded()).shape == (9, 4)


def test_restart_increases_the_rank_until_the_error_is_small():
    """The exact errors are 2^-k; a rare sketch with an inaccurate last column misses one by a quarter."""
    diagonal = torch.diag(2.0 ** -torch.arange(16, dtype=torch.float64))
    errors = []
    for seed in range(200):
        errors.append([])

        def one_more(error, seen=errors[-1]):
            seen.append(error)
            return 1

        factor = partial(subspace_iteration.s_rsi, diagonal, generator=seeded(seed))
        found = subspace_iteration.restart(diagonal, factor, 1, 16, 0.1, one_more)
        assert found.trials == found.Q.shape[1] == 4
        errors[-1].append(found.error)
    assert np.median(errors, axis=0) == pytest.approx([0.5, 0.25, 0.125, 0.0625], rel=1e-3)
    assert (np.min(errors, axis=0) > [(1 - 1e-6) * tail(diagonal, rank) for rank in (1, 2, 3, 4)]).all()


def test_restart_stops_at_the_cap():
    """At rank 1 the error is 0.5, for which f adds 176 components; the cap is 4."""
    diagonal = torch.diag(2.0 ** -torch.arange(16, dtype=torch.float64))
    found = [chosen(diagonal, seed, max_rank=4, tolerance=0.1) for seed in range(200)]
    assert {(rank.Q.shape[1], rank.trials) for rank in found} == {(4, 2)}
    assert np.median([rank.error for rank in found]) == pytest.approx(0.0625, rel=1e-3)


def test_growth_is_small_near_the_tolerance_and_large_far_from_it():
    """f is 6.17, 7.63, 14.84, 27.5, 91, 175.8 and 190.9 with the constants of the paper, before it is rounded up."""
    xi = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0)
    assert [subspace_iteration.growth(error) for error in xi] == [7, 8, 15, 28, 91, 176, 191]
    assert subspace_iteration.growth(0.1, scale=0.1) == 3
    assert subspace_iteration.growth(1.0, (191.0, 1e9, -4.0, 1.0)) == 1  # exp of the exponent exceeds a float
    assert subspace_iteration.growth(0.0, scale=1e-9) == subspace_iteration.growth(math.nan) == 1


@pytest.mark.parametrize(("scale", "tried"), [(1.0, [1, 11]), (0.02, [1, 3, 5, 7, 9, 11]), (None, [1, 6, 11])])
def test_growth_scale_of_none_scales_the_increment_to_the_cap(scale, tried):
    """The errors at ranks 1 and 6 are 0.25 and 0.2334, for which f is 91 and 82.7; a cap of 11 scales it by 10/191."""
    sigma = torch.cat([torch.tensor([15**0.5]), torch.full((39,), 39**-0.5)]).double()
    ranks = []

    def factor(rank):
        ranks.append(rank)
        return torch.eye(40, rank, dtype=torch.float64), torch.diag(sigma)[:, :rank]

    given = options(growth_scale=scale, max_rank=11, tolerance=0.01)
    found = subspace_iteration.choose_rank(torch.diag(sigma), factor, {}, given)
    assert ranks == tried
    assert found.trials == len(tried)


def test_growth_scale_of_none_leads_from_an_error_of_one_to_the_cap():
    """At rank 1 of 1600 equal singular values the error is 0.9997, for which f is 190.9."""
    flat = torch.eye(1600)
    given = options(growth_scale=None, max_rank=300, tolerance=0.01)
    found = subspace_iteration.choose_rank(flat, lambda rank: (flat[:, :rank], flat[:, :rank]), {}, given)
    assert (found.Q.shape[1], found.trials) == (300, 2)


@pytest.mark.parametrize("seed", range(3))
def test_colnorm_finds_the_rank_of_the_svd(seed):
    X, Y = (torch.rand(side, 6, generator=seeded(side + seed), dtype=torch.float64) for side in (90, 70))
    matrix = (X * torch.tensor([1, 0.5, 0.2, 0.05, 0.01, 0.002], dtype=torch.float64)) @ Y.T
    least = next(rank for rank in range(1, 7) if tail(matrix, rank) <= 0.02)
    found = chosen(matrix, seed, rank_rule="colnorm", tolerance=0.02)
    assert found.Q.shape[1] == least
    assert found.trials == 1
    assert found.error == pytest.approx(tail(matrix, least), rel=1e-6)
    full = torch.rand(40, 40, generator=seeded(seed))
    assert chosen(full, rank_rule="colnorm", tolerance=1e-4).Q.shape[1] == 10


def test_ema_uses_the_error_of_the_previous_selection():
    matrix, state = torch.rand(100, 80, generator=seeded(4)), {}
    first = chosen(matrix, state=state, rank_rule="ema", max_rank=80)
    assert first.Q.shape[1] == 12
    state["error"] = first.error
    assert first.error > subspace_iteration.SHARE_ERROR
    chosen(matrix, state=state, rank_rule="ema", max_rank=80)
    assert state["share"] == pytest.approx(0.1505)
    state["error"] = 0.0
    chosen(matrix, state=state, rank_rule="ema", max_rank=80)
    assert state["share"] == pytest.approx(0.15)
    assert subspace_iteration.next_share(0.6, 1.0) == pytest.approx(0.6)
    assert subspace_iteration.next_share(0.0625, 0.0) == pytest.approx(0.0625)


def test_fixed_rank_is_limited_only_by_the_matrix():
    assert chosen(torch.rand(30, 20), rank_rule="fixed", init_rank=7).Q.shape[1] == 7
    assert chosen(torch.rand(30, 20), rank_rule="fixed", init_rank=70).Q.shape[1] == 20


def test_a_truncated_positive_matrix_may_be_negative():
    matrix = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 1], [0, 0, 1]], dtype=torch.float64)
    Q, U = subspace_iteration.s_rsi(matrix, 2, seeded(), 60)
    product = Q @ U.T
    assert float(product[0, 2]) == pytest.approx(-0.25, abs=1e-6)
    assert float(product[3, 0]) == pytest.approx(-0.25, abs=1e-6)
