"""Weights of a base model's folder, found by the names of modules and read one at a time; no model is built."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from jaxtyping import Float

from lorascope.tensors import TensorFile


class Pretrained:
    """A folder written by ``save_pretrained``: one safetensors file, or shards.

    Parameters
    ----------
    folder : path

    Raises
    ------
    FileNotFoundError
        It holds no safetensors file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{self.folder} holds no safetensors file: give the folder of the base model")
        self._files = {name: file for file in map(TensorFile, files) for name in file}

    def holds(self, module: str) -> bool:
        """Is there a weight of this module? A tied one is stored under one of its names alone."""
        return self._find(module) is not None

    def shape(self, module: str, transposed: bool = False) -> tuple[int, int]:
        """(out, in) of a module's weight, from the header; ``transposed`` as in ``weight``.

        Raises
        ------
        ValueError
            There is no such weight.
        """
        name = self._name(module)
        first, *rest = self._files[name].shape(name)
        return (math.prod(rest), first) if transposed else (first, math.prod(rest))

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
            There is no such weight, or it has another shape.
        """
        name = self._name(module)
        stored = self._files[name][name]
        flat = stored.reshape(len(stored), -1)
        square = shape[0] == shape[1]
        weight = flat.T if (transposed if square else flat.shape == shape[::-1]) else flat
        if weight.shape != shape:
            raise ValueError(
                f"{self.folder}: {name} has the shape {stored.shape}, the update needs {shape}: "
                "another model, or quantised weights"
            )
        return weight

    def _name(self, module: str) -> str:
        name = self._find(module)
        if name is None:
            raise ValueError(f"{self.folder} holds no weight of {module}")
        return name

    def _find(self, module: str) -> str | None:
        parts = f"{module}.weight".split(".")
        for start in range(len(parts) - 1):
            if (name := ".".join(parts[start:])) in self._files:
                return name
        longer = [name for name in self._files if name.endswith(f".{module}.weight")]
        return longer[0] if len(longer) == 1 else None
