"""Distributions that an installation of lorascope brings, by its requirements and those of the installed packages."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from functools import cache
from importlib import metadata

from packaging.requirements import Requirement


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@cache
def required(name: str) -> list[Requirement]:
    return [Requirement(text) for text in metadata.requires(name) or []]


packages = cache(metadata.packages_distributions)


def distributions(requirements: Iterable[str], extras: Collection[str] = ()) -> set[str]:
    """Return the distributions that these requirements of lorascope and their own requirements install."""
    own, seen = [Requirement(text) for text in requirements], set()

    def visit(name: str, extras: Collection[str]) -> None:
        if (key := (name, frozenset(extras))) in seen:
            return
        seen.add(key)
        try:
            parsed = own if name == "lorascope" else required(name)
        except metadata.PackageNotFoundError:  # an optional package of another package
            return
        for requirement in parsed:
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras or [""]):
                visit(canonical(requirement.name), requirement.extras)

    visit("lorascope", extras)
    return {name for name, _ in seen} - {"lorascope"}


def importable(installed: Collection[str]) -> set[str]:
    """Return the top-level names that these distributions provide."""
    found = packages().items()
    return {name for name, owners in found if {canonical(owner) for owner in owners} & set(installed)}


def hide(packages: Collection[str]) -> str:
    """Return code after which importing one of these packages fails as if it were not installed."""
    return f"""
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {sorted(packages)}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name.partition(".")[0])

sys.meta_path.insert(0, Hidden())
"""
