"""From the coefficients of a few frequencies to a weight's update and back, in torch.

Source: FourierFT (arXiv 2405.03003), algorithm 1; the real transform of half a spectrum.
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
    """alpha * Re(ifft2(F)), where F holds c at the entries; differentiable, more than once.

    Parameters
    ----------
    c : (n,)
        In float32 at least.
    entries : (2, n)
        Rows and columns of F.
    shape : (int, int)
        (out, in).
    alpha : float
    """
    return _Synthesis.apply(c, entries, shape, alpha)


def use_basis_form(n: int, shape: Shape) -> bool:
    """Are products with waves, 8 T n (d1 + d2) for T tokens, fewer than those of the gradient by dW, 2 T d1 d2?

    Forwards the sum of both weights costs no more than the weight alone. The transforms come on top: where this says
    no, waves may still win with few tokens; at a thousand both are about even where it turns.
    """
    return 4 * n * sum(shape) < math.prod(shape)


def fourier_factors(
    entries: Int[Tensor, "2 n"], shape: Shape
) -> tuple[Float[Tensor, "out waves"], Float[Tensor, "in waves"]]:
    """L and R with dW = alpha / (d1 d2) L diag(c, c) R^T: cosines, then sines, those of L negative."""
    sides = []
    for index, side, sign in zip(entries, shape, (-1, 1), strict=True):
        # Whole turns are taken off in integers: of a large phase the cosine has lost its digits.
        turns = torch.outer(torch.arange(side, device=index.device), index) % side
        phases = turns.double() * (2 * math.pi / side)
        sides.append(torch.cat([phases.cos(), sign * phases.sin()], 1))
    return sides[0], sides[1]


class _Synthesis(torch.autograd.Function):
    """Coefficients to alpha * Re(ifft2(F)), without the complex matrices that autograd would keep."""

    @staticmethod
    def forward(ctx: Any, c: Float[Tensor, "n"], entries: Int[Tensor, "2 n"], shape: Shape, alpha: float) -> Tensor:
        ctx.save_for_backward(entries)
        ctx.shape, ctx.alpha = shape, alpha
        return synthesis(c, entries, shape, alpha)

    @staticmethod
    def backward(ctx: Any, G: Float[Tensor, "out in"]) -> tuple[Tensor, None, None, None]:
        return _Analysis.apply(G, *ctx.saved_tensors, ctx.alpha), None, None, None


class _Analysis(torch.autograd.Function):
    """The adjoint of ``_Synthesis``, and the other way round."""

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
    """alpha * Re(ifft2(F)) by a real transform of the left half of (F(j, k) + F(-j, -k)) / 2.

    That is half the work. It is scaled here, as float32 transforms of 2048 x 2048 by several threads may be twice.
    """
    width = shape[1] // 2 + 1
    place, mirror, alone = _half_spectrum(entries, shape)
    half = c * (alpha / (2 * math.prod(shape)))
    spectrum = c.new_zeros(shape[0] * width, 2)
    spectrum[:, 0].index_add_(0, place, half)
    spectrum[:, 0].index_add_(0, mirror, half * alone)
    return torch.fft.irfft2(torch.view_as_complex(spectrum).view(shape[0], width), s=shape, norm="forward")


def analysis(G: Float[Tensor, "out in"], entries: Int[Tensor, "2 n"], alpha: float) -> Float[Tensor, "n"]:
    """alpha / (d1 d2) Re(fft2(G)) at the entries.

    Two calls, since one of ``rfft2`` by several threads waits for them longer than the transform takes.
    """
    spectrum = torch.fft.fft(torch.fft.rfft(G), dim=0)
    place, _, _ = _half_spectrum(entries, (G.shape[0], G.shape[1]))
    return alpha / G.numel() * spectrum.real.reshape(-1)[place]


def _half_spectrum(
    entries: Int[Tensor, "2 n"], shape: Shape
) -> tuple[Int[Tensor, "n"], Int[Tensor, "n"], Bool[Tensor, "n"]]:
    """Of each entry or its mirror the one in the left half, numbered there; its mirror; are both in that half?"""
    (j, k), (rows, columns) = entries, shape
    width = columns // 2 + 1
    left = k < width
    opposite = -j % rows
    row, mirrored = torch.where(left, j, opposite), torch.where(left, opposite, j)
    column = torch.where(left, k, columns - k)
    return row * width + column, mirrored * width + column, 2 * column % columns == 0


def at_least_float32(c: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """In float32 at least: there are no transforms of halves."""
    return c.to(torch.promote_types(c.dtype, torch.float32))
