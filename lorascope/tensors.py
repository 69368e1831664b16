"""Reading and writing safetensors files with numpy alone.

The file format is eight bytes with the header's length, a JSON header, then the data. It is read here by memory map,
so that one tensor of a large file costs that tensor, and so that bfloat16, which numpy lacks, arrives as float32.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip

FLOATS = ("F64", "F32", "F16", "BF16")
_PARTIAL = re.compile(r"\..+\.\d+\.part")
_CONVERT = (
    "python -c \"import torch; from safetensors.torch import save_file; save_file(torch.load('{0}', "
    "weights_only=True), '{1}')\""
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# What a Trainer leaves beside the weights.
_STATES = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")
# The one entry of the header's text, since the order of several would be another each time.
_ABOUT = "about"


class TensorFile(Mapping[str, np.ndarray]):
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
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError(f"{self.path} is not a whole safetensors file: its header does not fit {size} bytes")
            try:
                header = dict(json.loads(file.read(length)))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{self.path} is not a safetensors file: its header is not a JSON object") from error
        self._words = header.pop("__metadata__", None) or {}
        if not isinstance(self._words, dict):
            raise ValueError(f"{self.path} is not a sound safetensors file: its header's __metadata__ is no object")
        self._entries: dict[str, dict[str, Any]] = header
        self._start = 8 + length
        broken = next((name for name, entry in header.items() if not _sound(entry)), None)
        if broken is not None:
            raise ValueError(f"{self.path} is not a sound safetensors file: its header's entry for {broken!r} is wrong")
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if self._start + end > size:
            raise ValueError(f"{self.path} is truncated: {size} bytes where its header needs {self._start + end}")

    @cached_property
    def about(self) -> dict[str, Any]:
        """What was said of the arrays when they were written here; of other files nothing is asked."""
        try:
            return dict(json.loads(self._words.get(_ABOUT, "{}")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.path} was not written here: what it says of its arrays is no JSON") from error

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{self.path}: {name} is stored as {entry['dtype']}, which numpy cannot hold")
        stored = np.dtype(_DTYPES[entry["dtype"]])
        begin, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        if begin == end:
            return np.zeros(shape, "<f4" if entry["dtype"] == "BF16" else stored)
        array = np.memmap(self.path, stored, "r", self._start + begin, ((end - begin) // stored.itemsize,))
        return _widened(array).reshape(shape) if entry["dtype"] == "BF16" else np.asarray(array).reshape(shape)

    def unread(self, name: str) -> Unread:
        """A tensor that is read when it is asked to, by memory map."""
        entry = self._entries[name]
        if entry["dtype"] != "BF16":
            return Unread(self[name])
        begin, end = entry["data_offsets"]
        bits = np.memmap(self.path, "<u2", "r", self._start + begin, ((end - begin) // 2,))
        return Unread(np.asarray(bits).reshape(entry["shape"]), brain=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return tuple(self._entries[name]["shape"])

    def dtype(self, name: str) -> str:
        """Stored dtype, such as ``"BF16"``."""
        return self._entries[name]["dtype"]


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

    def into(self, out: np.ndarray) -> None:
        """Read it into an array of float32 or float64."""
        if self.brain and out.dtype == np.float32:
            bits = out.view("<u4")
            np.copyto(bits, self.stored)
            bits <<= 16
        else:
            np.copyto(out, _widened(self.stored) if self.brain else self.stored)


def _widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16 as float32, of which it is the upper half."""
    wide = bits.astype("<u4")
    wide <<= 16
    return wide.view("<f4")


def _sound(entry: Any) -> bool:
    """Does an entry of the header have its three parts, and as many bytes as its shape needs?"""
    try:
        begin, end = entry["data_offsets"]
        size = math.prod(entry["shape"]) * np.dtype(_DTYPES.get(entry["dtype"], "|u1")).itemsize
    except (KeyError, TypeError, ValueError):
        return False
    return 0 <= begin <= end and (end - begin == size or entry["dtype"] not in _DTYPES)


def open_tensors(file: Path) -> TensorFile:
    """Open a file; a ValueError says what lies there under its name instead."""
    with file.open("rb") as stream:
        start = stream.read(32)
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{file} is only a pointer of Git LFS: fetch the weights by `git lfs pull`")
    # The ninth byte tells: the length of a header may begin like a pickle.
    if start.startswith((b"PK\x03\x04", b"\x80")) and start[8:9] != b"{":
        raise ValueError(f"{file} is a pickle under a wrong name, which is never loaded: save it as safetensors")
    return TensorFile(file)


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
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not readable as an index of shards: {error}") from error
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {len(missing)} of {len(names)} shards: {missing[0]}")
    return [folder / name for name in names]


def refuse_pickles(files: Iterable[Path]) -> None:
    """Raise a ValueError where one of the files is a pickle of weights by its name."""
    found = sorted(file for file in files if file.suffix in _PICKLES and not file.name.startswith(_STATES))
    if found:
        how = _CONVERT.format(found[0], found[0].with_suffix(".safetensors"))
        raise ValueError(f"{found[0]} is a pickle, which is never loaded; convert it: {how}")


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Write arrays and what is to be said about them (JSON values) as one safetensors file."""
    arrays = {name: np.ascontiguousarray(array).reshape(np.shape(array)) for name, array in tensors.items()}
    write_bytes(path, save(arrays, metadata={_ABOUT: json.dumps(about, sort_keys=True)}))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, flush it to the disk, and rename it.

    Raises
    ------
    OSError
        There is no room, or no right to write; what was there before is untouched.
    """
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
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
