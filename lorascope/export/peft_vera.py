"""VeRA updates in PEFT's form: both vectors of every module, and the shared random factors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lorascope.export.exporters import RunExporter
from lorascope.runs.lora_config import target_modules
from lorascope.runs.result import Result
from lorascope.updates import RandomProjection
from lorascope.updates.random_projection import projections


class VeraExporter(RunExporter):
    """Exporter of VeRA updates to PEFT: scaled random factors."""

    kind = "VeRA"
    factor = "lambda_d"

    def keywords(self, run: Result, updates: Mapping[str, Any]) -> dict[str, Any]:
        first = next(iter(updates.values()))
        return {
            "peft_type": "VERA",
            "r": first.rank,
            "target_modules": target_modules(run, updates),
            "projection_prng_key": int(first.to_factors()["projection"][0]),
            "save_projection": True,  # the file has A and B, see ``shared_tensors``
            "vera_dropout": 0.0,
        }

    def tensors(self, module: str, update: RandomProjection, host: str) -> Iterator[tuple[str, np.ndarray]]:
        yield f"{module}.vera_lambda_b", update.to_factors()["lambda_b"]
        yield f"{module}.vera_lambda_d", update.to_factors()["lambda_d"]

    def shared_tensors(self, updates: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return the random factors, so that PEFT does not have to draw the same ones."""
        first = next(iter(updates.values()))
        seed, widest_in, widest_out, _ = map(int, first.to_factors()["projection"])
        A, B = projections(seed, first.rank, widest_in, widest_out)
        outer, inner = map(max, zip(*(update.shape for update in updates.values()), strict=True))
        return {"base_model.vera_A": A[:, :inner], "base_model.vera_B": B[:outer]}  # the sides that PEFT expects
