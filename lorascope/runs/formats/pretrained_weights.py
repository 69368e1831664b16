"""Weights of a base model's folder, found by the names of modules and read one at a time; no model is built."""

from __future__ import annotations

import math
import os
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
from jaxtyping import Float

from lorascope.files.printable import printable
from lorascope.files.safetensors_io import FLOATS, TensorFile, Unread, open_tensors, refuse_pickles, weight_files
from lorascope.schema.module_roles import parse
from lorascope.schema.name_patterns import Ends


class PretrainedWeights:
    """A folder written by ``save_pretrained``: one safetensors file, or shards.

    Parameters
    ----------
    folder : path
        Or the file itself.

    Raises
    ------
    FileNotFoundError
        It holds no safetensors file, or a shard is missing.
    ValueError
        A file is broken, or is a pickle.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(os.path.expanduser(folder))
        self.files = tuple(map(open_tensors, _checkpoint_files(self.folder)))
        self._files = {name: file for file in self.files for name in file}
        self._ends = Ends(self._files)

    def has_weight(self, module: str) -> bool:
        """Is there a weight of this module? A tied one is stored under one of its names alone."""
        return self._find(module) is not None

    def shape(self, module: str, transposed: bool = False) -> tuple[int, int]:
        """(out, in) of a module's weight, from the header; ``transposed`` as in ``weight``.

        Raises
        ------
        ValueError
            There is no such weight.
        """
        first, *rest = self.stored_shape(module)
        return (math.prod(rest), first) if transposed else (first, math.prod(rest))

    def modules(self) -> list[str]:
        """Names of all modules that have a weight of two dimensions."""
        names = (name for name, file in self._files.items() if len(file.shape(name)) == 2)
        return [name.removesuffix(".weight") for name in names if name.endswith(".weight")]

    def stored_shape(self, module: str) -> tuple[int, ...]:
        """Shape of a module's weight as it is stored, of one dimension or more."""
        name = self._find_name(module)
        return self._files[name].shape(name) or (1,)

    def dtype(self, module: str) -> str:
        """Stored dtype of a module's weight, such as ``"BF16"``."""
        name = self._find_name(module)
        return self._files[name].dtype(name)

    def unread(self, module: str) -> Unread:
        """The weight of a module as it is stored, still unread.

        Raises
        ------
        ValueError
            There is no such weight, or it is not stored as floats.
        """
        name = self._find_name(module)
        return self._floats(name).unread(name)

    @cached_property
    def transposed(self) -> bool:
        """Does it store its linear layers as (in, out), as GPT-2 does? A bias is as long as the output."""
        for module in self.modules():
            outer, inner = self.stored_shape(module)
            bias = self._files.get(f"{module}.bias")
            if bias is not None and outer != inner and parse(module).layer is not None:
                return bias.shape(f"{module}.bias") == (inner,)
        return False

    def weight(self, module: str, shape: tuple[int, int], transposed: bool = False) -> Float[np.ndarray, "out in"]:
        """The weight of a module.

        Parameters
        ----------
        module : str
            Its name in the model; the checkpoint may lack the first parts of it, or have some before it.
        shape : (int, int)
            (out, in), as the update has it.
        transposed : bool
            Is it stored as (in, out)? Only asked for square ones: of others the shape tells.

        Raises
        ------
        ValueError
            There is no such weight, it has another shape, or is not stored as floats.
        """
        name = self._find_name(module)
        stored = self._floats(name)[name]
        first, *rest = stored.shape or (1,)
        flat = stored.reshape(first, math.prod(rest))
        square = shape[0] == shape[1]
        weight = flat.T if (transposed if square else flat.shape == shape[::-1]) else flat
        if weight.shape != shape:
            raise ValueError(
                f"{printable(self.folder)}: {printable(name)} has the shape {stored.shape}, the update needs {shape}: "
                "another model"
            )
        return weight

    def _floats(self, name: str) -> TensorFile:
        """The file of a tensor, if that is stored as floats: what is quantised means nothing without its scales."""
        file = self._files[name]
        if file.dtype(name) not in FLOATS:
            raise ValueError(
                f"{printable(file.path)}: {printable(name)} is stored as {printable(file.dtype(name))}; "
                "only floats are read: "
                "give the weights that are not quantised"
            )
        return file

    def _find_name(self, module: str) -> str:
        name = self._find(module)
        if name is None:
            raise ValueError(f"{printable(self.folder)} holds no weight of {printable(module)}")
        return name

    def _find(self, module: str) -> str | None:
        parts = f"{module}.weight".split(".")
        for start in range(len(parts) - 1):
            if (name := ".".join(parts[start:])) in self._files:
                return name
        longer = list(islice(self._ends.names_with_end(f".{module}.weight"), 2))
        return longer[0] if len(longer) == 1 else None


def _checkpoint_files(folder: Path) -> list[Path]:
    if folder.exists() and not folder.is_dir():
        return [folder]
    if not folder.exists():
        raise FileNotFoundError(f"there is no folder {printable(folder)}")
    # Besides the weights of transformers a folder may hold the same ones in the authors' own layout.
    found = weight_files(folder, "model")
    others = (file for file in sorted(folder.glob("*.safetensors")) if file.is_file())
    found = found or [file for file in others if not file.name.startswith("adapter_")]
    if not found:
        refuse_pickles(folder.glob("*model*"))
        raise FileNotFoundError(f"{printable(folder)} holds no safetensors file: give the folder of the base model")
    return found
