"""Updates of few frequencies in PEFT's form: the configuration of its FourierFT, and every module's coefficients.

PEFT keeps the coefficients alone and draws their entries anew, from all of a spectrum alike, by one seed and at one
scale for all modules. What was drawn otherwise cannot be written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lorascope.runs.formats.peft_fourierft import entry_seed
from lorascope.runs.run import Run
from lorascope.runs.summary import mode, targets
from lorascope.updates.fourier import Fourier, entries


def has_coefficients(run: Run, state: str) -> bool:
    """Are a run's updates made of coefficients, on whatever basis?"""
    return any("coefficients" in factors for factors in run.factors(state=state).values())


def updates_of(run: Run, state: str) -> dict[str, Fourier]:
    """The update of every module.

    Raises
    ------
    ValueError
        PEFT has no such basis, entries or scales.
    """
    who, (basis, seed, center) = (
        f"run {run.id} ({run.label}) cannot be written for PEFT:",
        _entry_distribution(run.meta["method"]),
    )
    if basis != "fourier":
        raise ValueError(f"{who} basis {basis!r} is none of PEFT's, whose basis is Fourier's")
    updates: dict[str, Any] = dict(run.updates(state=state))
    for name, update in updates.items():
        if center is not None:
            told = f"were drawn from a band (center {center:g}), PEFT draws from all places alike"
            raise ValueError(f"{who} the entries of {name} {told}")
        if not np.array_equal(update.entries, entries(update.shape, len(update.coefficients), seed)):
            told = f"are not those of seed {seed}, and PEFT has one seed for all modules"
            raise ValueError(f"{who} the entries of {name} {told}")
    scales = sorted({update.scale for update in updates.values()})
    if len(scales) > 1:
        told = f"scales of {scales[0]:g} and {scales[1]:g}: PEFT's `scaling` is one for all modules"
        raise ValueError(f"{who} it has {told}")
    return updates


def _entry_distribution(method: Mapping[str, Any]) -> tuple[str, int, float | None]:
    """Basis, seed and centre of the band; where PEFT trained its own basis, from all places alike."""
    if method["name"] == "peft":
        return "fourier", entry_seed(method), None
    return method["basis"], method["entry_seed"], method["center"]


def keywords(run: Run, updates: Mapping[str, Fourier]) -> dict[str, Any]:
    """Entries of the configuration that are FourierFT's."""
    if not updates:
        raise ValueError(f"run {run.id} has no update apart from weights that trained themselves: save these whole")
    numbers = {name: len(update.coefficients) for name, update in updates.items()}
    return {
        "peft_type": "FOURIERFT",
        "target_modules": targets(run, numbers),
        "scaling": next(iter(updates.values())).scale,
        "random_loc_seed": _entry_distribution(run.meta["method"])[1],
        **frequency_pattern(numbers),
    }


def frequency_pattern(numbers: Mapping[str, int]) -> dict[str, Any]:
    """How many coefficients each module has: PEFT's common number, and where they differ a pattern for every module.

    PEFT takes a key for an expression that a name matches behind one of its dots, the first that does; what has no dot
    is looked up as it is, so such names stand last, where they are not taken for the end of another.
    """
    if len(set(numbers.values())) == 1:
        return {"n_frequency": next(iter(numbers.values())), "n_frequency_pattern": {}}
    ordered = sorted(numbers, key=lambda name: "." not in name)
    return {
        "n_frequency": mode(numbers.values()),
        "n_frequency_pattern": {_key(name): numbers[name] for name in ordered},
    }


def _key(name: str) -> str:
    first, dot, rest = name.partition(".")
    return f"(?<=^{re.escape(first)}{re.escape(dot)}){re.escape(rest)}" if dot else name


def tensors(module: str, update: Fourier, host: str) -> Iterator[tuple[str, np.ndarray]]:
    """The coefficients, under PEFT's name."""
    yield f"{module}.fourierft_spectrum", update.coefficients
