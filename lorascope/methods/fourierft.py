"""FourierFT: a frozen weight plus an update made of few frequencies, of which the coefficients are trained.

    W = W_0 + dW,    dW = alpha Re(ifft2(F)),    F = c at the entries E, zero elsewhere
    dL/dc_l = alpha / (d1 d2) Re(fft2(dL/dW))[E_l]

The entries are drawn once, by seed, and are the same for all weights of one shape. Coefficients are standard normal at
the start, so that training does not start at the pre-trained model.

============  =========================================================================
paper         here
============  =========================================================================
n             ``coefficients`` of each module
alpha         ``alpha``, not divided by anything
E, c          the buffer ``entries`` (2, n) and the parameter ``coefficients`` (n,)
f_c, W        ``center`` and ``width`` of the frequency bias
seed 2024     ``entry_seed``
F-B, R-B, O-B ``basis``: the paper's own, random, orthogonal
============  =========================================================================

Source: FourierFT (arXiv 2405.03003), equations 2 to 4 with algorithm 1, which divides by d1 d2; equation 5 (frequency
bias), table 6 (bases).

Departs: weights need not be square; row and column of an entry are quotient and remainder by d2, as in PEFT, whose
entries these are under the same seed. Of a bias the map is centred on frequency zero, at which f_c = 0 has its limit 1,
and entries are drawn from it without replacement. Random bases are normal of variance 1 / d, orthogonal ones those of
such matrices, and both are scaled to the expected norm that the update has under the Fourier basis,
alpha sqrt(n / (2 d1 d2)). Transforms are taken in float32 or more, whatever the weight's dtype. Coefficients are not
decayed, since vectors are not. By default there are four coefficients for each row or column, whichever are fewer;
that, alpha and the rates are a choice for small models. Embeddings are refused, as in PEFT. Also:

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
from lorascope.methods.base import Method, Step, train_adapters
from lorascope.methods.fourierft_synthesis import at_least_float32, fourier_factors, synthesize, use_basis_form
from lorascope.schema import module_table
from lorascope.schema.records import Item, Quantity, Record, register
from lorascope.updates import fourier

BINS = 8
RECORD_EVERY = 10
register(
    "radius_energy",
    Quantity(
        "share of ‖ΔW‖²",
        index="bin",
        definition="part of |dW|^2 in each eighth of the radii, from frequency zero to the corner",
        source="FourierFT, section 4.3",
    ),
)


@dataclass(kw_only=True)
class FourierFT(Method, name="fourierft"):
    """Fine-tuning by a few coefficients of every weight's Fourier transform.

    Parameters
    ----------
    coefficients : int, optional
        Of each module; four times the smaller side of its weight by default.
    alpha : float
        The inverse transform, which divides by d1 d2, is multiplied by it.
    targets : str or tuple of str
        Roles, "all-linear", module names or a regular expression; see ``names.match``.
    entry_seed : int
        Of the entries alone: the global generators have no part in them.
    center, width : float
        Of the band from which the entries are drawn; no ``center`` draws from all alike.
    init : {"normal", "zeros"}
        Of the coefficients.
    basis : {"fourier", "random", "orthogonal"}
        The others are the controls of the paper's ablation.
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
        for name, choices in (("init", ("normal", "zeros")), ("basis", ("fourier", "random", "orthogonal"))):
            if (choice := getattr(self, name)) not in choices:
                raise ValueError(f"{name} {choice!r} is unknown: it must be one of {', '.join(map(repr, choices))}")
        if not (math.isfinite(self.alpha) and self.alpha):
            raise ValueError(f"alpha {self.alpha} leaves no update to train: give a finite number other than 0")

    def attach(self, model: nn.Module) -> None:
        """Adapt the targets; leave adapters and head trainable."""
        chosen = module_table.match(module_table.describe(model), self.targets)
        attach(model, {name: self._fourier_delta(name, model.get_submodule(name)) for name in chosen})
        train_adapters(model)

    def _fourier_delta(self, name: str, host: nn.Module) -> Delta:
        if isinstance(host, nn.Embedding):
            raise ValueError(f"{name!r} is an embedding: FourierFT adapts linear maps alone, leave it out of targets")
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
        """Where in the spectrum the update lies."""
        if step.finished % RECORD_EVERY and not step.last:
            return
        for module, delta in attached_deltas(step.model).items():
            if not isinstance(delta, FourierDelta):
                continue
            update = delta.update()
            edges = np.linspace(0, math.hypot(*(side // 2 for side in update.shape)), BINS + 1)
            energy = update.energy(edges)
            if energy.any():
                yield Record("radius_energy", energy / energy.sum(), module)


class FourierDelta(Delta):
    """The update alpha * Re(ifft2(F)) of one module.

    Parameters
    ----------
    coefficients : (n,)
        Their values at the start.
    entries : (2, n)
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
        self.register_buffer("sides", torch.tensor(shape), persistent=False)
        self._waves: tuple[Tensor, int, Tensor] | None = None

    def weight(self) -> Float[Tensor, "out in"]:
        return synthesize(at_least_float32(self.coefficients), self.entries, self.shape, self.alpha)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """By the matrix, or where the coefficients are few by their waves."""
        if not use_basis_form(len(self.coefficients), self.shape):
            return F.linear(x, self.weight().to(x.dtype))
        left, right = self._waves_for(x).split(self.shape)
        c = self.alpha / math.prod(self.shape) ** 0.5 * self.coefficients
        return F.linear(F.linear(x, right.T) * torch.cat([c, c]).to(x.dtype), left)

    def affine(
        self, x: Float[Tensor, "*batch in"], W: Float[Tensor, "out in"], b: Float[Tensor, "out"] | None
    ) -> Float[Tensor, "*batch out"]:
        """By the sum of both weights, as if the update were folded in; two products where the coefficients are few."""
        if use_basis_form(len(self.coefficients), self.shape):
            return F.linear(x, W, b) + self(x)
        return F.linear(x, (W + self.weight()).to(W.dtype), b)

    def _waves_for(self, x: Tensor) -> Float[Tensor, "sides waves"]:
        """Waves of length 1, kept from call to call until the entries change, as where a saved state is put back.

        A change is seen by the version of the tensor: to compare values means to wait for a GPU.

        Of length 1, since float16 cannot tell alpha c / (d1 d2) from zero where a weight is wide.
        """
        kept, entries = self._waves, self.entries
        version = -1 if entries.is_inference() else entries._version  # inference tensors have none
        if (
            kept is None
            or version < 0
            or (kept[0] is not entries or kept[1] != version)
            or (kept[2].dtype, kept[2].device) != (x.dtype, x.device)
        ):
            with torch.inference_mode(False):  # what is made under it cannot be trained with later
                sides = [wave / len(wave) ** 0.5 for wave in fourier_factors(entries, self.shape)]
                kept = self._waves = entries, version, torch.cat(sides).to(x.dtype)
        return kept[2]

    def __getstate__(self) -> dict[str, Any]:
        """Without the waves, which are many times what trains and are made again when asked for."""
        return super().__getstate__() | {"_waves": None}

    def factors(self) -> dict[str, Tensor]:
        return {"coefficients": self.coefficients, "entries": self.entries, "shape": self.sides}

    def update(self) -> fourier.Fourier:
        return fourier.Fourier(to_array(self.coefficients), to_array(self.entries), self.shape, self.alpha)

    def extra_repr(self) -> str:
        return f"coefficients={len(self.coefficients)}, alpha={self.alpha:g}"


class BasisDelta(Delta):
    """The update alpha / sqrt(2 d1 d2) * left F right^T, whose expected norm is that of a Fourier update.

    Parameters
    ----------
    coefficients, entries, alpha
        As of ``FourierDelta``.
    left, right : (out, out), (in, in)
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
    """``fourier.bases`` as tensors."""
    left, right = fourier.bases(shape, seed, kind)
    return torch.from_numpy(left), torch.from_numpy(right)
