"""Weights in a model folder, found by module name and loaded one at a time without building the model."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lorascope.array_types import Float
from lorascope.files.printable import printable
from lorascope.files.safetensors_io import FLOATS, TensorFile, Unread, open_tensors, reject_pickles, weight_files
from lorascope.files.small_floats import FLOAT8
from lorascope.files.typed_json import read_json, unreadable
from lorascope.formats.adapter_faults import BaseMisfit
from lorascope.formats.transformers_names import Tree, tree
from lorascope.schema.module_roles import parse
from lorascope.schema.name_patterns import Ends

_EXPERTS = ".mlp."  # in transformers; the files of Mixtral and MiniMax have another name


class PretrainedWeights:
    """Pretrained weights in a model folder: one safetensors file, shards, or a pipeline of diffusers.

    Parameters
    ----------
    folder : path
        The folder, or the safetensors file itself.

    Raises
    ------
    FileNotFoundError
        The folder has no safetensors file, or a shard is missing.
    ValueError
        A file is broken or is a pickle.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(os.path.expanduser(folder))
        self.files = tuple(_open_model(self.folder))
        self._stored = _Tensors(self.files)
        self._names: Mapping[str, str] = {}

    def has_weight(self, module: str) -> bool:
        """Return whether a module has a weight; a tied one is stored under only one of its names."""
        return self._find(module) is not None

    def shape(self, module: str, transposed: bool = False) -> tuple[int, int]:
        """Return (out, in) of a module's weight from the header; see ``weight`` for ``transposed`` and errors."""
        first, *inner_sides = self.stored_shape(module)
        shape = first, math.prod(inner_sides)
        return shape[::-1] if transposed else shape

    def all_modules(self) -> list[str]:
        """Return the names of all modules that have a weight."""
        return [name.removesuffix(".weight") for name in self._stored.files if name.endswith(".weight")]

    def modules(self) -> list[str]:
        """Return the names of all modules whose weight has two dimensions."""
        return [module for module in self.all_modules() if len(self._stored.shape(f"{module}.weight")) == 2]

    def named_as(self, modules: Collection[str]) -> dict[str, tuple[int, ...]]:
        """Return the stored shapes of all tensors, by their names in the files or in the module tree.

        The names are those that more of the modules have.
        """
        namings = [naming for naming in (self._stored, self._tree) if naming is not None]
        naming = max(namings, key=lambda naming: sum(f"{module}.weight" in naming.files for module in modules))
        return {name: naming.shape(name) for name in naming.files}

    def is_converted(self, module: str) -> bool:
        """Return whether transformers computes the weight of a module from several tensors of the files."""
        return self._tree_names is not None and f"{module}.weight" in self._tree_names.converted

    def stored_shape(self, module: str) -> tuple[int, ...]:
        """Return the stored shape of a module's weight, with at least one dimension."""
        name = self._find_name(module)
        return self.file(name).shape(name) or (1,)

    def dtype(self, module: str) -> str:
        """Return the stored dtype of a module's weight, such as ``"BF16"``."""
        name = self._find_name(module)
        return self.file(name).dtype(name)

    def bias(self, module: str) -> Float[np.ndarray, "n"] | None:
        """Load the bias of a module, None if there is none."""
        name = self.find_tensor(f"{self._names.get(module, module)}.bias")
        if name is None:
            return None
        return self._floats(name)[name].reshape(-1)

    def unread(self, module: str) -> Unread:
        """Return the memory-mapped weight of a module, whose values are not read yet; see ``weight`` for errors."""
        name = self._find_name(module)
        return self._floats(name).unread(name)

    @cached_property
    def transposed(self) -> bool:
        """Return whether linear layers are stored as (in, out), as in GPT-2, judging by the length of a bias."""
        for module in self.modules():
            outer, inner = self.stored_shape(module)
            bias = self._stored.files.get(f"{module}.bias")
            if bias is not None and outer != inner and parse(module).layer is not None:
                return bias.shape(f"{module}.bias") == (inner,)
        return False

    def weight(self, module: str, shape: tuple[int, int], transposed: bool = False) -> Float[np.ndarray, "out in"]:
        """Load the weight of a module, whose name in the checkpoint may lack first parts or have others before it.

        ``shape`` is the shape of the update, (out, in). It shows whether the weight is stored as (in, out); for a
        square weight, ``transposed`` does.

        Raises
        ------
        ValueError
            The module has no weight, it does not have this shape, or it is not stored as floats.
        """
        name, stored = self._read(module)
        first, *inner_sides = stored.shape or (1,)
        weight = stored.reshape(first, math.prod(inner_sides))
        square = shape[0] == shape[1]
        # The stored shape shows the orientation of any other weight.
        if (square and transposed) or (not square and weight.shape == shape[::-1]):
            weight = weight.T
        if weight.shape != shape:
            raise BaseMisfit(self.folder, f"{printable(name)} must have shape {shape}, got {stored.shape}")
        return weight

    def renamed(self, names: Mapping[str, str]) -> PretrainedWeights:
        """Return the same weights by other names; modules that are not in ``names`` have the same name."""
        weights = copy.copy(self)
        weights._names = names
        return weights

    def named_alike(self, other: PretrainedWeights) -> PretrainedWeights:
        """Return the weights of another folder by the names of these, such as those of a merged model."""
        weights = other.renamed(self._names)
        if not other._config:  # a single file, which was saved from the same class
            vars(weights).pop("_tree_names", None)
            weights._config = self._config
        return weights

    def stored_names(self, module: str) -> list[str]:
        """Return the names of the tensors that contain the weight of a module; empty if it has none."""
        name = self._find(module)
        return [] if name is None else [self.in_files(name)]

    def _read(self, module: str) -> tuple[str, np.ndarray]:
        """Return the name of a module's weight in the files, and the array."""
        name = self._find_name(module)
        return name, self._floats(name)[name]

    def _floats(self, name: str) -> TensorFile:
        """Return the file of a tensor stored as floats; quantized values are meaningless without their scales."""
        file = self.file(name)
        is_scaled = file.dtype(name) in FLOAT8 and self._has_scale(name)
        if is_scaled or file.dtype(name) not in FLOATS:
            stored = f"{printable(file.dtype(name))}; use the weights before quantization"
            if is_scaled:
                stored = f"scaled {stored}"
            raise unreadable(file.path, f"{printable(name)} must be stored as one of {', '.join(FLOATS)}, got {stored}")
        return file

    def _has_scale(self, name: str) -> bool:
        """Return whether a tensor of the same module is a scale, such as ``weight_scale_inv`` or ``scale_weight``."""
        module = self.in_files(name).rpartition(".")[0]
        for other in self._stored.files:
            if other.startswith(f"{module}.") and "scale" in other.removeprefix(module):
                return True
        return False

    def _find_name(self, module: str) -> str:
        name = self._find(module)
        if name is None:
            raise BaseMisfit(self.folder, f"it has no weight of {printable(module)}")
        return name

    def _find(self, module: str) -> str | None:
        module = self._names.get(module, module)
        if module.endswith(".in_proj"):  # nn.MultiheadAttention has the parameter in_proj_weight
            return self.find_tensor(f"{module}_weight")
        return self.find_tensor(f"{module}.weight")

    def find_tensor(self, tensor: str) -> str | None:
        """Return the name of a tensor in the files or in the module tree."""
        namings = [naming for naming in (self._stored, self._tree) if naming is not None]
        for naming in namings:
            if tensor in naming.files:
                return tensor
        for naming in namings:
            if (name := naming.find(tensor)) is not None:
                return name
        return None

    def in_files(self, name: str) -> str:
        """Return the name in the files of a tensor with a name there or in the module tree."""
        if name in self._stored.files or self._tree_names is None:
            return name
        return next(stored for stored, new_names in self._tree_names.names.items() if name in new_names)

    def file(self, name: str) -> TensorFile:
        """Return the file of a tensor, by its name there or in the module tree."""
        if name in self._stored.files or self._tree is None:
            return self._stored.files[name]
        return self._tree.files[name]

    @cached_property
    def _tree(self) -> _Tensors | None:
        """Tensors by their names in the module tree of transformers, None if those in the files are the same."""
        names = self._tree_names
        if names is None or all(new_names == [name] for name, new_names in names.names.items()):
            return None
        return _Tensors([file.renamed(names.names) for file in self.files])

    @cached_property
    def _tree_names(self) -> Tree | None:
        return tree(self._config, self._stored.files) if self._config else None

    @cached_property
    def _config(self) -> dict[str, Any]:
        file = self.folder / "config.json"
        return read_json(file, dict[str, Any]) if file.is_file() else {}

    @property
    def architectures(self) -> Any:
        """Classes of transformers that the model was saved from, None if they are not known."""
        return self._config.get("architectures")

    def tensor_names(self) -> list[str]:
        """Return the names of all tensors in the files."""
        return list(self._stored.files)

    def tree_names(self, name: str) -> Sequence[str]:
        """Return the names in the module tree of a tensor in the files; several are equal blocks of rows."""
        return [name] if self._tree_names is None else self._tree_names.names[name]


class _Tensors:
    """Tensors of several files by name."""

    def __init__(self, files: Iterable[TensorFile]) -> None:
        self.files = {name: file for file in files for name in file}
        self._ends = Ends(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the stored shape of a tensor."""
        return self.files[name].shape(name)

    def find(self, tensor: str) -> str | None:
        """Return the full name of a tensor whose name lacks first parts, or has others before it."""
        segments = tensor.split(".")
        for start in range(len(segments) - 1):  # the last segment, such as weight, names no module
            if (name := ".".join(segments[start:])) in self.files:
                return name
        # A second match is enough to know that the name is ambiguous.
        longer = list(islice(self._ends.names_with_end(f".{tensor}"), 2))
        if not longer and _EXPERTS in tensor:
            return self.find(tensor.replace(_EXPERTS, ".block_sparse_moe."))
        return longer[0] if len(longer) == 1 else None


OptionalBase = PretrainedWeights | None


def _open_model(folder: Path) -> Iterator[TensorFile]:
    """Open the files of a model, or those of all models of a pipeline; their names then start with that of a folder."""
    if not (folder / "model_index.json").exists():  # it lists the models of a pipeline of diffusers
        yield from map(open_tensors, _checkpoint_files(folder))
        return
    for component in sorted({file.parent for file in folder.glob("*/*.safetensors")}):
        for file in _checkpoint_files(component):
            yield open_tensors(file).prefixed(f"{component.name}.")


def _checkpoint_files(folder: Path) -> list[Path]:
    if folder.exists() and not folder.is_dir():
        return [folder]
    if not folder.exists():
        raise FileNotFoundError(f"cannot read model {printable(folder)}: the folder does not exist")
    # A folder may contain the same weights twice: in the layout of transformers and in that of the model's authors.
    files = weight_files(folder, "model")
    if not files:
        other_files = filter(Path.is_file, sorted(folder.glob("*.safetensors")))
        # PEFT's adapter_model.safetensors is not a model.
        files = [file for file in other_files if not file.name.startswith("adapter_")]
    if not files:
        reject_pickles(folder.glob("*model*"))
        raise FileNotFoundError(f"cannot read model {printable(folder)}: it has no safetensors file of a model")
    return files


def named_base(config: Mapping[str, Any]) -> OptionalBase:
    """Return the pretrained weights that an adapter's configuration names, if they are in a local folder."""
    name = config.get("base_model_name_or_path")
    if not name or "\0" in name:
        return None
    folder = Path(os.path.expanduser(name))
    if not folder.is_dir() or not any(folder.glob("*.safetensors")):
        return None
    return PretrainedWeights(folder)


def base_with_weight(base: OptionalBase, module: str) -> OptionalBase:
    """Return the given weights if they include that of a module, else None."""
    if base is not None and base.has_weight(module):
        return base
    return None


def require_base(path: Path, config: Mapping[str, Any], base: OptionalBase, reason: str) -> PretrainedWeights:
    """Return pretrained weights for an adapter that needs them for a reason: the given ones, else those it names."""
    weights = base or named_base(config)
    if weights is None:
        model = "its base model"
        if name := config.get("base_model_name_or_path"):
            model += f", {printable(name)}"
        raise unreadable(path, f"{reason}: pass {model}, as base= or --base DIR")
    return weights
