"""Grids of runs: models x tasks x methods x settings x seeds, from a TOML file or a mapping, validated before training.

A list means several values, with one run per value. If the value itself is a list, such as ``targets``, use a list of
lists. TOML has no null, so ``"none"`` means None wherever None is allowed.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import reprlib
import tomllib
import types
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lorascope.experiments.isolated_run import Data, Model
from lorascope.files.typed_json import require_size
from lorascope.inputs import models, tasks
from lorascope.inputs.metrics import require_fit, resolve
from lorascope.inputs.tasks import Task
from lorascope.methods import METHODS
from lorascope.methods.method import Method, config, from_config
from lorascope.observe import OBSERVERS, Observer
from lorascope.schema.suggestions import unknown_name
from lorascope.training.loop import train
from lorascope.training.settings import Settings, require_images, require_length, require_smoothing
from lorascope.training.trackers import tracker_names

_KEYS = ("model", "task", "method", "seeds", "settings", "root", "backend")
_NONE = "none"
_WORDS = {int: "an integer", float: "a number", str: "a string", bool: "true or false", type(None): f'"{_NONE}"'}
_BACKEND = {"name": str, "address": str, "jobs": int}
# Maximum number of seeds per recipe.
_MAX_SEEDS = 10_000
_MAX_RUNS = 10_000
# Parameters of ``train`` that have a separate key in a grid, or that many runs cannot share.
_NO_SETTINGS = {"model", "data", "method", "seed", "out", "root", "overwrite", "progress", "return"}


@dataclass(frozen=True)
class Job:
    """One combination of a grid, a call of ``train`` in a separate process; ``settings`` are its keyword arguments.

    ``name`` replaces the name that a sweep composes. ``start`` is the name of the job from whose run it starts.
    """

    model: Model
    data: Data
    method: Method
    settings: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    start: str = ""


@dataclass(frozen=True)
class Grid:
    """Grid of values to combine; every combination is one run.

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
        jobs = []
        combinations = itertools.product(self.models, self.tasks, self.methods, self.settings, self.seeds)
        for model, task, method, settings, seed in combinations:
            jobs.append(Job(model, task, method, {**settings, "seed": seed}))
        return jobs


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
    table = read_toml(path)
    with naming_file(path):
        return _read_grid(table)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a sweep file as a table, without validation.

    Raises
    ------
    FileNotFoundError
        The file does not exist.
    ValueError
        It is too large, or not TOML.
    """
    if path.is_dir():
        raise FileNotFoundError(f"cannot read {path} as a sweep: it is a folder, pass its TOML file")
    if not path.is_file():
        raise FileNotFoundError(f"cannot read {path} as a sweep: no such file")
    require_size(path.stat().st_size, path)
    with naming_file(path):
        try:
            return tomllib.loads(path.read_text(encoding="utf-8"))
        except RecursionError:
            raise ValueError("nested too deeply") from None


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Name a sweep file in the errors about its content."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_grid(table: Mapping[str, Any]) -> Grid:
    require_known(table, _KEYS, "key")
    for key in ("task", "method", "settings"):
        if key not in table:
            raise ValueError(f"missing key {key!r}: a sweep requires task, method and settings")
    if not isinstance(root := table.get("root", "runs"), str | Path):
        raise ValueError(f"root must be a string (folder of the runs), got {root!r}")
    if not isinstance(backend := table.get("backend", {}), Mapping):
        raise ValueError(f'backend must be a table such as {{name = "dask", address = "tcp://..."}}, got {backend!r}')
    for key, kind in _BACKEND.items():
        if key in backend:
            require_type(f"backend: {key}", backend[key], kind)
    lists = {}
    for key in ("model", "task", "method"):
        entry = table.get(key, "minilm")
        lists[key] = values = list(entry) if isinstance(entry, list | tuple) else [entry]
        if not values:
            raise ValueError(f"{key} must have at least one value, got {reprlib.repr(entry)}")
        for value in values:
            allowed = isinstance(value, str | Path | Task) or (key == "model" and callable(value))
            allowed = allowed or (key == "task" and isinstance(value, Mapping))
            if key != "method" and not allowed:
                raise ValueError(f"{key} must be a string or a list of strings, got {reprlib.repr(value)}")
    lists["task"] = [load_task(entry) if isinstance(entry, Mapping) else entry for entry in lists["task"]]
    methods = list(itertools.chain.from_iterable(map(read_methods, lists["method"])))
    settings = read_settings(table["settings"], methods)
    for combination in settings:
        combination["root"] = str(root)
    grid = Grid(lists["model"], lists["task"], methods, settings, parse_seeds(table.get("seeds", 3)), backend)
    _require_count([grid.models, grid.tasks, methods, settings, grid.seeds])
    _require_distinct(grid.models, "model")
    _require_distinct(grid.tasks, "task")
    _require_distinct(list(map(config, methods)), "method")
    _require_distinct(settings, "settings")
    for source in grid.tasks:
        task = source if isinstance(source, Task) else tasks.load(source)
        for combination in settings:
            if combination.get("metric") is not None:
                require_fit(resolve(combination["metric"]), task, combination.get("generation") is not None)
            require_smoothing(combination.get("label_smoothing", 0), task)
            require_images(combination.get("augment", "none"), task)
    for model in grid.models:
        if isinstance(model, str):
            models.locate_model(model)
    return grid


def load_task(entry: Mapping[str, Any]) -> Task:
    """Load the task of a table with a name and options of ``tasks.load``."""
    hints = get_type_hints(tasks.load)
    del hints["return"]
    if not isinstance(entry.get("name"), str):
        raise ValueError(
            f'task must be a name or a table with a name, such as {{name = "glue/rte"}}, got {reprlib.repr(entry)}'
        )
    require_known(entry, hints, "key of task")
    for key, value in entry.items():
        require_type(f"task: {key}", value, hints[key])
    return tasks.load(**entry)


def read_methods(entry: Any) -> list[Method]:
    """Return the methods of an entry, which is an object, a name, or a table with a name and fields."""
    if isinstance(entry, Method):
        return [entry]
    name, fields, hints = _read_named(entry, METHODS, "method", '{name = "lora", rank = 8}')
    try:
        return [from_config({"name": name, **combination}) for combination in _combinations(fields, hints)]
    except ValueError as error:
        raise ValueError(f"method {name}: {error}") from None


def read_settings(table: Any, methods: Sequence[Method]) -> list[dict[str, Any]]:
    """Return all combinations of the settings of a grid, validated with each method."""
    if not isinstance(table, Mapping):
        raise ValueError(f"settings must be a table such as {{steps = 300}}, got {reprlib.repr(table)}")
    hints = get_type_hints(train)
    for name in _NO_SETTINGS:
        del hints[name]
    require_known(table, hints, "setting")
    if "observe" in table:
        if isinstance(table["observe"], str | Mapping) and table["observe"] != _NONE:
            raise ValueError(f'observe must be a list of observers such as ["norms"], got {table["observe"]!r}')
        table = {**table, "observe": _observers(table["observe"])}
    if "steps" not in table and "epochs" not in table:
        raise ValueError("missing setting 'steps' or 'epochs': add one, as in {steps = 300}")
    combinations = _combinations(table, hints)
    names = get_type_hints(Settings).keys()
    _require_count([combinations, methods])
    for combination, method in itertools.product(combinations, methods):
        # Settings and trackers are checked here, so that an invalid one is reported before any run starts.
        tracker_names(combination.get("report_to"))
        training = {name: combination[name] for name in names & combination.keys()}
        for name in ("lr", "head_lr"):
            if training.get(name) is None:
                training[name] = getattr(method, name)
        require_length(training.get("steps"), training.get("epochs"))
        Settings(**{"steps": 0} | training).require_base_of(method)
    return combinations


def _observers(value: Any) -> Any:
    """Replace names and tables in ``observe`` by observers; lists stay lists."""
    if isinstance(value, list | tuple):
        return list(map(_observers, value))
    if isinstance(value, Observer) or value in (None, _NONE):
        return value
    name, fields, hints = _read_named(value, OBSERVERS, "observer", '{name = "neurons", every = 10}')
    for key, stored in fields.items():
        setting = _toml_to_value(stored, hints[key])
        require_type(f"observer {name}: {key}", setting, hints[key])
        if isinstance(setting, list):
            setting = tuple(setting)  # observers are frozen, and compared by their fields
        fields[key] = setting
    try:
        return OBSERVERS[name](**fields)
    except ValueError as error:
        raise ValueError(f"observer {name}: {error}") from error


def _read_named(
    entry: Any, kinds: Mapping[str, type], noun: str, example: str
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return name, fields and field types of an entry, which is a name or a table with a name and fields."""
    table = entry
    if isinstance(entry, str):
        table = {"name": entry}
    if not isinstance(table, Mapping) or not isinstance(name := table.get("name"), str):
        raise ValueError(f"{noun} must be a name or a table with a name, such as {example}, got {reprlib.repr(entry)}")
    require_known([name], kinds, noun)
    fields = dict(table)
    del fields["name"]
    hints = get_type_hints(kinds[name])
    field_hints = {}
    for setting in dataclasses.fields(kinds[name]):
        if setting.init and not setting.name.endswith("_"):
            field_hints[setting.name] = hints[setting.name]
    require_known(fields, field_hints, f"field of {noun} {name}")
    return name, fields, field_hints


def parse_seeds(value: Any) -> list[int]:
    """Return the seeds of a grid: those listed, or 0, 1, ... for a number of seeds."""
    seeds = value
    if type(value) is int:
        # One seed too many is enough to reject a huge number without listing it.
        seeds = range(min(value, _MAX_SEEDS + 1))
    accepted = isinstance(seeds, list | tuple | range) and seeds
    if not accepted or not all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds):
        raise ValueError(f"seeds must be an integer >= 1 or a list of integers from 0 to 2**32 - 1, got {value!r}")
    if len(seeds) > _MAX_SEEDS:
        raise ValueError(f"seeds must be at most {_MAX_SEEDS:,} seeds, got {reprlib.repr(value)}")
    _require_distinct(seeds, "seed")
    return list(seeds)


def _require_distinct(values: Sequence[Any], noun: str) -> None:
    for number, value in enumerate(values):
        if value in values[:number]:
            raise ValueError(f"duplicate {noun} {value!r}")


def _combinations(table: Mapping[str, Any], hints: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return all combinations of one value per key."""
    choices = []
    for key, value in table.items():
        hint, single = hints[key], _toml_to_value(value, hints[key])
        values = [single]
        if not is_of_type(single, hint) and isinstance(value, list):
            values = [_toml_to_value(item, hint) for item in value]
        if not values or not all(is_of_type(item, hint) for item in values):
            allowed = f"{_describe_type(hint)}, or a list of these (one run per value)"
            raise ValueError(f"{key} must be {allowed}, got {reprlib.repr(value)}")
        choices.append(values)
    _require_count(choices)
    return [dict(zip(table, combination, strict=True)) for combination in itertools.product(*choices)]


def _require_count(choices: Iterable[Sequence[Any]]) -> None:
    """Raise a ValueError if the combinations of one value per list are too many to list and validate."""
    count = math.prod(map(len, choices))
    if count > _MAX_RUNS:
        raise ValueError(f"a sweep must have at most {_MAX_RUNS:,} combinations, got {count:,}")


def _toml_to_value(value: Any, hint: Any) -> Any:
    """Convert a value to Python: "none" becomes None if the type allows None."""
    if value == _NONE and is_of_type(None, hint):
        return None
    return value


def is_of_type(value: Any, hint: Any) -> bool:
    """Return whether a value of a grid file (TOML) has this type; an integer is not a boolean, nor the reverse."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):  # of Optional[int] and int | None
        return any(is_of_type(value, member) for member in arguments)
    if origin is Literal:
        return value in arguments
    if hint is Any:
        return True
    if origin in (tuple, Sequence, Collection):
        return isinstance(value, list | tuple) and all(is_of_type(item, arguments[0]) for item in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(is_of_type(item, arguments[1]) for item in value.values())
    if isinstance(value, bool):
        return hint is bool
    if hint is float and isinstance(value, int):
        return True  # PEP 484 accepts an int as a float
    return isinstance(hint, type) and isinstance(value, hint)


def _describe_type(hint: Any) -> str:
    """Describe a type in the terms of TOML."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(filter(None, map(_describe_type, arguments))))
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin in (tuple, Sequence, Collection):
        return "a list"
    if origin is Mapping:
        return "a table"
    return _WORDS.get(hint, "")


def require_type(key: str, value: Any, hint: Any) -> None:
    """Raise ValueError if the value of a key does not have this type."""
    if not is_of_type(value, hint):
        raise ValueError(f"{key} must be {_describe_type(hint)}, got {reprlib.repr(value)}")


def require_known(names: Collection[str], choice: Collection[str], noun: str) -> None:
    """Raise ValueError for the first unknown name."""
    for name in names:
        if name not in choice:
            raise ValueError(unknown_name(noun, name, sorted(choice)))
