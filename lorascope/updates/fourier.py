"""Fourier updates: random spectral entries and the update they define, in float64 and without torch.

    dW[p, q] = alpha / (d1 d2) sum_l c_l cos(2 pi (j_l p / d1 + k_l q / d2))

The cosine of a sum is a product of cosines minus a product of sines. In the orthonormal basis of cosines and sines of
each side, the update is therefore sparse. It splits into an even part (cosines by cosines) and an odd part (sines by
sines). Its norm and rank do not need a matrix of the size of the weight, and its singular values need only two matrices
of half its height and width.

Source: FourierFT (arXiv 2405.03003), equations 2 and 3 with the division by d1 d2 of its algorithm 1, and equation 5
(frequency bias); Parseval's identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from lorascope.array_types import Float, Int
from lorascope.updates.linalg import all_finite, as_float64
from lorascope.updates.weight_update import Dense, Shapes, Update

SEEDS = 1 << 32  # MT19937 has 32-bit seeds and words


def entries(
    shape: tuple[int, int], n: int, seed: int, center: float | None = None, width: float = 200.0
) -> Int[np.ndarray, "2 n"]:
    """Draw n distinct entries of a Fourier spectrum: rows j and columns k.

    Without a frequency bias they equal the first n values of ``torch.randperm(d1 * d2)`` with a generator of this seed,
    as in PEFT. The other values are not computed: a forward Fisher-Yates shuffle on the output of MT19937 is replayed.

    Parameters
    ----------
    shape : (int, int)
        Shape (out, in) of the weight; the same seed draws other entries for another shape.
    n : int
        Number of entries.
    seed : int
        Seed from 0 to 2^32 - 1.
    center : float, optional
        Radius of the frequency bias: entries are drawn without replacement with the weights ``band_pass``. None draws
        them uniformly.
    width : float
        Width of the band.

    Raises
    ------
    ValueError
        Fewer than n entries are available, the band is outside the spectrum, or the seed is out of range.
    """
    if not 0 <= seed < SEEDS:
        raise ValueError(f"entry_seed must be from 0 to {SEEDS - 1}, got {seed}")
    size = shape[0] * shape[1]
    if not 1 <= n <= size:
        raise ValueError(
            f"number of coefficients must be from 1 to {size}, the entries of a {shape[0]} x {shape[1]} weight, got {n}"
        )
    positions = _shuffled_positions(size, n, seed) if center is None else _draw_in_band(shape, n, seed, center, width)
    return np.stack(np.divmod(positions, shape[1]))


def _shuffled_positions(size: int, n: int, seed: int) -> Int[np.ndarray, "n"]:
    # As in torch.randperm, each swap is a 32-bit word modulo the number of positions left.
    swaps = min(n, size - 1)
    words = np.random.RandomState(seed).randint(0, SEEDS, size=swaps, dtype=np.uint32).astype(np.int64)
    positions = np.arange(swaps)
    swapped: dict[int, int] = {}  # values at the positions of earlier swaps; any other position contains its index
    values = []
    for position, other in zip(positions.tolist(), (positions + words % (size - positions)).tolist(), strict=True):
        values.append(swapped.get(other, other))
        swapped[other] = swapped.get(position, position)
    if n == size:  # nothing is left to swap the last position with
        values.append(swapped.get(size - 1, size - 1))
    return np.array(values, dtype=np.int64)


def _draw_in_band(shape: tuple[int, int], n: int, seed: int, center: float, width: float) -> Int[np.ndarray, "n"]:
    """Draw without replacement: sort exponential waiting times whose rates are the band-pass weights."""
    highest = np.hypot(shape[0] // 2, shape[1] // 2)
    if center > highest:
        raise ValueError(
            f"center must be from 0 to {highest:.4g}, the largest radius of a {shape[0]} x {shape[1]} spectrum, "
            f"got {center:g}"
        )
    rates = band_pass(shape, center, width).reshape(-1)
    possible = np.flatnonzero(rates)
    if n > len(possible):
        raise ValueError(
            f"number of coefficients must be <= {len(possible)}, the entries of a {shape[0]} x {shape[1]} weight in "
            f"the band with center {center:g} and width {width:g}, got {n}"
        )
    # Logarithms, because the waiting times of tiny rates overflow.
    waits = np.log(np.random.default_rng(seed).exponential(size=len(possible))) - np.log(rates[possible])
    return possible[np.argsort(waits, kind="stable")[:n]]


def radius(entries: Int[np.ndarray, "2 *places"], shape: tuple[int, int]) -> Float[np.ndarray, "*places"]:
    """Compute the distance of Fourier entries from frequency zero, where the spectrum is periodic."""
    folded = [np.minimum(index, side - index) for index, side in zip(entries, shape, strict=True)]
    return np.hypot(folded[0], folded[1])


def band_pass(shape: tuple[int, int], center: float, width: float = 200.0) -> Float[np.ndarray, "out in"]:
    """Compute the frequency bias of Fourier entries, exp(-((D^2 - center^2) / (D width))^2), from 0 to 1.

    Sampling probabilities are proportional to it. Entry (0, 0) is frequency zero; ``numpy.fft.fftshift`` moves it to
    the center. At D = 0 the value is the limit: 1 for center 0, else 0.

    Raises
    ------
    ValueError
        The width is not positive, the center is negative, or one of them is not finite.
    """
    if not (0 < width < np.inf and 0 <= center < np.inf):
        raise ValueError(f"center must be >= 0 and width > 0, both finite, got center {center} and width {width}")
    D = radius(np.indices(shape), shape)
    D[0, 0] = 1.0  # any value but 0, which would be divided by
    bias = np.exp(-(((D**2 - center**2) / (D * width)) ** 2))
    bias[0, 0] = float(center == 0)
    return bias


def half_spectrum(entries: Any, shape: tuple[int, int]) -> tuple[Any, Any, Any, Any]:
    """Return the places of Fourier entries in the left half of a spectrum, whose real transform is Re(ifft2(F)).

    The real part is the transform of F averaged with its mirror image, F(j, k) / 2 + F(-j, -k) / 2, and a real inverse
    transform reads the columns up to d2 / 2 of this average.

    Returns
    -------
    row, column, mirrored, paired : arrays or Tensors (n,), as ``entries``
        The entry, or its mirror image if the entry is in the right half; the row of the other one, which is in the same
        column if ``paired``; and whether both are in the left half.
    """
    (j, k), (rows, columns) = entries, shape
    opposite = -j % rows
    change = (k <= columns // 2) * (j - opposite)
    column = k.clip(max=columns - k)
    return opposite + change, column, j - change, 2 * column % columns == 0


def bases(
    shape: tuple[int, int], seed: int, kind: str
) -> tuple[Float[np.ndarray, "out out"], Float[np.ndarray, "in in"]]:
    """Draw bases that replace those of a Fourier update: normal ("random") or their QR factors ("orthogonal")."""
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
    """Compute alpha / sqrt(2 d1 d2) * left F right^T, an update with the expected norm of a Fourier update."""
    (j, k), scale = entries, alpha / np.sqrt(2 * len(left) * len(right))
    return Dense((left[:, j] * (scale * as_float64(coefficients))) @ right[:, k].T)


class Fourier(Update, form="fourier"):
    """Fourier update scale * Re(ifft2(F)), with the coefficients at the entries of F; its matrix is built on access.

    Parameters
    ----------
    coefficients : array (n,)
        Real coefficients.
    entries : array (2, n)
        Rows and columns of F. An entry and its mirror image (-j, -k) are the same frequency; both may occur.
    shape : (int, int)
        Shape (out, in).
    scale : float
        alpha; the inverse transform already divides by out * in.
    """

    required = frozenset({"coefficients", "entries", "shape"})
    constants = frozenset({"entries", "shape"})

    def __init__(
        self,
        coefficients: Float[np.ndarray, "n"],
        entries: Int[np.ndarray, "2 n"],
        shape: tuple[int, int],
        scale: float = 1.0,
    ) -> None:
        self.coefficients, self.entries, self.scale = coefficients, entries, scale
        self._shape = int(shape[0]), int(shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in)."""
        return self._shape

    def to_factors(self) -> dict[str, Any]:
        """Return the coefficients, their entries and the shape."""
        return {"coefficients": self.coefficients, "entries": self.entries, "shape": np.array(self.shape)}

    @classmethod
    def from_factors(cls, factors: Mapping[str, Any], scale: float = 1.0, exact: bool = True) -> Fourier:
        """Build an update from ``coefficients`` (n,), ``entries`` (2, n) and ``shape`` (2,)."""
        outer, inner = factors["shape"].tolist()
        return cls(factors["coefficients"], factors["entries"], (outer, inner), scale)

    @classmethod
    def fits(cls, shapes: Shapes, floats: Mapping[str, bool], arrays: Mapping[str, np.ndarray]) -> bool:
        """See `Update.fits`."""
        match shapes:
            case {"coefficients": (n,), "entries": (2, m), "shape": (2,)} if n == m and floats["coefficients"]:
                (outer, inner), entries = arrays["shape"].tolist(), arrays["entries"]
                if not (isinstance(outer, int) and isinstance(inner, int) and entries.dtype.kind in "iu"):
                    return False
                # The size is limited because spectra require the whole matrix.
                sound = 0 < min(outer, inner) <= max(outer, inner) < 2**24 and outer * inner <= 2**31
                return sound and bool(((entries >= 0) & ((outer, inner) > entries.T).T).all())
        return False

    def dense(self) -> Float[np.ndarray, "out in"]:
        """Compute the update as a matrix."""
        return self.matrix

    @cached_property
    def matrix(self) -> Float[np.ndarray, "out in"]:
        """The update as a matrix, from one real inverse transform of half the spectrum."""
        row, column, mirrored, paired = half_spectrum(self.entries, self.shape)
        half = as_float64(self.coefficients) / 2
        spectrum = np.zeros((self.shape[0], self.shape[1] // 2 + 1))
        np.add.at(spectrum, (row, column), half)
        np.add.at(spectrum, (mirrored[paired], column[paired]), half[paired])
        return self.scale * np.fft.irfft2(spectrum, s=self.shape)

    @cached_property
    def parity_blocks(self) -> tuple[Any, Any]:
        """Even and odd part of dW in the basis of cosines or sines, as sparse arrays.

        They sum the values of each place: (j, k) and (-j, -k) are one frequency, (j, -k) shares its basis functions.
        """
        # Imported here to keep the import of this module fast.
        from scipy.sparse import csr_array

        folded, signs, lengths = [], [], []
        for index, side in zip(self.entries, self.shape, strict=True):
            no_sine = 2 * index % side == 0  # frequency zero and the Nyquist frequency
            folded.append(np.minimum(index, side - index))
            signs.append(np.where(no_sine, 0.0, np.sign(side - 2 * index)))
            lengths.append(np.where(no_sine, side, side / 2) ** 0.5)
        outer, inner = self.shape
        values = self.scale / (outer * inner) * as_float64(self.coefficients) * lengths[0] * lengths[1]
        sines = signs[0] * signs[1]
        odd = sines != 0
        odd_entries = folded[0][odd] - 1, folded[1][odd] - 1
        return (
            csr_array((values, (folded[0], folded[1])), (outer // 2 + 1, inner // 2 + 1)),
            csr_array((-(sines * values)[odd], odd_entries), ((outer - 1) // 2, (inner - 1) // 2)),
        )

    @property
    def rank(self) -> int:
        """Structural rank of the entries, which is the rank for almost all coefficients."""
        from scipy.sparse.csgraph import structural_rank

        return sum(int(structural_rank(block)) for block in self.parity_blocks if block.nnz)

    def norm(self) -> float:
        """Compute the Frobenius norm by Parseval's identity."""
        return float(np.sqrt(sum(np.vdot(block.data, block.data) for block in self.parity_blocks)))

    def inner_weight(self, W: Any) -> float:
        """Compute <W, dW> from the coefficients and the transform of W at their entries."""
        if not isinstance(W, np.ndarray):
            W = W.detach()
            if W.element_size() < 4:  # numpy has no bfloat16
                W = W.float()
            W = W.cpu().numpy()
        row, column, _, _ = half_spectrum(self.entries, self.shape)
        transform = np.fft.rfft2(W).real[row, column]
        return float(self.scale / W.size * np.vdot(as_float64(self.coefficients), as_float64(transform)))

    def singular_values(self) -> Float[np.ndarray, "k"]:
        """Compute the min(out, in) singular values of both parts, largest first."""
        if not all_finite(self.coefficients):
            return np.full(min(self.shape), np.nan)
        sigma = [Dense(block.toarray()).singular_values() for block in self.parity_blocks]
        return np.sort(np.concatenate(sigma))[::-1]

    def energy(self, edges: Float[np.ndarray, "edges"]) -> Float[np.ndarray, "bins"]:
        """Compute ``|dW|^2`` by radius of the frequency: sums between consecutive edges, including the last edge."""
        even, odd = (block.tocoo() for block in self.parity_blocks)
        distances = np.concatenate([np.hypot(even.row, even.col), np.hypot(odd.row + 1, odd.col + 1)])
        squares = np.concatenate([even.data, odd.data]) ** 2
        return np.histogram(distances, edges, weights=squares)[0]

    def __sub__(self, other: Update) -> Update:
        """Return the difference; updates with the same entries and scale are subtracted by coefficient."""
        if (
            isinstance(other, Fourier)
            and (self.shape, self.scale) == (other.shape, other.scale)
            and np.array_equal(self.entries, other.entries)
        ):
            change = as_float64(self.coefficients) - as_float64(other.coefficients)
            return Fourier(change, self.entries, self.shape, self.scale)
        return super().__sub__(other)

    def __repr__(self) -> str:
        return f"Fourier({len(self.coefficients)} coefficients, shape={self.shape}, scale={self.scale:g})"
