"""Recipes: tables of papers as sweeps in parts, one part per column, read from TOML files.

A recipe is a sweep file with more keys: ``paper``, ``part`` (a column of the table, with any key of a sweep),
``printed`` (which number of the paper belongs to a row), ``mean`` (a column with the mean over others) and ``smoke``
(how the recipe is tried with a tiny model).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pandas as pd

from lorascope.experiments import grid
from lorascope.experiments.grid import Grid, Job
from lorascope.experiments.smoke import Smoke
from lorascope.files.data_folder import DATA
from lorascope.files.typed_json import to_typed
from lorascope.inputs.metrics import Metric, resolve
from lorascope.inputs.tasks import Task
from lorascope.methods.method import Method
from lorascope.schema.suggestions import unknown_name

FOLDER = Path(__file__).with_name("recipes")
"""Folder of the recipes in the package."""
_SWEEP_KEYS = ("model", "task", "method", "settings", "seeds")
_KEYS = (*_SWEEP_KEYS, "root", "backend", "paper", "part", "printed", "mean", "smoke")
_PART_KEYS = (*_SWEEP_KEYS, "column", "metric", "printed", "test_columns", "id", "start")
_MEAN_KEYS = ("column", "columns", "printed")
_PRINTED_KEYS = ("paper", "table", "model", "data", "metric", "method", "parameters")
PUBLISHED = "reported.csv"
_STATISTICS, _STATES = ("mean", "median"), ("best", "last", "unknown")


class Paper(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Table of a paper that a recipe is of.

    Parameters
    ----------
    name, arxiv, table : str
        Name of its method, its arXiv id, and the number of its table, such as "Table 1".
    caption : str
        Model and data, such as "DeBERTaV3-base, GLUE dev".
    statistic : {"mean", "median"}
        What is printed of the seeds.
    state : {"best", "last", "unknown"}
        Evaluation of which the printed numbers are.
    sources : tuple of str
        Files of public code, ``owner/repository: file``, or sections of the paper, that the values are from.
    """

    name: str
    arxiv: str
    table: str
    caption: str = ""
    statistic: str = "mean"
    state: str = "unknown"
    sources: tuple[str, ...] = ()


class PrintedCell(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Number of another paper at a cell of an own table, with its standard deviation and number of seeds if printed."""

    row: str
    column: str
    value: float
    sd: float = math.nan
    n: float = math.nan


class PrintedScore(NamedTuple):
    """Number that a paper prints; ``sd`` and ``n``, over seeds, are NaN if it does not."""

    value: float
    sd: float
    n: float


class Perplexity(NamedTuple):
    """Metric of plain text and of open responses, which runs record if their settings name no metric."""

    name: str = "perplexity"
    higher_is_better: bool = False


@dataclass(frozen=True)
class TableRow:
    """Row of the table: its name, the method that is trained for it, and the printed numbers by column."""

    name: str
    method: Method
    printed: Mapping[str, PrintedScore]


@dataclass(frozen=True)
class RecipePart:
    """Runs on one dataset: the columns that they fill, one per metric, and a grid with one method per row.

    ``test_columns`` has the columns of further test sets, by the names of these sets. The runs start from the runs of
    ``start`` with the same row and seed.
    """

    columns: Mapping[str, Metric | Perplexity]
    rows: tuple[TableRow, ...]
    grid: Grid
    test_columns: Mapping[str, str] = field(default_factory=dict)
    start: RecipePart | None = None

    @property
    def title(self) -> str:
        """Names of its columns."""
        return ", ".join([*self.columns, *self.test_columns.values()])

    def jobs(self) -> list[Job]:
        """Return the jobs, named after row, columns and seed, with all seeds of a row together."""
        jobs = []
        # With one model and task, the jobs of a grid are ordered by method and then by seed.
        for number, job in enumerate(self.grid.jobs()):
            row, seed = self.rows[number // len(self.grid.seeds)], job.settings["seed"]
            if self.start is not None:
                job = replace(job, start=self.start._job_name(row, seed))
            jobs.append(replace(job, name=self._job_name(row, seed)))
        return jobs

    def _job_name(self, row: TableRow, seed: int) -> str:
        return f"{row.name}, {', '.join(self.columns)}, seed {seed}"


@dataclass(frozen=True)
class MeanColumn:
    """Column with the mean over other columns of a seed: its name, theirs, and the printed numbers by row."""

    name: str
    columns: tuple[str, ...]
    printed: Mapping[str, PrintedScore]


@dataclass(frozen=True)
class Recipe:
    """Recipe of a table: its paper, None for an own table, its columns, also of means, and the folder of its runs."""

    name: str
    paper: Paper | None
    recipe_parts: tuple[RecipePart, ...]
    means: tuple[MeanColumn, ...]
    root: Path
    backend: Mapping[str, Any]

    def jobs(self) -> list[Job]:
        """Return the jobs of all columns."""
        return list(chain.from_iterable(recipe_part.jobs() for recipe_part in self.recipe_parts))

    def without_printed(self) -> Recipe:
        """Return the recipe without printed numbers."""
        recipe_parts = []
        for recipe_part in self.recipe_parts:
            rows = tuple(replace(row, printed={}) for row in recipe_part.rows)
            recipe_parts.append(replace(recipe_part, rows=rows))
        means = tuple(replace(mean, printed={}) for mean in self.means)
        return replace(self, recipe_parts=tuple(recipe_parts), means=means)


def recipe_names() -> list[str]:
    """Return the names of the recipes in the package."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def find_recipe(source: str | Path) -> Path:
    """Return the file of a recipe or sweep: a path, or the name of a recipe in the package.

    Raises
    ------
    FileNotFoundError
        There is neither such a file nor such a recipe.
    """
    path = Path(source)
    if path.exists():
        return path
    if str(source) in recipe_names():
        return FOLDER / f"{source}.toml"
    if path.suffix or len(path.parts) > 1:
        raise FileNotFoundError(f"cannot read {path} as a sweep: no such file")
    raise FileNotFoundError(f"{unknown_name('recipe', str(source), recipe_names())}; a sweep file ends in .toml")


def is_recipe(table: Mapping[str, Any]) -> bool:
    """Return whether the content of a sweep file is a recipe, which has parts."""
    return "part" in table


def read(source: str | Path, smoke: bool = False) -> Recipe:
    """Read a recipe, and validate everything that does not require a model.

    Parameters
    ----------
    source : path or str
        A TOML file, or the name of a recipe in the package.
    smoke : bool
        Replace models by tiny ones with random weights, data by 20 generated rows per split, steps by 4 and seeds by 1.
        Nothing is downloaded.

    Raises
    ------
    ValueError
        A key, method, field, task or value is invalid; the message has one line and names the part.
    FileNotFoundError
        The file, a task or a model does not exist.
    """
    path = find_recipe(source)
    table = grid.read_toml(path)
    with grid.naming_file(path):
        plan = _read_table(table, path.stem, smoke)
    if smoke:
        # Scores of a tiny model have nothing to do with the numbers, whose places are checked.
        plan = plan.without_printed()
    return plan


def read_printed(source: str | Path) -> Recipe:
    """Read a recipe with tiny models and generated data, as for a trial, but with its metrics and printed numbers.

    Parameters
    ----------
    source : path or str
        A TOML file, or the name of a recipe in the package.

    Raises
    ------
    ValueError
        A key, method, field or value is invalid.
    FileNotFoundError
        There is no such file or recipe.
    """
    path = find_recipe(source)
    table = grid.read_toml(path)
    with grid.naming_file(path):
        plan = _read_table(table, path.stem, smoke=True)
    recipe_parts = []
    for number, (recipe_part, entry) in enumerate(zip(plan.recipe_parts, table["part"], strict=True), start=1):
        recipe_parts.append(replace(recipe_part, columns=read_columns(entry, number)))
    return replace(plan, recipe_parts=tuple(recipe_parts))


def _read_table(table: Mapping[str, Any], name: str, smoke: bool) -> Recipe:
    grid.require_known(table, _KEYS, "key")
    paper = None
    if "paper" in table:
        paper = to_typed(table["paper"], Paper, "paper")
        for key, allowed in {"statistic": _STATISTICS, "state": _STATES}.items():
            if (value := getattr(paper, key)) not in allowed:
                raise ValueError(f"{key} of paper must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    grid.require_type("settings", table.get("settings", {}), Mapping[str, Any])
    # A table has several columns of means as a list, [[mean]].
    mean_entries = table.get("mean", [])
    grid.require_type("mean", mean_entries, Mapping[str, Any] | Sequence[Mapping[str, Any]])
    if isinstance(mean_entries, Mapping):
        mean_entries = [mean_entries]
    grid.require_type("part", table["part"], Sequence[Mapping[str, Any]])
    stand_in = to_typed(table.get("smoke", {}), Smoke, "smoke")
    root = Path(table.get("root", f"runs/{name}"))
    if smoke:
        root = root.with_name(f"{root.name}-smoke")
    recipe_parts: list[RecipePart] = []
    by_id: dict[str, RecipePart] = {}
    for number, entry in enumerate(table["part"], start=1):
        columns = read_columns(entry, number)
        try:
            recipe_part = _read_part(entry, columns, table, paper, root, stand_in if smoke else None)
            recipe_part = _link_start(recipe_part, entry, by_id)
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"part {', '.join(columns)}: {error}") from None
        recipe_parts.append(recipe_part)
    _require_distinct_cells(recipe_parts)
    cells = to_typed(table.get("printed", []), list[PrintedCell], "printed")
    recipe_parts = _add_printed(recipe_parts, cells)
    means = tuple(_read_mean(entry, recipe_parts, paper) for entry in mean_entries)
    return Recipe(name, paper, tuple(recipe_parts), means, root, table.get("backend", {}))


def _link_start(recipe_part: RecipePart, entry: Mapping[str, Any], by_id: dict[str, RecipePart]) -> RecipePart:
    """Return a part with the part that it starts from, and register it by its id."""
    for key in ("id", "start"):
        grid.require_type(key, entry.get(key, ""), str)
    name, source_id = entry.get("id"), entry.get("start")
    if name in by_id:
        raise ValueError(f"duplicate id {name!r}")
    if source_id is not None:
        # Only parts above are known here, so that starts have no cycles.
        if source_id not in by_id:
            raise ValueError(f"start {source_id!r} must be the id of a part above")
        source = by_id[source_id]
        method_names = {row.name: row.method.name for row in source.rows}
        for row in recipe_part.rows:
            if method_names.get(row.name) != row.method.name:
                raise ValueError(f"start {source_id!r} must have row {row.name!r} with method {row.method.name}")
        if source.grid.models != recipe_part.grid.models:
            raise ValueError(f"start {source_id!r} must have the same model, got {source.grid.models[0]}")
        if missing := sorted(set(recipe_part.grid.seeds) - set(source.grid.seeds)):
            raise ValueError(f"start {source_id!r} must have the same seeds, but seed {missing[0]} is missing")
        recipe_part = replace(recipe_part, start=source)
    if name is not None:
        by_id[name] = recipe_part
    return recipe_part


def _require_distinct_cells(recipe_parts: Iterable[RecipePart]) -> None:
    """Raise a ValueError if two parts fill one cell of the table; a column may have rows of several parts."""
    filled: set[tuple[str, str]] = set()
    for recipe_part in recipe_parts:
        for column, row in product([*recipe_part.columns, *recipe_part.test_columns.values()], recipe_part.rows):
            if (column, row.name) in filled:
                raise ValueError(f"duplicate row {row.name!r} of column {column!r}")
            filled.add((column, row.name))


def _add_printed(recipe_parts: list[RecipePart], cells: Iterable[PrintedCell]) -> list[RecipePart]:
    """Return parts whose rows have the printed numbers of the recipe itself."""
    numbers = {(cell.row, cell.column): PrintedScore(cell.value, cell.sd, cell.n) for cell in cells}
    unused, completed = set(numbers), []
    for recipe_part in recipe_parts:
        columns, rows = [*recipe_part.columns, *recipe_part.test_columns.values()], []
        for row in recipe_part.rows:
            printed = dict(row.printed)
            for column in columns:
                if (row.name, column) in numbers:
                    unused.remove((row.name, column))
                    printed[column] = numbers[row.name, column]
            rows.append(replace(row, printed=printed))
        completed.append(replace(recipe_part, rows=tuple(rows)))
    if unused:
        name, column = min(unused)
        raise ValueError(f"printed must be of a row and a column of the table, got row {name!r} of column {column!r}")
    return completed


def _read_mean(entry: Mapping[str, Any], recipe_parts: Iterable[RecipePart], paper: Paper | None) -> MeanColumn:
    """Read the column with the mean of others, by default of the first one of each part."""
    grid.require_known(entry, _MEAN_KEYS, "key of mean")
    all_columns = list(chain.from_iterable(recipe_part.columns for recipe_part in recipe_parts))
    columns = entry.get("columns", [next(iter(recipe_part.columns)) for recipe_part in recipe_parts])
    columns = list(dict.fromkeys(columns))  # several parts may have rows of one column
    grid.require_known(columns, all_columns, "column of mean")
    name = str(entry.get("column", "mean"))
    printed = {}
    row_names = [row.name for recipe_part in recipe_parts for row in recipe_part.rows]
    grid.require_known(entry.get("printed", {}), row_names, "row of mean")
    for row, cell_values in entry.get("printed", {}).items():
        if paper is None:
            raise ValueError(f"row {row!r}: printed requires the table paper")
        printed[row] = _find_printed({"paper": paper.name, "table": paper.table, "data": name, **cell_values})
    return MeanColumn(name, tuple(columns), printed)


def read_columns(entry: Mapping[str, Any], number: int) -> dict[str, Metric | Perplexity]:
    """Return the metric of each column of part ``number``: of one column, or of several by metric."""
    column = entry.get("column")
    if isinstance(column, str) and entry.get("metric") == Perplexity().name:
        return {column: Perplexity()}
    if isinstance(column, str):
        if "metric" not in entry:
            raise ValueError(f'part {column}: missing key "metric", as in metric = "accuracy"')
        return {column: resolve(entry["metric"])[0]}
    if not isinstance(column, Mapping) or not all(isinstance(name, str) for name in column.values()):
        raise ValueError(
            f"part {number}: column must be a name, or a table of names by metric such as "
            f'{{accuracy = "QQP accuracy", f1 = "QQP F1"}}, got {column!r}'
        )
    metrics = resolve(list(column))
    return dict(zip(column.values(), metrics, strict=True))


def _read_part(
    entry: Mapping[str, Any],
    columns: Mapping[str, Metric | Perplexity],
    table: Mapping[str, Any],
    paper: Paper | None,
    root: Path,
    smoke: Smoke | None,
) -> RecipePart:
    """Read a part, whose keys override those of the recipe, setting by setting."""
    grid.require_known(entry, _PART_KEYS, "key")
    for key in ("settings", "printed"):
        grid.require_type(key, entry.get(key, {}), Mapping[str, Any])
    test_columns = entry.get("test_columns", {})
    grid.require_type("test_columns", test_columns, Mapping[str, str])
    merged, settings = merge_part(entry, table)
    metrics = {name: metric for name, metric in columns.items() if isinstance(metric, Metric)}
    methods = merged.get("method")
    if not isinstance(methods, list) or not methods:
        raise ValueError("missing key 'method': a part requires at least one row, [[part.method]]")
    # Further test sets have the first metric.
    metric_of_column = {**columns, **dict.fromkeys(test_columns.values(), next(iter(columns.values())))}
    rows = []
    for fields in methods:
        rows.append(_read_row(fields, metric_of_column, entry.get("printed", {}), paper, smoke))
    names = [row.name for row in rows]
    # Runs are found by the name of their row.
    if len(set(names)) < len(names):
        raise ValueError(f"rows must have distinct names, got {', '.join(names)}")
    if smoke is not None:
        stand_in = smoke.task(merged.get("task"))
        merged |= {"model": smoke.model(stand_in.kind), "task": stand_in, "seeds": 1}
        settings = smoke.settings(settings)
        for name, metric in metrics.items():
            (metrics[name],) = resolve(smoke.metrics.get(metric.name, metric.name))
        columns = {**columns, **metrics}
    settings.pop("metric", None)
    if metrics:
        # One run fills all columns of a part, so a list of metrics is one value.
        settings["metric"] = [[metric.name for metric in metrics.values()]]
    part_grid = grid.read({**merged, "method": [row.method for row in rows], "settings": settings, "root": root})
    for key, values in {"model": part_grid.models, "task": part_grid.tasks, "settings": part_grid.settings}.items():
        if len(values) > 1:
            raise ValueError(f"{key} must have one value in a part, got {len(values)}: add a part for each")
    task = part_grid.tasks[0]
    assert isinstance(task, Task)
    if not metrics and (task.labels or task.kind not in ("prompt", "seq2seq", "lm")):
        raise ValueError(f"metric 'perplexity' requires plain text or open responses, and {task.name} has neither")
    # The first test set is the split test, which the columns have.
    grid.require_known(test_columns, task.test_sets[1:], "test set")
    return RecipePart(columns, tuple(rows), part_grid, test_columns)


def merge_part(entry: Mapping[str, Any], table: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the keys of a sweep that a part has with those of its recipe, without settings, and the settings."""
    merged: dict[str, Any] = {}
    for key, value in {**table, **entry}.items():
        if key in _SWEEP_KEYS and key != "settings":
            merged[key] = value
    if isinstance(merged.get("task"), str):
        # Finished runs are recognized by the hash of the data, so the data are loaded now.
        merged["task"] = {"name": merged["task"]}
    return merged, {**table.get("settings", {}), **entry.get("settings", {})}


def _read_row(
    fields: Any,
    columns: Mapping[str, Metric | Perplexity],
    cell_values: Mapping[str, Any],
    paper: Paper | None,
    smoke: Smoke | None,
) -> TableRow:
    """Read a method of a part, with its name and the place of its printed numbers, of which the part has a half."""
    if not isinstance(fields, Mapping) or not isinstance(name := fields.get("row"), str):
        raise ValueError(f'a method requires its row in the table, as in row = "LoRA, rank 8", got {fields!r}')
    own_fields = dict(fields)
    del own_fields["row"]
    row_values = own_fields.pop("printed", None)
    if smoke is not None:
        # Rows of one method may differ in a field that all of them replace.
        for key in (str(own_fields.get("name")), name):
            own_fields |= smoke.methods.get(key, {})
    methods = grid.read_methods(own_fields)
    if len(methods) > 1:
        raise ValueError(f"row {name!r} must be one method, got {len(methods)}: add a row for each")
    printed = {}
    if row_values is not None:
        if paper is None:
            raise ValueError(f"row {name!r}: printed requires the table paper")
        for column, metric in columns.items():
            of_column = {"paper": paper.name, "table": paper.table, "data": column}
            values = {**of_column, **cell_values, **row_values}
            for key, value in values.items():
                # Columns of one run differ in the metric, and so in what the published table calls it.
                if isinstance(value, Mapping):
                    grid.require_known([metric.name], value, f"metric in {key} of printed")
                    values[key] = value[metric.name]
            printed[column] = _find_printed(values)
    return TableRow(name, methods[0], printed)


def _find_printed(cell_values: Mapping[str, Any]) -> PrintedScore:
    """Return the printed number at a place: the values of columns of the published table."""
    grid.require_known(cell_values, _PRINTED_KEYS, "key of printed")
    table = _read_published()
    for column, value in cell_values.items():
        table = table[table[column] == value]
    # A table prints several budgets of a method, so the method does not identify a number.
    if len(table) != 1:
        values = ", ".join(map(str, cell_values.values()))
        raise ValueError(f"printed matches {len(table)} rows of {PUBLISHED}, expected 1: {values}")
    number = table.iloc[0]
    return PrintedScore(float(number["value"]), float(number["sd"]), float(number["n"]))


@cache
def _read_published() -> pd.DataFrame:
    return pd.read_csv(DATA / "published" / PUBLISHED, dtype={"parameters": "str"})
