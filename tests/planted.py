"""Runs with planted values, written to real run folders and read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from lorascope.runs.manifest import Manifest
from lorascope.runs.run import Run
from lorascope.runs.writer import RunWriter
from lorascope.schema.records import Factors, Record, Snapshot

PLACES = [
    ("words", "", None, "embed"),
    ("h.0", "", 0, "block"),
    ("h.0.q", "", 0, "q"),
    ("h.0.up", "", 0, "ffn_in"),
    ("h.1.q", "", 1, "q"),
    ("h.1.up", "", 1, "ffn_in"),
    ("score", "", None, "head"),
]
MODULES = [dict(zip(("module", "stack", "layer", "role"), place, strict=True)) for place in PLACES]
# Entries of run.json that all planted runs share.
COMMON = {
    "schema": 1, "model": "m", "task": "t", "recipe": {"name": "lora"}, "method": {"name": "lora"},
    "settings": {"steps": 9}, "parents": [],
    "parameters": {"trained": 1}, "test": {},
}  # fmt: skip


def manifest(**content: Any) -> Manifest:
    """Build the description of a run from a part of it; a stored one, such as `Manifest.to_json` returns, fits too."""
    whole = COMMON | {"id": "a", "label": "LoRA", "seed": 0, "status": "running", "modules": MODULES} | content
    return msgspec.convert(whole | {"test": whole["test"] or None}, Manifest)


Values = Mapping[tuple[str, str], Mapping[int, Any]]
SHAPES = {"q": (1, 1), "k": (1, 1), "v": (1, 1), "o": (1, 1), "ffn_in": (4, 1), "ffn_out": (1, 4)}  # (out, in) / hidden


def plant(
    folder: Path,
    id: str,
    values: Values,
    label: str = "LoRA rank 2",
    seed: int | None = 0,
    factors: Mapping[str, tuple[Any, Any]] | None = None,
    sigmas: Mapping[str, Any] | None = None,
    exact: bool = True,
    starts: Mapping[str, tuple[Any, Any]] | None = None,
    **meta: Any,
) -> Run:
    """Write a run of (quantity, module) -> {step: value} into ``folder / id``.

    ``factors`` are (B, A) by module; if ``exact`` is False, the updates depend on the input. ``starts`` are the factors
    of step 0, and ``sigmas`` the saved spectra of dense updates.
    """
    last = max((step for steps in values.values() for step in steps), default=0)
    ranks = {name: np.shape(B)[1] for name, (B, _) in (factors or {}).items()}
    states = {"last": {"step": max(last, 0), "ranks": ranks}}
    named = {"id": id, "label": label, "seed": seed, "modules": MODULES, "states": states}
    content = COMMON | named | meta
    writer = RunWriter(folder / id, manifest(**content | {"method": meta.get("method", content["recipe"])}))
    for (quantity, module), steps in values.items():
        for step, value in steps.items():
            writer.collect(step, [Record(quantity, value, module)])
    if factors is not None:
        writer.collect(last, _factors(factors, exact))
    if starts is not None:
        writer.collect(0, _factors(starts, exact))
    for module, sigma in (sigmas or {}).items():
        writer.collect(last, [Snapshot(f"{module}/singular_values", np.array(sigma), ("component",))])
    writer.finish("done")
    return Run.read(folder / id)


def _factors(found: Mapping[str, tuple[Any, Any]], exact: bool) -> list[Factors]:
    """Build factors; floats keep their dtype, other values become float64."""

    def floats(values: Any) -> np.ndarray:
        array = np.array(values)
        return array if array.dtype.kind == "f" else array.astype(np.float64)

    return [Factors(name, {"B": floats(B), "A": floats(A)}, 1.0, exact) for name, (B, A) in found.items()]


# A worked example of a FourierFT update: entries, coefficients, shape.
ENTRIES = np.array([[0, 1, 2, 3], [0, 2, 5, 1]])
C = np.array([1.0, -2.0, 0.5, 3.0])
SHAPE = (4, 6)


def plant_fourier(
    folder: Path,
    id: str,
    found: Mapping[str, Mapping[int, Any]],
    label: str = "FourierFT",
    seed: int = 0,
    entries: Any = ENTRIES,
    metric: float | None = None,
    **recipe: Any,
) -> Run:
    """Write a FourierFT run of module -> {step: coefficients} at the worked example's entries, with alpha 12.

    Fields of the method go into the recipe; for a basis other than "fourier", shape and scale are not saved.
    """
    fields = {"name": "fourierft", "alpha": 12} | recipe
    states = {"last": {"step": 9, "ranks": dict.fromkeys(found, len(C))}}
    modules = [place | {"out_features": SHAPE[0], "in_features": SHAPE[1]} for place in MODULES]
    named = {
        "id": id,
        "label": label,
        "seed": seed,
        "modules": modules,
        "states": states,
        "recipe": fields,
        "method": fields,
    }
    writer = RunWriter(folder / id, manifest(**COMMON | named))
    is_fourier = recipe.get("basis", "fourier") == "fourier"
    for module, steps in found.items():
        for quantity in ("update_norm", "learned_norm"):
            writer.collect(9, [Record(quantity, float(np.linalg.norm(steps[9])), module)])
        for step, coefficients in steps.items():
            arrays = {"coefficients": np.array(coefficients), "entries": np.array(entries)}
            arrays |= {"shape": np.array(SHAPE)} if is_fourier else {}
            writer.collect(step, [Factors(module, arrays, 12.0 if is_fourier else None)])
        if not is_fourier:  # the norms observer saves spectra of such updates
            writer.collect(9, [Snapshot(f"{module}/singular_values", np.ones(min(SHAPE)), ("component",))])
    if metric is not None:
        writer.collect(9, [Record("test_metric", metric)])
    writer.finish("done")
    return Run.read(folder / id)


def profile(words: float, q: float, up: float) -> Values:
    """Update norms after step 9; block 1 is half of block 0."""
    at = {"words": words, "h.0.q": q, "h.0.up": up, "h.1.q": q / 2, "h.1.up": up / 2}
    return {("update_norm", module): {0: 0.0, 4: value / 2, 9: value} for module, value in at.items()}


def lookup(chart: Any, *columns: str, value: str = "value") -> dict:
    data = chart.data
    keys = list(zip(*(data[column] for column in columns), strict=True)) if len(columns) > 1 else data[columns[0]]
    return dict(zip(keys, data[value], strict=True))


def low_rank(*sigma: float) -> tuple[Any, Any]:
    """Return factors (4, rank) and (rank, 5) of an update with these singular values."""
    return np.eye(4)[:, : len(sigma)] * sigma, np.eye(len(sigma), 5)


SPECTRA = {"h.0.q": (5.0, 1.0, 0.5), "h.0.up": (4.0, 1.0), "h.1.q": (0.1, 0.05), "h.1.up": (3.0, 1.0, 1.0)}


def plant_spectra(folder: Path) -> Run:
    """Write a run whose updates have the singular values ``SPECTRA``, ten in all."""
    return plant(folder, "run", {}, factors={name: low_rank(*sigma) for name, sigma in SPECTRA.items()})


def blocks(layers: int, roles: Sequence[str] = tuple(SHAPES), hidden: int = 768) -> list[dict[str, Any]]:
    """Return the modules of a Transformer in model order with sizes, such as ``encoder.layer.3.ffn_in``."""
    return [
        {"module": f"encoder.layer.{layer}.{role}", "stack": "encoder", "layer": layer, "role": role}
        | {"out_features": hidden * SHAPES[role][0], "in_features": hidden * SHAPES[role][1]}
        for layer in range(layers)
        for role in roles
    ]
