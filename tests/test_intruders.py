"""Intruder dimensions, compared with their definition by two dense decompositions and with a hand-computed example."""

from __future__ import annotations

import numpy as np
import pytest

from lorascope.analysis.intruders import Basis, count_intruders, decompose_weights, find_intruders
from lorascope.updates import Dense, LowRank


def by_definition(W0, W, k):
    """Compute the largest |cos| of W's first k left singular vectors with any of W_0's, and W's singular values."""
    before = np.linalg.svd(W0, full_matrices=False)[0]
    after, sigma, _ = np.linalg.svd(W, full_matrices=False)
    return np.abs(before.T @ after[:, :k]).max(axis=0), sigma


def weight(rng, out, inner, spectrum):
    """Return a random weight with the given kind of spectrum."""
    m = min(out, inner)
    sigma = {
        "random": np.linalg.svd(rng.standard_normal((out, inner)), compute_uv=False) / 8,
        "decay": 4 * np.arange(1, m + 1) ** -0.7,
        "near ties": np.sort(2 + 1e-5 * rng.permutation(m))[::-1],
        "deficient": np.where(np.arange(m) < m // 3, 2.0 - np.arange(m) / m, 0.0),
    }[spectrum]
    U, V = (np.linalg.qr(rng.standard_normal((side, m)))[0] for side in (out, inner))
    return U * sigma @ V.T


SHAPES = [(60, 60), (90, 40), (40, 90), (128, 128), (65, 64)]
SPECTRA = ["random", "decay", "near ties", "deficient"]
CASES = [(shape, spectrum, 5 * i + j) for i, spectrum in enumerate(SPECTRA) for j, shape in enumerate(SHAPES)]


@pytest.mark.parametrize(("shape", "spectrum", "seed"), CASES)
def test_intruders_match_the_definition(shape, spectrum, seed):
    rng = np.random.default_rng(seed)
    out, inner = shape
    W0 = weight(rng, out, inner, spectrum)
    rank, scale = int(rng.integers(1, 9)), 10 ** rng.uniform(-2, 0.3)
    update = LowRank(rng.standard_normal((out, rank)), rng.standard_normal((rank, inner)) / inner**0.5, scale)
    for k in (1, 10, min(shape)):
        similarity, sigma = by_definition(W0, W0 + update.dense(), k)
        for change in (update, Dense(update.dense())):
            found = find_intruders(decompose_weights({"m": W0}), {"m": change}, k)
            np.testing.assert_allclose(found["sigma"], sigma[:k], atol=1e-12 * sigma[0])
            # Singular vectors of (almost) equal singular values, zeros in particular, are not unique.
            unique = _gaps(np.append(sigma, 0.0))[:k] > 1e-8 * sigma[0]
            np.testing.assert_allclose(found["similarity"][unique], similarity[unique], atol=1e-7)
            assert unique.any()
            assert (found["intruder"] == (similarity < 0.5))[unique].all()


def _gaps(sigma):
    """Return the distance of every singular value except the last to its nearest neighbor."""
    below = -np.diff(sigma)
    return np.minimum(below, np.append(np.inf, below[:-1]))


def test_intruders_match_a_hand_computed_example():
    """W_0 = diag(3, 2, 1) in R^4 with columns e1..e3; dW = 5 e4 e1^T rotates e1 to (3 e1 + 5 e4) / sqrt(34)."""
    W0 = np.zeros((4, 3))
    W0[[0, 1, 2], [0, 1, 2]] = 3, 2, 1
    update = LowRank(np.eye(4)[:, 3:], np.eye(3)[:1], 5.0)
    found = find_intruders(decompose_weights({"m": W0}), {"m": update}, 3, threshold=0.6)
    assert found["module"].tolist() == ["m"] * 3
    assert found["component"].tolist() == [1, 2, 3]
    np.testing.assert_allclose(found["sigma"], [34**0.5, 2, 1])
    np.testing.assert_allclose(found["similarity"], [3 / 34**0.5, 1, 1])  # 0.514
    assert found["intruder"].tolist() == [True, False, False]
    assert not find_intruders(decompose_weights({"m": W0}), {"m": update}, 3, threshold=0.5)["intruder"].any()


def test_intruders_include_a_planted_one_but_no_amplified_direction():
    rng = np.random.default_rng(0)
    W0 = weight(rng, 256, 256, "decay")
    U, _, V = np.linalg.svd(W0)
    mixed_left, mixed_right = U.mean(axis=1, keepdims=True) * 16, V.mean(axis=0, keepdims=True) * 16
    updates = {
        "intruder": LowRank(mixed_left, mixed_right, 10.0),
        "amplified": LowRank(U[:, 5:6], V[5:6], 10.0),
        "untouched": LowRank(np.zeros((256, 2)), rng.standard_normal((2, 256))),
    }
    found = find_intruders(decompose_weights(dict.fromkeys(updates, W0)), updates)
    assert found.loc[found["intruder"], ["module", "component"]].values.tolist() == [["intruder", 1]]
    assert count_intruders(found).set_index("module")["intruders"].to_dict() == {
        "intruder": 1,
        "amplified": 0,
        "untouched": 0,
    }
    assert count_intruders(found)["components"].tolist() == [10, 10, 10]


ZERO = {
    "B is zero": LowRank(np.zeros((50, 2)), np.ones((2, 60))),
    "A is zero": LowRank(np.ones((50, 2)), np.zeros((2, 60))),
    "of rank 0": LowRank(np.zeros((50, 0)), np.zeros((0, 60))),
    "of scale 0": LowRank(np.ones((50, 2)), np.ones((2, 60)), 0.0),
    "dense": Dense(np.zeros((50, 60))),
}


@pytest.mark.parametrize("kind", list(ZERO))
@pytest.mark.parametrize("k", [5, 50])
@pytest.mark.parametrize("spectrum", ["decay", "ties"])
def test_zero_update_has_no_intruder(kind, k, spectrum):
    """Equal singular values are included, because their singular vectors differ between decompositions."""
    rng = np.random.default_rng(0)
    U, V = (np.linalg.qr(rng.standard_normal((side, 50)))[0] for side in (50, 60))
    sigma = np.ones(50) if spectrum == "ties" else np.arange(1, 51) ** -0.7
    found = find_intruders(decompose_weights({"m": U * sigma @ V.T}), {"m": ZERO[kind]}, k)
    assert found["similarity"].tolist() == pytest.approx([1.0] * k)
    assert found["sigma"].tolist() == pytest.approx(sigma[:k].tolist())
    assert count_intruders(found)[["components", "intruders"]].values.tolist() == [[k, 0]]


def test_intruders_without_updates_has_no_rows():
    found = find_intruders(decompose_weights({"m": np.eye(5)}), {})
    some = find_intruders(decompose_weights({"m": np.eye(5)}), {"m": Dense(np.eye(5))})
    assert found.dtypes.to_dict() == some.dtypes.to_dict()
    assert len(found) == len(count_intruders(found)) == 0
    assert count_intruders(found).columns.tolist() == count_intruders(some).columns.tolist()


def test_intruders_find_all_copies_of_equal_singular_values():
    """In exact arithmetic, a Krylov method finds only one direction of a repeated singular value."""
    W0 = np.diag(np.r_[5.0, 5.0, 5.0, 4.0, 4.0, np.linspace(2, 1, 195)])
    found = find_intruders(
        decompose_weights({"m": W0}), {"m": LowRank(np.eye(200)[:, 9:10], np.eye(200)[9:10], 1e-3)}, 8
    )
    np.testing.assert_allclose(found["sigma"][:5], [5, 5, 5, 4, 4])


def test_bases_decompose_each_weight_once(monkeypatch):
    seen = []
    monkeypatch.setattr(Basis, "of", lambda W0, of=Basis.of: seen.append(W0.shape) or of(W0))
    W0 = np.random.default_rng(0).standard_normal((80, 80))
    base = decompose_weights({"m": W0, "unused": W0})
    update = LowRank(np.ones((80, 1)), np.ones((1, 80)))
    assert len(find_intruders(base, {"m": update})) == len(find_intruders(base, {"m": update})) == 10
    assert seen == [(80, 80)]


def test_intruders_with_k_above_the_size_returns_all_components():
    W0 = np.eye(6, 4)
    assert len(find_intruders(decompose_weights({"m": W0}), {"m": Dense(0.1 * W0)}, 10)) == 4


@pytest.mark.parametrize(
    ("update", "k", "reason"),
    [
        (LowRank(np.ones((5, 1)), np.ones((1, 5))), 0, "k .*got 0"),
        (LowRank(np.ones((5, 1)), np.ones((1, 4))), 2, r"m: update.*\(5, 5\).*got \(5, 4\)"),
        (LowRank(np.full((5, 1), np.nan), np.ones((1, 5))), 2, "m: .*got NaN"),
        (Dense(np.full((5, 5), np.inf)), 2, "m: .*got NaN"),
    ],
)
def test_intruders_with_invalid_arguments_raises(update, k, reason):
    with pytest.raises(ValueError, match=reason):
        find_intruders(decompose_weights({"m": np.eye(5)}), {"m": update}, k)


def test_intruders_without_a_base_weight_raises():
    with pytest.raises(ValueError, match=r"'m'.* n$"):
        find_intruders(decompose_weights({"n": np.eye(5)}), {"m": Dense(np.eye(5))})
