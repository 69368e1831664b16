"""Registry of the readers of adapter formats.

A reader is a function of an opened adapter that returns its ``AdapterFiles``. ``@reads(matches)`` registers it::

    @reads(lambda config, names: any(name.endswith(".lokr_w1") for name in names))
    def read_lokr(path, config, files, base): ...

Some adapters have no update of weights, such as trained prompts. ``@says(matches)`` registers a function with the
same parameters that returns one sentence about such an adapter.

Every module of this package is searched for readers, and so are the modules that other packages list under the entry
point group ``lorascope.readers``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lorascope.files.printable import first_of
from lorascope.files.safetensors_io import TensorFile
from lorascope.formats.stored_update import AdapterFiles
from lorascope.schema.plugins import load_plugins

Config = Mapping[str, Any]
"""Content of ``adapter_config.json``, or the metadata of a file; empty without either."""
WeightFiles = tuple[TensorFile, ...]
Matches = Callable[[Config, Collection[str]], bool]
Needs = Literal["files", "direction", "base", "peft"]


@dataclass(frozen=True)
class Reader:
    """Reader of one adapter format, as registered by `reads`."""

    matches: Matches
    read: Callable[..., AdapterFiles]
    format: str
    needs: Needs


Sentence = Callable[..., str]
READERS: dict[str, Reader] = {}
"""Readers by the names of their functions."""


def reads(
    matches: Matches, format: str = "", needs: Needs = "files"
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function ``read(path, config, files, base)`` as the reader of a format.

    It returns the adapter's ``AdapterFiles``, or raises a ValueError if a tensor is missing or configuration and
    weights disagree. ``base`` is the base model's ``PretrainedWeights``, or None.

    Parameters
    ----------
    matches : callable
        ``matches(config, names)``: whether it reads an adapter with this configuration, empty without a file, and these
        names of tensors.
    format : str
        Name of the format in the documentation; the name of the function by default.
    needs : {"files", "direction", "base", "peft"}
        What an update follows from: the adapter's files (default), the same for its direction and the base model for
        the whole, the base model, or PEFT with the base model.
    """

    def register(read: Callable[..., Any]) -> Callable[..., Any]:
        READERS[read.__name__] = Reader(matches, read, format or read.__name__, needs)
        return read

    return register


SENTENCES: list[tuple[Matches, Sentence, str]] = []
"""Functions that describe adapters without updates of weights, with what they match and the name of the format."""


def says(matches: Matches, format: str) -> Callable[[Sentence], Sentence]:
    """Register a reader ``say(path, config, files, base)`` of adapters without updates of weights.

    It returns one sentence: what the adapter changes instead. ``load`` raises it as a ValueError. ``base`` is the base
    model's ``PretrainedWeights``, or None.

    Parameters
    ----------
    matches, format
        See `reads`.
    """

    def register(say: Sentence) -> Sentence:
        SENTENCES.append((matches, say, format))
        return say

    return register


def unread(names: Sequence[str]) -> str:
    """Return the end of a sentence about tensors that the reader of a format ignores; "" if there are none."""
    if not names:
        return ""
    return f"; tensors that are not read: {first_of(names)}"


def find_sentence(config: Config, names: Collection[str]) -> Sentence | None:
    """Return the registered reader that describes an adapter without updates of weights, or None."""
    load_plugins("lorascope.formats", "lorascope.readers")
    for matches, say, _ in reversed(SENTENCES):  # in the order of `find_reader`
        if matches(config, names):
            return say
    return None


def find_reader(config: Config, names: Collection[str]) -> Reader | None:
    """Return the reader of an adapter's format, or None; of several, the one that was registered last."""
    load_plugins("lorascope.formats", "lorascope.readers")
    # Packages register their readers last, so they may replace these.
    for reader in reversed(READERS.values()):
        if reader.matches(config, names):
            return reader
    return None
