"""What a figure is drawn from: runs sorted by label, their joint table, the marks and the caption that show seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import pandas as pd

from lorascope.analysis import initial_update, norms
from lorascope.charts.chart import Band, Bar, Line, Mark, Point, Text
from lorascope.plots.registry import FIGURES, MIXTURES, OF_UPDATES, missing_reason
from lorascope.runs.gated_run import gate_description
from lorascope.runs.run import Run
from lorascope.schema import records
from lorascope.schema.records import QUANTITIES

Runs: TypeAlias = Run | Sequence[Run] | Mapping[str, Run | Sequence[Run]]

INTERVAL = "95 % t-interval over seeds"
_SAME = ("model", "task", "recipe", "settings")
_POOLS = {"norm": "root of summed squares", "sum": "sum", "mean": "mean"}


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone, under the label of a legend."""

    label: str
    runs: tuple[Run, ...]
    control: bool = False

    @property
    def seeds(self) -> list[int]:
        """Known seeds, in order."""
        return sorted({run.meta["seed"] for run in self.runs if run.meta.get("seed") is not None})


@dataclass(frozen=True)
class Cohort:
    """All runs of a figure by label, for the figure called ``name``, or for a figure of the quantity ``name``."""

    name: str
    groups: tuple[Group, ...]

    @cached_property
    def table(self) -> pd.DataFrame:
        """The records of all runs."""
        return records.concat(run.table for run in self.runs)

    @property
    def runs(self) -> list[Run]:
        """All runs in order."""
        return [run for group in self.groups for run in group.runs]

    @property
    def labels(self) -> list[str]:
        """Labels in the order of the legend."""
        return [group.label for group in self.groups]

    @cached_property
    def meta(self) -> dict[str, Any]:
        """What a saved figure says of its origin, and if it is about updates, which of them are mixtures."""
        needs = FIGURES[self.name].needs if self.name in FIGURES else (self.name,)
        about_updates = not OF_UPDATES.isdisjoint(needs)
        gates = {group.label: _gates(group) for group in self.groups} if about_updates else {}
        mixtures = {label: told for label, told in gates.items() if told}
        return {"figure": self.name, "runs": [run.id for run in self.runs]} | ({MIXTURES: mixtures} if mixtures else {})

    def require(self, *needs: str, history: bool = False) -> None:
        """Raise a ValueError that names what the first run in want lacks."""
        for run in self.runs:
            for need in needs:
                if lacking := missing_reason(run, need, history):
                    raise ValueError(f"{self.name} needs {lacking} (run {run.id}, {run.label})")

    def require_same(self, *keys: str) -> None:
        """Raise a ValueError that names two runs which differ in one of these keys of their description."""
        first = self.runs[0]
        for key in keys:
            for run in self.runs:
                if run.meta[key] != first.meta[key]:
                    raise ValueError(
                        f"{self.name} compares runs of one {key}; got {first.meta[key]} (run {first.id}) "
                        f"and {run.meta[key]} (run {run.id})"
                    )

    def require_differ_only_in(self, *free: str) -> None:
        """Raise a ValueError that names two runs which differ in more than these fields of the method, or the seed."""
        self.require_same("model", "task")
        first = self.runs[0]
        for run in self.runs:
            for part in ("recipe", "settings"):
                one, other = first.meta[part], run.meta[part]
                for key in sorted({*one, *other} - {*free}):
                    if one.get(key) != other.get(key):
                        raise ValueError(
                            f"{self.name} compares runs that differ in {' and '.join(free)} alone; got {key} "
                            f"{one.get(key)} (run {first.id}) and {other.get(key)} (run {run.id})"
                        )

    def label(self, table: pd.DataFrame) -> pd.DataFrame:
        """Add the columns ``recipe`` (the label) and ``kind`` (run or control) to a table with ``run``."""
        labels = {run.id: group.label for group in self.groups for run in group.runs}
        kinds = {run.id: "control" if group.control else "run" for group in self.groups for run in group.runs}
        run = table["run"].astype("str")
        return table.assign(recipe=run.map(labels), kind=run.map(kinds))

    def scores(self) -> pd.DataFrame:
        """The test metric of every run at its end."""
        return self.label(norms.last(self.table[self.table["quantity"] == "test_metric"]))

    @property
    def metric(self) -> str:
        """What an axis of test metrics is called: by its name, where the runs have the same."""
        names = {run.meta.get("test", {}).get("name", "metric") for run in self.runs}
        return f"test {names.pop()}" if len(names) == 1 else QUANTITIES["test_metric"].label

    @property
    def sample(self) -> str:
        """How many runs there are with which seeds, by label where that differs."""
        counts = {group.label: _count_seeds(group) for group in self.groups}
        if len(set(counts.values())) == 1:
            return next(iter(counts.values()))
        return "; ".join(f"{label}: {count}" for label, count in counts.items())

    def caption(self, *sentences: str, interval: str = f"bands and bars: {INTERVAL}") -> str:
        """The sentences, then how many runs with which seeds, and what the interval is."""
        several = any(len(group.runs) > 1 for group in self.groups)
        sample = self.sample
        shown = f"Mean of {sample}; {interval}." if several else f"{sample[0].upper()}{sample[1:]}, so no interval."
        return " ".join([*sentences, shown])

    def dense_moment_note(self) -> list[str]:
        """Which second moments have no factors under Adapprox, where a run is of it."""
        kept: dict[str, dict[str, None]] = {}
        for group in self.groups:
            for recipe in (run.meta.get("recipe") or {} for run in group.runs):
                if recipe.get("name") == "adapprox":
                    kept.setdefault(_dense_moments(recipe), {})[group.label] = None
        one = len(kept) == 1
        return [f"{'Adapprox' if one else ', '.join(labels)} keeps {what} dense." for what, labels in kept.items()]

    def missing_initial_updates(self) -> list[str]:
        """Which recipes still show the start of their update, because it was not kept."""
        lacking = [group.label for group in self.groups if any(map(initial_update.lacks_initial_update, group.runs))]
        return [f"With its start, which was not kept: {', '.join(lacking)}."] if lacking else []


def gather(name: str, runs: Runs, control: Runs | None = None) -> Cohort:
    """Sort runs by label.

    Parameters
    ----------
    name : str
        The figure, for messages.
    runs : Run, sequence of Run, or mapping label -> run or runs
        Without labels, runs of one recipe share that recipe's label and count as its seeds.
    control : as ``runs``, optional
        Drawn beside.

    Raises
    ------
    ValueError
        There is no run, a run comes twice, or runs of one label differ in more than their seed.
    """
    groups = _groups(runs) + (_groups(control, control=True) if control is not None else ())
    cohort = Cohort(name, groups)
    ids = [run.id for run in cohort.runs]
    if not ids:
        raise ValueError(f"{name} got no run to draw")
    if twice := sorted({id for id in ids if ids.count(id) > 1}):
        raise ValueError(f"{name} got run {twice[0]} twice: give every run once")
    if twice := sorted({label for label in cohort.labels if cohort.labels.count(label) > 1}):
        raise ValueError(f"{name} got the label {twice[0]!r} for runs and control: name them apart")
    return cohort


def ends(cells: pd.DataFrame) -> tuple[str | None, str | None]:
    """The columns of ``band`` that a mark's interval lies between; None where no recipe has several seeds."""
    return ("low", "high") if cells["low"].notna().any() else (None, None)


def lines(cells: pd.DataFrame, x: str, points: bool = True) -> list[Mark]:
    """Marks for the table of ``band``: a line a recipe; where there are several seeds, a band, and bars on points."""
    low, high = ends(cells)
    dash = "kind" if cells["kind"].nunique() > 1 else None
    band = [Band(x, low, high, "recipe")] if low and high else []
    dots = [Point(x, "value", "recipe", low=low, high=high)] if points else []
    return [*band, Line(x, "value", "recipe", dash), *dots]


def bars(cells: pd.DataFrame, start: float) -> tuple[pd.DataFrame, list[Mark]]:
    """Marks for the table of ``band`` by ``recipe``, and the table: a bar each with its interval, its number above it.

    ``start`` is the lower end of the axis.
    """
    top = cells["high"].fillna(cells["value"])
    cells = cells.assign(words=cells["value"].map("{:#.3g}".format), above=top + 0.04 * (top.max() - start))
    low, high = ends(cells)
    return cells, [Bar("recipe", "value", low=low, high=high), Text("recipe", "above", "words")]


def define(quantity: str) -> str:
    """What a quantity means, as a caption says it."""
    entry = QUANTITIES[quantity]
    return f"{entry.label}: {entry.definition}; modules pooled by {_POOLS[entry.pool]}."


def axis_label(quantity: str) -> str:
    """Label and unit of a quantity."""
    entry = QUANTITIES[quantity]
    return f"{entry.label} ({entry.unit})" if entry.unit else entry.label


def _gates(group: Group) -> str:
    """At which gates the updates of its runs stand; "" where they depend on no input."""
    return " and ".join(filter(None, dict.fromkeys(map(_gates_or_empty, group.runs))))


def _gates_or_empty(run: Run) -> str:
    try:
        return gate_description(run)
    except ValueError:  # nothing was kept at its last step
        return ""


def _dense_moments(recipe: Mapping[str, Any]) -> str:
    """What of a model has second moments without factors under this Adapprox."""
    if recipe.get("min_dim", 0) is None:
        return "everything"
    given = recipe.get("dense", ())
    named: list[str] = [given] if isinstance(given, str) else list(given)
    small = ["small matrices"] if recipe.get("min_dim", 64) > 1 else []
    *others, last = ["vectors", *named, *small]
    return " and ".join([", ".join(others), last] if others else [last])


def _groups(runs: Runs, control: bool = False) -> tuple[Group, ...]:
    if isinstance(runs, Mapping):
        lists = {label: (found,) if isinstance(found, Run) else tuple(found) for label, found in runs.items()}
        return tuple(Group(label, found, control) for label, found in lists.items() if found)
    by_label: dict[str, list[Run]] = {}
    for run in [runs] if isinstance(runs, Run) else runs:
        by_label.setdefault(f"control: {run.label}" if control else run.label, []).append(run)
    for label, found in by_label.items():
        _check_same(label, found)
    return tuple(Group(label, tuple(found), control) for label, found in by_label.items())


def _check_same(label: str, runs: Sequence[Run]) -> None:
    """Refuse to take runs for seeds of one recipe that differ in anything else."""
    for run in runs[1:]:
        if differing := [key for key in _SAME if run.meta.get(key) != runs[0].meta.get(key)]:
            raise ValueError(
                f"runs {runs[0].id} and {run.id} are both {label!r} but differ in {', '.join(differing)}: "
                "give a dict label -> runs"
            )
    seeds = [run.meta.get("seed") for run in runs]
    if len(runs) > 1 and (None in seeds or len(set(seeds)) < len(seeds)):
        raise ValueError(
            f"{len(runs)} runs are {label!r} but no seeds of one recipe (seeds {seeds}): give a dict label -> run"
        )


def _count_seeds(group: Group) -> str:
    n, seeds = len(group.runs), group.seeds
    listed = ", ".join(map(str, seeds))
    if not seeds:
        return "1 run" if n == 1 else f"{n} runs"
    if n == 1:
        return f"1 run (seed {listed})"
    return f"{n} seeds ({listed})" if len(seeds) == n else f"{n} runs (seeds {listed})"
