"""FourierFT updates in PEFT's form: configuration, and coefficients of every module.

PEFT stores only the coefficients. It redraws their entries uniformly from the whole spectrum, with one seed and one
scale for all modules. Updates with other entries or scales cannot be exported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from statistics import mode
from typing import Any

import numpy as np

from lorascope.export.exporters import RunExporter
from lorascope.formats.peft_fourierft import entry_seed
from lorascope.runs.lora_config import target_modules
from lorascope.runs.result import Result
from lorascope.updates.fourier import Fourier, entries


class FourierExporter(RunExporter):
    """Exporter of FourierFT updates to PEFT: their coefficients."""

    kind = "FourierFT"
    factor = "coefficients"

    def updates(self, run: Result, state: str) -> dict[str, Any]:
        """Return the update of every module; PEFT must be able to express its basis, entries and scale."""
        who = f"cannot export {run.reference} to PEFT:"
        basis, seed, center = _entry_distribution(run.meta.method)
        if basis != "fourier":
            raise ValueError(f"{who} basis must be 'fourier', got {basis!r}")
        updates = super().updates(run, state)
        for name, update in updates.items():
            if center is not None:
                raise ValueError(f"{who} center must be None (uniform entries), got {center:g} for {name}")
            if not np.array_equal(update.entries, entries(update.shape, len(update.coefficients), seed)):
                raise ValueError(f"{who} entries of {name} must be drawn with seed {seed}, the one of all modules")
        scales = sorted({update.scale for update in updates.values()})
        if len(scales) > 1:
            raise ValueError(f"{who} all modules must have the same scale, got {scales[0]:g} and {scales[1]:g}")
        return updates

    def keywords(self, run: Result, updates: Mapping[str, Any]) -> dict[str, Any]:
        numbers = {name: len(update.coefficients) for name, update in updates.items()}
        return {
            "peft_type": "FOURIERFT",
            "target_modules": target_modules(run, numbers),
            "scaling": next(iter(updates.values())).scale,
            "random_loc_seed": _entry_distribution(run.meta.method)[1],
            **frequency_pattern(numbers),
        }

    def tensors(self, module: str, update: Fourier, host: str) -> Iterator[tuple[str, np.ndarray]]:
        yield f"{module}.fourierft_spectrum", update.coefficients


def _entry_distribution(method: Mapping[str, Any]) -> tuple[str, int, float | None]:
    """Return basis, seed and band center of the entries; the center is None for uniform entries, as in PEFT."""
    if method["name"] == "peft":
        return "fourier", entry_seed(method), None
    return method["basis"], method["entry_seed"], method["center"]


def frequency_pattern(numbers: Mapping[str, int]) -> dict[str, Any]:
    """Return PEFT's number of FourierFT coefficients: a common one and, if modules differ, a pattern for each.

    PEFT matches each key as a regular expression after one of the dots of a name, and uses the first match. A name
    without a dot is looked up literally. Such names come last, so that they do not match the end of another name.
    """
    if len(set(numbers.values())) == 1:
        return {"n_frequency": next(iter(numbers.values())), "n_frequency_pattern": {}}
    ordered = sorted(numbers, key=lambda name: "." not in name)
    return {
        "n_frequency": mode(numbers.values()),
        "n_frequency_pattern": {_pattern_key(name): numbers[name] for name in ordered},
    }


def _pattern_key(name: str) -> str:
    first, dot, ending = name.partition(".")
    if not dot:
        return name
    # PEFT prepends (.*\.)? to a key, so only a lookbehind can require the beginning of the name.
    return f"(?<=^{re.escape(first)}{re.escape(dot)}){re.escape(ending)}"
