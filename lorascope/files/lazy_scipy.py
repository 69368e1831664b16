"""Functions of scipy, imported at the first call: a plain installation has no scipy, and adapters rarely need it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np


def _import_on_call(module: str, name: str) -> Callable[..., Any]:
    """Return a function that imports the one of this name and calls it."""

    def call(*args: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **options)

    return call


binom = _import_on_call("scipy.stats", "binom")
false_discovery_control = _import_on_call("scipy.stats", "false_discovery_control")
hypergeom = _import_on_call("scipy.stats", "hypergeom")
rankdata = _import_on_call("scipy.stats", "rankdata")
stdtr = _import_on_call("scipy.special", "stdtr")
_stdtrit = _import_on_call("scipy.special", "stdtrit")


def stdtrit(degrees: Any, p: Any) -> Any:
    """Return scipy's quantile of Student's t; NaN without scipy if all degrees are, as with one run per curve."""
    if np.isnan(degrees).all():
        return np.full(np.shape(degrees), np.nan)
    return _stdtrit(degrees, p)
