"""Command lines of functions: the signature gives the flags, and the numpydoc docstring gives the help."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
import shutil
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import docstring_parser
import numpy as np
import tyro
from tyro.conf import FlagCreatePairsOff, arg
from tyro.constructors import PrimitiveConstructorSpec

File = Annotated[str | None, arg(metavar="FILE")]
Folder = Annotated[str | None, arg(metavar="DIR")]
Name = Annotated[str | None, arg(metavar="NAME")]
SavedState = Literal["last", "best"]
# To check a tuple[str, ...], tyro imports a package that takes as long as tyro itself.
_WORDS = PrimitiveConstructorSpec("*", "WORD ...", tuple, lambda value: isinstance(value, tuple), list)
Paths = Annotated[tuple[str, ...], arg(metavar="PATH ..."), _WORDS]

_PLAIN = (bool, int, float, str, Path, type(None))


def command(function: Callable[..., int]) -> Callable[[Sequence[str]], int]:
    """Turn a function of options into the ``main(argv)`` of its module, which is called with command-line arguments."""
    return partial(call, function, f"lorascope {function.__module__.rpartition('.')[2]}")


def call(
    function: Callable[..., int],
    name: str,
    argv: Sequence[str],
    extra: Sequence[inspect.Parameter] = (),
    description: str | None = None,
) -> int:
    """Call a function with the arguments of a command line; ``--help`` prints the help and exits.

    The parameters of the function are the options; positional-only ones have no flag. ``name`` is the command in the
    help and in errors, such as ``"lorascope inspect"``. The function receives ``extra`` options by ``**``, and a
    ``description`` replaces its docstring in the help. Raise a ValueError of one line for an invalid argument.
    """
    parameters = [*options_of(function), *(parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in extra)]
    _require_values(argv, parameters, name)

    def bind(*arguments: Any, **options: Any) -> Callable[[], int]:
        return partial(function, *arguments, **options)

    for binder in {bind, inspect.unwrap(bind)}:  # they differ if types are checked at every call, as in the tests
        binder.__dict__["__signature__"] = inspect.Signature(parameters)
        binder.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        binder.__doc__ = description or function.__doc__
    errors, columns = io.StringIO(), os.environ.get("COLUMNS")
    # tyro never finishes wrapping its help on a terminal narrower than this.
    os.environ["COLUMNS"] = str(max(40, shutil.get_terminal_size().columns))
    try:
        with contextlib.redirect_stderr(errors):
            # Without pairs, a flag has no second form that does nothing.
            bound = tyro.cli(bind, args=list(argv), prog=name, config=(FlagCreatePairsOff,))
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(f"{_parse_error_panel(errors.getvalue())} (see {name} --help)") from None
    finally:
        del os.environ["COLUMNS"]
        if columns is not None:
            os.environ["COLUMNS"] = columns
    with np.errstate(all="ignore"):  # NaN and infinity are findings; numpy's warnings would print lines of code
        return bound()


def _require_values(argv: Sequence[str], parameters: Sequence[inspect.Parameter], name: str) -> None:
    """Raise a ValueError if an argument is empty, or an option for several values has none."""
    lists = [f"--{option.name.replace('_', '-')}" for option in parameters if isinstance(option.default, tuple)]
    for number, word in enumerate(argv):
        # A negative number is a value.
        has_value = number + 1 < len(argv) and not re.match(r"--?[^\W\d]", argv[number + 1])
        if not word or re.fullmatch(r"--[^=]+=", word) or (word in lists and not has_value):
            argument = f"argument {word or repr(word)}"
            if number and not word:
                argument += f" after {argv[number - 1]}"
            raise ValueError(f"{argument} must not be empty: omit it or set a value (see {name} --help)")


def options_of(function: Callable[..., Any], skip: Collection[str] = ()) -> list[inspect.Parameter]:
    """Return the parameters of a function or dataclass as arguments for tyro, with help from the docstring.

    Parameters in ``skip``, and those whose types a command line cannot express, are omitted.
    """
    # tyro breaks the help where the docstring breaks its lines, and finds neither "lr, head_lr : float" nor the
    # parameters of a base class.
    owners = reversed(function.__mro__) if isinstance(function, type) else [function]
    docs: dict[str, str] = {}
    for owner in owners:
        for entry in docstring_parser.parse(owner.__doc__ or "", docstring_parser.DocstringStyle.NUMPYDOC).params:
            docs |= dict.fromkeys(entry.arg_name.split(", "), entry.description or "")
    hints = typing.get_type_hints(function, include_extras=True)
    options = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name in skip or parameter.kind is parameter.VAR_KEYWORD:
            continue
        kind = _flag_type(hints[name])
        if kind is None:
            continue
        default = parameter.default
        if kind is float and default != parameter.empty:
            default = float(default)
        help = " ".join(docs.get(name, "").replace("``", "").split()).rstrip(".")
        if default is True:  # the only option is --no-NAME
            help = f"do not {help[:1].lower()}{help[1:]}"
        hint = None
        if default is None or isinstance(default, bool) or default in ("", ()):
            hint = ""  # the help shows no default
        annotation = Annotated[kind, arg(help=help, help_behavior_hint=hint)]
        options.append(parameter.replace(annotation=annotation, default=default))
    return options


def reject(invalid: Mapping[str, bool]) -> None:
    """Raise a ValueError with the first message that is true of the command-line arguments."""
    for message, is_true in invalid.items():
        if is_true:
            raise ValueError(message)


def headline(function: Callable[..., Any]) -> str:
    """Return the first sentence of a docstring, as the help of a command line needs it, without its final period."""
    paragraph = inspect.cleandoc(function.__doc__ or "").partition("\n\n")[0]
    return re.split(r"\.\s+(?=[A-Z])", paragraph)[0].replace("\n", " ").rstrip(".")


def _flag_type(hint: Any) -> Any:
    """Return the part of a type that a command line can express (sequences of str and int as tuples), or None."""
    if get_origin(hint) is Annotated:
        kind = tuple if _WORDS in hint.__metadata__ else _flag_type(hint.__origin__) or hint.__origin__
        return Annotated[kind, *hint.__metadata__]
    is_union = get_origin(hint) in (Union, types.UnionType)
    kinds: list[Any] = []
    for kind in get_args(hint) if is_union else [hint]:
        if kind in _PLAIN or get_origin(kind) is Literal:
            kinds.append(kind)
        elif get_origin(kind) in (tuple, Sequence):
            item = get_args(kind)[0]
            if item is int:
                kinds.append(tuple[int, ...])
            elif item is float:
                kinds.append(tuple[float, ...])
            elif item is str or str in get_args(item):
                kinds.append(tuple[str, ...])
    if str in kinds and Path in kinds:
        kinds.remove(Path)
    if not set(kinds) - {type(None)}:
        return None
    # Not kinds[0] | kinds[1]: to check such a union, tyro imports the same package.
    return Union[tuple(kinds)]  # noqa: UP007


def _parse_error_panel(panel: str) -> str:
    """Return the message in tyro's error panel (box-drawing or ASCII), without the help of the options it names."""
    lines = []
    for line in panel.splitlines():
        text = line[2:].rstrip(" │")
        if line.startswith(("│ ", "  ")) and not text.startswith(" " * 8):  # tyro indents the help of an option by 8
            lines.append(text)
    message, *sections = re.split(r"^[─-]{3,}$", "\n".join(lines), flags=re.MULTILINE)
    suggestions = " ".join(section for section in sections if "Perhaps you meant" in section)
    options = dict.fromkeys(re.findall(r"--[\w-]+", suggestions))
    sentence = " ".join(message.split())
    if not options:
        return sentence
    return f"{sentence}; did you mean {' or '.join(options)}?"
