"""Transforms between a few Fourier coefficients and the update of a weight, in torch.

Source: FourierFT (arXiv 2405.03003), algorithm 1, by real transforms of half a spectrum.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Shape = tuple[int, int]


def synthesize(
    c: Float[Tensor, "n"], entries: Int[Tensor, "2 n"], shape: Shape, alpha: float
) -> Float[Tensor, "out in"]:
    """Compute alpha * Re(ifft2(F)), where F is c at the entries and 0 elsewhere; differentiable more than once.

    Parameters
    ----------
    c : (n,)
        Coefficients, in float32 or wider.
    entries : (2, n)
        Rows and columns of F.
    shape : (int, int)
        (out, in).
    alpha : float
    """
    return _Synthesis.apply(c, entries, shape, alpha)


def use_basis_form(n: int, shape: Shape) -> bool:
    """Return whether basis form needs fewer operations than the matrix.

    For T tokens, products with waves take 8 T n (d1 + d2) operations and the gradient by dW takes 2 T d1 d2. Forward,
    the sum of both weights costs no more than the weight itself. Transforms are not counted, so waves may be faster for
    few tokens even if this returns False. At a thousand tokens both are about even at the threshold.
    """
    return 4 * n * sum(shape) < math.prod(shape)


def fourier_factors(
    entries: Int[Tensor, "2 n"], shape: Shape
) -> tuple[Float[Tensor, "out waves"], Float[Tensor, "in waves"]]:
    """Return L and R with dW = alpha / (d1 d2) L diag(c, c) R^T: cosines, then sines, which are negative in L."""
    sides = []
    for index, side, sign in zip(entries, shape, (-1, 1), strict=True):
        # Phases are reduced modulo a full turn in integers, because the cosine of a large phase loses digits.
        turns = torch.outer(torch.arange(side, device=index.device), index) % side
        phases = turns.double() * (2 * math.pi / side)
        sides.append(torch.cat([phases.cos(), sign * phases.sin()], 1))
    return sides[0], sides[1]


class _Synthesis(torch.autograd.Function):
    """Map from coefficients to alpha * Re(ifft2(F)), without the complex matrices that autograd would store."""

    @staticmethod
    def forward(ctx: Any, c: Float[Tensor, "n"], entries: Int[Tensor, "2 n"], shape: Shape, alpha: float) -> Tensor:
        ctx.save_for_backward(entries)
        ctx.shape, ctx.alpha = shape, alpha
        return synthesis(c, entries, shape, alpha)

    @staticmethod
    def backward(ctx: Any, G: Float[Tensor, "out in"]) -> tuple[Tensor, None, None, None]:
        return _Analysis.apply(G, *ctx.saved_tensors, ctx.alpha), None, None, None


class _Analysis(torch.autograd.Function):
    """Adjoint of ``_Synthesis``, whose adjoint in turn is ``_Synthesis``."""

    @staticmethod
    def forward(ctx: Any, G: Float[Tensor, "out in"], entries: Int[Tensor, "2 n"], alpha: float) -> Tensor:
        ctx.save_for_backward(entries)
        ctx.shape, ctx.alpha = (G.shape[0], G.shape[1]), alpha
        return analysis(G, entries, alpha)

    @staticmethod
    def backward(ctx: Any, c: Float[Tensor, "n"]) -> tuple[Tensor, None, None]:
        return _Synthesis.apply(c, *ctx.saved_tensors, ctx.shape, ctx.alpha), None, None


def synthesis(
    c: Float[Tensor, "n"], entries: Int[Tensor, "2 n"], shape: Shape, alpha: float
) -> Float[Tensor, "out in"]:
    """Compute alpha * Re(ifft2(F)) by a real transform of the left half of (F(j, k) + F(-j, -k)) / 2.

    This is half the work. The scale is applied here, because multithreaded float32 transforms of 2048 x 2048 may apply
    theirs twice.
    """
    width = shape[1] // 2 + 1
    place, mirror, paired = _half_spectrum(entries, shape)
    half = c * (alpha / (2 * math.prod(shape)))
    spectrum = c.new_zeros(shape[0] * width, 2)
    spectrum[:, 0].index_add_(0, place, half)
    spectrum[:, 0].index_add_(0, mirror, half * paired)
    return torch.fft.irfft2(torch.view_as_complex(spectrum).view(shape[0], width), s=shape, norm="forward")


def analysis(G: Float[Tensor, "out in"], entries: Int[Tensor, "2 n"], alpha: float) -> Float[Tensor, "n"]:
    """Compute alpha / (d1 d2) Re(fft2(G)) at the entries.

    Two transforms are used because a multithreaded ``rfft2`` waits for its threads longer than it computes.
    """
    spectrum = torch.fft.fft(torch.fft.rfft(G), dim=0)
    place, _, _ = _half_spectrum(entries, (G.shape[0], G.shape[1]))
    return alpha / G.numel() * spectrum.real.reshape(-1)[place]


def _half_spectrum(
    entries: Int[Tensor, "2 n"], shape: Shape
) -> tuple[Int[Tensor, "n"], Int[Tensor, "n"], Bool[Tensor, "n"]]:
    """Return each entry's index in the left half (or its mirror's), the mirror's index, and whether both are in it."""
    (j, k), (rows, columns) = entries, shape
    width = columns // 2 + 1
    left = k < width
    opposite = -j % rows
    row, mirrored = torch.where(left, j, opposite), torch.where(left, opposite, j)
    column = torch.where(left, k, columns - k)
    return row * width + column, mirrored * width + column, 2 * column % columns == 0


def at_least_float32(c: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Convert to float32 unless the dtype is wider: half precision has no transforms."""
    return c.to(torch.promote_types(c.dtype, torch.float32))
