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
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lorascope.adapters.delta import Delta, attach, attached_deltas, host_weight, to_array
from lorascope.methods.base import Method, Step, require_choice, train_adapters
from lorascope.methods.fourierft_synthesis import at_least_float32, fourier_factors, synthesize, use_basis_form
from lorascope.schema import module_table
from lorascope.schema.records import Item, Quantity, Record, register
from lorascope.updates import fourier

BINS = 8
RECORD_EVERY = 10
register(
    "radius_energy",
    Quantity(
        "fraction of ‖ΔW‖²",
        index="bin",
        definition="fraction of |dW|^2 in each of eight rings of radii, from frequency zero to the corner",
        source="FourierFT, section 4.3",
    ),
)


@dataclass(kw_only=True)
class FourierFT(Method, name="fourierft"):
    """Fine-tuning of a few Fourier coefficients per weight.

    Parameters
    ----------
    coefficients : int, optional
        Number of coefficients per module; by default four times the smaller side of its weight.
    alpha : float
        Factor of the inverse transform, which itself divides by d1 d2.
    targets : str or tuple of str
        Roles, "all-linear", module names or a regular expression; see ``ls.names.match``.
    entry_seed : int
        Seed of the entries; the global generators are not used.
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
        require_choice(self, "init", ("normal", "zeros"))
        require_choice(self, "basis", ("fourier", "random", "orthogonal"))
        if not (math.isfinite(self.alpha) and self.alpha):
            raise ValueError(f"alpha must be finite and nonzero, got {self.alpha}")

    def attach(self, model: nn.Module) -> None:
        """Adapt the targets; leave adapters and head trainable."""
        chosen = module_table.match(module_table.describe(model), self.targets)
        attach(model, {name: self._fourier_delta(name, model.get_submodule(name)) for name in chosen})
        train_adapters(model)

    def _fourier_delta(self, name: str, host: nn.Module) -> Delta:
        if isinstance(host, nn.Embedding):
            raise ValueError(
                f"cannot adapt embedding {name!r}: FourierFT supports linear layers. Remove it from targets"
            )
        weight = host_weight(host)
        d1, d2 = weight.shape
        n = 4 * min(d1, d2) if self.coefficients is None else self.coefficients
        try:
            drawn = fourier.entries((d1, d2), n, self.entry_seed, self.center, self.width)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from None
        places = torch.from_numpy(drawn)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        start = torch.randn(n, dtype=dtype) if self.init == "normal" else torch.zeros(n, dtype=dtype)
        if self.basis == "fourier":
            return FourierDelta(start, places, (d1, d2), self.alpha)
        return BasisDelta(start, places, *bases((d1, d2), self.entry_seed, self.basis), self.alpha)

    def records(self, step: Step) -> Iterable[Item]:
        """Yield the radial energy of every Fourier update, every ten steps and at the end."""
        if step.finished % RECORD_EVERY and not step.last:
            return
        for module, delta in attached_deltas(step.model).items():
            if not isinstance(delta, FourierDelta):  # other bases have no frequencies
                continue
            update = delta.update()
            edges = np.linspace(0, math.hypot(*(side // 2 for side in update.shape)), BINS + 1)
            energy = update.energy(edges)
            if energy.any():
                yield Record("radius_energy", energy / energy.sum(), module)


class FourierDelta(Delta):
    """Update alpha * Re(ifft2(F)) of one module.

    Parameters
    ----------
    coefficients : (n,)
        Initial values.
    entries : (2, n)
        Rows and columns of the spectrum F.
    shape : (int, int)
        (out, in).
    alpha : float
    """

    entries: Tensor
    sides: Tensor

    def __init__(
        self, coefficients: Float[Tensor, "n"], entries: Int[Tensor, "2 n"], shape: tuple[int, int], alpha: float
    ) -> None:
        super().__init__()
        self.shape, self.alpha = shape, float(alpha)
        self.coefficients = nn.Parameter(coefficients)
        self.register_buffer("entries", entries)
        # The shape as a tensor, so that snapshots store it with the factors.
        self.register_buffer("sides", torch.tensor(shape), persistent=False)
        self._waves: tuple[Tensor, int, Tensor] | None = None

    def weight(self) -> Float[Tensor, "out in"]:
        return synthesize(at_least_float32(self.coefficients), self.entries, self.shape, self.alpha)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Apply the update as a matrix, or in basis form if there are few coefficients."""
        if not use_basis_form(len(self.coefficients), self.shape):
            return F.linear(x, self.weight().to(x.dtype))
        left, right = self._waves_for(x).split(self.shape)
        # The waves have norm 1, so their products already divide by sqrt(d1 d2).
        c = self.alpha / math.prod(self.shape) ** 0.5 * self.coefficients
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
        kept, entries = self._waves, self.entries
        version = -1 if entries.is_inference() else entries._version  # inference tensors have no version
        if (
            kept is None
            or version < 0
            or (kept[0] is not entries or kept[1] != version)
            or (kept[2].dtype, kept[2].device) != (x.dtype, x.device)
        ):
            with torch.inference_mode(False):  # tensors created in inference mode cannot be used in training
                sides = [wave / len(wave) ** 0.5 for wave in fourier_factors(entries, self.shape)]
                kept = self._waves = entries, version, torch.cat(sides).to(x.dtype)
        return kept[2]

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the cached waves, which are large and are rebuilt on use."""
        return super().__getstate__() | {"_waves": None}

    def factors(self) -> dict[str, Tensor]:
        return {"coefficients": self.coefficients, "entries": self.entries, "shape": self.sides}

    def update(self) -> fourier.Fourier:
        return fourier.Fourier(to_array(self.coefficients), to_array(self.entries), self.shape, self.alpha)

    def extra_repr(self) -> str:
        return f"coefficients={len(self.coefficients)}, alpha={self.alpha:g}"


class BasisDelta(Delta):
    """Update alpha / sqrt(2 d1 d2) * left F right^T, which has the expected norm of a Fourier update.

    Parameters
    ----------
    coefficients, entries, alpha
        See ``FourierDelta``.
    left, right : (out, out), (in, in)
        Bases of the outputs and of the inputs, in columns.
    """

    entries: Tensor
    left: Tensor
    right: Tensor

    def __init__(
        self,
        coefficients: Float[Tensor, "n"],
        entries: Int[Tensor, "2 n"],
        left: Float[Tensor, "out out"],
        right: Float[Tensor, "in in"],
        alpha: float,
    ) -> None:
        super().__init__()
        self.scale = alpha / math.sqrt(2 * len(left) * len(right))
        self.coefficients = nn.Parameter(coefficients)
        self.register_buffer("entries", entries)
        self.register_buffer("left", left.to(coefficients), persistent=False)
        self.register_buffer("right", right.to(coefficients), persistent=False)

    def weight(self) -> Float[Tensor, "out in"]:
        spectrum = self.coefficients.new_zeros(len(self.left), len(self.right))
        spectrum = spectrum.index_put(tuple(self.entries), self.scale * self.coefficients)
        return self.left @ spectrum @ self.right.T

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return F.linear(x, self.weight().to(x.dtype))

    def factors(self) -> dict[str, Tensor]:
        return {"coefficients": self.coefficients, "entries": self.entries}


def bases(shape: tuple[int, int], seed: int, kind: str) -> tuple[Float[Tensor, "out out"], Float[Tensor, "in in"]]:
    """Return ``fourier.bases`` as tensors."""
    left, right = fourier.bases(shape, seed, kind)
    return torch.from_numpy(left), torch.from_numpy(right)
