"""Updates of DoRA in PEFT's form: the factors and the magnitudes of every module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from lorascope.array_types import Float
from lorascope.export.peft_lora import LoraExporter
from lorascope.runs.result import Result
from lorascope.updates import WeightDecomposed


class DoraExporter(LoraExporter):
    """Exporter of DoRA updates to PEFT: directions and magnitudes."""

    kind = "DoRA"
    factor = "magnitude"

    def updates(self, run: Result, state: str) -> dict[str, Any]:
        return dict(run.updates(state=state))

    def keywords(self, run: Result, updates: Mapping[str, Any]) -> dict[str, Any]:
        return super().keywords(run, updates) | {"use_dora": True}

    def merge(self, update: WeightDecomposed, W0: Float[np.ndarray, "out in"]) -> Float[np.ndarray, "out in"]:
        return super().merge(replace(update, W0=W0), W0)

    def tensors(self, module: str, update: WeightDecomposed, host: str) -> Iterator[tuple[str, np.ndarray]]:
        yield from super().tensors(module, update, host)
        yield f"{module}.lora_magnitude_vector", update.magnitude
