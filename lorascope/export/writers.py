"""Registry of the writers of adapter formats.

A writer is a function of a `WritableLora` and a new path. ``@writes(name, readers)`` registers it, and every module of
this package is searched for writers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorascope.array_types import Float
from lorascope.export.lora_layers import WritableLora, writable
from lorascope.files.printable import printable
from lorascope.runs.adapter import Adapter
from lorascope.runs.folders import require_absent
from lorascope.runs.result import Result
from lorascope.runs.series import Series
from lorascope.schema.plugins import load_plugins

Write = Callable[[WritableLora, Path], None]


@dataclass(frozen=True)
class Writer:
    """Writer of one format; ``readers`` are the names of the functions that read what it writes."""

    write: Write
    readers: tuple[str, ...]


_WRITERS: dict[str, Writer] = {}


def writes(name: str, *readers: str) -> Callable[[Write], Write]:
    """Register a function ``write(lora, path)`` as the writer of a format.

    It raises a ValueError before it writes anything if the format cannot hold the adapter.
    """

    def register(write: Write) -> Write:
        _WRITERS[name] = Writer(write, readers)
        return write

    return register


def writers() -> Mapping[str, Writer]:
    """Return the writers by the names of their formats."""
    load_plugins("lorascope.export")
    return _WRITERS


def write_lora(lora: WritableLora, path: Path, format: str) -> Path:
    """Write layers in a format to a path that does not exist, and return it."""
    if format not in writers():
        raise ValueError(f"format must be one of {', '.join(map(repr, writers()))}, got {format!r}")
    writers()[format].write(lora, path)
    return path


def convert(
    adapter: Result,
    out: str | Path,
    format: str,
    budget: float | None = None,
    scores: Mapping[str, Float[np.ndarray, "_"]] | None = None,
    component: str | None = None,
) -> Path:
    """Write an adapter in another format, with the same numbers.

    Factors are copied bit by bit, and the scales are exact.

    Parameters
    ----------
    adapter : Adapter
        LoRA or DoRA in any format that stores the factors.
    out : path
        New folder or file.
    format : {"peft", "kohya", "diffusers", "mlx"}
        Format to write.
    budget : float or int, optional
        Components to keep, see ``select_components``; all by default. The kept ones are written in float32.
    scores : mapping module -> array, optional
        See ``select_components``.
    component : str, optional
        Component of a pipeline that the adapter belongs to, such as ``"text_encoder"``, for kohya and diffusers. By
        default it follows from the names of the modules.

    Returns
    -------
    path
        The folder or file.

    Raises
    ------
    FileExistsError
        The path exists.
    ValueError
        The format cannot hold the adapter.
    """
    require_absent(Path(out))
    return write_lora(writable(require_adapter(adapter), budget, scores, component), Path(out), format)


def require_adapter(opened: Result) -> Adapter:
    """Return an adapter; raise a ValueError if it is a run or a series of checkpoints."""
    if isinstance(opened, Series):
        raise one_of_series(opened)
    if not isinstance(opened, Adapter):
        raise ValueError(
            f"only adapters are summed or converted, got run {opened.label}: export it with to_peft (--peft) first"
        )
    return opened


def one_of_series(series: Series) -> ValueError:
    """Return the error for a series of checkpoints, of which only one can be exported."""
    where = printable(series.last.files.path)
    return ValueError(f"cannot export the series {series.label}: load one checkpoint, such as {where}")
