"""Reader of GGUF files as lazy mappings, for tensors that are not quantized.

The file starts with its magic number, its version, and the numbers of tensors and of metadata values. The values and
one entry per tensor follow, then the data. All numbers are little endian.

Source: ggml (``docs/gguf.md``).
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Container
from pathlib import Path
from typing import Any

from lorascope.files.printable import printable
from lorascope.files.safetensors_io import FileMap, TensorFile
from lorascope.files.typed_json import MAX_BYTES, require_regular

_VERSIONS = (2, 3)
_ALIGNMENT = 32  # unless the metadata set another one
_MAX_AXES = 4
# Formats of ``struct`` for the kinds of values; the missing ones are texts and arrays.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")  # of a text


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
        self.path = Path(path)
        size = require_regular(self.path)
        try:
            with self.path.open("rb") as file:
                self._map = FileMap(self.path, file.fileno())
                header = _Header(mmap.mmap(file.fileno(), min(size, MAX_BYTES), access=mmap.ACCESS_READ))
            if header.take("4s") != b"GGUF":
                raise ValueError("it must start with GGUF")
            if (version := header.take("I")) not in _VERSIONS:
                raise ValueError(f"version must be one of {', '.join(map(str, _VERSIONS))}, got {version}")
            tensors, values = header.take("Q"), header.take("Q")
            self.words = header.take_values(values)
            entries = header.take_entries(tensors)
            alignment = self.words.get("general.alignment", _ALIGNMENT)
            if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
                raise ValueError(f"general.alignment must be a power of two, got {alignment}")
        except ValueError as error:
            raise ValueError(f"cannot read {printable(self.path)} as GGUF: {printable(error)}") from error
        # The data starts at the next multiple of the alignment.
        self._start = -(-header.position // alignment) * alignment
        self._entries = self._parse_entries(entries, size)


class _Header:
    """Cursor in the header of a GGUF file, ``data``, of which arrays are skipped."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 0

    def skip(self, size: int) -> int:
        """Move behind the next bytes, and return where they start."""
        start = self.position
        self.position += size
        if self.position > len(self.data):
            raise ValueError(f"its header does not fit into {len(self.data)} bytes")
        return start

    def take(self, kind: str) -> Any:
        """Return the next value, in a format of ``struct``."""
        kind = f"<{kind}"
        return struct.unpack_from(kind, self.data, self.skip(struct.calcsize(kind)))[0]

    def take_text(self) -> str:
        """Return the next text."""
        size = self.take("Q")
        return self.data[self.skip(size) : self.position].decode()

    def take_name(self, names: Container[str]) -> str:
        """Return the next text, which must not be one of ``names``."""
        if (name := self.take_text()) in names:
            raise ValueError(f"{name} occurs twice")
        return name

    def take_values(self, count: int) -> dict[str, Any]:
        """Return the metadata, without its arrays."""
        values: dict[str, Any] = {}
        for _ in range(count):
            name, kind = self.take_name(values), self.take("I")
            values[name] = self.take_value(kind)
        return {name: value for name, value in values.items() if value is not None}

    def take_value(self, kind: int) -> Any:
        """Return the next number or text; None for an array, which is skipped."""
        if kind == _ARRAY:
            self.skip_array()
            return None
        return self.take_text() if kind == _TEXT else self.take(_format_of(kind))

    def skip_array(self) -> None:
        """Move behind the next array."""
        kind, count = self.take("I"), self.take("Q")
        if kind == _ARRAY:
            raise ValueError("arrays must not be nested")
        if kind != _TEXT:
            self.skip(count * struct.calcsize(f"<{_format_of(kind)}"))
            return
        position, size = self.position, len(self.data)  # in one loop, because a vocabulary has more than 100,000 texts
        for _ in range(count):
            position += _LENGTH.size
            if position > size:
                break
            position += _LENGTH.unpack_from(self.data, position - _LENGTH.size)[0]
        self.skip(position - self.position)

    def take_entries(self, count: int) -> dict[str, Any]:
        """Return the entries of the tensors by name, as in the header of a safetensors file."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType  # slow import

        entries: dict[str, Any] = {}
        for _ in range(count):
            name, axes = self.take_name(entries), self.take("I")
            if axes > _MAX_AXES:
                raise ValueError(f"{name} must have <= {_MAX_AXES} axes, got {axes}")
            # GGUF lists the dimensions with the fastest first.
            shape = [self.take("Q") for _ in range(axes)][::-1]
            kind, begin = GGMLQuantizationType(self.take("I")), self.take("Q")
            block, width = GGML_QUANT_SIZES[kind]
            end = begin + math.prod(shape) * width // block
            entries[name] = {"dtype": kind.name, "shape": shape, "data_offsets": [begin, end]}
        return entries


def _format_of(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"type of a value must be from 0 to 12, got {kind}")
    return _SCALARS[kind]
