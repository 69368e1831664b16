"""Grids of runs: models x tasks x methods x settings x seeds, from a TOML file or a mapping, validated before training.

A list means several values, with one run per value. If the value itself is a list, such as ``targets``, use a list of
lists. TOML has no null, so ``"none"`` means None wherever None is allowed.
"""

from __future__ import annotations

import dataclasses
import itertools
import reprlib
import tomllib
import types
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lorascope import observe
from lorascope.experiments.isolated_run import Data, Model
from lorascope.files.typed_json import require_size
from lorascope.inputs import models, tasks
from lorascope.inputs.tasks import Task
from lorascope.methods import METHODS
from lorascope.methods.method import Method, config, from_config
from lorascope.observe.observer import Observer
from lorascope.schema.suggestions import unknown_name
from lorascope.training.loop import train
from lorascope.training.settings import Settings
from lorascope.training.trackers import tracker_names

_KEYS = ("model", "task", "method", "seeds", "settings", "root", "backend")
_NONE = "none"
_WORDS = {int: "an integer", float: "a number", str: "a string", bool: "true or false", type(None): f'"{_NONE}"'}
_BACKEND = {"name": str, "address": str, "jobs": int}
# Maximum number of seeds per recipe.
_MOST = 10_000
_OBSERVERS = {
    name: kind
    for name, kind in vars(observe).items()
    if isinstance(kind, type) and issubclass(kind, Observer) and kind is not Observer
}
# Parameters of ``train`` that have a separate key in a grid, or that many runs cannot share.
_NO_SETTINGS = {"model", "data", "method", "seed", "out", "root", "overwrite", "progress", "return"}


@dataclass(frozen=True)
class Job:
    """One call of ``train`` in a separate process, with the same arguments; ``settings`` are its keyword arguments.

    ``name`` replaces the name that a sweep composes, and ``cost`` is the expected duration relative to other jobs.
    """

    model: Model
    data: Data
    method: Method
    settings: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    cost: float = 1.0


@dataclass(frozen=True)
class Grid:
    """Values to combine; every combination is one run.

    ``backend`` has ``name``, ``address``, ``jobs`` and options of the joblib backend; empty for local processes.
    """

    models: Sequence[Model]
    tasks: Sequence[Data]
    methods: Sequence[Method]
    settings: Sequence[Mapping[str, Any]]
    seeds: Sequence[int]
    backend: Mapping[str, Any] = field(default_factory=dict)

    def jobs(self) -> list[Job]:
        """Return one job per combination; the seeds of one recipe are consecutive."""
        parts = itertools.product(self.models, self.tasks, self.methods, self.settings, self.seeds)
        return [Job(model, task, method, {**settings, "seed": seed}) for model, task, method, settings, seed in parts]


def read(source: str | Path | Mapping[str, Any]) -> Grid:
    """Read a grid, and validate everything that does not require a model.

    Parameters
    ----------
    source : path or mapping
        A TOML file, or a mapping with the same keys, which may also contain Method and Task objects. Required keys are
        ``task``, ``method`` and ``settings`` (with ``steps``). Optional keys are ``model`` (default "minilm"),
        ``seeds`` (a number or a list, default 3), ``root`` (folder of the runs, default "runs") and ``backend``.

    Raises
    ------
    ValueError
        A key, method, field, task or value is invalid; the message has one line.
    FileNotFoundError
        The file, a task or a model does not exist.
    """
    if isinstance(source, Mapping):
        return _read_grid(source)
    path = Path(source)
    if not path.is_file():
        reason = "it is a folder, pass its TOML file" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"cannot read {path} as a sweep: {reason}")
    require_size(path.stat().st_size, path)
    try:
        return _read_grid(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: {error}") from None
    except RecursionError:
        raise ValueError(f"cannot read {path}: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_grid(table: Mapping[str, Any]) -> Grid:
    _require_known(table, _KEYS, "key")
    for key in ("task", "method", "settings"):
        if key not in table:
            raise ValueError(f"missing key {key!r}: a sweep requires task, method and settings")
    if not isinstance(root := table.get("root", "runs"), str | Path):
        raise ValueError(f"root must be a string (folder of the runs), got {root!r}")
    if not isinstance(backend := table.get("backend", {}), Mapping):
        raise ValueError(f'backend must be a table such as {{name = "dask", address = "tcp://..."}}, got {backend!r}')
    for key, kind in _BACKEND.items():
        if key in backend:
            _require_type(f"backend: {key}", backend[key], kind)
    given = {key: table.get(key, "minilm") for key in ("model", "task", "method")}
    lists = {key: list(value) if isinstance(value, list | tuple) else [value] for key, value in given.items()}
    for key, found in lists.items():
        if not found:
            raise ValueError(f"{key} must have at least one value, got {given[key]!r}")
        for place in found:
            if (
                key != "method"
                and not isinstance(place, str | Path | Task)
                and not (key == "model" and callable(place))
            ):
                raise ValueError(f"{key} must be a string or a list of strings, got {place!r}")
    methods = [method for entry in lists["method"] for method in _methods(entry)]
    settings = [{**chosen, "root": str(root)} for chosen in _read_settings(table["settings"], methods)]
    grid = Grid(lists["model"], lists["task"], methods, settings, parse_seeds(table.get("seeds", 3)), backend)
    _require_distinct(grid.models, "model")
    _require_distinct(grid.tasks, "task")
    _require_distinct([config(method) for method in methods], "method")
    _require_distinct(settings, "settings")
    for task in grid.tasks:
        if not isinstance(task, Task):
            tasks.load(task)
    for model in grid.models:
        if isinstance(model, str):
            models.locate(model)
    return grid


def _methods(entry: Any) -> list[Method]:
    """Return the methods of an entry, which is an object, a name, or a table with a name and fields."""
    if isinstance(entry, Method):
        return [entry]
    name, given, hints = _read_named(entry, METHODS, "method", '{name = "lora", rank = 8}')
    try:
        return [from_config({"name": name, **chosen}) for chosen in _combinations(given, hints)]
    except ValueError as error:
        raise ValueError(f"method {name}: {error}") from None


def _read_settings(table: Any, methods: Sequence[Method]) -> list[dict[str, Any]]:
    if not isinstance(table, Mapping):
        raise ValueError(f"settings must be a table such as {{steps = 300}}, got {table!r}")
    hints = {name: hint for name, hint in get_type_hints(train).items() if name not in _NO_SETTINGS}
    _require_known(table, hints, "setting")
    if "observe" in table:
        if isinstance(table["observe"], str | Mapping) and table["observe"] != _NONE:
            raise ValueError(f'observe must be a list of observers such as ["norms"], got {table["observe"]!r}')
        table = {**table, "observe": _observers(table["observe"])}
    if "steps" not in table:
        raise ValueError("missing setting 'steps': add it, as in {steps = 300}")
    found = _combinations(table, hints)
    names = {field.name for field in dataclasses.fields(Settings)}
    for chosen, method in itertools.product(found, methods):
        # Settings and trackers are checked here, so that an invalid one is reported before any run starts.
        tracker_names(chosen.get("report_to"))
        own = {name: value for name, value in chosen.items() if name in names}
        rates = {name: getattr(method, name) for name in ("lr", "head_lr") if own.get(name) is None}
        Settings(**own | rates)
    return found


def _observers(value: Any) -> Any:
    """Replace names and tables in ``observe`` by observers; lists stay lists."""
    if isinstance(value, list | tuple):
        return [_observers(item) for item in value]
    if isinstance(value, Observer) or value in (None, _NONE):
        return value
    name, given, hints = _read_named(value, _OBSERVERS, "observer", '{name = "neurons", every = 10}')
    for key, each in given.items():
        given[key] = each = _toml_to_value(each, hints[key])
        _require_type(f"observer {name}: {key}", each, hints[key])
        given[key] = tuple(each) if isinstance(each, list) else each
    try:
        return _OBSERVERS[name](**given)
    except ValueError as error:
        raise ValueError(f"observer {name}: {error}") from error


def _read_named(
    entry: Any, kinds: Mapping[str, type], what: str, example: str
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return name, fields and field types of an entry, which is a name or a table with a name and fields."""
    table = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(table, Mapping) or not isinstance(name := table.get("name"), str):
        raise ValueError(f"{what} must be a name or a table with a name, such as {example}, got {entry!r}")
    _require_known([name], kinds, what)
    given = {key: value for key, value in table.items() if key != "name"}
    hints = get_type_hints(kinds[name])
    own = {f.name: hints[f.name] for f in dataclasses.fields(kinds[name]) if f.init and not f.name.endswith("_")}
    _require_known(given, own, f"field of {what} {name}")
    return name, given, own


def parse_seeds(value: Any) -> list[int]:
    """Return the listed seeds, or 0, 1, ... for a number of seeds."""
    # One seed too many is enough to reject a huge number without listing it.
    found = range(min(value, _MOST + 1)) if type(value) is int else value
    accepted = isinstance(found, list | tuple | range) and found
    if not accepted or not all(type(each) is int and 0 <= each < 2**32 for each in found):
        raise ValueError(f"seeds must be an integer >= 1 or a list of integers from 0 to 2**32 - 1, got {value!r}")
    if len(found) > _MOST:
        raise ValueError(f"seeds must be at most {_MOST:,} seeds, got {reprlib.repr(value)}")
    _require_distinct(found, "seed")
    return list(found)


def _require_distinct(values: Sequence[Any], what: str) -> None:
    for number, value in enumerate(values):
        if value in values[:number]:
            raise ValueError(f"duplicate {what} {value!r}")


def _combinations(table: Mapping[str, Any], hints: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return all combinations of one value per key."""
    choices = []
    for key, value in table.items():
        hint, one = hints[key], _toml_to_value(value, hints[key])
        several = [_toml_to_value(item, hint) for item in value] if isinstance(value, list) else []
        if is_of_type(one, hint):
            several = [one]
        elif not several or not all(is_of_type(item, hint) for item in several):
            allowed = f"{_describe_type(hint)}, or a list of these (one run per value)"
            raise ValueError(f"{key} must be {allowed}, got {value!r}")
        choices.append(several)
    return [dict(zip(table, chosen, strict=True)) for chosen in itertools.product(*choices)]


def _toml_to_value(value: Any, hint: Any) -> Any:
    """Convert a value to Python: "none" becomes None if the type allows None."""
    return None if value == _NONE and is_of_type(None, hint) else value


def is_of_type(value: Any, hint: Any) -> bool:
    """Return whether a TOML value has this type. An integer is not a boolean, and a boolean not an integer."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(is_of_type(value, each) for each in arguments)
    if origin is Literal:
        return value in arguments
    if hint is Any:
        return True
    if origin in (tuple, Sequence, Collection):
        return isinstance(value, list | tuple) and all(is_of_type(item, arguments[0]) for item in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(is_of_type(item, arguments[1]) for item in value.values())
    kind = int | float if hint is float else hint  # PEP 484 accepts an int as a float
    return isinstance(hint, type) and isinstance(value, kind) and (hint is bool or not isinstance(value, bool))


def _describe_type(hint: Any) -> str:
    """Describe a type in the terms of TOML."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(name for each in arguments if (name := _describe_type(each))))
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin in (tuple, Sequence, Collection):
        return "a list"
    if origin is Mapping:
        return "a table"
    return _WORDS.get(hint, "")


def _require_type(key: str, value: Any, hint: Any) -> None:
    """Raise ValueError if the value of a key does not have this type."""
    if not is_of_type(value, hint):
        raise ValueError(f"{key} must be {_describe_type(hint)}, got {value!r}")


def _require_known(given: Collection[str], choice: Collection[str], what: str) -> None:
    """Raise ValueError for the first unknown name."""
    for name in given:
        if name not in choice:
            raise ValueError(unknown_name(what, name, sorted(choice)))
