"""Registry of the exporters: a class statement registers one, and every module of this package is searched.

A `LayerExporter` writes the layers of a LoRA or DoRA, of whichever format, and a `RunExporter` states how PEFT stores
the updates of a run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from inspect import isabstract
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lorascope.array_types import Float
from lorascope.export.lora_layers import WritableLora
from lorascope.runs.result import Result
from lorascope.schema.plugins import load_plugins

EXPORTERS: list[Exporter] = []
"""Exporters, in the order of their class statements."""


class Exporter(ABC):
    """Exporter of adapters in one format."""

    format: ClassVar[str]
    """Name of the format, and of the option of ``lorascope export``."""

    def __init_subclass__(cls) -> None:
        if not isabstract(cls):  # works also here, before ABCMeta sets __abstractmethods__
            EXPORTERS.append(cls())


class LayerExporter(Exporter):
    """Exporter of the layers of a LoRA or DoRA."""

    readers: ClassVar[tuple[str, ...]]
    """Names of the functions that read what it writes."""

    @abstractmethod
    def write(self, lora: WritableLora, path: Path) -> None:
        """Write layers to a path that does not exist.

        Raises
        ------
        ValueError
            The format cannot hold the adapter; nothing is written.
        """


class RunExporter(Exporter):
    """Exporter of a run's updates as the content of a PEFT folder."""

    format = "peft"
    kind: ClassVar[str]
    """Name of the kind of adapter, such as LoRA."""
    factor: ClassVar[str] = ""
    """Factor that marks the runs of this kind; any run fits without one."""

    def updates(self, run: Result, state: str) -> dict[str, Any]:
        """Return the update of every module to export; raise a ValueError if PEFT cannot express one."""
        return dict(run.updates(state=state))

    @abstractmethod
    def keywords(self, run: Result, updates: Mapping[str, Any]) -> dict[str, Any]:
        """Return the entries of PEFT's configuration for these updates, with ``peft_type``."""

    def merge(self, update: Any, W0: Float[np.ndarray, "out in"]) -> Float[np.ndarray, "out in"]:
        """Return a weight that trained as well, with its update."""
        return W0 + update.dense().astype(W0.dtype)

    @abstractmethod
    def tensors(self, module: str, update: Any, host: str) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the tensors of one module by their names in PEFT, for a host of this class."""

    def shared_tensors(self, updates: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return the tensors of the whole adapter by their full names in PEFT's file."""
        return {}


def layer_exporters() -> dict[str, LayerExporter]:
    """Return the exporters of layers by the names of their formats."""
    load_plugins("lorascope.export")
    return {exporter.format: exporter for exporter in EXPORTERS if isinstance(exporter, LayerExporter)}


def find_exporter(run: Result, state: str) -> RunExporter:
    """Return the exporter of a run: the last one whose factor it has, else the last one without a factor."""
    load_plugins("lorascope.export")
    factors = {""}.union(*run.factors(state=state).values())
    fitting = [exporter for exporter in EXPORTERS if isinstance(exporter, RunExporter) and exporter.factor in factors]
    return max(reversed(fitting), key=lambda exporter: bool(exporter.factor))  # the first one of the maximum
