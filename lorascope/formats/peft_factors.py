"""Tensors of PEFT's formats, grouped by module and checked against the shapes that a format prescribes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorascope.files.printable import first_of, printable
from lorascope.files.safetensors_io import FLOATS, TensorFile
from lorascope.files.typed_json import unreadable
from lorascope.formats.adapter_faults import AdapterFault
from lorascope.formats.stored_update import StoredTensor, StoredUpdate, in_order, plain_name, stored_tensors
from lorascope.updates import Update

MAX_ENTRIES = 2**31  # a small file may describe a matrix that does not fit in memory
INDICES = "indices"
"""Part of the names of tensors that contain integers."""
# Indices of SHiRA are stored as floats on Windows.
INDEX_DTYPES = ("I64", "I32", "I16", "U8", "F32")
# The largest embedding tables have 300,000 rows, so a factor of rank 256 has 75 million values. Larger tensors are not
# factors of an adapter and could exhaust the memory.
MAX_SIDE, MAX_VALUES = 2**24, 2**28
Factors = Mapping[str, StoredTensor]
"""Tensors of one module by the names that PEFT gives them, such as ``hada_w1_a``."""
GroupedFactors = tuple[dict[str, dict[str, StoredTensor]], tuple[str, ...]]
"""Factors by module, and the names of all other tensors."""


@dataclass(frozen=True)
class StoredFactors(StoredUpdate):
    """Stored PEFT factors of one module, from which a function of their format builds the update.

    Parameters
    ----------
    tensors : mapping name -> StoredTensor
    sides : (int, int)
        Shape (out, in).
    components : int
        Largest possible rank.
    build : callable
        Function of the loaded arrays, in their stored shapes, that returns the update.
    scale : float
        Factor of the update, for display; ``build`` applies it.
    transposed : bool
    thin : bool
        Whether singular values can be computed fast.
    frozen : collection of str
        Names of further tensors that are not trained; indices never are.
    copies_weight : bool
    """

    tensors: Factors
    sides: tuple[int, int]
    components: int
    build: Callable[[dict[str, np.ndarray]], Update]
    scale: float = 1.0
    transposed: bool = False
    thin: bool = True
    frozen: Collection[str] = ()
    copies_weight: bool = False

    def __post_init__(self) -> None:
        size = max(math.prod(self.sides), self.components * sum(self.sides))
        if size > MAX_ENTRIES:
            path, (outer, inner) = next(iter(self.tensors.values())).file.path, self.sides
            must = f"updates must have <= {MAX_ENTRIES} entries, in their matrix and in their factors"
            raise unreadable(path, f"{must}, got {outer} x {inner} of rank {self.components}")

    @property
    def size(self) -> int:
        trained = (name for name in self.tensors if INDICES not in name and name not in self.frozen)
        return sum(math.prod(self.tensors[name].shape) for name in trained)

    @property
    def has_thin_factors(self) -> bool:
        return self.thin

    @property
    def shape(self) -> tuple[int, int]:
        return self.sides

    @property
    def rank(self) -> int:
        return self.components

    def factors(self) -> dict[str, Any]:
        """Load the tensors in their stored shapes."""
        return {name: tensor.file[tensor.name] for name, tensor in self.tensors.items()}

    def update(self) -> Update:
        """Load the tensors, and build the update."""
        return self.build(self.factors())

    def _tensors(self) -> list[StoredTensor]:
        # The first tensor has the dtype of the update, which indices do not have.
        return sorted(self.tensors.values(), key=lambda tensor: INDICES in tensor.name)


def group_factors(files: Iterable[TensorFile], pattern: re.Pattern[str]) -> GroupedFactors:
    """Group PEFT factors by module, ordered by layer and role; also return all other tensor names.

    ``pattern`` matches the names of factors without PEFT's prefix, with the groups ``module`` and ``factor``. A factor
    that is not stored as floats, or as integers if it is named ``indices``, or does not have the shape of one raises a
    ValueError.
    """
    module_factors: dict[str, dict[str, StoredTensor]] = {}
    other_names = []
    for tensor in stored_tensors(files):
        name = plain_name(tensor.name)
        match = pattern.fullmatch(name)
        if match is None:
            other_names.append(name)
            continue
        require_factor(tensor, INDEX_DTYPES if INDICES in match["factor"] else FLOATS)
        factors = module_factors.setdefault(match["module"], {})
        if match["factor"] in factors:
            names = f"{printable(factors[match['factor']].name)} and {printable(tensor.name)}"
            raise unreadable(tensor.file.path, f"two tensors are the same factor: {names}")
        factors[match["factor"]] = tensor
    if empty := [module for module, factors in module_factors.items() if (0,) in map(stored_shape, factors.values())]:
        raise ungathered_factors(tensor.file.path, empty)
    return in_order(module_factors), tuple(other_names)


def ungathered_factors(path: Path, modules: Sequence[str], state: str = "empty") -> AdapterFault:
    """Return the error for modules with the PEFT factors of a single process, empty or flat."""
    verb = "is" if len(modules) == 1 else "are"
    reason = f"{first_of(modules)} {verb} {state}: saved under ZeRO-3 or FSDP without gathering"
    return AdapterFault("empty", path, reason)


def no_factors(path: Path, must: str, other_names: Sequence[str]) -> ValueError:
    """Return the error for an adapter without PEFT or other factors, which names the first of its other tensors."""
    first = next(iter(other_names), "no tensor")
    return unreadable(path, f"{must}, got {printable(first)}")


def peft_factors(path: Path, files: Iterable[TensorFile], names: Collection[str]) -> GroupedFactors:
    """Group PEFT factors by module, ordered by layer and role; return the names of all other tensors, too.

    The name of the adapter may follow that of a tensor, if a state dict was saved by hand.

    Raises
    ------
    ValueError
        No tensor has one of these names, or one is not stored as floats or, with ``indices`` in its name, as integers.
    """
    alternatives = "|".join(map(re.escape, names))
    pattern = rf"(?s)(?P<module>.+)\.(?P<factor>{alternatives})(?:\.(?!weight$|bias$)[^.]+)?(?:\.weight)?"
    module_factors, other_names = group_factors(files, re.compile(pattern))
    if not module_factors:
        values = ", ".join(name for name in names if INDICES not in name)
        raise no_factors(path, f"weights must include one of {values}", other_names)
    return module_factors, other_names


def require_factor(tensor: StoredTensor, dtypes: Sequence[str] = FLOATS) -> StoredTensor:
    """Return a stored PEFT factor; raise a ValueError if its dtype is not that of a factor or it is too large."""
    file, name = tensor.file, tensor.name
    if file.dtype(name) not in dtypes:
        stored = printable(file.dtype(name))
        raise unreadable(file.path, f"{printable(name)} must be stored as one of {', '.join(dtypes)}, got {stored}")
    require_factor_shape(file.path, name, file.shape(name))
    return tensor


def require_factor_shape(path: Path, name: str, shape: tuple[int, ...]) -> None:
    """Raise a ValueError if an array of this shape is too large for a PEFT factor."""
    if not shape or max(shape) > MAX_SIDE or math.prod(shape) > MAX_VALUES:
        limits = f">= 1 dimensions, each <= {MAX_SIDE}, and <= {MAX_VALUES} values"
        raise unreadable(path, f"{printable(name)} must have {limits}, got shape {shape}")


def shared_factor(path: Path, files: Iterable[TensorFile], name: str) -> StoredTensor:
    """Return the factor that all modules of a PEFT adapter share, ``base_model.NAME``."""
    for tensor in stored_tensors(files):
        # They belong to no module, so PEFT's prefix base_model.model. is only base_model. here.
        if tensor.name.rpartition("base_model.")[2] == name:
            return require_factor(tensor)
    raise AdapterFault("incomplete", path, f"weights must include base_model.{name}")


def stored_shape(tensor: StoredTensor) -> tuple[int, ...]:
    """Return the shape of a PEFT factor, or another tensor, in its file, with all its dimensions."""
    return tensor.file.shape(tensor.name)


def check_shapes(path: Path, module: str, factors: Factors, shapes: Mapping[str, str], **sizes: int) -> dict[str, int]:
    """Check the shapes of a module's PEFT factors, and return the sizes that they name.

    Parameters
    ----------
    path : path
    module : str
    factors : mapping name -> StoredTensor
    shapes : mapping name -> str
        Dimensions of each required tensor, such as ``"out rank"``: numbers, or names of sizes that are equal wherever
        they occur. A final ``*`` stands for any further dimensions, and a final ``in*`` for their product.
    **sizes : int
        Sizes that are known.

    Raises
    ------
    ValueError
        A tensor is missing, is empty, or has another shape.
    """
    for name, dimensions in shapes.items():
        if name not in factors:
            raise AdapterFault("incomplete", path, f"{printable(module)} has no {name}")
        stored, names = stored_shape(factors[name]), dimensions.split()
        sides, fits = stored, len(stored) == len(names)
        if names[-1].endswith("*"):
            last = len(names) - 1
            sides, fits = (*stored[:last], math.prod(stored[last:])), len(stored) >= last
            names[-1] = names[-1].removesuffix("*")
        for size, side in zip(names, sides, strict=False):
            if size.isdigit():
                fits &= side == int(size)
            elif size:  # a lone * has no name
                fits &= side == sizes.setdefault(size, side)
        if 0 in stored:
            raise ungathered_factors(path, [module])
        if not fits:
            must = ", ".join(str(sizes.get(size, size)) for size in dimensions.split())
            raise AdapterFault("shape", path, f"{name} of {printable(module)} must have shape ({must}), got {stored}")
    return sizes


def check_fit(path: Path, module: str, shape: tuple[int, int], base: tuple[int, int]) -> None:
    """Raise a ValueError if a module's factors, as in PEFT, do not fit the shape (out, in) of its base weight."""
    if shape != base:
        must = f"factors of {printable(module)} must fit its base weight, {base[0]} x {base[1]}"
        raise AdapterFault("misfit", path, f"{must}, got {shape[0]} x {shape[1]}")
