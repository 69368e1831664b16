"""Updates made of few frequencies: where these are drawn, and what such an update is, in float64 and without torch.

    dW[p, q] = alpha / (d1 d2) sum_l c_l cos(2 pi (j_l p / d1 + k_l q / d2))

A cosine of a sum is a product of cosines less a product of sines. So in the orthonormal basis of cosines and sines of
either side the update is sparse and falls into an even part (cosines by cosines) and an odd one (sines by sines): its
norm and its rank need no matrix of the size of the weight, and its singular values two of half that size.

Source: FourierFT (arXiv 2405.03003), equations 2 and 3 with the division by d1 d2 of its algorithm 1, and equation 5
(frequency bias); Parseval's identity.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from lorascope.updates.linalg import all_finite, as_float64
from lorascope.updates.low_rank import Dense, LowRank

SEEDS = 1 << 32


def entries(
    shape: tuple[int, int], n: int, seed: int, center: float | None = None, width: float = 200.0
) -> Int[np.ndarray, "2 n"]:
    """Draw n different places of a spectrum: rows j and columns k.

    Without a bias they are the first n of ``torch.randperm(d1 * d2)`` under a generator of this seed, as PEFT draws
    them, found without the rest: that shuffle is Fisher and Yates's, forwards, over the words of MT19937.

    Parameters
    ----------
    shape : (int, int)
        (out, in) of the weight; another shape has other places under the same seed.
    n : int
    seed : int
        From 0 to 2^32 - 1.
    center : float, optional
        Draw by ``band_pass`` around this radius, without replacement; None draws from all alike.
    width : float
        Of the band.

    Raises
    ------
    ValueError
        There are not n such places, the band lies outside the spectrum, or the seed is none.
    """
    if not 0 <= seed < SEEDS:
        raise ValueError(f"entry seed {seed} is none: it must lie between 0 and {SEEDS - 1}")
    size = shape[0] * shape[1]
    if not 1 <= n <= size:
        raise ValueError(f"{n} coefficients do not fit a weight of {shape[0]} x {shape[1]}: give 1 to {size}")
    drawn = _shuffle_places(size, n, seed) if center is None else _draw_in_band(shape, n, seed, center, width)
    return np.stack(np.divmod(drawn, shape[1]))


def _shuffle_places(size: int, n: int, seed: int) -> Int[np.ndarray, "n"]:
    swaps = min(n, size - 1)
    words = np.random.RandomState(seed).randint(0, SEEDS, size=swaps, dtype=np.uint32).astype(np.int64)
    places = np.arange(swaps)
    held: dict[int, int] = {}  # what lies at a place that a swap has touched; elsewhere its own number
    drawn = []
    for place, other in zip(places.tolist(), (places + words % (size - places)).tolist(), strict=True):
        drawn.append(held.get(other, other))
        held[other] = held.get(place, place)
    if n == size:
        drawn.append(held.get(size - 1, size - 1))
    return np.array(drawn, dtype=np.int64)


def _draw_in_band(shape: tuple[int, int], n: int, seed: int, center: float, width: float) -> Int[np.ndarray, "n"]:
    """One draw after the other without replacement, as the order of exponential waiting times at these rates."""
    rates = band_pass(shape, center, width).reshape(-1)
    highest = np.hypot(shape[0] // 2, shape[1] // 2)
    if center > highest:
        raise ValueError(
            f"the band around {center:g} lies outside the spectrum of {shape[0]} x {shape[1]}, which ends at "
            f"{highest:.4g}: give a center of 0 to that"
        )
    possible = np.flatnonzero(rates)
    if n > len(possible):
        raise ValueError(
            f"{n} coefficients do not fit the band around {center:g} of width {width:g}: only {len(possible)} places "
            f"of {shape[0]} x {shape[1]} have a chance there; give fewer, or a wider band"
        )
    waits = np.log(np.random.default_rng(seed).exponential(size=len(possible))) - np.log(rates[possible])
    return possible[np.argsort(waits, kind="stable")[:n]]


def radius(entries: Int[np.ndarray, "2 *places"], shape: tuple[int, int]) -> Float[np.ndarray, "*places"]:
    """Distance of places from frequency zero, on the torus that a spectrum is."""
    folded = [np.minimum(index, side - index) for index, side in zip(entries, shape, strict=True)]
    return np.hypot(folded[0], folded[1])


def band_pass(shape: tuple[int, int], center: float, width: float = 200.0) -> Float[np.ndarray, "out in"]:
    """The frequency bias exp(-((D^2 - center^2) / (D width))^2), 0 to 1: probabilities up to their sum.

    Place (0, 0) is frequency zero; for a picture with it in the middle use ``numpy.fft.fftshift``. At D = 0 the limit
    is taken: 1 for center 0, else 0.

    Raises
    ------
    ValueError
        The width is not above zero, the center below it, or one of them is not finite.
    """
    if not (0 < width < np.inf and 0 <= center < np.inf):
        raise ValueError(f"center {center} and width {width} are no band: a center of 0 or more, a width above 0")
    D = radius(np.indices(shape), shape)
    D[0, 0] = 1.0
    bias = np.exp(-(((D**2 - center**2) / (D * width)) ** 2))
    bias[0, 0] = float(center == 0)
    return bias


def bases(
    shape: tuple[int, int], seed: int, kind: str
) -> tuple[Float[np.ndarray, "out out"], Float[np.ndarray, "in in"]]:
    """Other bases for either side: "random" ones are normal of variance 1 / d, "orthogonal" ones made of such."""
    generator = np.random.default_rng(seed)
    left, right = (generator.standard_normal((side, side)) / np.sqrt(side) for side in shape)
    return (left, right) if kind == "random" else (np.linalg.qr(left)[0], np.linalg.qr(right)[0])


def on_bases(
    coefficients: Float[np.ndarray, "n"],
    entries: Int[np.ndarray, "2 n"],
    left: Float[np.ndarray, "out out"],
    right: Float[np.ndarray, "in in"],
    alpha: float,
) -> Dense:
    """The update alpha / sqrt(2 d1 d2) * left F right^T, whose expected norm is that of a Fourier update."""
    (j, k), scale = entries, alpha / np.sqrt(2 * len(left) * len(right))
    return Dense((left[:, j] * (scale * as_float64(coefficients))) @ right[:, k].T)


class _Part(NamedTuple):
    """The even or the odd part in the basis of cosines or sines: values at (row, column), zero elsewhere."""

    shape: tuple[int, int]
    rows: Int[np.ndarray, "m"]
    columns: Int[np.ndarray, "m"]
    values: Float[np.ndarray, "m"]

    def dense(self) -> Float[np.ndarray, "rows columns"]:
        matrix = np.zeros(self.shape)
        matrix[self.rows, self.columns] = self.values
        return matrix


class Fourier(Dense):
    """The update scale * Re(ifft2(F)), where F holds the coefficients at the entries; nothing is formed unasked.

    Parameters
    ----------
    coefficients : array (n,)
        Real.
    entries : array (2, n)
        Rows and columns of F. Of a place and its mirror (-j, -k) both may be there: they are one frequency.
    shape : (int, int)
        (out, in).
    scale : float
        alpha; the inverse transform itself divides by out * in.
    """

    coefficients: Float[np.ndarray, "n"]
    entries: Int[np.ndarray, "2 n"]
    scale: float
    exact = True

    def __init__(
        self,
        coefficients: Float[np.ndarray, "n"],
        entries: Int[np.ndarray, "2 n"],
        shape: tuple[int, int],
        scale: float = 1.0,
    ) -> None:
        # The base class is frozen.
        sides = int(shape[0]), int(shape[1])
        vars(self).update(coefficients=coefficients, entries=entries, scale=scale, _shape=sides)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return vars(self)["_shape"]

    @cached_property
    def matrix(self) -> Float[np.ndarray, "out in"]:
        """The update as a matrix, by one real transform of half the spectrum."""
        rows, columns = self.shape
        (j, k), half = self.entries, as_float64(self.coefficients) / 2
        spectrum = np.zeros((rows, columns // 2 + 1))
        for row, column in ((j, k), (-j % rows, -k % columns)):
            kept = column <= columns // 2
            np.add.at(spectrum, (row[kept], column[kept]), half[kept])
        return self.scale * np.fft.irfft2(spectrum, s=self.shape)

    @cached_property
    def parts(self) -> tuple[_Part, _Part]:
        """The even and the odd part: dW in an orthonormal basis, with each frequency once."""
        folded, signs, lengths = [], [], []
        for index, side in zip(self.entries, self.shape, strict=True):
            alone = 2 * index % side == 0  # frequency zero and the highest one have no sine
            folded.append(np.minimum(index, side - index))
            signs.append(np.where(alone, 0.0, np.sign(side - 2 * index)))
            lengths.append(np.where(alone, side, side / 2) ** 0.5)
        outer, inner = self.shape
        values = self.scale / (outer * inner) * as_float64(self.coefficients) * lengths[0] * lengths[1]
        sines = signs[0] * signs[1]
        even = _sum_places((outer // 2 + 1, inner // 2 + 1), folded[0], folded[1], values)
        j, k = folded[0][sines != 0] - 1, folded[1][sines != 0] - 1
        return even, _sum_places(((outer - 1) // 2, (inner - 1) // 2), j, k, -(sines * values)[sines != 0])

    @property
    def rank(self) -> int:
        """The rank that these entries allow, and have for all coefficients but special ones."""
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import structural_rank

        return sum(
            int(structural_rank(csr_array((np.ones(len(part.rows)), (part.rows, part.columns)), part.shape)))
            for part in self.parts
            if len(part.rows)
        )

    def norm(self) -> float:
        """Frobenius norm, by Parseval's identity."""
        return float(np.sqrt(sum(np.vdot(part.values, part.values) for part in self.parts)))

    def inner(self, W: Float[np.ndarray, "out in"]) -> float:
        """<W, dW>: the coefficients by the transform of W at their entries."""
        (j, k), (rows, columns) = self.entries, self.shape
        spectrum = np.fft.rfft2(W).real
        left = k < spectrum.shape[1]
        found = spectrum[np.where(left, j, -j % rows), np.where(left, k, columns - k)]
        return float(self.scale / W.size * np.vdot(as_float64(self.coefficients), as_float64(found)))

    def singular_values(self) -> Float[np.ndarray, "k"]:
        """The min(out, in) singular values, largest first, of both parts together."""
        if not all_finite(self.coefficients):
            return np.full(min(self.shape), np.nan)
        sigma = [Dense(part.dense()).singular_values() for part in self.parts]
        return np.sort(np.concatenate(sigma))[::-1]

    def energy(self, edges: Float[np.ndarray, "edges"]) -> Float[np.ndarray, "bins"]:
        """|dW|^2 by radius of the frequency: one sum between each two edges, the last edge included."""
        even, odd = self.parts
        distances = np.concatenate([np.hypot(even.rows, even.columns), np.hypot(odd.rows + 1, odd.columns + 1)])
        squares = np.concatenate([even.values, odd.values]) ** 2
        return np.histogram(distances, edges, weights=squares)[0]

    def __sub__(self, other: LowRank | Dense) -> Dense:
        """The difference; of two updates at the same entries and scale by their coefficients."""
        alike = isinstance(other, Fourier) and (self.shape, self.scale) == (other.shape, other.scale)
        if isinstance(other, Fourier) and alike and np.array_equal(self.entries, other.entries):
            return Fourier(
                as_float64(self.coefficients) - as_float64(other.coefficients), self.entries, self.shape, self.scale
            )
        return Dense(self.dense() - other.dense())

    def __repr__(self) -> str:
        return f"Fourier({len(self.coefficients)} coefficients, shape={self.shape}, scale={self.scale:g})"


def _sum_places(
    shape: tuple[int, int], rows: Int[np.ndarray, "n"], columns: Int[np.ndarray, "n"], values: Float[np.ndarray, "n"]
) -> _Part:
    """Values of one place added up: (j, k) and (-j, -k) are the same frequency, (j, -k) shares its basis functions."""
    places, where = np.unique(rows * max(shape[1], 1) + columns, return_inverse=True)
    found = np.divmod(places, max(shape[1], 1))
    return _Part(shape, *found, np.bincount(where, values, len(places)))
