"""Results of instruments in the user's cache, by the content of everything that they depend on.

A result is read again if weights, rows, arguments, package and torch are the same; the run itself never changes.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import joblib
import torch
from torch import Tensor

import lorascope
from lorascope.inputs import package_assets
from lorascope.insight.adapted_base import AdaptedBase
from lorascope.runs.result import Result

MEASURE_AGAIN = "LORASCOPE_MEASURE_AGAIN"
"""Environment variable: if it is set, nothing is read from the cache, and nothing is written."""

Measured = TypeVar("Measured")


def recall(
    instrument: str,
    run: Result,
    adapted: AdaptedBase,
    call: Mapping[str, Any],
    measure: Callable[[], Measured],
    progress: bool,
) -> Measured:
    """Return the result of an instrument from the cache, or measure it and keep it there.

    Parameters
    ----------
    instrument : str
        Name of the instrument.
    run : Result
        Its run, whose label and path the result names.
    adapted : AdaptedBase
        Opened model, whose weights and updates it measures.
    call : mapping
        All arguments that change the result, with the hashes of the rows.
    measure : callable
        Measures it.
    progress : bool
        Say where the result comes from.
    """
    if os.environ.get(MEASURE_AGAIN):
        return measure()
    name = [instrument, run.id, run.label, str(run.path), _code(), torch.__version__, _content(adapted), dict(call)]
    file = folder() / f"{instrument}-{joblib.hash(name)}.joblib"
    if file.exists():
        if progress:
            print(f"{instrument}: as measured before ({file})", file=sys.stderr)
        return joblib.load(file)
    result = measure()
    with package_assets.stage_target(file) as draft:
        joblib.dump(result, draft, compress=3)
    return result


def folder() -> Path:
    """Return the folder of measured results in the user's cache; its files may be deleted."""
    return package_assets.cache() / "measured"


@contextmanager
def measured_again() -> Iterator[None]:
    """Measure everything in this context, as a receipt is verified."""
    before = os.environ.get(MEASURE_AGAIN)
    os.environ[MEASURE_AGAIN] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[MEASURE_AGAIN]
        else:
            os.environ[MEASURE_AGAIN] = before


def _content(adapted: AdaptedBase) -> str:
    """Return the SHA-256 of all weights of a model and of its detached updates."""
    digest = hashlib.sha256()
    states = {"": adapted.base.state_dict()}
    for module, delta in adapted.deltas.items():
        states[module] = delta.state_dict()
    for module, state in states.items():
        for name, tensor in state.items():
            digest.update(f"{module} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(_bytes(tensor))
    # States do not contain scales.
    for module, update in adapted.updates.items():
        digest.update(f"{module} {type(update).__name__} {joblib.hash(update.svd()[1])}".encode())
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


@functools.cache
def _code() -> str:
    """Return the SHA-256 of the package's code, because a clone changes without a new version."""
    digest = hashlib.sha256()
    for file in sorted(Path(lorascope.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
