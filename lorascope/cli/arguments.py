"""Command-line parsing into a dataclass of options, and options generated from a function signature."""

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
    """Invalid command line."""


def parse(options: type[Options], argv: Sequence[str], command: str) -> Options:
    """Parse command-line arguments into a dataclass; ``--help`` prints the help and exits.

    Parameters
    ----------
    options : dataclass
        Type whose fields are the options and whose docstring is the help.
    argv : sequence of str
        Arguments after the command.
    command : str
        Name in the help and in errors, such as ``"lorascope inspect"``.

    Raises
    ------
    UsageError
        An argument is invalid; the message is one line.
    """
    for number, word in enumerate(argv):
        if not word or re.fullmatch(r"--[^=]+=", word):
            before = f" after {argv[number - 1]}" if number and not word else ""
            argument = f"argument {word or repr(word)}{before}"
            raise UsageError(f"{argument} must not be empty: omit it or set a value (see {command} --help)")
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), _wide_terminal():
            return tyro.cli(options, args=list(argv), prog=command, config=(FlagCreatePairsOff,))
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(f"{_parse_error_panel(errors.getvalue())} (see {command} --help)") from None


@contextlib.contextmanager
def _wide_terminal() -> Iterator[None]:
    """Set ``COLUMNS`` to at least 40, because tyro never finishes wrapping its help on a narrower terminal."""
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
    """Return options for the parameters of a function or the fields of a dataclass, with help from its docstring.

    Parameters whose types a command line cannot express are omitted.

    Parameters
    ----------
    function : callable
        Function or dataclass with a numpydoc docstring.
    skip : collection of str
        Names of parameters to omit.

    Returns
    -------
    list of (name, type, field)
        For ``dataclasses.make_dataclass``.
    """
    hints, docs = typing.get_type_hints(function), parse_parameter_docs(function)
    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        kind = None if name in skip else flag_type(hints[name])
        if kind is None:
            continue
        required = parameter.default is inspect.Parameter.empty
        default = float(parameter.default) if kind is float and not required else parameter.default
        field = dataclasses.field() if required else dataclasses.field(default=default)
        help = docs.get(name, "").rstrip(".")
        if parameter.default is True:  # the only option is --no-NAME
            help = f"disable: {help}"
        found.append((name, Annotated[kind, arg(help=help, metavar=_metavar(kind))], field))
    return found


def headline(function: Callable[..., Any]) -> str:
    """Return the first sentence of a docstring without its final period."""
    paragraph = inspect.cleandoc(function.__doc__ or "").partition("\n\n")[0]
    return re.split(r"\.\s+(?=[A-Z])", paragraph)[0].replace("\n", " ").rstrip(".")


def flag_type(hint: Any) -> Any:
    """Return the part of a type that a command line can express (sequences of str as tuples), or None."""
    union = get_origin(hint) in (Union, types.UnionType)
    kept = [kind for kind in map(_simple, get_args(hint) if union else [hint]) if kind is not None]
    if str in kept and Path in kept:
        kept.remove(Path)
    return reduce(or_, kept) if set(kept) - {type(None)} else None


def _metavar(kind: Any) -> str | None:
    """Return the placeholder of the value in the help; None selects tyro's default."""
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
    """Return the description of each parameter in the numpydoc of a function, or of a class and its bases."""
    owners = reversed(function.__mro__) if isinstance(function, type) else [function]
    docs: dict[str, str] = {}
    for owner in owners:
        text = inspect.cleandoc(owner.__doc__ or "")
        for names, body in re.findall(r"^(\w+(?:, \w+)*) : .*\n((?: {4}.*\n?)*)", text, re.MULTILINE):
            docs |= dict.fromkeys(names.split(", "), " ".join(body.replace("``", "").split()))
    return docs


def _parse_error_panel(panel: str) -> str:
    """Return the message in tyro's error panel (box-drawing or ASCII), without the help of the options it names."""
    inside = [line[2:].rstrip(" │") for line in panel.splitlines() if line.startswith(("│ ", "  "))]
    text = "\n".join(line for line in inside if not line.startswith(" " * 8))
    message, *rest = re.split(r"^[─-]{3,}$", text, flags=re.MULTILINE)
    near = [option for part in rest if "Perhaps you meant" in part for option in re.findall(r"--[\w-]+", part)]
    return " ".join(message.split()) + (f"; did you mean {' or '.join(dict.fromkeys(near))}?" if near else "")
