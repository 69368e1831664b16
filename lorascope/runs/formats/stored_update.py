"""Stored update of one module: shapes from the file headers, arrays loaded on access."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lorascope.files.safetensors_io import TensorFile
from lorascope.updates.low_rank import Dense, LowRank


@dataclass(frozen=True)
class StoredTensor:
    """Stored factor of an adapter.

    Parameters
    ----------
    file : TensorFile
    name : str
        Name in the file.
    """

    file: TensorFile
    name: str

    @property
    def shape(self) -> tuple[int, int]:
        """Shape in two dimensions; the kernel dimensions of a convolution are part of the second."""
        first, *rest = self.file.shape(self.name)
        return first, math.prod(rest)

    def read(self) -> Any:
        """Load the array with the two dimensions of ``shape``."""
        return self.file[self.name].reshape(self.shape)


class StoredUpdate:
    """Stored update of one module for any method: shapes from the headers, arrays loaded on access."""

    scale: float
    transposed: bool
    """Whether the base stores its weight as (in, out)."""

    @property
    def has_thin_factors(self) -> bool:
        """Return whether singular values can be computed fast, from low-rank factors."""
        return True

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        raise NotImplementedError

    @property
    def rank(self) -> int:
        """Number of components."""
        raise NotImplementedError

    @property
    def size(self) -> int:
        """Number of stored values."""
        raise NotImplementedError

    @property
    def dtype(self) -> str:
        """Stored dtype, such as ``"BF16"``."""
        raise NotImplementedError

    @property
    def exact(self) -> bool:
        """Return whether ``update`` is the same for every input."""
        return True

    def factors(self) -> dict[str, Any]:
        """Load the factors."""
        raise NotImplementedError

    def update(self) -> LowRank | Dense:
        """Load the factors, and return the update."""
        raise NotImplementedError


@dataclass(frozen=True)
class StoredLoRA(StoredUpdate):
    """Update of one module: scale * B @ A.

    Parameters
    ----------
    B, A : StoredTensor
        (out, rank) and (rank, in), regardless of how the base stores its weight.
    scale : float
    transposed : bool
        Whether the base stores its weight as (in, out).
    """

    B: StoredTensor
    A: StoredTensor
    scale: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        """Number of components."""
        return self.A.shape[0]

    @property
    def size(self) -> int:
        """Number of stored values."""
        return math.prod(self.A.shape) + math.prod(self.B.shape)

    @property
    def dtype(self) -> str:
        """Stored dtype, such as ``"BF16"``."""
        return self.A.file.dtype(self.A.name)

    def factors(self) -> dict[str, Any]:
        """Load the factors."""
        return {"A": self.A.read(), "B": self.B.read()}

    def update(self) -> LowRank | Dense:
        """Load the factors, and return the update."""
        return LowRank(self.B.read(), self.A.read(), self.scale)
