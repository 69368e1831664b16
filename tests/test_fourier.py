"""Fourier updates compared with numpy's transform, worked examples, and torch.randperm."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerance import rounding

from lorascope.updates import LowRank, spectra
from lorascope.updates.fourier import Fourier, band_pass, entries, radius

WORKED = np.array(
    [
        [1.2500, 1.8750, 0.1250, -2.2500, 0.1250, 1.8750],
        [0.2500, 2.5401, 1.0580, 0.7500, 0.1920, -1.7901],
        [0.2500, -0.6250, 0.6250, 2.7500, 0.6250, -0.6250],
        [0.2500, -1.7901, 0.1920, 0.7500, 1.0580, 2.5401],
    ]
)


def places(*pairs: tuple[int, int]) -> np.ndarray:
    return np.array(pairs).T


def inverse_transform(update: Fourier) -> np.ndarray:
    """Compute the update by definition: the real part of the inverse transform of the spectrum, times alpha."""
    spectrum = np.zeros(update.shape)
    np.add.at(spectrum, tuple(update.entries), update.coefficients)
    return update.scale * np.fft.ifft2(spectrum).real


def cosines(update: Fourier) -> np.ndarray:
    (d1, d2), (j, k) = update.shape, update.entries
    p, q = np.indices(update.shape)
    phases = 2 * np.pi * (p[..., None] * j / d1 + q[..., None] * k / d2)
    return update.scale / (d1 * d2) * (np.cos(phases) * update.coefficients).sum(-1)


@st.composite
def updates(draw) -> Fourier:
    """Draw any shape and entries, including mirrored entries, frequency zero and the Nyquist frequency."""
    shape = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    n = draw(st.integers(1, shape[0] * shape[1]))
    seed = draw(st.integers(0, 1000))
    values = np.random.default_rng(seed).standard_normal(n)
    return Fourier(values, entries(shape, n, seed), shape, draw(st.sampled_from([1.0, -3.0, 100])))


@given(updates())
def test_an_update_is_the_inverse_transform_and_the_sum_of_cosines(update):
    expected = inverse_transform(update)
    bound = 1e-12 * (1 + np.abs(expected).max())
    assert np.abs(update.matrix - expected).max() < bound
    assert np.abs(cosines(update) - expected).max() < bound
    assert update.matrix.shape == update.shape


@given(updates())
def test_norm_spectrum_and_rank_equal_the_matrix_ones_without_forming_it(update):
    expected = np.linalg.svd(inverse_transform(update), compute_uv=False)
    assert update.norm() == pytest.approx(np.linalg.norm(expected), rel=1e-10)
    bound = rounding(torch.float64, terms=9) ** 0.5  # singular values are roots of eigenvalues
    assert update.singular_values() == pytest.approx(expected, abs=bound * expected[0] + 1e-15)
    assert update.rank == np.sum(expected > 1e-12 * expected[0])
    assert "matrix" not in vars(update)


@given(updates())
def test_every_update_is_symmetric_about_the_origin(update):
    mirrored = np.roll(update.matrix[::-1, ::-1], (1, 1), (0, 1))
    assert np.abs(update.matrix - mirrored).max() <= 1e-12 * (1 + np.abs(update.matrix).max())


def test_update_of_worked_example():
    update = Fourier(np.array([1, -2, 0.5, 3]), places((0, 0), (1, 2), (2, 5), (3, 1)), (4, 6), 12)
    assert update.dense() == pytest.approx(WORKED, abs=5.1e-5)
    assert update.norm() == pytest.approx(6.763875, abs=5e-7)
    assert update.rank == 4
    assert update.matrix.sum() == pytest.approx(12)
    assert update.matrix[0, 0] == pytest.approx(1.25)


@pytest.mark.parametrize(
    ("place", "rank", "square"),
    [
        ((0, 0), 1, 24),
        ((2, 0), 1, 24),
        ((0, 3), 1, 24),
        ((2, 3), 1, 24),
        ((1, 0), 1, 12),
        ((0, 2), 1, 12),
        ((1, 2), 2, 12),
    ],
)
def test_one_frequency_has_the_expected_rank_and_norm(place, rank, square):
    update = Fourier(np.ones(1), places(place), (4, 6), 24)
    assert update.rank == np.linalg.matrix_rank(update.matrix) == rank
    assert update.norm() ** 2 == pytest.approx(square)
    assert np.linalg.norm(update.matrix) ** 2 == pytest.approx(square)


@pytest.mark.parametrize(("shape", "dimension"), [((4, 4), 10), ((5, 5), 13), ((4, 5), 11), ((8, 8), 34), ((6, 4), 14)])
def test_all_entries_span_half_of_the_matrix_space(shape, dimension):
    everywhere = entries(shape, shape[0] * shape[1], 0)
    basis = [Fourier(np.ones(1), place[:, None], shape).matrix.ravel() for place in everywhere.T]
    assert np.linalg.matrix_rank(np.array(basis)) == dimension
    assert sum(part.nnz for part in Fourier(np.ones(len(basis)), everywhere, shape).parity_blocks) == dimension


@pytest.mark.parametrize(
    ("n", "rank"), [(1, 2), (4, 6), (8, 14), (16, 20), (31, 32), (32, 33), (64, 48), (128, 60), (512, 64)]
)
def test_rank_of_random_entries(n, rank):
    values = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).numpy()
    update = Fourier(values, entries((64, 64), n, 777), (64, 64))
    assert update.rank == np.linalg.matrix_rank(update.matrix) == rank


@pytest.mark.parametrize(
    ("seed", "rows", "columns"),
    [
        (777, [509, 239, 538, 500, 567, 78], [359, 147, 367, 200, 103, 51]),
        (2024, [607, 331, 592, 323, 69, 408], [392, 644, 550, 140, 135, 714]),
    ],
)
def test_first_entries_of_a_seed(seed, rows, columns):
    assert entries((768, 768), 1000, seed)[:, :6].tolist() == [rows, columns]


def test_entries_of_a_small_weight():
    assert entries((4, 6), 5, 777).tolist() == [[3, 0, 3, 2, 0], [5, 2, 1, 5, 1]]


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1), st.data())
def test_entries_equal_the_start_of_torch_randperm(d1, d2, seed, data):
    n = data.draw(st.integers(1, d1 * d2))
    before = np.random.get_state()[1].copy()
    shuffled = torch.randperm(d1 * d2, generator=torch.Generator().manual_seed(seed))[:n]
    assert entries((d1, d2), n, seed).tolist() == [(shuffled // d2).tolist(), (shuffled % d2).tolist()]
    assert (np.random.get_state()[1] == before).all()


@pytest.mark.parametrize(("seed", "mirrored"), [(777, 2), (2024, 1)])
def test_mirrored_entries_count_as_one_frequency(seed, mirrored):
    update = Fourier(np.ones(1000), entries((768, 768), 1000, seed), (768, 768))
    j, k = update.entries
    found = set(zip(j.tolist(), k.tolist(), strict=True))
    pairs = sum((-a % 768, -b % 768) in found and (-a % 768, -b % 768) != (a, b) for a, b in found)
    assert pairs == 2 * mirrored
    # a pair is one frequency with twice the coefficient, which the norm by Parseval must account for
    assert update.norm() == pytest.approx(np.linalg.norm(inverse_transform(update)), rel=1e-12)


@pytest.mark.parametrize(("d", "alpha"), [(768, 100), (1024, 120), (4096, 300)])
def test_mean_squared_norm_of_a_random_initial_update(d, alpha):
    """By Parseval it is alpha^2 n / (2 d^2): the real part has half of the energy of n standard normal coefficients."""
    draw, places, draws, n = np.random.default_rng(0), entries((d, d), 1000, 777), 200, 1000
    squares = [Fourier(draw.standard_normal(n), places, (d, d), alpha).norm() ** 2 for _ in range(draws)]
    deviation = np.sqrt(2 / n / draws)  # relative, of a mean of chi-squared sums
    assert np.mean(squares) == pytest.approx(alpha**2 * n / 2 / d**2, rel=4 * deviation)


RADII = [0, 50, 100, 200, 300, 400, 480, 543]
BANDS = {
    0: [1, 0.9394, 0.7788, 0.3679, 0.1054, 0.0183, 0.0032, 0.0006],
    100: [0, 0.5698, 1, 0.5698, 0.1690, 0.0297, 0.0051, 0.0010],
    200: [0, 0, 0.1054, 1, 0.4994, 0.1054, 0.0196, 0.0041],
    350: [0, 0, 0, 0.0142, 0.7457, 0.8027, 0.2827, 0.0806],
    480: [0, 0, 0, 0, 0.0042, 0.4610, 1, 0.7031],
}
MEAN_RADII = {0: 173.6, 100: 190.6, 200: 249.5, 350: 351.4, 480: 429.4}
# An entry of a 768 x 768 spectrum at each radius: (0, D) up to the edge, farther ones on a diagonal.
AT_RADIUS = [(0, 0), (0, 50), (0, 100), (0, 200), (0, 300), (240, 320), (288, 384), (384, 384)]


@pytest.mark.parametrize("center", BANDS)
def test_band_pass_has_the_expected_values(center):
    bias = band_pass((768, 768), center)
    assert radius(np.array(AT_RADIUS).T, (768, 768)) == pytest.approx(RADII, abs=0.1)
    found = [bias[place] for place in AT_RADIUS]
    assert found[:-1] == pytest.approx(BANDS[center][:-1], abs=6e-5)
    assert found[-1] == pytest.approx(BANDS[center][-1], abs=6e-4)  # the radius of the corner is 543.06
    assert (bias == bias[-np.arange(768) % 768]).all()
    distances = radius(np.indices((768, 768)), (768, 768))
    assert (bias * distances).sum() / bias.sum() == pytest.approx(MEAN_RADII[center], abs=0.06)


@pytest.mark.parametrize("center", BANDS)
def test_entries_of_a_band_have_the_expected_mean_radius(center):
    drawn = entries((768, 768), 4000, 2024, center)
    assert radius(drawn, (768, 768)).mean() == pytest.approx(MEAN_RADII[center], rel=0.03)
    assert len(np.unique(drawn, axis=1).T) == 4000
    assert (drawn == entries((768, 768), 4000, 2024, center)).all()
    assert (drawn != entries((768, 768), 4000, 777, center)).any()


def test_entries_of_a_band_are_drawn_without_replacement():
    """Two of three entries with weights 1, 2 and 2: each ordered pair has its exact probability."""
    shape, bias = (1, 4), band_pass((1, 4), 1, 1.5).reshape(-1)
    rates = bias / bias.sum()
    assert rates[0] == 0
    counts = np.zeros((4, 4))
    for seed in range(4000):
        first, second = entries(shape, 2, seed, 1, 1.5)[1]
        counts[first, second] += 1
    for first in (1, 2, 3):
        for second in {1, 2, 3} - {first}:
            expected = rates[first] * rates[second] / (1 - rates[first])
            assert counts[first, second] / 4000 == pytest.approx(expected, abs=4 * np.sqrt(expected / 4000))


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 5)])
def test_band_pass_for_any_shape_is_centered_on_frequency_zero(shape):
    assert band_pass(shape, 0, 3)[0, 0] == 1
    assert band_pass(shape, 0, 3).argmax() == 0
    assert band_pass(shape, 2, 3)[0, 0] == 0
    assert band_pass(shape, 2, 3)[0, 2] == band_pass(shape, 2, 3)[0, -2] == band_pass(shape, 2, 3)[2, 0] == 1


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: entries((4, 6), 25, 0), "number of coefficients .* 24, .* 4 x 6 .*got 25"),
        (lambda: entries((4, 6), 0, 0), "number of coefficients .* got 0"),
        (lambda: entries((4, 6), 2, -1), "entry_seed .*got -1"),
        (lambda: entries((4, 6), 2, 2**32), "entry_seed .*4294967295, got 4294967296"),
        (
            lambda: entries((4, 6), 24, 0, 2),
            "number of coefficients .*<= 23, .*center 2 and width 200, got 24",
        ),
        (
            lambda: entries((4, 6), 2, 0, 3.7),
            r"center .*3\.606, .* 4 x 6 .*got 3\.7",
        ),
        (lambda: band_pass((4, 6), float("nan")), "center .*got center nan and width 200.0"),
        (lambda: band_pass((4, 6), 1, float("inf")), "center .*got center 1 and width inf"),
        (lambda: band_pass((4, 6), -1), "center .*got center -1 and width 200.0"),
        (lambda: band_pass((4, 6), 1, 0), "center .*got center 1 and width 0"),
    ],
)
def test_invalid_arguments_raise_one_line(ask, message):
    with pytest.raises(ValueError, match=message) as raised:
        ask()
    assert "\n" not in str(raised.value)


def test_difference_of_two_states_of_one_adapter_is_formed_from_coefficients():
    shape, drawn = (12, 10), entries((12, 10), 30, 0)
    values = np.random.default_rng(0).standard_normal(30)
    change = 1e-9 * np.random.default_rng(1).standard_normal(30)
    before, after = Fourier(values, drawn, shape, 50), Fourier(values + change, drawn, shape, 50)
    difference = after - before
    assert isinstance(difference, Fourier)
    assert difference.norm() == pytest.approx(
        np.linalg.norm(inverse_transform(Fourier(change, drawn, shape, 50))), rel=1e-5
    )
    assert vars(before).keys().isdisjoint({"matrix"})
    elsewhere = Fourier(values, entries(shape, 30, 1), shape, 50)
    assert (after - elsewhere).matrix == pytest.approx(inverse_transform(after) - inverse_transform(elsewhere))
    assert not isinstance(after - elsewhere, Fourier)
    louder = Fourier(values, drawn, shape, 70)
    assert (after - louder).dense() == pytest.approx(inverse_transform(after) - inverse_transform(louder))
    low = LowRank(np.ones((12, 1)), np.ones((1, 10)))
    assert (after - low).dense() == pytest.approx(inverse_transform(after) - 1)
    assert (low - after).dense() == pytest.approx(1 - inverse_transform(after))


def test_energy_by_radius():
    update = Fourier(np.array([3.0, 4.0, 1.0, 1.0]), places((0, 0), (1, 0), (7, 1), (1, 7)), (8, 8), 2)
    # |dW|^2 = alpha^2 / (d1 d2) (3^2 + 4^2 / 2 + 2^2 / 2), because the last two entries are one frequency
    assert update.energy(np.array([0, 0.5, 1.2, 6])) == pytest.approx(np.array([9, 8, 2]) * 4 / 64)
    assert update.energy(np.array([0, 6.0])).sum() == pytest.approx(update.norm() ** 2)


@given(updates())
def test_inner_product_with_a_weight(update):
    W = np.random.default_rng(5).standard_normal(update.shape)
    expected = np.vdot(W, inverse_transform(update))
    assert update.inner_weight(W) == pytest.approx(expected, abs=1e-10 * (1 + abs(update.scale)))


def test_fourier_update_can_replace_a_dense_update():
    update = Fourier(np.array([1, -2, 0.5, 3], np.float32), places((0, 0), (1, 2), (2, 5), (3, 1)), (4, 6), 12)
    assert update.dense() == pytest.approx(WORKED, abs=5.1e-5)
    U, sigma, V = update.svd()
    assert U @ np.diag(sigma) @ V.T == pytest.approx(WORKED, abs=5.1e-5)
    assert spectra([update])[0] == pytest.approx(sigma, abs=1e-7)
    assert repr(update) == "Fourier(4 coefficients, shape=(4, 6), scale=12)"
    broken = Fourier(np.array([np.nan]), places((1, 1)), (4, 6))
    assert np.isnan(broken.singular_values()).all()
    assert np.isnan(broken.norm())
    assert Fourier(np.zeros(1), places((1, 1)), (4, 6)).norm() == 0
