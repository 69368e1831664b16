"""Registries that fill themselves: modules of a package, and entry points of other packages."""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from functools import cache
from importlib.metadata import entry_points
from typing import Any


@cache
def load_plugins(package: str, group: str = "", skip: tuple[str, ...] = ()) -> None:
    """Import the modules of a package in the order of their names, except ``skip``, then the entry points of a group.

    What they define registers itself on import. An entry point that cannot be imported is skipped with a warning.
    ``skip`` names modules that define nothing and have optional dependencies.
    """
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if module.name not in skip:
            importlib.import_module(f"{package}.{module.name}")
    for point in installed_entry_points().select(group=group) if group else ():
        try:
            # A package that is being imported, and so caused this import, continues with its own afterwards.
            importlib.import_module(point.module)
        except Exception as error:  # it is code of another package
            warnings.warn(
                f"skipped the entry point {point.name!r} of {group}: {point.value} raised {error!r}", stacklevel=2
            )


@cache
def installed_entry_points() -> Any:
    """Return the entry points of all installed packages: one search of their metadata for all groups."""
    return entry_points()
