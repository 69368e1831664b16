"""Interface of weight updates, their registry, and the form of a matrix.

An update dW has the shape (out, in). A form is a way to store one, such as two factors or Fourier coefficients. A new
form is a subclass of ``Update`` with the name that snapshots store, ``class Kronecker(Update, form="kronecker")``; it
defines ``shape``, ``dense``, ``to_factors`` and ``from_factors``, and inherits everything else.

Arrays may be numpy arrays or torch tensors. Computations use float64 and numpy, regardless of the input; only ``dense``
of tensors is a tensor of their dtype, which autograd can differentiate.

The ranks of a zero update are 0.0. If an array contains NaN or infinity, singular values and ranks are NaN.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np

from lorascope.array_types import Float
from lorascope.updates.linalg import (
    all_finite,
    as_float64,
    at_least_float32,
    beside,
    gram,
    numerical_rank,
    one_thread,
    tiles,
)
from lorascope.updates.neuron_angles import NeuronChange, neuron_change

FORMS: dict[str, type[Update]] = {}
"""Forms by the name that snapshots store."""
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
_PIECE = 1 << 18  # values of a tensor at once, few enough for the cache


class Update(ABC):
    """Update of one weight, in any form."""

    form: ClassVar[str] = ""
    """Name of the form in snapshots."""
    required: ClassVar[frozenset[str]] = frozenset()
    """Names of the factors without which the form cannot be built."""
    constants: ClassVar[frozenset[str]] = frozenset()
    """Names of factors that are not trained."""
    needs_weight: ClassVar[bool] = False
    """True if the update depends on W_0, which is then the factor ``W0`` if it is known."""
    scale: float = 1.0
    """Factor that snapshots store separately."""
    exact: bool = True
    """False if the update depends on the input, and this is its value at fixed gate weights."""

    def __init_subclass__(cls, form: str = "", **options: Any) -> None:
        super().__init_subclass__(**options)
        if form:
            cls.form = form
            FORMS[form] = cls

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Shape (out, in)."""

    @abstractmethod
    def dense(self) -> Float[np.ndarray, "out in"]:
        """Compute the update as a matrix."""

    @abstractmethod
    def to_factors(self) -> dict[str, Any]:
        """Return the arrays that snapshots store, by name; ``from_factors`` with ``scale`` rebuilds the update."""

    @classmethod
    @abstractmethod
    def from_factors(cls, factors: Mapping[str, Any], scale: float = 1.0, exact: bool = True) -> Update:
        """Build an update from the arrays of ``to_factors``."""

    @classmethod
    def fits(cls, shapes: Shapes, floats: Mapping[str, bool], arrays: Mapping[str, np.ndarray]) -> bool:
        """Return whether stored arrays, loaded on access, form an update; ``floats`` is whether each has floats."""
        return cls.required <= shapes.keys()

    @property
    def whole(self) -> bool:
        """False if the update also depends on a base weight that is not known here."""
        return True

    @property
    def rank(self) -> int:
        """Largest possible rank."""
        return min(self.shape)

    @property
    def low_rank(self) -> Any:
        """The update as a product of two low-rank factors (``LowRank``), or None if it is not stored as one."""
        return None

    def norm(self) -> float:
        """Compute the Frobenius norm."""
        return float(np.sqrt(sum(np.vdot(tile, tile) for tile in tiles(self._stored_matrix()))))

    def inner(self, other: Update) -> float:
        """Compute <dW_1, dW_2>, the sum of the products of their entries."""
        if (product := other.low_rank) is not None:
            return float(product.inner(self))
        return float(np.vdot(self.dense(), other.dense()))

    def inner_weight(self, W: Any) -> float:
        """Compute <W, dW> for a weight (out, in); on the device of W, if it is a tensor."""
        if isinstance(W, np.ndarray):
            return float(np.vdot(as_float64(W), self.dense()))
        pieces = zip(*(X.reshape(-1).split(_PIECE) for X in (W, beside(W, self._stored_matrix()))), strict=True)
        return math.fsum(float((at_least_float32(w) * at_least_float32(dw)).sum()) for w, dw in pieces)

    def _stored_matrix(self) -> Any:
        """Return the matrix in its own dtype, if it is stored."""
        return self.dense()

    def neuron_change(self, W0: Float[np.ndarray, "out in"], axis: int) -> NeuronChange:
        """Compute ``neuron_angles.neuron_change`` from W_0 to W_0 + dW."""
        return neuron_change(W0, self.dense() + W0, axis)

    def singular_values(self) -> Float[np.ndarray, "k"]:
        """Compute the singular values, largest first.

        They are roots of the eigenvalues of the smaller Gram matrix: values below 1e-8 of the largest are rounding
        errors.
        """
        matrix = self.dense()
        if not all_finite(matrix):
            return np.full(min(self.shape), np.nan)
        inner = gram(matrix if self.shape[0] >= self.shape[1] else matrix.T)
        with one_thread():
            eigenvalues = np.linalg.eigvalsh(inner)
        return np.sqrt(np.maximum(eigenvalues[::-1], 0.0))

    def svd(self) -> tuple[Float[np.ndarray, "out k"], Float[np.ndarray, "k"], Float[np.ndarray, "in k"]]:
        """Compute U, sigma and V with dW = U diag(sigma) V^T, without components with sigma = 0 up to rounding.

        Raises
        ------
        ValueError
            The update contains NaN or infinity.
        """
        matrix = as_float64(self.dense())
        if not all_finite(matrix):
            raise ValueError("cannot compute singular vectors: the matrix contains NaN or infinity")
        U, sigma, V = np.linalg.svd(matrix, full_matrices=False)
        k = numerical_rank(sigma, self.shape)
        return U[:, :k], sigma[:k], V[:k].T

    def __sub__(self, other: Update) -> Update:
        """Return the difference of two updates, in their form if the form allows it."""
        return Dense(self.dense() - other.dense())


@dataclass(frozen=True, eq=False)
class Dense(Update, form="dense"):
    """Update of one weight, given as a matrix.

    Parameters
    ----------
    matrix : array (out, in)
    """

    matrix: Float[np.ndarray, "out in"]
    required = frozenset({"matrix"})

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    def dense(self) -> Float[np.ndarray, "out in"]:
        """Return the matrix in float64."""
        return as_float64(self.matrix)

    def _stored_matrix(self) -> Float[np.ndarray, "out in"]:
        return self.matrix

    def to_factors(self) -> dict[str, Any]:
        """Return the matrix."""
        return {"matrix": self.matrix}

    @classmethod
    def from_factors(cls, factors: Mapping[str, Any], scale: float = 1.0, exact: bool = True) -> Dense:
        """Build an update from its matrix; ``scale`` is not used."""
        return cls(factors["matrix"])


def form_named(name: str | None, factors: Iterable[str]) -> type[Update]:
    """Return the form of a weight update by its stored name, or the one with the most required factors among these.

    Raises
    ------
    ValueError
        No form has this name, or none fits the factors.
    """
    names = set(factors)
    if name is not None:
        if name not in FORMS:
            raise ValueError(
                f"unknown form of update {name!r}; expected one of {', '.join(FORMS)}, or import its package"
            )
        return FORMS[name]
    fitting = [form for form in FORMS.values() if form.required and form.required <= names]
    if not fitting:
        raise ValueError(f"factors of an update must include A and B, got {', '.join(sorted(names)) or 'none'}")
    return max(fitting, key=lambda form: len(form.required))


def constant_factors() -> frozenset[str]:
    """Return the names of all factors of weight updates, of any form, that are not trained."""
    return frozenset[str]().union(*(form.constants for form in FORMS.values()))


def from_factors(factors: Mapping[str, Any], scale: float = 1.0, exact: bool = True, form: str | None = None) -> Update:
    """Build a weight update from its stored factors; see ``form_named`` for ``form``."""
    return form_named(form, factors).from_factors(factors, scale, exact)
