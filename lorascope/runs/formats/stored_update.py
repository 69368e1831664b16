"""What an adapter's files keep of one module, known by their headers; arrays are read when they are asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lorascope.files.safetensors_io import TensorFile
from lorascope.updates.low_rank import Dense, LowRank


@dataclass(frozen=True)
class StoredTensor:
    """One stored factor.

    Parameters
    ----------
    file : TensorFile
    name : str
        Its name in the file.
    """

    file: TensorFile
    name: str

    @property
    def shape(self) -> tuple[int, int]:
        """Two dimensions; what a convolution adds is folded into the second."""
        first, *rest = self.file.shape(self.name)
        return first, math.prod(rest)

    def read(self) -> Any:
        """The array, with the two dimensions of ``shape``."""
        return self.file[self.name].reshape(self.shape)


class StoredUpdate:
    """What a folder keeps of one module, whatever the method: known by the headers, the arrays read when asked for."""

    scale: float
    transposed: bool
    """Does the base store its weight as (in, out)?"""

    @property
    def has_thin_factors(self) -> bool:
        """Are singular values found from thin factors, and so at once?"""
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
        """Does ``update`` say all of it, whatever the input?"""
        return True

    def factors(self) -> dict[str, Any]:
        """Read the factors."""
        raise NotImplementedError

    def update(self) -> LowRank | Dense:
        """Read the factors, as an update."""
        raise NotImplementedError


@dataclass(frozen=True)
class StoredLoRA(StoredUpdate):
    """The update of one module: scale * B @ A.

    Parameters
    ----------
    B, A : Factor
        (out, rank) and (rank, in), whatever way round the base stores its weight.
    scale : float
    transposed : bool
        Does the base store its weight as (in, out)?
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
        """Read the factors."""
        return {"A": self.A.read(), "B": self.B.read()}

    def update(self) -> LowRank | Dense:
        """Read the factors."""
        return LowRank(self.B.read(), self.A.read(), self.scale)
