"""Conversion of adapters to other formats."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lorascope.array_types import Float
from lorascope.export.exporters import layer_exporters
from lorascope.export.lora_layers import WritableLora, writable
from lorascope.files.printable import printable
from lorascope.files.whole_files import require_absent
from lorascope.runs.adapter import Adapter
from lorascope.runs.result import Result
from lorascope.runs.series import Series


def write_lora(lora: WritableLora, path: Path, format: str) -> Path:
    """Write converted layers in a format to a path that does not exist, and return it."""
    exporters = layer_exporters()
    if format not in exporters:
        raise ValueError(f"format must be one of {', '.join(map(repr, exporters))}, got {format!r}")
    exporters[format].write(lora, path)
    return path


def convert(
    adapter: Result,
    out: str | Path,
    format: str,
    budget: float | None = None,
    scores: Mapping[str, Float[np.ndarray, "_"]] | None = None,
    component: str | None = None,
) -> Path:
    """Convert an adapter to another format, with the same numbers.

    Factors are copied bit by bit, and the scales are exact. Only in kohya files of modules with different alphas, some
    factors are multiplied by what differs, and rounded once.

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
    """Return an adapter for conversion; raise a ValueError if it is a run or a series of checkpoints."""
    if isinstance(opened, Series):
        raise series_error(opened)
    if not isinstance(opened, Adapter):
        raise ValueError(
            f"only adapters are summed or converted, got run {opened.label}: export it with to_peft (--peft) first"
        )
    return opened


def series_error(series: Series) -> ValueError:
    """Return the error for the conversion of a series of checkpoints, of which only one can be exported."""
    checkpoint = printable(series.last.files.path)
    return ValueError(f"cannot export the series {series.label}: load one checkpoint, such as {checkpoint}")
