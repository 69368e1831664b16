"""Statistics and controls of all claims: one module per probe, each with the claims that it judges.

A module defines ``CLAIMS``: id -> (statistic, control). They read only the evidence, and need no torch.
"""

from importlib import import_module
from pkgutil import iter_modules

_MODULES = {module.name: import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)}

PAIRS = {id: pair for module in _MODULES.values() for id, pair in getattr(module, "CLAIMS", {}).items()}
"""Statistic and control of every claim, by id."""


def module_of(claim: str) -> str:
    """Return the name of the module that computes a claim."""
    return next(f"{__name__}.{name}" for name, module in _MODULES.items() if claim in getattr(module, "CLAIMS", {}))
