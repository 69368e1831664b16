"""Every name that a function reads is defined. Linters do not report it here: they take shapes of tensors for names."""

from __future__ import annotations

import builtins
import dis
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(file for folder in ("lorascope", "benchmarks", "docs/_ext") for file in (ROOT / folder).rglob("*.py"))


def undefined_names(source: str) -> set[str]:
    """Return the names that code reads from its module, which neither the module nor Python defines."""
    module = compile(source, "module", "exec", dont_inherit=True)
    defined, read = {*vars(builtins), "__file__", "__annotations__"}, set()
    for code in nested_code(module):
        for instruction in dis.get_instructions(code):
            if instruction.opname == "STORE_GLOBAL" or (code is module and instruction.opname == "STORE_NAME"):
                defined.add(instruction.argval)
            elif instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                read.add((code, instruction.argval))
    local = {(code, name) for code in nested_code(module) for name in local_names(code)}
    return {name for code, name in read - local if name not in defined}


def nested_code(code: CodeType) -> Iterator[CodeType]:
    """Yield code and that of its functions and classes, of any depth."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from nested_code(constant)


def local_names(code: CodeType) -> Iterator[str]:
    """Yield the names that the body of a class or module defines, and those that Python defines in a class."""
    yield from ("__module__", "__qualname__", "__name__")
    for instruction in dis.get_instructions(code):
        if instruction.opname == "STORE_NAME":
            yield instruction.argval


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(x):\n    return x + y\n", {"y"}),
        ("y = 1\ndef f(x):\n    return x + y\n", set()),
        ("def f():\n    z = 1\n    def g():\n        return z\n    return g\n", set()),
        ("class A:\n    b = 1\n    c = b\n    def f(self):\n        return b\n", {"b"}),
        ("def f():\n    return [name for name in names]\n", {"names"}),
        ("from __future__ import annotations\ndef f(x: 'unknown') -> unknown: ...\n", set()),
        ("def f():\n    global total\n    total = 1\ndef g():\n    return total\n", set()),
    ],
)
def test_undefined_names_are_found(source: str, expected: set[str]) -> None:
    assert undefined_names(source) == expected


def test_every_name_is_defined() -> None:
    undefined = {}
    for file in FILES:
        if names := undefined_names(file.read_text(encoding="utf-8")):
            undefined[file.relative_to(ROOT).as_posix()] = sorted(names)
    assert undefined == {}
