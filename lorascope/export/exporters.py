"""Registry of the exporters to PEFT: a class statement registers one, and every module of this package is searched."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from lorascope.array_types import Float
from lorascope.runs.result import Result
from lorascope.schema.plugins import load_plugins

EXPORTERS: list[Exporter] = []
"""Exporters; of several that fit a run, one with a factor writes it, and of several of these the last one."""


class Exporter(ABC):
    """Writer of one kind of adapter in PEFT's form."""

    kind: ClassVar[str]
    """Name of the kind, such as LoRA."""
    factor: ClassVar[str] = ""
    """Factor that marks the runs of this kind; any run fits without one."""

    def __init_subclass__(cls) -> None:
        EXPORTERS.append(cls())

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


def find_exporter(run: Result, state: str) -> Exporter:
    """Return the exporter of a run."""
    load_plugins("lorascope.export")
    names = {name for factors in run.factors(state=state).values() for name in factors} | {""}
    fitting = [exporter for exporter in reversed(EXPORTERS) if exporter.factor in names]
    return next((exporter for exporter in fitting if exporter.factor), fitting[0])
