"""Reading and writing safetensors files with numpy alone.

The file format is eight bytes with the header's length, a JSON header, then the data. It is read here by memory map,
so that one tensor of a large file costs that tensor, and so that bfloat16, which numpy lacks, arrives as float32.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shlex
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path, PureWindowsPath
from typing import Annotated, Any

import msgspec
import numpy as np
from safetensors.numpy import save

from lorascope.files.printable import printable
from lorascope.files.typed_json import Count, parse_json, read_json, require_regular, require_size, to_typed

_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip

FLOATS = ("F64", "F32", "F16", "BF16")
# What a network file system answers while its server is away, or when a folder was moved during the call.
_TRANSIENT = {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT, errno.ENOENT}
PAUSES = (0.5, 5.0)
"""Seconds before the second and the third attempt to write a file."""
_PARTIAL = re.compile(r"\..+\.\d+\.part")
_CONVERT = (
    'python -c "import sys, torch; from safetensors.torch import save_file; '
    'save_file(torch.load(sys.argv[1], weights_only=True), sys.argv[2])" {0} {1}'
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# What a Trainer leaves beside the weights.
_STATES = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")
# Names of modules are far shorter; searching in longer ones takes time with the square of their length.
MAX_NAME = 1000
# The one entry of the header's text, since the order of several would be another each time.
_ABOUT = "about"


@dataclass(frozen=True)
class _Entry:
    """What a header says of one tensor."""

    dtype: str
    shape: Annotated[tuple[Count, ...], msgspec.Meta(max_length=32)]
    data_offsets: tuple[Count, Count]

    @property
    def count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


class TensorFile(Mapping[str, Any]):
    """A safetensors file as a lazy mapping name -> array.

    Parameters
    ----------
    path : path
        Of the file.

    Raises
    ------
    ValueError
        The file is no safetensors file, or is cut short.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        size = require_regular(self.path)
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError(
                    f"{printable(self.path)} is not a whole safetensors file: its header does not fit {size} bytes"
                )
            require_size(length, f"the header of {self.path}")
            header = to_typed(parse_json(file.read(length), f"the header of {self.path}"), dict[str, Any], self.path)
        self._start = 8 + length
        self._words = to_typed(header.pop("__metadata__", None), dict[str, Any] | None, f"__metadata__ of {path}") or {}
        self._entries = {name: self._entry(name, entry, size) for name, entry in header.items()}
        spans = sorted(entry.data_offsets for entry in self._entries.values())
        if any(begin < end for (_, end), (begin, _) in pairwise(spans)):
            raise ValueError(f"{printable(self.path)} is not a sound safetensors file: its tensors overlap")

    def _entry(self, name: str, content: Any, size: int) -> _Entry:
        """One tensor of the header, whose bytes are those of its shape and lie within the file."""
        whose = f"{self.path}, the header's entry for {name[:MAX_NAME]}"
        if len(name) > MAX_NAME:
            raise ValueError(f"cannot read {printable(whose)}: its name has {len(name)} characters, not {MAX_NAME}")
        entry = to_typed(content, _Entry, whose)
        begin, end = entry.data_offsets
        width = np.dtype(_DTYPES.get(entry.dtype, "|u1")).itemsize
        # numpy counts the other dimensions of an empty array, too.
        fits = math.prod(side or 1 for side in entry.shape) * width < 2**63
        if not (fits and begin <= end and (end - begin == entry.count * width or entry.dtype not in _DTYPES)):
            raise ValueError(f"cannot read {printable(whose)}: shape and data_offsets must fit each other")
        if self._start + end > size:
            raise ValueError(
                f"{printable(self.path)} is truncated: {size} bytes where its header needs {self._start + end}"
            )
        return entry

    @cached_property
    def about(self) -> dict[str, Any]:
        """What was said of the arrays when they were written here; of other files nothing is asked."""
        text = to_typed(self._words.get(_ABOUT, "{}"), str, f"{_ABOUT} of {self.path}")
        return to_typed(parse_json(text, f"{_ABOUT} of {self.path}"), dict[str, Any], f"{_ABOUT} of {self.path}")

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        if entry.dtype not in _DTYPES:
            raise ValueError(
                f"{printable(self.path)}: {printable(name)} is stored as {printable(entry.dtype)}, "
                "which numpy cannot hold"
            )
        stored = np.dtype(_DTYPES[entry.dtype])
        begin, _ = entry.data_offsets
        if not entry.count:
            return np.zeros(entry.shape, "<f4" if entry.dtype == "BF16" else stored)
        array = np.memmap(self.path, stored, "r", self._start + begin, (entry.count,))
        return (_bfloat16_to_float32(array) if entry.dtype == "BF16" else np.asarray(array)).reshape(entry.shape)

    def unread(self, name: str) -> Unread:
        """A tensor that is read when it is asked to, by memory map."""
        entry = self._entries[name]
        if entry.dtype != "BF16" or not entry.count:
            return Unread(self[name])
        bits = np.memmap(self.path, "<u2", "r", self._start + entry.data_offsets[0], (entry.count,))
        return Unread(np.asarray(bits).reshape(entry.shape), brain=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return self._entries[name].shape

    def dtype(self, name: str) -> str:
        """Stored dtype, such as ``"BF16"``."""
        return self._entries[name].dtype


@dataclass(frozen=True, eq=False)
class Unread:
    """A tensor of a file, still unread.

    Parameters
    ----------
    stored : array
        As it lies in the file.
    brain : bool
        Is it bfloat16, seen as 16-bit integers?
    """

    stored: np.ndarray
    brain: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.stored.shape

    @property
    def dtype(self) -> np.dtype:
        """The dtype in which nothing is lost."""
        return np.dtype("<f4") if self.brain else self.stored.dtype

    def __getitem__(self, where: Any) -> Unread:
        """A part of it, still unread."""
        return Unread(self.stored[where], self.brain)

    def read_into(self, out: np.ndarray) -> None:
        """Read it into an array of float32 or float64."""
        if self.brain and out.dtype == np.float32:
            bits = out.view("<u4")
            np.copyto(bits, self.stored)
            bits <<= 16
        else:
            np.copyto(out, _bfloat16_to_float32(self.stored) if self.brain else self.stored)


def _bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """bfloat16 as float32, of which it is the upper half."""
    wide = bits.astype("<u4")
    wide <<= 16
    return wide.view("<f4")


def open_tensors(file: Path) -> TensorFile:
    """Open a file; a ValueError says what lies there under its name instead."""
    require_regular(file)
    with file.open("rb") as stream:
        start = stream.read(32)
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{printable(file)} is only a pointer of Git LFS: fetch the weights by `git lfs pull`")
    # The ninth byte tells: the length of a header may begin like a pickle.
    if start.startswith((b"PK\x03\x04", b"\x80")) and start[8:9] != b"{":
        raise ValueError(
            f"{printable(file)} is a pickle under a wrong name, which is never loaded: save it as safetensors"
        )
    return TensorFile(file)


@dataclass(frozen=True)
class _Index:
    """What the index of shards says: the file of each tensor."""

    weight_map: dict[str, str]


def is_plain(name: str) -> bool:
    """Return whether a name from a file names a child of the folder, on any system."""
    return name not in ("", ".", "..") and "\0" not in name and PureWindowsPath(name).name == name


def weight_files(folder: Path, stem: str) -> list[Path]:
    """Files of weights in a folder: ``<stem>.safetensors``, or the shards of its index, or all that begin so.

    Raises
    ------
    FileNotFoundError
        The index lists a shard that is not there.
    ValueError
        The index cannot be read.
    """
    whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if whole.exists():
        return [whole]
    if not index.exists():
        return sorted(folder.glob(f"{stem}*.safetensors"))
    names = sorted(set(read_json(index, _Index).weight_map.values()))
    outside = next((name for name in names if not is_plain(name)), None)
    if outside is not None:
        raise ValueError(f"{printable(index)}: a shard must be a file of its folder, got {printable(outside)}")
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(
            f"{printable(folder)} lacks {len(missing)} of {len(names)} shards: {printable(missing[0])}"
        )
    return [folder / name for name in names]


def refuse_pickles(files: Iterable[Path]) -> None:
    """Raise a ValueError where one of the files is a pickle of weights by its name."""
    found = sorted(file for file in files if file.suffix in _PICKLES and not file.name.startswith(_STATES))
    if found:
        # Quoted: a file may be named like a command.
        names = (shlex.quote(str(file)) for file in (found[0], found[0].with_suffix(".safetensors")))
        how = printable(_CONVERT.format(*names))
        raise ValueError(f"{printable(found[0])} is a pickle, which is never loaded; convert it: {how}")


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Write arrays and what is to be said about them (JSON values) as one safetensors file."""
    arrays = {name: np.ascontiguousarray(array).reshape(np.shape(array)) for name, array in tensors.items()}
    write_bytes(path, save(arrays, metadata={_ABOUT: json.dumps(about, sort_keys=True)}))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, flush it to the disk, and rename it; a symbolic link is followed.

    Raises
    ------
    OSError
        There is no room, or no right to write; what was there before is untouched. Errors that a network file system
        recovers from are raised after two more attempts.
    """
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    for pause in PAUSES:
        try:
            return _write_once(path, data)
        except OSError as error:
            if error.errno not in _TRANSIENT:
                raise
            warnings.warn(f"{error}; trying again in {pause} s", stacklevel=2)
            time.sleep(pause)
    _write_once(path, data)


def _write_once(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"{path} could not be written ({error.strerror})") from error
    finally:
        temporary.unlink(missing_ok=True)


def is_partial(path: Path) -> bool:
    """Is this the temporary file of a writer that may have been killed?"""
    return _PARTIAL.fullmatch(path.name) is not None


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, in UTF-8.

    A file name that is not in the locale's encoding holds lone surrogates, which JSON escapes.
    """
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    require_regular(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
