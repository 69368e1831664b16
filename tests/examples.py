"""The example of every method of the package, which the tests of all methods train, and its variants."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from lorascope.methods import METHODS
from lorascope.methods.field_checks import literal_fields
from lorascope.methods.method import Method

EXAMPLES = {name: method.example() for name, method in METHODS.items() if method.__module__.startswith("lorascope.")}


def variants(method: Method) -> Iterator[tuple[str, Method]]:
    """Yield each other value of each ``Literal`` field of a method, as in a label, and the method with this value."""
    for name, values in literal_fields(type(method)).items():
        for value in set(values) - {getattr(method, name)}:
            with suppress(ValueError):  # DoRA and PiSSA inherit a field of LoRA, but accept only its default
                yield f"{name} {value}", replace(method, **{name: value})
