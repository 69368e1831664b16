"""Rotation of neurons: 1 - cos of the angle between each neuron's weights before and after training.

Source: NeFT (arXiv 2403.11621), equation 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from lorascope.array_types import Bool, Float, Int
from lorascope.updates.linalg import TILE_BYTES, as_float64, gram, tiles

# Squares below this may have lost digits to underflow in float32.
_SMALL = 1e-25


class NeuronChange(NamedTuple):
    """Rotation angle of every neuron's weights, as 1 - cos, and the norms of w_0, w and w - w_0."""

    cosine_distance: Float[np.ndarray, "neurons"]
    norm_original: Float[np.ndarray, "neurons"]
    norm_tuned: Float[np.ndarray, "neurons"]
    delta_norm: Float[np.ndarray, "neurons"]


def neuron_change(W0: Any, W: Any, axis: int, dtype: type = np.float64) -> NeuronChange:
    """Compute the angle (1 - cos) of each neuron's weights before and after, their norms, and the norm of the change.

    With e = w - w_0, ``1 - cos = (|e|^2 - (|w| - |w_0|)^2) / (2 |w_0| |w|)``, which is accurate even for angles whose
    cosine rounds to 1. Here ``|w| - |w_0| = (2 <w_0, e> + |e|^2) / (|w| + |w_0|)``. One pass over cache-sized tiles is
    enough for most neurons.

    Parameters
    ----------
    W0, W : arrays (rows, columns)
        Weights before and after; memory maps and tensors in files are read tile by tile.
    axis : {0, 1}
        Axis along the weights of a neuron: 1 if neurons are rows, 0 if they are columns.
    dtype : type
        Dtype of the tiles. float32 takes half the time and agrees with float64 to a relative 1e-5. Neurons that would
        lose more digits (rescaled with almost no rotation, or close to zero) are read again in float64.

    Returns
    -------
    NeuronChange
        Cosine distances from 0 (same direction) to 2, NaN if one of the two vectors is zero; and the norms.

    Source: NeFT, equation 1.
    """
    neurons = np.arange(W0.shape[1 - axis])
    sums = _change_sums(W0, W, axis, neurons, dtype)
    unsound = neurons[~_is_accurate(sums)]
    if not len(unsound):
        return _rotation_from_sums(sums)
    if dtype is not np.float64:
        sums[:, unsound] = _change_sums(W0, W, axis, unsound, np.float64)
    change = _rotation_from_sums(sums)
    # If w_0 and w differ in length, |e|^2 hides the angle. Scaling w_0 to the length of w preserves the angle.
    before, after = change.norm_original[unsound], change.norm_tuned[unsound]
    scale = np.divide(after, before, out=np.ones(len(unsound)), where=(before > 0.0) & (after > 0.0))
    change.cosine_distance[unsound] = _rotation_from_sums(
        _change_sums(W0, W, axis, unsound, np.float64, scale)
    ).cosine_distance
    return change


def factored_change(
    W0: Float[np.ndarray, "rows columns"],
    B: Float[np.ndarray, "rows rank"],
    A: Float[np.ndarray, "rank columns"],
    axis: int,
) -> NeuronChange:
    """Compute angles of neurons, see ``neuron_change``, from W_0 to W_0 + B A from the factors, without B A.

    Parameters
    ----------
    W0 : array (rows, columns)
        Weights before.
    B, A : arrays (rows, rank), (rank, columns)
        Factors; one of them includes the scale.
    axis : {0, 1}
        Axis along the weights of a neuron: 1 if neurons are rows, 0 if they are columns.
    """
    if axis == 0:
        return factored_change(W0.T, A.T, B.T, 1)
    left, right = as_float64(B), as_float64(A).T
    before2, inner = np.empty(len(left)), np.empty(len(left))
    start = 0
    for tile in tiles(W0):
        rows = slice(start, start := start + len(tile))
        before2[rows] = np.vecdot(tile, tile)
        inner[rows] = np.vecdot(tile @ right, left[rows])
    error2 = np.maximum(np.vecdot(left @ gram(right), left), 0.0)
    return _rotation_from_sums(np.stack([before2, np.maximum(before2 + 2.0 * inner + error2, 0.0), inner, error2]))


def _rotation_from_sums(sums: Float[np.ndarray, "4 neurons"]) -> NeuronChange:
    """Compute the change of neurons from the sums ``|w_0|^2, |w|^2, <w_0, e>, |e|^2``."""
    before, after, error = np.sqrt(sums[[0, 1, 3]])
    product = before * after
    with np.errstate(invalid="ignore"):
        distance = np.maximum(_rotation_squares(sums), 0.0) / (2.0 * np.where(product > 0.0, product, np.nan))
    return NeuronChange(distance, before, after, error)


def _rotation_squares(sums: Float[np.ndarray, "4 neurons"]) -> Float[np.ndarray, "neurons"]:
    """Compute ``|e|^2 - (|w| - |w_0|)^2``."""
    before2, after2, inner, error2 = sums
    with np.errstate(invalid="ignore"):
        return error2 - ((2.0 * inner + error2) / (np.sqrt(after2) + np.sqrt(before2))) ** 2


def _is_accurate(sums: Float[np.ndarray, "4 neurons"]) -> Bool[np.ndarray, "neurons"]:
    """Return whether the sums of each neuron are accurate: no cancellation, and no over- or underflow in float32."""
    before2, after2, _, error2 = sums
    with np.errstate(invalid="ignore"):
        has_digits = (error2 == 0.0) | ((error2 > _SMALL) & (_rotation_squares(sums) >= error2 / 16.0))
    return np.isfinite(sums).all(axis=0) & (before2 > _SMALL) & (after2 > _SMALL) & has_digits


def _change_sums(
    W0: Any,
    W: Any,
    axis: int,
    neurons: Int[np.ndarray, "n"],
    dtype: type,
    scale: Float[np.ndarray, "n"] | None = None,
) -> Float[np.ndarray, "4 n"]:
    """Compute ``|w_0|^2, |w|^2, <w_0, e>, |e|^2`` of some neurons (ascending), with w_0 multiplied by ``scale``."""
    sums = np.zeros((4, len(neurons)))
    columns = W0.shape[1]
    height = max(1, 2 * TILE_BYTES // (np.dtype(dtype).itemsize * max(1, columns)))
    # Reuse one buffer for all tiles: allocating it again costs as much as the sums.
    scratch = np.empty((4, height, columns), dtype)
    for start in range(0, W0.shape[0], height):
        rows = slice(start, min(start + height, W0.shape[0]))
        inside = slice(*np.searchsorted(neurons, (rows.start, rows.stop))) if axis == 1 else slice(None)
        indices = neurons[inside] - (start if axis == 1 else 0)
        if not len(indices):
            continue
        tile = scratch[:, : rows.stop - start]
        # The other two arrays are for the change and for products.
        for weights, out in zip((W0[rows], W[rows]), tile, strict=False):
            if isinstance(weights, np.ndarray):
                np.copyto(out, weights)
            else:
                weights.read_into(out)
        if len(indices) < tile.shape[2 - axis]:
            tile = tile.take(indices, 2 - axis)
        before, after, error, product = tile
        if scale is not None:
            before *= scale[inside, None] if axis == 1 else scale
        with np.errstate(over="ignore", invalid="ignore"):
            np.subtract(after, before, out=error)
            pairs = (before, before), (after, after), (before, error), (error, error)
            for total, (left, right) in zip(sums, pairs, strict=True):
                if axis == 1:
                    total[inside] += np.vecdot(left, right)
                else:
                    total += np.ones(len(product), dtype) @ np.multiply(left, right, out=product)
    return sums
