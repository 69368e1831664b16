"""Stored update of one module: shapes from the file headers, arrays loaded on access."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lorascope.files.safetensors_io import TensorFile, Unread
from lorascope.formats.pretrained_weights import OptionalBase
from lorascope.schema.image_roles import FLATTENED
from lorascope.schema.module_roles import parse, position
from lorascope.updates import Update, from_factors
from lorascope.updates.low_rank import Product

T = TypeVar("T")

PREFIX = "base_model.model."
"""Prefix of module names in PEFT's files."""
COMPILED = "_orig_mod."
"""Segment that torch.compile adds to the names of a model and its modules."""
FLAT_COMPILED = COMPILED.replace(".", "_")
"""The same segment in the names of kohya, whose dots are underscores."""


@dataclass(frozen=True)
class StoredTensor:
    """Stored tensor of an update, by its name in a file."""

    file: TensorFile
    name: str

    @property
    def shape(self) -> tuple[int, int]:
        """Shape in two dimensions; the kernel dimensions of a convolution are part of the second."""
        first, *inner_sides = self.file.shape(self.name) or (1,)  # a scalar, such as alpha, is one row
        return first, math.prod(inner_sides)

    def read(self) -> Any:
        """Load the array with the two dimensions of ``shape``."""
        return self.file[self.name].reshape(self.shape)

    def unread(self) -> Unread:
        """Return the tensor with the two dimensions of ``shape``, whose values are not read yet."""
        tensor = self.file.unread(self.name)
        return Unread(tensor.stored.reshape(self.shape), tensor.encoding)


def in_order(modules: Mapping[str, T]) -> dict[str, T]:
    """Return stored updates, or other values by module, ordered by layer and role."""
    ordered = sorted(modules, key=lambda module: position(*parse(module)))
    return {module: modules[module] for module in ordered}


def uncompiled_name(name: str) -> str:
    """Return the name of a stored tensor or module as before torch.compile."""
    if FLATTENED.match(name):
        name = name.replace(FLAT_COMPILED, "")
    return name.replace(COMPILED, "")


def plain_name(name: str) -> str:
    """Return the name of a stored tensor in its model: without PEFT's prefix, and as before torch.compile."""
    return uncompiled_name(name).removeprefix(PREFIX)


def stored_tensors(files: Iterable[TensorFile]) -> Iterator[StoredTensor]:
    """Yield all stored tensors of some files, each as a `StoredTensor`."""
    for file in files:
        for name in file:
            yield StoredTensor(file, name)


class StoredUpdate:
    """Stored update of one module for any method: shapes from the headers, arrays loaded on access.

    A subclass is a dataclass with the module's tensors as fields of type `StoredTensor`.
    """

    scale: float
    transposed: bool
    """Whether the base stores its weight as (in, out)."""
    copies_weight: bool = False
    """Whether the files contain new values of the weight, which a merge copies."""

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
        """Number of stored values that were trained."""
        return sum(math.prod(tensor.shape) for tensor in self._tensors())

    @property
    def dtype(self) -> str:
        """Stored dtype of the first tensor, such as ``"BF16"``."""
        first = self._tensors()[0]
        return first.file.dtype(first.name)

    @property
    def exact(self) -> bool:
        """Return whether ``update`` is the same for every input."""
        return True

    def factors(self) -> dict[str, Any]:
        """Load the factors."""
        raise NotImplementedError

    def update(self) -> Update:
        """Load the factors, and return the update, whose form follows from their names."""
        return from_factors(self.factors(), self.scale, self.exact)

    def unread(self) -> Update | Product:
        """Return what ``spectra`` computes the singular values from, without loading the factors if possible."""
        return self.update()

    def _tensors(self) -> list[StoredTensor]:
        return [value for value in vars(self).values() if isinstance(value, StoredTensor)]


@dataclass(frozen=True)
class StoredLoRA(StoredUpdate):
    """Stored update of one module as two factors: scale * B @ A.

    B is (out, rank) and A is (rank, in), regardless of how the base stores its weight.
    """

    B: StoredTensor
    A: StoredTensor
    scale: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def factors(self) -> dict[str, Any]:
        return {"A": self.A.read(), "B": self.B.read()}

    def unread(self) -> Update | Product:
        if type(self) is not StoredLoRA:  # a subclass has other factors
            return self.update()
        return Product(self.B.unread(), self.A.unread(), self.scale)


@dataclass(frozen=True)
class AdapterFiles:
    """Opened adapter folder with the stored update of every module.

    Parameters
    ----------
    path : path
    config : dict
        Content of ``adapter_config.json``; empty if there is none.
    parts : mapping module name -> StoredUpdate
        Stored updates, ordered by layer, then by role.
    others : tuple of str
        Names of the tensors that are not factors: heads, biases, whole embeddings.
    files : tuple of TensorFile
        Weight files.
    kind : str
        Name of the method, "LoRA" by default.
    needs_base : bool
        Whether the adapter can be opened only with the folder of its base.
    notes : tuple of str
        Cautions about the whole adapter, one sentence each.
    configured : mapping module name -> str
        Names that the configuration matches, for modules with another name in ``parts`` or with none.
    base : PretrainedWeights, optional
        Base weights by the names in ``parts``, if they differ from those in the base.
    shared_size : int
        Number of trained values that all modules share.
    """

    path: Path
    config: dict[str, Any]
    parts: Mapping[str, StoredUpdate]
    others: tuple[str, ...]
    files: tuple[TensorFile, ...]
    kind: str = "LoRA"
    needs_base: bool = False
    notes: tuple[str, ...] = ()
    configured: Mapping[str, str] = field(default_factory=dict)
    base: OptionalBase = None
    shared_size: int = 0
