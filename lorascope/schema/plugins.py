"""Registries that fill themselves: modules of a package, and entry points of other packages."""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
import warnings
from functools import cache
from typing import Any


@cache
def load_plugins(package: str, group: str = "", skip: tuple[str, ...] = ()) -> None:
    """Import plugins: the modules of a package by name, except ``skip``, then the entry points of a group.

    What they define registers itself on import. ``skip`` names modules that define nothing and have optional
    dependencies.
    """
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if module.name not in skip:
            importlib.import_module(f"{package}.{module.name}")
    if group:
        load_entry_points(group)


@cache
def load_entry_points(group: str) -> None:
    """Import the modules of an entry point group; one that cannot be imported is skipped with a warning."""
    if (points := installed_entry_points()) is None:
        return
    for point in points.select(group=group):
        try:
            # A package that is being imported, and so caused this import, continues with its own afterwards.
            importlib.import_module(point.module)
        except Exception as error:  # it is code of another package
            warnings.warn(
                f"skipped the entry point {point.name!r} of {group}: {point.value} raised {error!r}", stacklevel=2
            )


@cache
def installed_entry_points() -> Any:
    """Return the entry points of all installed plugins and packages, or None if no group is of this package.

    Importing ``importlib.metadata`` to parse the files takes as long as reading an adapter.
    """
    if not any(map(_has_group, sys.path)):
        return None
    from importlib.metadata import entry_points

    return entry_points()


def _has_group(folder: str) -> bool:
    """Return whether a package in a folder of ``sys.path`` has a group of this package; True for an archive."""
    try:
        names = os.listdir(folder or ".")
    except OSError:  # not a folder
        return os.path.isfile(folder)
    for name in names:
        if name.endswith((".dist-info", ".egg-info")):
            try:
                with open(os.path.join(folder, name, "entry_points.txt"), "rb") as file:
                    if b"[lorascope." in file.read():
                        return True
            except OSError:  # it has no entry points
                continue
    return False
