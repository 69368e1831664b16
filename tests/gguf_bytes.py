"""GGUF files byte by byte, with any error."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

KINDS = {
    "float32": 0, "float16": 1, "uint8": 24, "int8": 24, "int16": 25, "int32": 26, "int64": 27, "float64": 28,
}  # fmt: skip
"""Types of tensors, GGUF's number of each; it has no unsigned integers."""


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def value(key: bytes, kind: int, content: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + content


def array(kind: int, count: int, content: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + content


def entry(name: bytes, sides: tuple[int, ...], kind: int = 0, offset: int = 0, axes: int | None = None) -> bytes:
    axes = len(sides) if axes is None else axes
    return text(name) + struct.pack(f"<I{len(sides)}QIQ", axes, *sides, kind, offset)


ADAPTER = (value(b"general.type", 8, text(b"adapter")), value(b"adapter.type", 8, text(b"lora")))


def header(*values: bytes, tensors: tuple[bytes, ...] = (), counts: tuple[int, int] | None = None) -> bytes:
    counts = counts or (len(tensors), len(values))
    return b"GGUF" + struct.pack("<IQQ", 3, *counts) + b"".join(values + tensors)


def write_gguf(file: Path, tensors: Mapping[str, np.ndarray], *values: bytes) -> None:
    """Write tensors and metadata values."""
    entries, data = [], b""
    for name, stored in tensors.items():
        entries.append(entry(name.encode(), stored.shape[::-1], KINDS[stored.dtype.name], len(data)))
        data += stored.tobytes()
        data += bytes(-len(data) % 32)
    start = header(*values, tensors=tuple(entries))
    file.write_bytes(start + bytes(-len(start) % 32) + data)
