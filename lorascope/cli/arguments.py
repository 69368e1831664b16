"""From words of a command line to a dataclass of options, and from a function's signature to options."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import os
import re
import shutil
import types
import typing
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import tyro
from tyro.conf import FlagCreatePairsOff, arg

Options = TypeVar("Options")
Field = tuple[str, Any, Any]

_PLAIN = (bool, int, float, str, Path, type(None))


class UsageError(ValueError):
    """A command line that cannot be understood."""


def parse(options: type[Options], argv: Sequence[str], command: str) -> Options:
    """Read options off the command line; ``--help`` prints and exits.

    Parameters
    ----------
    options : dataclass
        Its fields are the options, its docstring the help.
    argv : sequence of str
        Words after the command.
    command : str
        Such as ``"lorascope inspect"``.

    Raises
    ------
    UsageError
        In one line.
    """
    for number, word in enumerate(argv):
        if not word or re.fullmatch(r"--[^=]+=", word):
            before = f" after {argv[number - 1]}" if number and not word else ""
            told = f"argument {word or repr(word)}{before}"
            raise UsageError(f"{told} must not be empty; leave it out, or give a value (see {command} --help)")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), _wide_terminal():
            return tyro.cli(options, args=list(argv), prog=command, config=(FlagCreatePairsOff,))
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(f"{_complaint(said.getvalue())} (see {command} --help)") from None


@contextlib.contextmanager
def _wide_terminal() -> Iterator[None]:
    """Set ``COLUMNS`` to at least 40: on a narrower terminal tyro wraps its help forever."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(max(40, shutil.get_terminal_size().columns))
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def fields_of(function: Callable[..., Any], skip: Collection[str] = ()) -> list[Field]:
    """Options for the parameters of a function or the fields of a dataclass, with the help of its docstring.

    Parameters whose values cannot stand on a command line are left out.

    Parameters
    ----------
    function : callable
    skip : collection of str
        Parameters that are none.

    Returns
    -------
    list of (name, type, field)
        For ``dataclasses.make_dataclass``.
    """
    hints, told = typing.get_type_hints(function), parse_parameter_docs(function)
    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        kind = None if name in skip else flag_type(hints[name])
        if kind is None:
            continue
        required = parameter.default is inspect.Parameter.empty
        default = float(parameter.default) if kind is float and not required else parameter.default
        field = dataclasses.field() if required else dataclasses.field(default=default)
        # A switch that is on can only be switched off.
        help = ("Switch off: " if parameter.default is True else "") + told.get(name, "")
        found.append((name, Annotated[kind, arg(help=help, metavar=_metavar(kind))], field))
    return found


def headline(function: Callable[..., Any]) -> str:
    """The first sentence of a docstring, without its full stop."""
    paragraph = inspect.cleandoc(function.__doc__ or "").partition("\n\n")[0]
    return re.split(r"\.\s+(?=[A-Z])", paragraph)[0].replace("\n", " ").rstrip(".")


def flag_type(hint: Any) -> Any:
    """Return the part of a type that a command line can hold (sequences of str as tuples), None if there is none."""
    union = get_origin(hint) in (Union, types.UnionType)
    kept = [kind for kind in map(_simple, get_args(hint) if union else [hint]) if kind is not None]
    if str in kept and Path in kept:
        kept.remove(Path)
    return reduce(or_, kept) if set(kept) - {type(None)} else None


def _metavar(kind: Any) -> str | None:
    """How the value is called in the help; None leaves it to tyro."""
    members = [member for member in get_args(kind) or (kind,) if member is not type(None)]
    named = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}
    words = [named.get(member, "TEXT ..." if get_origin(member) is tuple else None) for member in members]
    return None if None in words else "|".join(map(str, words))


def _simple(kind: Any) -> Any:
    if kind in _PLAIN or get_origin(kind) is Literal:
        return kind
    words = get_origin(kind) in (tuple, Sequence) and get_args(kind)[0] is str
    return tuple[str, ...] if words else None


def parse_parameter_docs(function: Callable[..., Any]) -> dict[str, str]:
    """What the numpydoc of a function, or of a class and those it inherits from, says of each parameter."""
    owners = reversed(function.__mro__) if isinstance(function, type) else [function]
    told: dict[str, str] = {}
    for owner in owners:
        text = inspect.cleandoc(owner.__doc__ or "")
        for names, body in re.findall(r"^(\w+(?:, \w+)*) : .*\n((?: {4}.*\n?)*)", text, re.MULTILINE):
            told |= dict.fromkeys(names.split(", "), " ".join(body.replace("``", "").split()))
    return told


def _complaint(panel: str) -> str:
    """The message inside the panel that tyro draws, in lines or in ASCII, without the help of the options it names."""
    inside = [line[2:].rstrip(" │") for line in panel.splitlines() if line.startswith(("│ ", "  "))]
    told = "\n".join(line for line in inside if not line.startswith(" " * 8))
    message, *rest = re.split(r"^[─-]{3,}$", told, flags=re.MULTILINE)
    near = [option for part in rest if "Perhaps you meant" in part for option in re.findall(r"--[\w-]+", part)]
    return " ".join(message.split()) + (f"; did you mean {' or '.join(dict.fromkeys(near))}?" if near else "")
