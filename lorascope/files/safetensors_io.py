"""Reader and writer of safetensors files in numpy.

The file starts with the length of the header in eight bytes, followed by the JSON header and the data. Files are
memory-mapped, so reading one tensor of a large file loads only that tensor. bfloat16 and float8, which numpy does not
have, are converted to float32.
"""

from __future__ import annotations

import copy
import json
import math
import mmap
import os
import shlex
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from safetensors.numpy import save

from lorascope.files.file_names import is_plain
from lorascope.files.printable import printable
from lorascope.files.small_floats import ENCODED, FLOAT8, decode
from lorascope.files.typed_json import Count, parse_json, read_json, require_regular, require_size, to_typed, unreadable
from lorascope.files.whole_files import write_bytes

_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1", "F8_E4M3": "|u1", "F8_E5M2": "|u1",
}  # fmt: skip

FLOATS = ("F64", "F32", "F16", "BF16", *FLOAT8)
_CONVERT = (
    'python -c "import sys, torch; from safetensors.torch import save_file; '
    'save_file(torch.load(sys.argv[1], weights_only=True), sys.argv[2])" {0} {1}'
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Files that a Trainer saves next to the weights.
_STATES = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")
# Module names are far shorter, and the time to search a name grows with the square of its length.
MAX_NAME = 1000
# Arrays of this many bytes may be in memory before those read earlier are released: a large file is read in turn.
_RESIDENT = 2**22
_RELEASE = getattr(mmap, "MADV_DONTNEED", None)  # pages return from the file when they are read again
# The header has a single metadata entry, because the order of several entries differs between writes.
_ABOUT = "about"


class _Entry(msgspec.Struct, frozen=True):
    """Header entry of one tensor."""

    dtype: str
    shape: Annotated[tuple[Count, ...], msgspec.Meta(max_length=32)]
    data_offsets: tuple[Count, Count]

    @property
    def count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def file_version(file: int | Path) -> tuple[int, ...]:
    """Return what changes if a safetensors file, given as open or by path, is replaced or written to."""
    status = os.stat(file)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class FileMap:
    """Memory map of a whole file, shared by all its arrays, because each map keeps a file handle open.

    The map is closed with the last of the arrays.
    """

    def __init__(self, path: Path, file: int) -> None:
        self.path = path
        self._version = file_version(file)
        self._open_map: Callable[[], mmap.mmap | None] = lambda: None
        self._used = 0

    def array(self, stored: np.dtype, count: int, start: int) -> np.ndarray:
        """Return ``count`` values from a position in the file."""
        self._require_same_version(self.path)
        mapped = self._open_map()
        if mapped is None:
            mapped = self._map()
        self._used += count * stored.itemsize
        if self._used > _RESIDENT and _RELEASE is not None:
            mapped.madvise(_RELEASE)
            self._used = 0
        return np.frombuffer(mapped, stored, count, start)

    def _map(self) -> mmap.mmap:
        file = os.open(self.path, os.O_RDONLY)  # in a fifth of the time of ``open``
        try:
            self._require_same_version(file)
            mapped = mmap.mmap(file, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(file)
        self._open_map = weakref.ref(mapped)
        return mapped

    def _require_same_version(self, file: int | Path) -> None:
        if file_version(file) != self._version:  # the header gives no positions in another file
            raise unreadable(self.path, "it was replaced or changed after it was opened; open it again")


class TensorFile(Mapping[str, Any]):
    """Safetensors file as a lazy mapping from tensor names to arrays.

    Attributes
    ----------
    words : dict
        Metadata of the header; {} if there is none.

    Raises
    ------
    ValueError
        The file is not a valid safetensors file, or is truncated.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        cannot = f"cannot read {printable(self.path)} as safetensors"
        size = require_regular(self.path)
        with self.path.open("rb") as file:
            self._map = FileMap(self.path, file.fileno())
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError(f"{cannot}: its header does not fit into {size} bytes")
            require_size(length, f"the header of {self.path}")
            header = to_typed(parse_json(file.read(length), f"the header of {self.path}"), dict[str, Any], self.path)
        self._start = 8 + length
        words = header.pop("__metadata__", None)
        self.words = {} if words is None else to_typed(words, dict[str, Any], f"__metadata__ of {path}")
        self._entries = self._parse_entries(header, size)
        used, data, last = 0, size - self._start, 0
        for begin, end in sorted(entry.data_offsets for entry in self._entries.values()):
            if begin < last:
                raise ValueError(f"{cannot}: its tensors overlap")
            used, last = used + end - begin, end
        # As safetensors itself requires: bytes without a tensor may be a shifted header.
        if used != data:
            raise ValueError(f"{cannot}: {data - used} of {data} bytes of data belong to no tensor")

    def _parse_entries(self, contents: Mapping[str, Any], size: int) -> dict[str, _Entry]:
        """Return the header entries of all tensors, after checking that the file has their bytes."""
        entries = {name: self._parse_entry(name, content) for name, content in contents.items()}
        required = max((self._start + entry.data_offsets[1] for entry in entries.values()), default=0)
        if required > size:
            raise unreadable(self.path, f"it is truncated, {size} of {required} bytes")
        return entries

    def _parse_entry(self, name: str, content: Any) -> _Entry:
        """Return the header entry of one tensor, after checking its offsets against its shape."""
        source = f"{self.path}, the header's entry for {name[:MAX_NAME]}"
        if len(name) > MAX_NAME:
            raise unreadable(source, f"name must be <= {MAX_NAME} characters, got {len(name)}")
        entry = to_typed(content, _Entry, source)
        begin, end = entry.data_offsets
        width = np.dtype(_DTYPES.get(entry.dtype, "|u1")).itemsize
        # numpy also rejects an empty array if the product of its other dimensions overflows.
        fits = math.prod(side or 1 for side in entry.shape) * width < 2**63
        if not (fits and begin <= end and (end - begin == entry.count * width or entry.dtype not in _DTYPES)):
            raise unreadable(source, f"data_offsets must match shape {entry.shape}, got {begin} and {end}")
        return entry

    @cached_property
    def about(self) -> dict[str, Any]:
        """Description that ``write_tensors`` stored with the arrays, {} if there is none; parsed only on access."""
        source = f"{_ABOUT} of {self.path}"
        return to_typed(parse_json(to_typed(self.words.get(_ABOUT, "{}"), str, source), source), dict[str, Any], source)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.unread(name).read()

    def unread(self, name: str) -> Unread:
        """Return a memory-mapped tensor whose values are not read yet."""
        entry = self._entries[name]
        if entry.dtype not in _DTYPES:
            raise unreadable(f"{name} of {self.path}", f"numpy has no dtype {printable(entry.dtype)}")
        stored, encoding = np.dtype(_DTYPES[entry.dtype]), ""
        if entry.dtype in ENCODED:
            encoding = entry.dtype
        if not entry.count:
            return Unread(np.zeros(entry.shape, stored), encoding)
        return Unread(self._values(entry, stored).reshape(entry.shape), encoding)

    def bits(self, name: str) -> np.ndarray:
        """Return the bytes of a tensor of any dtype, memory-mapped."""
        begin, end = self._entries[name].data_offsets
        if begin == end:
            return np.zeros(0, np.uint8)
        return self._values(_Entry("U8", (end - begin,), (begin, end)), np.dtype(np.uint8))

    def _values(self, entry: _Entry, stored: np.dtype) -> np.ndarray:
        """Return the values of a tensor as a view of the file."""
        return self._map.array(stored, entry.count, self._start + entry.data_offsets[0])

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def prefixed(self, prefix: str) -> TensorFile:
        """Return the same file with a prefix before the names of all tensors."""
        return self.renamed({name: [f"{prefix}{name}"] for name in self})

    def renamed(self, names: Mapping[str, Sequence[str]]) -> TensorFile:
        """Return the same file with other names of all its tensors; several names are equal blocks of the rows.

        Raises
        ------
        ValueError
            The rows of a tensor cannot be divided into this many blocks.
        """
        other = copy.copy(self)
        other._entries = {}
        for name, entry in self._entries.items():
            new_names = names[name]
            if len(new_names) == 1:
                other._entries[new_names[0]] = entry
                continue
            rows, *sides = entry.shape or (0,)
            if rows % len(new_names):
                raise unreadable(self.path, f"{printable(name)} must have {len(new_names)} equal blocks of rows")
            begin, end = entry.data_offsets
            size = (end - begin) // len(new_names)
            for index, new_name in enumerate(new_names):
                offsets = begin + index * size, begin + (index + 1) * size
                other._entries[new_name] = _Entry(entry.dtype, (rows // len(new_names), *sides), offsets)
        return other

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor from the header."""
        return self._entries[name].shape

    def dtype(self, name: str) -> str:
        """Return the stored dtype of a tensor, such as ``"BF16"``."""
        return self._entries[name].dtype


@dataclass(eq=False)
class Unread:
    """Memory-mapped safetensors array that is not read yet; ``encoding`` is the dtype that integers are the bits of."""

    stored: np.ndarray
    encoding: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.stored.shape

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the stored values."""
        return self.stored.strides

    @property
    def T(self) -> Unread:
        """The transposed tensor, also unread."""
        return Unread(self.stored.T, self.encoding)

    @property
    def dtype(self) -> np.dtype:
        """Numpy dtype of the values: float32 for bfloat16 and float8, else the stored dtype."""
        return np.dtype("<f4") if self.encoding else self.stored.dtype

    def __getitem__(self, where: Any) -> Unread:
        """Return a part of the tensor, also unread."""
        return Unread(self.stored[where], self.encoding)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.read(), dtype)

    def read(self) -> np.ndarray:
        """Return the array."""
        if self.encoding:
            return decode(self.stored, self.encoding)
        return self.stored

    def read_into(self, out: np.ndarray) -> None:
        """Read the values into an array of float32 or float64."""
        if self.encoding == "BF16" and out.dtype == np.float32:
            bits = out.view("<u4")
            np.copyto(bits, self.stored)
            bits <<= 16
        else:
            np.copyto(out, self.read())


def open_tensors(file: Path) -> TensorFile:
    """Open a safetensors file; a ValueError reports Git LFS pointers and pickles."""
    require_regular(file)
    with file.open("rb") as stream:
        start = stream.read(32)
    if start.startswith(b"version https://git-lfs"):
        raise unreadable(file, "it is a Git LFS pointer; run `git lfs pull`")
    # The ninth byte distinguishes them: the length of a header may start with the same byte as a pickle.
    if start.startswith((b"PK\x03\x04", b"\x80")) and start[8:9] != b"{":
        reason = "it is a pickle, and pickles are never loaded; save it as safetensors"
        raise ValueError(f"cannot load {printable(file)}: {reason}")
    return TensorFile(file)


class _Index(msgspec.Struct, frozen=True):
    """Index of shards: the file of each tensor."""

    weight_map: dict[str, str]


def weight_files(folder: Path, stem: str) -> list[Path]:
    """Return a folder's safetensors files: ``<stem>.safetensors``, its indexed shards, or ``<stem>*.safetensors``.

    A missing shard raises a FileNotFoundError, and an index that cannot be read a ValueError.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        return sorted(folder.glob(f"{stem}*.safetensors"))
    shards = indexed_shards(index)
    if missing := [shard.name for shard in shards if not shard.exists()]:
        reason = f"missing {len(missing)} of {len(shards)} shards, such as {printable(missing[0])}"
        raise FileNotFoundError(f"cannot read {printable(folder)}: {reason}")
    return shards


def indexed_shards(index: Path) -> list[Path]:
    """Return the safetensors shards in an index, which may not exist; those in other folders raise a ValueError."""
    shards = []
    for name in sorted(set(read_json(index, _Index).weight_map.values())):
        if not is_plain(name):
            raise unreadable(index, f"shards must be in its folder, got {printable(name)}")
        shards.append(index.parent / name)
    return shards


def is_pickle(file: Path) -> bool:
    """Return whether the name of a file indicates pickled weights instead of safetensors."""
    return file.suffix in _PICKLES and not file.name.startswith(_STATES)


def reject_pickles(files: Iterable[Path]) -> None:
    """Raise a ValueError if the name of a file indicates pickled weights instead of safetensors."""
    for pickle in sorted(filter(is_pickle, files)):
        # Quoted, because the name of a file may contain shell commands.
        names = map(shlex.quote, map(str, (pickle, pickle.with_suffix(".safetensors"))))
        command = printable(_CONVERT.format(*names))
        raise ValueError(f"cannot load {printable(pickle)}: pickles are never loaded; convert it: {command}")


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Write arrays and their description ``about`` (JSON values) to one safetensors file."""
    arrays = {name: np.ascontiguousarray(array).reshape(np.shape(array)) for name, array in tensors.items()}
    write_bytes(path, save(arrays, metadata={_ABOUT: json.dumps(about, sort_keys=True)}))
