r"""FourierFT: a frozen weight plus an update with a sparse spectrum, whose coefficients are trained.

.. math::

    W &= W_0 + \Delta W, \qquad \Delta W = \alpha \operatorname{Re} \operatorname{ifft2}(F), \qquad
        F_{E_l} = c_l \text{ and zero elsewhere} \\
    \frac{\partial L}{\partial c_l} &= \frac{\alpha}{d_1 d_2}
        \operatorname{Re} \operatorname{fft2}\left(\frac{\partial L}{\partial W}\right)_{E_l}

The entries are drawn once by seed and are the same for all weights of one shape. Coefficients are initially standard
normal, so training does not start from the pretrained model.

=============  =========================================================================
paper          here
=============  =========================================================================
n              ``coefficients``, per module
alpha          ``alpha``, without a divisor
E, c           the buffer ``entries`` (2, n) and the parameter ``coefficients`` (n,)
f_c, W         ``center`` and ``width`` of the frequency bias
seed 2024      ``entry_seed``
F-B, R-B, O-B  ``basis``: the paper's own, random, orthogonal
=============  =========================================================================

Source: FourierFT (arXiv 2405.03003), equations 2 to 4 with algorithm 1, which divides by d1 d2; equation 5 (frequency
bias), table 6 (bases).

Departs:

- Weights need not be square. Row and column of an entry are quotient and remainder by d2, as in PEFT; the same seed
  gives PEFT's entries.
- The map of a frequency bias is centered on frequency zero, where it takes its limit 1 if f_c = 0. Entries are drawn
  from it without replacement.
- Random bases are normal with variance 1 / d; orthogonal bases are the Q factors of such matrices. Both are scaled to
  the expected norm of the update in the Fourier basis, alpha sqrt(n / (2 d1 d2)).
- Transforms use float32 or wider, regardless of the dtype of the weight.
- Coefficients have no weight decay, like all vectors.
- By default there are four coefficients per row or per column, whichever are fewer. This default, alpha and the
  learning rates are chosen for small models.
- Embeddings are rejected, as in PEFT.
- An input x is mapped to dW x, as in PEFT; the layer of the authors' code applies the transpose of dW.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorascope.adapters.delta import Delta, host_weight, to_array
from lorascope.array_types import Float, Int
from lorascope.methods.field_checks import default_if_none, require, require_literals
from lorascope.methods.method import AdapterMethod, Step, reject_embedding
from lorascope.methods.precision import wide_dtype
from lorascope.schema.records import Item, Quantity, Record, register
from lorascope.updates import fourier

BINS = 8
RECORD_EVERY = 10
_RINGS = "fraction of |dW|^2 in each of eight rings of radii, from frequency zero to the corner"
register(
    "train FourierFT",
    radius_energy=Quantity("fraction of ‖ΔW‖²", "", "bin", "mean", _RINGS, "FourierFT, section 4.3"),
)


@dataclass(kw_only=True)
class FourierFT(AdapterMethod, name="fourierft"):
    """Fine-tuning of a few Fourier coefficients per weight.

    Parameters
    ----------
    coefficients : int, optional
        Number of coefficients per module; by default four times the smaller side of its weight.
    alpha : float
        Factor of the inverse transform, which itself divides by d1 d2.
    targets : str or tuple of str
        Roles, "all-linear", module names or a regular expression; see ``ls.module_table.match``.
    entry_seed : int
        Seed of the entries, and of the bases that are drawn; the global generators are not used.
    center, width : float
        Frequency band from which entries are drawn; without ``center`` all entries are equally likely.
    init : {"normal", "zeros"}
        Initial values of the coefficients.
    basis : {"fourier", "random", "orthogonal"}
        Basis of the update; "random" and "orthogonal" are the controls of the paper's ablation.
    """

    coefficients: int | None = None
    alpha: float = 100.0
    targets: str | tuple[str, ...] = ("q", "v")
    entry_seed: int = 2024
    center: float | None = None
    width: float = 200.0
    init: Literal["normal", "zeros"] = "normal"
    basis: Literal["fourier", "random", "orthogonal"] = "fourier"
    lr: float = 5e-2
    head_lr: float = 5e-3

    def __post_init__(self) -> None:
        require_literals(self)
        require(self, "alpha", "finite and nonzero", math.isfinite(self.alpha) and self.alpha != 0)

    @classmethod
    def example(cls) -> FourierFT:
        return cls(coefficients=20, targets="all-linear", lr=1e-1)

    def delta(self, name: str, host: nn.Module) -> Delta:
        """Return the update of one module, with entries drawn for its shape."""
        reject_embedding(self, name, host)
        weight = host_weight(host)
        d1, d2 = weight.shape
        n = default_if_none(self.coefficients, 4 * min(d1, d2))
        try:
            E = torch.from_numpy(fourier.entries((d1, d2), n, self.entry_seed, self.center, self.width))
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from None
        draw = torch.randn if self.init == "normal" else torch.zeros
        c = draw(n, dtype=wide_dtype(weight))
        if self.basis == "fourier":
            return FourierDelta(c, E, (d1, d2), self.alpha)
        left, right = fourier.bases((d1, d2), self.entry_seed, self.basis)
        return BasisDelta(c, E, left, right, self.alpha)

    def records(self, step: Step) -> Iterable[Item]:
        """Yield the radial energy of every Fourier update, every ten steps and at the end."""
        if step.finished % RECORD_EVERY and not step.last:
            return
        if self.basis != "fourier":
            return  # no frequencies
        for module, delta in self._deltas.items():
            update = delta.update()
            edges = np.linspace(0, math.hypot(*(side // 2 for side in update.shape)), BINS + 1)
            energy = update.energy(edges)
            if energy.any():  # coefficients that start at zero have no fractions yet
                yield Record("radius_energy", energy / energy.sum(), module)

    def describe(self) -> dict[str, Any]:
        """Return the common facts: updates start at random unless ``init`` is "zeros"."""
        return super().describe() | {"starts_at_zero": self.init == "zeros"}


class Waves(NamedTuple):
    """Cached waves of FourierFT's update, and what they depend on: version of the entries, dtype and device."""

    entries: Tensor
    key: tuple[int | None, torch.dtype, torch.device]
    values: Tensor


class FourierDelta(Delta):
    """FourierFT's update alpha * Re(ifft2(F)) of one module; ``entries`` are rows and columns of F."""

    entries: Tensor

    def __init__(
        self, coefficients: Float[Tensor, "n"], entries: Int[Tensor, "2 n"], shape: tuple[int, int], alpha: float
    ) -> None:
        super().__init__()
        self.shape, self.alpha = shape, float(alpha)
        self.coefficients = nn.Parameter(coefficients)
        self.register_buffer("entries", entries)
        self._waves: Waves | None = None

    def weight(self) -> Float[Tensor, "out in"]:
        # Half precision has no transforms.
        c = self.coefficients.to(wide_dtype(self.coefficients))
        return synthesize(c, self.entries, self.shape, self.alpha)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Apply the update as a matrix, or in basis form if there are few coefficients."""
        if not use_basis_form(len(self.coefficients), self.shape):
            return super().forward(x)
        left, right = self._waves_for(x).split(self.shape)
        # The waves have norm 1, so their products already divide by sqrt(d1 d2).
        c = self.alpha / math.prod(self.shape) ** 0.5 * self.coefficients
        # A coefficient scales its cosine and its sine.
        return F.linear(F.linear(x, right.T) * torch.cat([c, c]).to(x.dtype), left)

    def affine(
        self, x: Float[Tensor, "*batch in"], W: Float[Tensor, "out in"], b: Float[Tensor, "out"] | None
    ) -> Float[Tensor, "*batch out"]:
        """Apply the sum of both weights, as if merged, or two products if there are few coefficients."""
        if use_basis_form(len(self.coefficients), self.shape):
            return F.linear(x, W, b) + self(x)
        return F.linear(x, (W + self.weight()).to(W.dtype), b)

    def _waves_for(self, x: Tensor) -> Float[Tensor, "sides waves"]:
        """Return the cosines and sines of unit-norm waves, cached until the entries change.

        The version of the tensor shows a change, such as a restored state; comparing values would wait for a GPU. The
        norm is 1 because float16 rounds alpha c / (d1 d2) to zero for a wide weight.
        """
        waves, entries = self._waves, self.entries
        version = None if entries.is_inference() else entries._version  # inference tensors have no version
        key = (version, x.dtype, x.device)
        if waves is None or version is None or waves.entries is not entries or waves.key != key:
            with torch.inference_mode(False):  # tensors created in inference mode cannot be used in training
                sides = [wave / len(wave) ** 0.5 for wave in fourier_factors(entries, self.shape)]
                waves = self._waves = Waves(entries, key, torch.cat(sides).to(x.dtype))
        return waves.values

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the cached waves, which are large and are rebuilt on use."""
        return super().__getstate__() | {"_waves": None}

    def factors(self) -> dict[str, Tensor]:
        return {"coefficients": self.coefficients, "entries": self.entries, "shape": torch.tensor(self.shape)}

    def update(self) -> fourier.Fourier:
        return fourier.Fourier(to_array(self.coefficients), to_array(self.entries), self.shape, self.alpha)

    def extra_repr(self) -> str:
        return f"coefficients={len(self.coefficients)}, alpha={self.alpha:g}"


class BasisDelta(Delta):
    """FourierFT's update in other bases: alpha / sqrt(2 d1 d2) * left F right^T, with the same expected norm.

    ``left`` and ``right`` are bases of the outputs and of the inputs, in columns.
    """

    entries: Tensor
    left: Tensor
    right: Tensor

    def __init__(
        self,
        coefficients: Float[Tensor, "n"],
        entries: Int[Tensor, "2 n"],
        left: Float[np.ndarray, "out out"],
        right: Float[np.ndarray, "in in"],
        alpha: float,
    ) -> None:
        super().__init__()
        self.scale = alpha / math.sqrt(2 * len(left) * len(right))
        self.coefficients = nn.Parameter(coefficients)
        self.register_buffer("entries", entries)
        # Not stored: the seed gives the same bases again.
        self.register_buffer("left", torch.from_numpy(left).to(coefficients), persistent=False)
        self.register_buffer("right", torch.from_numpy(right).to(coefficients), persistent=False)

    def weight(self) -> Float[Tensor, "out in"]:
        spectrum = self.coefficients.new_zeros(len(self.left), len(self.right))
        spectrum = spectrum.index_put(tuple(self.entries), self.scale * self.coefficients)
        return self.left @ spectrum @ self.right.T

    def factors(self) -> dict[str, Tensor]:
        return {"coefficients": self.coefficients, "entries": self.entries}


def synthesize(
    c: Float[Tensor, "n"], entries: Int[Tensor, "2 n"], shape: tuple[int, int], alpha: float
) -> Float[Tensor, "out in"]:
    """Compute FourierFT's ``synthesis``, differentiable more than once."""
    return _Transform.apply(c, entries, shape, alpha, False)


class _Transform(torch.autograd.Function):
    """``synthesis``, or its adjoint ``analysis``, without the complex matrices that autograd would store.

    The backward pass of each of the two is the other.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, entries: Tensor, shape: tuple[int, int], alpha: float, back: bool) -> Tensor:
        ctx.save_for_backward(entries)
        ctx.shape, ctx.alpha, ctx.back = shape, alpha, back
        return (analysis if back else synthesis)(values, entries, shape, alpha)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        # One result per argument of ``forward``; only the first is differentiable.
        result = _Transform.apply(gradient, *ctx.saved_tensors, ctx.shape, ctx.alpha, not ctx.back)
        return result, None, None, None, None


def synthesis(
    c: Float[Tensor, "n"], entries: Int[Tensor, "2 n"], shape: tuple[int, int], alpha: float
) -> Float[Tensor, "out in"]:
    """Compute FourierFT's alpha * Re(ifft2(F)) in float32 or wider, by a real transform of half the spectrum.

    The scale is applied here, because multithreaded float32 transforms of 2048 x 2048 may apply theirs twice.
    """
    width = shape[1] // 2 + 1
    row, column, mirrored, paired = fourier.half_spectrum(entries, shape)
    # The real part gives an entry and its mirror image half of the coefficient each.
    half = c * (alpha / (2 * math.prod(shape)))
    spectrum = c.new_zeros(shape[0] * width, 2)
    # Added, because two drawn entries may be mirror images of each other.
    spectrum[:, 0].index_add_(0, row * width + column, half)
    spectrum[:, 0].index_add_(0, mirrored * width + column, half * paired)
    return torch.fft.irfft2(torch.view_as_complex(spectrum).view(shape[0], width), s=shape, norm="forward")


def analysis(
    G: Float[Tensor, "out in"], entries: Int[Tensor, "2 n"], shape: tuple[int, int], alpha: float
) -> Float[Tensor, "n"]:
    """Compute alpha / (d1 d2) Re(fft2(G)) at FourierFT's entries.

    Two transforms are used because a multithreaded ``rfft2`` waits for its threads longer than it computes.
    """
    spectrum = torch.fft.fft(torch.fft.rfft(G), dim=0)
    row, column, _, _ = fourier.half_spectrum(entries, shape)
    return alpha / G.numel() * spectrum.real.reshape(-1)[row * spectrum.shape[1] + column]


def use_basis_form(n: int, shape: tuple[int, int]) -> bool:
    """Return whether FourierFT's basis form needs fewer operations than the matrix.

    For T tokens, products with waves take 8 T n (d1 + d2) operations and the gradient by dW takes 2 T d1 d2. Forward,
    the sum of both weights costs no more than the weight itself. Transforms are not counted, so waves may be faster for
    few tokens even if this returns False. At a thousand tokens both are about even at the threshold.
    """
    return 4 * n * sum(shape) < math.prod(shape)


def fourier_factors(
    entries: Int[Tensor, "2 n"], shape: tuple[int, int]
) -> tuple[Float[Tensor, "out waves"], Float[Tensor, "in waves"]]:
    """Return L and R of FourierFT's dW = alpha / (d1 d2) L diag(c, c) R^T: cosines, then sines, negative in L."""
    sides = []
    for index, side, sign in zip(entries, shape, (-1, 1), strict=True):
        # Phases are reduced modulo a full turn in integers, because the cosine of a large phase loses digits.
        turns = torch.outer(torch.arange(side, device=index.device), index) % side
        phases = turns.double() * (2 * math.pi / side)
        sides.append(torch.cat([phases.cos(), sign * phases.sin()], 1))
    return sides[0], sides[1]
