"""Kronecker products: norm, spectrum and rank without the dense matrix."""

from __future__ import annotations

import numpy as np
import pytest

from lorascope.updates import Dense, Kronecker, LowRank, from_factors

rng = np.random.default_rng(0)
LEFT, RIGHT = rng.standard_normal((2, 3)), rng.standard_normal((5, 4))
B, A = rng.standard_normal((5, 2)), rng.standard_normal((2, 4))
CASES = {
    "dense": (Kronecker(Dense(LEFT), Dense(RIGHT), -1.5), LEFT, RIGHT, 2 * 4),
    "low rank": (Kronecker(Dense(LEFT), LowRank(B, A), -1.5), LEFT, B @ A, 2 * 2),
    "zero": (Kronecker(Dense(LEFT), Dense(np.zeros((5, 4))), -1.5), LEFT, np.zeros((5, 4)), 2 * 4),
}


@pytest.mark.parametrize(("update", "left", "right", "rank"), CASES.values(), ids=CASES)
def test_kronecker_equals_the_dense_product(update: Kronecker, left: np.ndarray, right: np.ndarray, rank: int) -> None:
    """The rank is the largest possible one for these shapes, and exact unless a matrix is zero."""
    dense = -1.5 * np.kron(left, right)
    assert update.shape == dense.shape == (10, 12)
    assert update.dense() == pytest.approx(dense)
    assert update.norm() == pytest.approx(np.linalg.norm(dense))
    sigma = np.linalg.svd(dense, compute_uv=False)
    found = update.singular_values()
    assert found == pytest.approx(sigma[: len(found)], abs=1e-7)
    assert update.rank == rank
    assert np.linalg.matrix_rank(dense) == (rank if right.any() else 0)
    assert (sigma[len(found) :] < 1e-12).all()
    U, values, V = update.svd()
    assert (U * values) @ V.T == pytest.approx(dense)


@pytest.mark.parametrize("update", [update for update, *_ in CASES.values()], ids=CASES)
def test_stored_factors_rebuild_the_update(update: Kronecker) -> None:
    factors = update.to_factors()
    again = from_factors(factors, update.scale, form="kronecker")
    assert (again.dense() == update.dense()).all()
    shapes, floats = {name: array.shape for name, array in factors.items()}, dict.fromkeys(factors, True)
    assert Kronecker.fits(shapes, floats, factors)
    for name in factors:
        assert not Kronecker.fits({each: shapes[each] for each in shapes if each != name}, floats, factors)
        assert not Kronecker.fits(shapes | {name: (2, 3, 4)}, floats, factors)
        assert not Kronecker.fits(shapes, floats | {name: False}, factors)


def test_low_rank_factors_of_different_ranks_do_not_fit() -> None:
    shapes = {"left": (2, 3), "right_A": (3, 4), "right_B": (5, 2)}
    assert not Kronecker.fits(shapes, dict.fromkeys(shapes, True), {})
