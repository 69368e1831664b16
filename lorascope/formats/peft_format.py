"""Base class of PEFT's types of adapters: a subclass states its settings, its tensors, and the equation of its update.

The class statement registers the reader; see `peft_hra` for a short one. Formats with another layout, such as LoRA with
its variants, are functions with `reads`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import msgspec
import numpy as np

from lorascope.array_types import Float
from lorascope.files.printable import printable
from lorascope.files.safetensors_io import TensorFile
from lorascope.files.typed_json import to_typed
from lorascope.formats.adapter_faults import AdapterFault
from lorascope.formats.peft_config import CONFIG, KINDS, peft_kind
from lorascope.formats.peft_factors import (
    INDICES,
    Factors,
    StoredFactors,
    check_fit,
    check_shapes,
    peft_factors,
    shared_factor,
    stored_shape,
)
from lorascope.formats.peft_merge import read_merged
from lorascope.formats.pretrained_weights import OptionalBase, named_base, require_base
from lorascope.formats.readers import Config, Needs, WeightFiles, reads
from lorascope.formats.stored_update import AdapterFiles
from lorascope.schema.name_patterns import per_module
from lorascope.updates import Update
from lorascope.updates.linalg import as_float64

Arrays = Mapping[str, np.ndarray]
Sizes = Mapping[str, int]
_PATTERNS = {"rank_pattern": "r", "alpha_pattern": "alpha", "n_frequency_pattern": "n_frequency"}
"""Settings of single modules, and the settings that they replace."""
_REASONS = {"shapes": "stores no shapes", "base": "changes the weights of its base"}
"""Reasons why updates require a base."""


@dataclass(frozen=True)
class PeftModule:
    """Stored tensors of one module in a PEFT format, whose shapes fit each other and the base weight.

    Parameters
    ----------
    path : path
        The adapter, for error messages.
    name : str
    tensors, shared : mapping name -> StoredTensor
        Tensors of the module, and those of all modules.
    sizes : mapping name -> int
        Sizes that the shapes name, such as settings, and with a base ``out`` and ``in``.
    shape : (int, int)
        Shape of the base weight, (out, in); (0, 0) without a base.
    transposed : bool
        Whether the base stores the weight as (in, out).
    base : PretrainedWeights, optional
    """

    path: Path
    name: str
    tensors: Factors
    shared: Factors
    sizes: Sizes
    shape: tuple[int, int]
    transposed: bool
    base: OptionalBase

    def weight(self) -> Float[np.ndarray, "out in"]:
        """Load the base weight in float64."""
        assert self.base is not None
        return as_float64(self.base.weight(self.name, self.shape, self.transposed))

    def check_indices(self, name: str, *sizes: int) -> None:
        """Check that indices are integers from 0 to below ``sizes``, one size for all or one per row."""
        indices = self.tensors[name].read()
        inside = (indices >= 0) & (indices < np.array(sizes)[:, None]) & (indices == np.floor(indices))
        if not inside.all():
            limits = " and ".join(map(str, sizes))
            must = f"{name} of {printable(self.name)} must be integers from 0 to below {limits}"
            raise self.error(f"{must}, got {indices[~inside][0]:g}")

    def error(self, reason: str) -> ValueError:
        """Return the error for tensors that the format does not allow."""
        return AdapterFault("shape", self.path, reason)


class PeftFormat(msgspec.Struct, frozen=True):
    """Format of one type of PEFT adapter; a subclass's fields are its settings, with PEFT's defaults.

    Class attributes
    ----------------
    kind : str
        Name of the type; PEFT writes it in capitals, without hyphen.
    needs : {"files", "shapes", "base"}
        What updates require: the adapter's files, also the shapes of the base weights, or also their values.
    tensors : mapping name -> str
        Tensors of a module, with shapes such as ``"r in"`` in the notation of `check_shapes`. A size with the name of
        a setting is that setting. Tensors with ``indices`` in their names contain integers.
    shared : mapping name -> str
        Tensors that are stored once for all modules, as ``base_model.NAME``, with their shapes.
    frozen : tuple of str
        Names of tensors that are not trained; indices never are.
    """

    kind: ClassVar[str]
    needs: ClassVar[Literal["files", "shapes", "base"]] = "files"
    tensors: ClassVar[Mapping[str, str]]
    shared: ClassVar[Mapping[str, str]] = {}
    frozen: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        peft_type = cls.kind.upper().replace("-", "")

        def read(path: Path, config: Config, files: WeightFiles, base: OptionalBase) -> AdapterFiles:
            return to_typed(config, cls, path / CONFIG)._read(path, config, files, base)

        # Readers are registered by name, and belong to the package that their module is in.
        read.__name__, read.__module__ = f"read_{peft_type.lower()}", cls.__module__
        needs: Needs = "files" if cls.needs == "files" else "base"
        reads(lambda config, names: peft_kind(config) == peft_type, f"{cls.kind} (PEFT)", needs)(read)
        KINDS.append(peft_type)

    def update(self, *arguments: Any) -> Update:
        """Return the update of a module from its arrays, in float64 or, for indices, int64.

        The second argument is the base weight W0 (out, in) in float64 if ``needs`` is "base", and the `PeftModule` if
        it is "shapes".
        """
        raise NotImplementedError

    def shape(self, sizes: Sizes) -> tuple[int, int]:
        """Return the shape (out, in) that the tensors imply, which must be that of the base weight."""
        return sizes["out"], sizes["in"]

    def rank(self, sizes: Sizes) -> int | None:
        """Return the rank of an update in low-rank factors, None for a matrix."""
        return None

    @property
    def scale(self) -> float:
        """Factor of the update, for display; ``update`` applies it."""
        return 1.0

    def required(self, module: PeftModule) -> Mapping[str, str]:
        """Return the tensors that a module must have, with their shapes."""
        return self.tensors

    def check(self, module: PeftModule) -> None:
        """Raise a ValueError for tensors of the right shapes that cannot be used."""

    def notes(self) -> tuple[str, ...]:
        """Return cautions about the whole adapter."""
        return ()

    def requires_peft(self, files: Iterable[TensorFile]) -> bool:
        """Return whether only PEFT computes the updates of these files."""
        return False

    def common_sizes(self, shapes: Collection[tuple[int, int]]) -> dict[str, int]:
        """Return the sizes that follow from the shapes of all base weights."""
        return {}

    def shared_tensors(self) -> Mapping[str, str]:
        """Return the tensors that are stored once for all modules, with their shapes."""
        return self.shared

    def of_module(self, source: Path) -> Callable[[str], PeftFormat]:
        """Return the function from a module to its settings; ``source`` is the configuration, for error messages."""
        values = {}
        for pattern, setting in _PATTERNS.items():
            if hasattr(self, pattern):
                values[setting] = per_module(source, pattern, getattr(self, setting), getattr(self, pattern))
        return lambda module: msgspec.structs.replace(self, **{name: value(module) for name, value in values.items()})

    def stored_update(self, module: PeftModule) -> StoredFactors:
        """Return the stored update of a module."""
        shape, rank = self.shape(module.sizes), self.rank(module.sizes)
        build, thin = partial(self._build, module), rank is not None
        if rank is None:
            rank = min(shape)
        return StoredFactors(module.tensors, shape, rank, build, self.scale, module.transposed, thin, self.frozen)

    def _build(self, module: PeftModule, stored: Arrays) -> Update:
        arrays = {}
        for name, array in stored.items():
            # Indices are int32, but PEFT saves those of SHiRA as float32 on Windows.
            arrays[name] = array.astype(np.int64) if INDICES in name else as_float64(array)
        for name, tensor in module.shared.items():
            arrays[name] = as_float64(tensor.file[tensor.name])
        if self.needs == "files":
            return self.update(arrays)
        if self.needs == "base":
            return self.update(arrays, module.weight())
        return self.update(arrays, module)

    def _read(self, path: Path, config: Config, files: WeightFiles, base: OptionalBase) -> AdapterFiles:
        if self.requires_peft(files):
            return read_merged(path, config, files, base)
        weights: OptionalBase = None
        if self.needs != "files":
            weights = require_base(path, config, base, f"{self.kind} {_REASONS[self.needs]}")
        module_tensors, other_names = peft_factors(path, files, self.tensors)
        shapes = dict.fromkeys(module_tensors, (0, 0))
        if weights is not None:
            for name, tensors in module_tensors.items():
                shapes[name] = weights.shape(name, self._is_transposed(tensors))
        shared = {name: shared_factor(path, files, name) for name in self.shared_tensors()}
        known_sizes = self._int_settings() | self.common_sizes(shapes.values())
        sizes = check_shapes(path, "all modules", shared, self.shared_tensors(), **known_sizes)
        settings_of, updates = self.of_module(path / CONFIG), {}
        for name, tensors in module_tensors.items():
            transposed = self._is_transposed(tensors)
            module = PeftModule(path, name, tensors, shared, sizes, shapes[name], transposed, weights)
            updates[name] = settings_of(name)._read_module(module)
        trained = sum(math.prod(stored_shape(shared[name])) for name in shared.keys() - set(self.frozen))
        # PEFT may store the shared tensors a second time under every module.
        other_names = tuple(name for name in other_names if not name.endswith(tuple(self.shared)))
        needs_base = weights is not None and named_base(config) is None
        return AdapterFiles(
            path, dict(config), updates, other_names, files, self.kind, needs_base, self.notes(), shared_size=trained
        )

    def _read_module(self, module: PeftModule) -> StoredFactors:
        """Check a module with the settings that it has, and return its stored update."""
        known_sizes = {**module.sizes, **self._int_settings()}  # patterns may give a module other settings
        sizes = check_shapes(module.path, module.name, module.tensors, self.required(module), **known_sizes)
        if module.base is not None:
            # The base has only the sizes that no tensor shows, so that `check_fit` compares the others with it.
            sizes = {"out": module.shape[0], "in": module.shape[1]} | sizes
            check_fit(module.path, module.name, self.shape(sizes), module.shape)
        module = replace(module, sizes=sizes)
        self.check(module)
        return self.stored_update(module)

    def _int_settings(self) -> dict[str, int]:
        # type() is exact: a bool is also an instance of int, and no size.
        return {name: value for name, value in msgspec.structs.asdict(self).items() if type(value) is int}

    def _is_transposed(self, names: Collection[str]) -> bool:
        """Return whether the base stores the weight of a module with these tensors as (in, out)."""
        return bool(getattr(self, "fan_in_fan_out", False)) or any("embedding" in name for name in names)
