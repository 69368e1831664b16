"""Reader of GGUF files as lazy mappings, for tensors that are not quantized."""

from __future__ import annotations

import struct
from pathlib import Path

from lorascope.files.printable import printable
from lorascope.files.safetensors_io import MAX_NAME, TensorFile, _Entry
from lorascope.files.typed_json import require_regular, unreadable


class GgufFile(TensorFile):
    """GGUF file as a lazy mapping from tensor names to arrays, with the axes in numpy's order.

    Attributes
    ----------
    words : dict
        Metadata: numbers and strings; arrays are left out.

    Raises
    ------
    ValueError
        The file is not a valid GGUF file, or is truncated.
    """

    def __init__(self, path: str | Path) -> None:
        import gguf  # slow import

        self.path = Path(path)
        size = require_regular(self.path)
        try:
            reader = gguf.GGUFReader(self.path)
            scalars = [field for field in reader.fields.values() if field.types[:1] != [gguf.GGUFValueType.ARRAY]]
            self.words = {field.name: field.contents() for field in scalars}
            tensors = reader.tensors
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, struct.error) as error:
            raise ValueError(f"cannot read {printable(self.path)} as GGUF: {printable(error)}") from error
        self._start, self._entries = 0, {}
        for tensor in tensors:
            begin = int(tensor.data_offset)
            # GGUF lists the dimensions with the fastest first.
            shape = tuple(map(int, reversed(tensor.shape)))
            name = tensor.name[: MAX_NAME + 1]
            entry = _Entry(tensor.tensor_type.name, shape, (begin, begin + int(tensor.n_bytes)))
            if entry.data_offsets[1] > size:
                raise unreadable(self.path, f"it is truncated, {size} of {entry.data_offsets[1]} bytes")
            self._entries[name] = entry
