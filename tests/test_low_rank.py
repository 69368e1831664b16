"""Low-rank and dense updates compared with worked examples, dense decompositions and planted values."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import lorascope.updates as update
from lorascope.updates import Dense, LowRank, WeightDecomposed, linalg

RNG = np.random.default_rng(7)


@pytest.fixture(autouse=True)
def fresh_rng(monkeypatch):
    """Reset the generator, so that a test does not depend on the tests before it."""
    monkeypatch.setitem(globals(), "RNG", np.random.default_rng(7))


HAND = LowRank(np.array([[3.0], [4.0]]), np.array([[1.0, 2.0]]), scale=2)


RANKS = (update.stable_rank, update.effective_rank, update.entropy_rank, update.participation_rank, update.energy_rank)


def cosine_distance(W0: np.ndarray, W: np.ndarray, axis: int) -> np.ndarray:
    return update.neuron_change(W0, W, axis).cosine_distance


def low_rank(out: int = 12, inner: int = 9, rank: int = 4, scale: float = 0.5) -> LowRank:
    return LowRank(RNG.standard_normal((out, rank)), RNG.standard_normal((rank, inner)), scale)


def with_condition(side: int, rank: int, condition: float) -> np.ndarray:
    """Return a (side, rank) array with singular values from 1 down to 1 / condition."""
    Q, _ = np.linalg.qr(RNG.standard_normal((side, rank)))
    P, _ = np.linalg.qr(RNG.standard_normal((rank, rank)))
    return Q * np.geomspace(1.0, 1.0 / condition, rank) @ P


def test_update_of_worked_example():
    assert HAND.dense().tolist() == [[6, 12], [8, 16]]
    assert HAND.norm() == pytest.approx(500**0.5, rel=1e-15)
    assert HAND.singular_values() == pytest.approx([500**0.5])
    assert HAND.svd()[0][:, 0] * HAND.svd()[2][0, 0] == pytest.approx(np.array([0.6, 0.8]) / 5**0.5)
    assert (HAND.shape, HAND.rank) == ((2, 2), 1)


@pytest.mark.parametrize("shape", [(12, 9, 4), (9, 12, 4), (5, 30, 8), (30, 5, 8), (3, 4, 20), (7, 7, 7), (1, 6, 1)])
def test_factored_equals_dense(shape):
    factored = low_rank(*shape)
    dense = Dense(factored.dense())
    sigma = np.linalg.svd(factored.dense(), compute_uv=False)
    k = min(shape)
    assert factored.singular_values() == pytest.approx(sigma[:k], rel=1e-12, abs=1e-13)
    assert dense.singular_values() == pytest.approx(sigma, abs=1e-7 * sigma[0])
    assert factored.norm() == pytest.approx(np.linalg.norm(factored.dense()), rel=1e-13)
    assert dense.norm() == pytest.approx(factored.norm(), rel=1e-13)
    for which in (factored, dense):
        U, values, V = which.svd()
        assert len(values) == k
        assert (U * values) @ V.T == pytest.approx(factored.dense(), abs=1e-12)
        for basis in (U, V):
            assert np.allclose(basis.T @ basis, np.eye(k), atol=1e-13)


@pytest.mark.parametrize(("left", "right"), [(1e2, 1e2), (5e2, 5e2), (1e3, 1e3), (2e3, 1e1), (1e5, 1e4), (1e8, 1e1)])
def test_singular_values_by_cholesky_and_by_qr_are_accurate(left, right):
    """Values above 1e-6 of the largest are accurate to a relative 1e-8, below and above the limit for Cholesky."""
    B, A = with_condition(40, 6, left), with_condition(50, 6, right).T
    R_left, R_right = np.linalg.qr(B, mode="r"), np.linalg.qr(A.T, mode="r")
    expected = np.linalg.svd(R_left @ R_right.T, compute_uv=False)
    large = expected > 1e-6 * expected[0]
    assert LowRank(B, A).singular_values()[large] == pytest.approx(expected[large], rel=1e-8)


@pytest.mark.parametrize("side", [1023, 1024, 1025, 2048, 2500])
def test_tall_factors_are_decomposed_in_blocks(side):
    B, A = with_condition(side, 5, 1e7), with_condition(side, 5, 10.0).T
    expected = np.linalg.svd(np.linalg.qr(B, mode="r") @ np.linalg.qr(A.T, mode="r").T, compute_uv=False)
    large = expected > 1e-6 * expected[0]
    assert LowRank(B, A).singular_values()[large] == pytest.approx(expected[large], rel=1e-9)


def test_columns_of_different_scales_are_accurate_without_qr(monkeypatch):
    """Cholesky of a Gram matrix is accurate for columns of any scale, as QR is; only dependent columns require QR."""
    B, A = with_condition(3000, 12, 30) * np.geomspace(1, 1e-7, 12), with_condition(70, 12, 30).T
    R_left, R_right = np.linalg.qr(B, mode="r"), np.linalg.qr(A.T, mode="r")
    expected = np.linalg.svd(R_left @ R_right.T, compute_uv=False)
    large = expected > 1e-6 * expected[0]
    monkeypatch.delattr(linalg, "_qr_triangle")
    for size in (2.0**-100, 1.0, 2.0**100):
        assert LowRank(size * B, A).singular_values()[large] == pytest.approx(size * expected[large], rel=1e-10)


def test_only_ill_conditioned_factors_of_a_batch_are_decomposed_by_qr(monkeypatch):
    """Conditions on both sides of 1e3, the square root of the limit of the Gram matrix, and a singular factor."""
    conditions = (2.0, 100.0, 5e3, 1e6)
    factors = [with_condition(40, 6, condition) for condition in conditions]
    factors = [factor / np.linalg.norm(factor, axis=0) for factor in factors]
    factors.append(np.repeat(factors[0][:, :1], 6, axis=1))
    eigenvalues = np.array([np.linalg.eigvalsh(factor.T @ factor)[[0, -1]] for factor in factors])
    ill = set(np.flatnonzero(eigenvalues[:, 0] <= linalg.GRAM_LIMIT * eigenvalues[:, 1]))
    assert ill == {2, 3, 4}
    by_qr, qr = [], linalg._qr_triangle
    monkeypatch.setattr(linalg, "_qr_triangle", lambda X: by_qr.append(X) or qr(X))
    for chosen in ([0, 1], range(4), range(5)):  # the last one is singular, so Cholesky itself fails
        by_qr.clear()
        R = linalg.triangles([factors[i] for i in chosen])
        assert len(by_qr) == len(ill & set(chosen))
        for i, one in zip(chosen, R, strict=True):
            assert one.T @ one == pytest.approx(factors[i].T @ factors[i], abs=1e-13)


def test_batches_of_mixed_shapes_keep_their_order():
    updates = [
        low_rank(8, 6, 3),
        low_rank(8, 6, 2),
        Dense(RNG.standard_normal((4, 5))),
        low_rank(20, 30, 3),
        low_rank(),
    ]
    updates += [LowRank(np.zeros((8, 3)), np.ones((3, 6))), low_rank(8, 6, 3, scale=-2.0), low_rank(8, 6, 0)]
    for sigma, one in zip(update.spectra(updates), updates, strict=True):
        expected = np.linalg.svd(one.dense(), compute_uv=False)[: one.rank]
        assert sigma == pytest.approx(expected, rel=1e-7, abs=1e-12)
        assert one.norm() == pytest.approx(np.linalg.norm(one.dense()), rel=1e-13)
    assert update.spectra([]) == []


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_narrow_arrays_are_computed_in_double(dtype):
    B, A = (RNG.standard_normal(shape).astype(dtype) for shape in ((300, 5), (5, 200)))
    wide = LowRank(B.astype(np.float64), A.astype(np.float64))
    narrow = LowRank(B, A)
    assert narrow.singular_values().tolist() == wide.singular_values().tolist()
    assert narrow.norm() == wide.norm()
    large = Dense(np.full((400, 400), 300.0, dtype=np.float16))  # squares overflow float16, their sum needs float64
    assert large.norm() == pytest.approx(120_000.0, rel=1e-15)
    assert large.singular_values()[0] == pytest.approx(120_000.0)


def test_singular_values_are_gauge_invariant():
    factored, M = low_rank(), RNG.standard_normal((4, 4))
    turned = LowRank(factored.B @ M, np.linalg.inv(M) @ factored.A, factored.scale)
    assert turned.singular_values() == pytest.approx(factored.singular_values(), rel=1e-10)
    assert update.phi_matrix(turned.dense(), factored.dense()).diagonal() == pytest.approx(np.ones(4))


@pytest.mark.parametrize(
    "zero",
    [LowRank(np.zeros((5, 3)), np.ones((3, 4))), LowRank(np.ones((5, 0)), np.ones((0, 4))), Dense(np.zeros((5, 4)))],
)
def test_zero_update_has_rank_zero(zero):
    assert zero.norm() == 0.0
    assert not zero.singular_values().any()
    sigma = zero.singular_values()
    assert [rank(sigma) for rank in RANKS] == [0.0] * 5
    U, _, V = zero.svd()
    assert (U.shape, V.shape) == ((5, 0), (4, 0))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_or_infinity_makes_ranks_nan(bad):
    B = np.ones((5, 3))
    B[2, 1] = bad
    for broken in (LowRank(B, RNG.standard_normal((3, 4))), Dense(B)):
        assert np.isnan(broken.singular_values()).all()
        assert not np.isfinite(broken.norm())
        with pytest.raises(ValueError, match="NaN or infinity"):
            broken.svd()
    assert np.isnan([rank(np.array([1.0, np.nan])) for rank in RANKS]).all()
    healthy = low_rank(5, 4, 3)
    assert update.spectra([LowRank(B, healthy.A), healthy])[1] == pytest.approx(healthy.singular_values())


@pytest.mark.parametrize("power", [250, 500, 1000])
def test_factors_near_the_limit_of_float64_do_not_overflow(power):
    """Factors 2^p B and 2^-p A make the same update as B and A; only a product that overflows is infinite."""
    draw = np.random.default_rng(0)
    B, A = draw.standard_normal((30, 4)), draw.standard_normal((4, 20))
    plain = LowRank(B, A, 0.5)
    for big in (LowRank(B * 2.0**power, A * 2.0**-power, 0.5), LowRank(B * 2.0**-power, A * 2.0**power, 0.5)):
        assert big.norm() == pytest.approx(plain.norm(), rel=1e-13)
        assert big.singular_values() == pytest.approx(plain.singular_values(), rel=1e-12)
    over = LowRank(B * 2.0**power, A * 2.0**1000, 0.5)
    finite = np.isfinite(2.0**power * 2.0**1000)
    assert np.isinf(over.norm()) == np.isinf(over.singular_values()).all() == (not finite)


def test_rank_deficient_factors_have_as_many_vectors_as_their_rank():
    B, A = RNG.standard_normal((20, 2)), RNG.standard_normal((2, 15))
    doubled = LowRank(np.hstack([B, B]), np.vstack([A, A]))
    assert doubled.rank == 4
    assert doubled.singular_values()[2:] == pytest.approx(np.zeros(2), abs=1e-13 * doubled.norm())
    U, _, V = doubled.svd()
    assert (U.shape, V.shape) == ((20, 2), (15, 2))
    assert update.principal_angles(U, LowRank(B, A).svd()[0]) == pytest.approx(np.zeros(2), abs=1e-13)


def test_difference_of_similar_updates_keeps_its_digits():
    before, small = low_rank(30, 20, 3), low_rank(30, 20, 3)
    after = LowRank(before.B + 1e-9 * small.B, before.A, before.scale)
    expected = LowRank(1e-9 * small.B, before.A, before.scale).norm()
    difference = after - before
    assert isinstance(difference, LowRank)
    assert difference.norm() == pytest.approx(expected, rel=1e-7)  # B itself has no more digits
    grown = LowRank(np.hstack([before.B, 1e-9 * small.B]), np.vstack([before.A, small.A]), before.scale)
    expected = LowRank(1e-9 * small.B, small.A, before.scale).norm()
    assert (grown - before).norm() == pytest.approx(expected, rel=1e-6)  # the Gram sum would have no digits left
    assert (after - Dense(before.dense())).dense() == pytest.approx(difference.dense(), abs=1e-15)
    assert (Dense(after.dense()) - before).dense() == pytest.approx(difference.dense(), abs=1e-15)


def states(out, inner, rank, dtype="float32", scale=0.5, step=1e-3):
    """Return two states of one product, one step apart."""
    B, A = RNG.standard_normal((out, rank)).astype(dtype), RNG.standard_normal((rank, inner)).astype(dtype)
    moved = [(X + step * RNG.standard_normal(X.shape)).astype(dtype) for X in (B, A)]
    return LowRank(*moved, scale), LowRank(B, A, scale)


def changed(pair, **entries):
    """Return the pair with other first entries in the factors of its first update."""
    B, A = pair[0].B.copy(), pair[0].A.copy()
    B[0, 0], A[0, 0] = entries.get("B", B[0, 0]), entries.get("A", A[0, 0])
    return LowRank(B, A, pair[0].scale), pair[1]


def test_change_norms_are_those_of_the_differences():
    pairs = [states(out, 9, 3) for out in (12, 7, 12, 9, 12)]
    pairs += [states(12, 9, 3, scale=scale) for scale in (-2.0, 0.0)]
    pairs += [states(12, 9, 3, dtype="float64"), states(500, 300, 2), (pairs[0][0], pairs[0][0])]
    pairs += [(states(12, 9, 2)[0], states(12, 9, 3)[0]), (states(12, 9, 3)[0], states(12, 9, 3, scale=1.0)[0])]
    pairs += [(Dense(np.ones((12, 9))), pairs[0][0]), (pairs[0][0], Dense(np.ones((12, 9))))]
    expected = [np.linalg.norm(after.dense() - before.dense()) for after, before in pairs]
    assert update.change_norms(iter(pairs)) == pytest.approx(expected, rel=1e-11, abs=0)
    assert update.change_norms([]) == []


@pytest.mark.parametrize(("entries", "norm"), [({"B": np.nan}, np.nan), ({"A": np.inf}, np.nan), ({"B": 1e38}, None)])
def test_change_norms_of_extreme_entries_are_those_of_the_differences(entries, norm):
    pairs = [states(12, 9, 3), changed(states(12, 9, 3), **entries), states(12, 9, 3)]
    expected = [np.linalg.norm(after.dense() - before.dense()) if norm is None else norm for after, before in pairs]
    found = update.change_norms(pairs)
    assert found[1] == pytest.approx(expected[1], rel=1e-11, nan_ok=True)
    assert np.isfinite([found[0], found[2]]).all()


def test_full_batches_keep_their_order(monkeypatch):
    monkeypatch.setattr("lorascope.updates.low_rank._BATCH_VALUES", 200)
    pairs = [states(out, 9, 3) for out in (12, 7, 12, 9, 12, 12, 7, 12)]
    expected = [np.linalg.norm(after.dense() - before.dense()) for after, before in pairs]
    assert update.change_norms(pairs) == pytest.approx(expected, rel=1e-11)
    for sigma, (product, _) in zip(update.spectra([product for product, _ in pairs]), pairs, strict=True):
        assert sigma == pytest.approx(np.linalg.svd(product.dense(), compute_uv=False)[:3], rel=1e-8)


def test_change_norms_compares_states_of_one_product_in_a_batch(monkeypatch):
    monkeypatch.setattr(LowRank, "__sub__", None)
    assert len(update.change_norms([states(40, 30, 3) for _ in range(5)])) == 5


def test_ranks_of_known_spectra():
    flat, steep = np.ones(6), np.array([3.0, 1.0])
    for rank in (update.effective_rank, update.entropy_rank, update.participation_rank, update.stable_rank):
        assert rank(flat) == pytest.approx(6.0)
        assert rank(1e-200 * flat) == pytest.approx(6.0)
        assert rank(np.array([5.0, 0.0])) == pytest.approx(1.0)
    p, q = np.array([0.75, 0.25]), np.array([0.9, 0.1])
    assert update.effective_rank(steep) == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert update.entropy_rank(steep) == pytest.approx(np.exp(-(q * np.log(q)).sum()))
    assert update.participation_rank(steep) == pytest.approx(100 / 82)
    assert update.stable_rank(steep) == pytest.approx(10 / 9)
    assert [update.energy_rank(steep, share) for share in (0.89, 0.9, 0.91, 1.0)] == [1, 1, 2, 2]
    assert update.energy_rank(steep[::-1], 0.9) == 1
    assert update.energy_rank(np.full(10, 0.1), 1.0) == 10


def test_ranks_of_many_spectra_equal_those_of_each():
    spectra = [RNG.random(k) for k in (8, 3, 8, 1)] + [np.zeros(3), np.empty(0), np.array([2.0, 0.0, 1.0])]
    spectra += [np.array([1.0, np.nan, 0.0]), np.array([np.inf, 1.0, 0.0])]
    found = linalg.stable_and_effective_ranks(spectra)
    for ranks, sigma in zip(found[:4], spectra[:4], strict=True):
        assert ranks == pytest.approx((update.stable_rank(sigma), update.effective_rank(sigma)), rel=1e-14)
    assert found[4:6] == [(0.0, 0.0)] * 2
    assert found[6] == pytest.approx((5 / 4, 3 / 2 ** (2 / 3)))  # p = 2/3, 1/3: exp(-sum p log p) = 3 / 2^(2/3)
    assert np.isnan(found[7:]).all()
    assert linalg.stable_and_effective_ranks([]) == []


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("side", "rank"), [(40, 6), (40, 8), (50, 16), (60, 33), (4, 8), (9000, 5)])
def test_grams_together_equal_those_one_by_one(side, rank, dtype):
    """In both orders of memory, for heights of one tile and of several; equal bits, which the figures rely on."""
    tall = [RNG.standard_normal((side + i % 2, rank)).astype(dtype) for i in range(4)]
    wide = [RNG.standard_normal((rank, side)).astype(dtype).T for _ in range(3)]
    found = linalg._grams(tall + wide, None)
    assert np.array_equal(found, [linalg.gram(X) for X in tall + wide])
    exact = [X.T.astype(np.float64) @ X.astype(np.float64) for X in tall + wide]
    assert np.allclose(found, exact, rtol=0, atol=4 * (side + 1) * np.finfo(np.float64).eps * np.abs(exact).max())


def test_stacks_share_memory_within_a_thread():
    one, two = [np.ones((2, 3), np.float32)] * 2, [np.full(5, 2.0)] * 3
    first, second = linalg.stacks(one, two)
    assert first.dtype == second.dtype == np.float64
    assert first.shape == (2, 2, 3)
    assert second.shape == (3, 5)
    assert not np.shares_memory(first, second)
    assert (first == 1).all()
    assert (second == 2).all()
    with ThreadPoolExecutor(1) as pool:
        (other,) = pool.submit(linalg.stacks, [np.zeros(27)]).result()
    assert (first == 1).all()
    assert (other == 0).all()
    (again,) = linalg.stacks([np.full(4, 3.0)])
    assert np.shares_memory(again, first)
    large = np.ones(linalg._WORKSPACE_VALUES + 1)
    assert not np.shares_memory(linalg.stacks([large])[0], again)


def test_phi_on_the_worked_example():
    A1, A2 = np.array([[2.0, 0, 0], [0, 1, 0]]), np.array([[1.0, 0, 0], [0, 0, 3]])
    assert update.phi_matrix(A1, A2) == pytest.approx(np.array([[0, 1], [0, 0.5]]), abs=1e-15)
    assert [update.phi(A1, A2, i, j) for i, j in ((1, 1), (1, 2), (2, 1), (2, 2))] == pytest.approx([0, 1, 0, 0.5])
    with pytest.raises(ValueError, match=r"to 2 .* to 2, got 3 and 1"):
        update.phi(A1, A2, 3, 1)
    with pytest.raises(ValueError, match=r"to 2 .* to 2, got 0 and 1"):
        update.phi(A1, A2, 0, 1)


def test_phi_against_its_formula_and_symmetry():
    A1, A2 = RNG.standard_normal((4, 10)), RNG.standard_normal((6, 10))
    V1, V2 = (np.linalg.svd(A, full_matrices=False)[2].T for A in (A1, A2))
    expected = [[np.linalg.norm(V1[:, :i].T @ V2[:, :j]) ** 2 / min(i, j) for j in range(1, 7)] for i in range(1, 5)]
    assert update.phi_matrix(A1, A2) == pytest.approx(np.array(expected))
    assert update.phi_matrix(A2, A1) == pytest.approx(np.transpose(expected))
    assert update.phi_matrix(A1, A1).diagonal() == pytest.approx(np.ones(4))


def test_phi_of_independent_subspaces():
    draws = [update.phi_matrix(RNG.standard_normal((8, 64)), RNG.standard_normal((16, 64))) for _ in range(200)]
    assert np.mean(draws, axis=0)[7, 15] == pytest.approx(16 / 64, rel=0.03)


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-9, 1e-5, 0.3, np.pi / 4, 1.2, np.pi / 2 - 1e-10, np.pi / 2])
def test_principal_angles_are_accurate_near_0_and_90_degrees(angle):
    frame = np.linalg.qr(RNG.standard_normal((9, 9)))[0]
    U1 = frame[:, :2]
    U2 = np.column_stack([np.cos(angle) * frame[:, 0] + np.sin(angle) * frame[:, 2], frame[:, 1], frame[:, 5]])
    for one, other in ((U1, U2), (U2, U1)):
        assert update.principal_angles(one, other) == pytest.approx([0.0, angle], abs=2e-15)


def test_amplification_of_the_worked_example():
    W, change = np.diag([3.0, 1.0]), Dense(np.diag([0.0, 2.0]))
    U, _, V = change.svd()
    assert update.projected_norm(W, U, V) == pytest.approx(1.0)
    assert change.norm() / update.projected_norm(W, U, V) == pytest.approx(2.0)
    U, _, V = Dense(W).svd()
    assert update.projected_norm(W, U[:, :1], V[:, :1]) == pytest.approx(3.0)


def test_neuron_cosine_on_the_worked_examples():
    up = 1.0 - cosine_distance(np.array([[1.0, 0], [0, 2], [3, 4]]), np.array([[1.0, 1], [0, 5], [4, 3]]), axis=1)
    assert up == pytest.approx([0.70710678, 1.0, 0.96])
    before, after = np.array([[1.0, 2, 0], [1, 0, 2]]), np.array([[1.0, 2, 1], [0, 0, 2]])
    assert 1.0 - cosine_distance(before, after, axis=0) == pytest.approx([0.70710678, 1.0, 0.89442719])
    assert 1.0 - cosine_distance(before, after, axis=1) == pytest.approx([0.91287, 0.89443], abs=1e-5)
    w = np.array([[3.0, 4.0]])
    assert cosine_distance(w, w + 0.1 * np.array([[-4.0, 3.0]]), axis=1) == pytest.approx([1 - 1.01**-0.5])
    assert cosine_distance(w, -w, axis=1) == pytest.approx([2.0])
    assert np.isnan(cosine_distance(w, 0 * w, axis=1)).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_neuron_cosine_of_small_angles_keeps_its_digits(axis):
    """Compare with |u - v|^2 / 2 of unit vectors in extended precision, for more rows than fit in one tile."""
    W0 = RNG.standard_normal((700, 300)).astype(np.float32)
    W = (W0 + np.float32(1e-4) * RNG.standard_normal(W0.shape).astype(np.float32)).astype(np.float32)
    u, v = (x.astype(np.longdouble) for x in (W0, W))
    u, v = (x / np.sqrt((x * x).sum(axis=axis, keepdims=True)) for x in (u, v))
    expected = (((u - v) ** 2).sum(axis=axis) / 2).astype(np.float64)
    assert expected.max() < 1e-8
    assert cosine_distance(W0, W, axis) == pytest.approx(expected, rel=1e-10)
    assert cosine_distance(W0, 2 * W0, axis).max() < 1e-15


def exact_change(W0, W, axis):
    """Compute cosine distances from unit vectors, and norms, in extended precision."""
    w0, w = (np.moveaxis(x, axis, -1).astype(np.longdouble) for x in (W0, W))
    norms = [np.sqrt((x * x).sum(-1)) for x in (w0, w, w - w0)]
    u, v = w0 / norms[0][:, None], w / norms[1][:, None]
    return [x.astype(np.float64) for x in (((u - v) ** 2).sum(-1) / 2, *norms)]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 30.0])
def test_neuron_change_in_float32_is_accurate_for_every_neuron(axis, size):
    """Some neurons are rescaled or almost zero, with a small rotation: float32 sums lose all their digits."""
    W0 = RNG.standard_normal((700, 300)).astype(np.float32)
    change = RNG.standard_normal(W0.shape) * size
    scale = np.ones(W0.shape[1 - axis])
    scale[3:9] = 1.5, 0.5, 1e-3, 300.0, 1.01, -2.0
    W = (W0 * np.expand_dims(scale, axis) + change * np.expand_dims(np.abs(scale), axis)).astype(np.float32)
    found = update.neuron_change(W0, W, axis, np.float32)
    for values, expected in zip(found, exact_change(W0, W, axis), strict=True):
        assert values == pytest.approx(expected, rel=1e-5, abs=0)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shrunk", [1e-3, 1e-6, 1e3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_neuron_angle_keeps_its_digits_if_the_length_changes(axis, shrunk, dtype):
    W0 = RNG.standard_normal((300, 200))
    W = shrunk * (W0 + 1e-4 * RNG.standard_normal(W0.shape))
    found = update.neuron_change(W0.astype(np.float32), W.astype(np.float32), axis, dtype)
    distance = exact_change(W0.astype(np.float32), W.astype(np.float32), axis)[0]
    # The unit vectors differ by a relative 1e-4, so the angle loses four of the digits of float64.
    np.testing.assert_allclose(found.cosine_distance, distance, rtol=1e4 * np.finfo(np.float64).eps * 10)


@pytest.mark.parametrize("axis", [0, 1])
def test_neuron_change_of_zero_or_nan_weights_is_nan_and_of_equal_weights_zero(axis):
    W0 = RNG.standard_normal((80, 80)).astype(np.float32)
    W = W0.copy()
    gone, came, same, wrong, huge = range(5)
    across = (slice(None), gone) if axis == 0 else (gone, slice(None))

    def put(matrix, neuron, value):
        matrix[(slice(None), neuron) if axis == 0 else neuron] = value

    put(W, gone, 0), put(W0, came, 0), put(W, wrong, np.nan), put(W0, huge, 1e30), put(W, huge, 2e30)
    found = update.neuron_change(W0, W, axis, np.float32)
    assert np.isnan(found.cosine_distance[[gone, came, wrong]]).all()
    assert (found.norm_tuned[gone], found.norm_original[came]) == (0, 0)
    assert found.delta_norm[gone] == pytest.approx(np.linalg.norm(W0[across]))
    assert np.isnan(found.norm_tuned[wrong])
    assert (found.cosine_distance[same], found.delta_norm[same]) == (0, 0)
    assert found.cosine_distance[huge] == pytest.approx(0, abs=1e-15)
    assert found.norm_tuned[huge] == pytest.approx(2e30 * 80**0.5)


def test_torch_is_not_imported():
    code = "import sys, lorascope.updates.low_rank; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_directions_of_dora_are_compared_by_their_factors(monkeypatch):
    draw = np.random.default_rng(0)
    one, other = (WeightDecomposed(draw.normal(size=(6, 2)), draw.normal(size=(2, 5)), np.ones(6)) for _ in range(2))
    first, second = (update.scale * update.B @ update.A for update in (one, other))
    assert one.inner(other) == pytest.approx((first * second).sum())
    assert Dense(first).inner(other) == pytest.approx((first * second).sum())
    assert (one - other).dense() == pytest.approx(first - second)
    assert (one - other).low_rank is not None
    monkeypatch.setattr(WeightDecomposed, "dense", None)  # no matrix of the size of the weight is formed
    U, sigma, V = one.svd()
    assert (U * sigma) @ V.T == pytest.approx(first)
    assert one.norm() == pytest.approx(np.linalg.norm(first))


def test_change_norms_of_cancelling_changes_keep_their_digits():
    draw = np.random.default_rng(0)
    B, A = draw.standard_normal((40, 4)), draw.standard_normal((4, 30))
    before = LowRank(B.astype("f4"), A.astype("f4"))
    moved = (0.5 * before.A).astype("f4")
    moved[0, 0] += np.float32(2**-20)  # all else is the same product with other factors
    after = LowRank(2 * before.B, moved)
    change = float(moved[0, 0]) - 0.5 * float(before.A[0, 0])
    expected = 2 * abs(change) * np.linalg.norm(before.B[:, 0].astype("f8"))
    assert update.change_norms([(after, before)]) == pytest.approx([expected], rel=1e-7)
