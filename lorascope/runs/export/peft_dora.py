"""DoRA updates in PEFT's form: a LoRA with ``use_dora``, and the magnitudes of every module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lorascope.runs.export.peft_lora import LoraExporter
from lorascope.runs.result import Result
from lorascope.updates import WeightDecomposed


class DoraExporter(LoraExporter):
    """Directions and magnitudes, as DoRA."""

    kind = "DoRA"
    factor = "magnitude"

    def keywords(self, run: Result, updates: Mapping[str, Any]) -> dict[str, Any]:
        """Return the configuration entries specific to DoRA."""
        return super().keywords(run, updates) | {"use_dora": True}

    def tensors(self, module: str, update: WeightDecomposed, host: str) -> Iterator[tuple[str, np.ndarray]]:
        """Yield both factors and the magnitude under PEFT's names."""
        yield from super().tensors(module, update, host)
        yield f"{module}.lora_magnitude_vector", update.magnitude
