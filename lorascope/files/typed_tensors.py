"""Arrays with the dtype that a file stores, including bfloat16 and float8, and their bytes as safetensors.

numpy has neither, so their values are in an array of float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from lorascope.files.safetensors_io import TensorFile
from lorascope.files.small_floats import ENCODED, decode, encode

_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


@dataclass(frozen=True, eq=False)
class TypedTensor:
    """Typed tensor: an array and the dtype that it is stored in.

    Parameters
    ----------
    values : array
    dtype : str
        Name in safetensors, such as ``"BF16"``.
    """

    values: np.ndarray
    dtype: str

    @classmethod
    def fitting(cls, values: np.ndarray, dtype: str) -> TypedTensor:
        """Return an array in this dtype of floats if it represents all values exactly, else rounded to float32."""
        tensor = cls(values, dtype)
        return tensor if tensor.exact else cls(values, "F32")

    @classmethod
    def read(cls, file: TensorFile, name: str) -> TypedTensor:
        """Load a tensor of a file."""
        return cls(file[name], file.dtype(name))

    def map(self, change: Callable[[np.ndarray], np.ndarray]) -> TypedTensor:
        """Return the tensor with changed values, in the same dtype."""
        return TypedTensor(change(self.values), self.dtype)

    @property
    def exact(self) -> bool:
        """Whether the dtype represents all values exactly."""
        stored = self._stored()
        if self.dtype in ENCODED:
            stored = decode(stored, self.dtype)
        return np.array_equal(stored, self.values, equal_nan=True)

    def _stored(self) -> np.ndarray:
        """Return the array whose bytes are stored."""
        if self.dtype in ENCODED:
            return encode(self.values, self.dtype)
        with np.errstate(over="ignore"):
            dtype = _FLOATS.get(self.dtype, self.values.dtype)
            return np.ascontiguousarray(self.values, dtype).reshape(self.values.shape)


def safetensors_bytes(tensors: Mapping[str, TypedTensor], words: Mapping[str, str]) -> bytes:
    """Return typed tensors as the content of a safetensors file.

    Tensors are ordered like those of the library: larger items first, then by name.

    Parameters
    ----------
    tensors : mapping name -> TypedTensor
    words : mapping
        Metadata of the header.
    """
    header: dict[str, object] = {"__metadata__": dict(words)}
    data: list[bytes] = []
    end = 0
    arrays = {name: tensor._stored() for name, tensor in tensors.items()}
    for name in sorted(arrays, key=lambda name: (-arrays[name].itemsize, name)):
        array, begin = arrays[name], end
        end += array.nbytes
        offsets = [begin, end]
        header[name] = {"dtype": tensors[name].dtype, "shape": list(array.shape), "data_offsets": offsets}
        data.append(array.tobytes())
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *data])
