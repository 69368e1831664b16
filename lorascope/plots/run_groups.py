"""Input of a figure: runs grouped by label, their joint table, and the marks and caption that show seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import pandas as pd

from lorascope.analysis import initial_update, norms
from lorascope.charts.chart import Band, Bar, Line, Mark, Point, Text
from lorascope.plots.registry import FIGURES, MIXTURES, OF_UPDATES, missing_reason
from lorascope.plots.setting_names import present_label, present_setting
from lorascope.runs.gated_run import gate_description
from lorascope.runs.result import Result
from lorascope.schema import records
from lorascope.schema.records import QUANTITIES

Runs: TypeAlias = Result | Sequence[Result] | Mapping[str, Result | Sequence[Result]]

INTERVAL = "95% t-interval over seeds"
_SAME = ("model", "task", "recipe", "settings")
_POOLS = {"norm": "root sum of squares", "sum": "sum", "mean": "mean"}


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed, with their label in the legend."""

    label: str
    runs: tuple[Result, ...]
    control: bool = False

    @property
    def seeds(self) -> list[int]:
        """Known seeds in ascending order."""
        return sorted({run.meta.seed for run in self.runs if run.meta.seed is not None})


@dataclass(frozen=True)
class Cohort:
    """All runs of a figure by label; ``name`` is the name of the figure or of the quantity that it shows."""

    name: str
    groups: tuple[Group, ...]

    @cached_property
    def table(self) -> pd.DataFrame:
        """Records of all runs."""
        return records.concat(run.table for run in self.runs)

    @property
    def runs(self) -> list[Result]:
        """All runs in order."""
        return [run for group in self.groups for run in group.runs]

    @property
    def labels(self) -> list[str]:
        """Labels in the order of the legend."""
        return [group.label for group in self.groups]

    @cached_property
    def meta(self) -> dict[str, Any]:
        """Origin of the figure for saved files: its name and runs, and the gates of input-dependent updates."""
        needs = FIGURES[self.name].needs if self.name in FIGURES else (self.name,)
        about_updates = not OF_UPDATES.isdisjoint(needs)
        gates = {group.label: _gates(group) for group in self.groups} if about_updates else {}
        mixtures = {label: text for label, text in gates.items() if text}
        return {"figure": self.name, "runs": [run.id for run in self.runs]} | ({MIXTURES: mixtures} if mixtures else {})

    def require(self, *needs: str, history: bool = False) -> None:
        """Raise a ValueError for the first run that lacks one of these records."""
        for run in self.runs:
            for need in needs:
                if lacking := missing_reason(run, need, history):
                    raise ValueError(f"{self.name} needs {lacking} (run {run.id}, {_run_label(run)})")

    def require_runs(self, least: int) -> None:
        """Raise a ValueError if there are fewer runs than this."""
        if len(self.runs) < least:
            raise ValueError(f"{self.name} needs at least {least} runs, got {len(self.runs)}")

    def require_same(self, *keys: str) -> None:
        """Raise a ValueError if two runs differ in one of these keys of ``Run.meta``."""
        first = self.runs[0]
        for key in keys:
            for run in self.runs:
                if getattr(run.meta, key) != getattr(first.meta, key):
                    raise ValueError(
                        f"{self.name} needs runs with the same {key}, got {getattr(first.meta, key)} (run {first.id}) "
                        f"and {getattr(run.meta, key)} (run {run.id})"
                    )

    def require_differ_only_in(self, *free: str) -> None:
        """Raise a ValueError if two runs differ in more than the seed and these stored settings of the method."""
        self.require_same("model", "task")
        first = self.runs[0]
        method = first.meta.recipe.get("name", "")
        for run in self.runs:
            for part in ("recipe", "settings"):
                one, other = getattr(first.meta, part), getattr(run.meta, part)
                for key in sorted({*one, *other} - {*free}):
                    if one.get(key) != other.get(key):
                        allowed = " and ".join(present_setting(method, name, None)[0] for name in free)
                        shown, mine = present_setting(method, key, one.get(key))
                        _, theirs = present_setting(method, key, other.get(key))
                        raise ValueError(
                            f"{self.name} needs runs that differ only in {allowed}, got {shown} {mine} "
                            f"(run {first.id}) and {theirs} (run {run.id})"
                        )

    def no_common_module(self, module: str | None, common: Sequence[str]) -> ValueError:
        """Return the error for a module that not all runs have; ``common`` lists those that they have."""
        given = "" if module is None else f", got {module!r}"
        return ValueError(
            f"{self.name} needs a module that all runs have{given}; expected one of {', '.join(common[:5]) or 'none'}"
        )

    def label(self, table: pd.DataFrame) -> pd.DataFrame:
        """Add the columns ``recipe`` (the label) and ``kind`` (run or control) to a table with a column ``run``."""
        labels = {run.id: group.label for group in self.groups for run in group.runs}
        kinds = {run.id: "control" if group.control else "run" for group in self.groups for run in group.runs}
        run = table["run"].astype("str")
        return table.assign(recipe=run.map(labels), kind=run.map(kinds))

    def scores(self) -> pd.DataFrame:
        """Return the final test metric of every run."""
        return self.label(norms.last(self.table[self.table["quantity"] == "test_metric"]))

    @property
    def metric(self) -> str:
        """Axis label of test metrics: the name of the metric if all runs share it."""
        names = {run.meta.test.name if run.meta.test else "metric" for run in self.runs}
        return f"test {names.pop()}" if len(names) == 1 else QUANTITIES["test_metric"].label

    @property
    def sample(self) -> str:
        """Number of runs and their seeds as text, by label if the labels differ."""
        counts = {group.label: _count_seeds(group) for group in self.groups}
        if len(set(counts.values())) == 1:
            return next(iter(counts.values()))
        return "; ".join(f"{label}: {count}" for label, count in counts.items())

    def caption(self, *sentences: str, interval: str = f"bands and bars: {INTERVAL}") -> str:
        """Return the sentences of a caption, followed by the number of runs, their seeds and the kind of interval."""
        sample = self.sample
        if not any(len(group.runs) > 1 for group in self.groups):
            return " ".join([*sentences, f"{sample[0].upper()}{sample[1:]}, so no interval."])
        equal = len(set(map(_count_seeds, self.groups))) == 1
        return " ".join([*sentences, f"{'Mean of' if equal else 'Mean over seeds:'} {sample}; {interval}."])

    def dense_moment_note(self) -> list[str]:
        """Return sentences on the second moments that Adapprox stores without factors, if it trained any run."""
        dense: dict[str, dict[str, None]] = {}
        for group in self.groups:
            for recipe in (run.meta.recipe or {} for run in group.runs):
                if recipe.get("name") == "adapprox":
                    dense.setdefault(_dense_moments(recipe), {})[group.label] = None
        one = len(dense) == 1
        return [f"{'Adapprox' if one else ', '.join(labels)} keeps {what} dense." for what, labels in dense.items()]

    def missing_initial_updates(self) -> list[str]:
        """Return a sentence on the recipes whose initial update cannot be subtracted, because it was not saved."""
        lacking = [group.label for group in self.groups if any(map(initial_update.lacks_initial_update, group.runs))]
        return [f"Includes the initial update, which was not saved: {', '.join(lacking)}."] if lacking else []


def gather(name: str, runs: Runs, control: Runs | None = None) -> Cohort:
    """Group runs by label.

    Parameters
    ----------
    name : str
        Name of the figure, for error messages.
    runs : Run, sequence of Run, or mapping label -> run or runs
        Runs to plot. Without labels, runs of one recipe have the label of the recipe and count as its seeds.
    control : as ``runs``, optional
        Runs to compare with.

    Raises
    ------
    ValueError
        There is no run, a run or label occurs twice, or unlabeled runs of one recipe differ in more than their seed.
    """
    groups = _groups(runs) + (_groups(control, control=True) if control is not None else ())
    cohort = Cohort(name, groups)
    ids = [run.id for run in cohort.runs]
    if not ids:
        raise ValueError(f"{name} needs at least 1 run, got 0")
    if twice := sorted({id for id in ids if ids.count(id) > 1}):
        raise ValueError(f"{name}: duplicate run {twice[0]}")
    if twice := sorted({label for label in cohort.labels if cohort.labels.count(label) > 1}):
        raise ValueError(f"{name}: duplicate label {twice[0]!r} in runs and control")
    return cohort


def ends(cells: pd.DataFrame) -> tuple[str | None, str | None]:
    """Return the columns of ``band`` with the ends of the interval; None if no recipe has several seeds."""
    return ("low", "high") if cells["low"].notna().any() else (None, None)


def lines(cells: pd.DataFrame, x: str, points: bool = True) -> list[Mark]:
    """Return marks for a table from ``band``: one line per recipe, with bands and error bars for several seeds."""
    low, high = ends(cells)
    dash = "kind" if cells["kind"].nunique() > 1 else None
    band = [Band(x, low, high, "recipe")] if low and high else []
    dots = [Point(x, "value", "recipe", low=low, high=high)] if points else []
    return [*band, Line(x, "value", "recipe", dash), *dots]


def bars(cells: pd.DataFrame, start: float) -> tuple[pd.DataFrame, list[Mark]]:
    """Return a table from ``band`` by ``recipe`` with label positions, and its marks: bars with intervals and numbers.

    ``start`` is the lower end of the axis.
    """
    top = cells["high"].fillna(cells["value"])
    cells = cells.assign(words=cells["value"].map("{:#.3g}".format), above=top + 0.04 * (top.max() - start))
    low, high = ends(cells)
    return cells, [Bar("recipe", "value", low=low, high=high), Text("recipe", "above", "words")]


def define(quantity: str) -> str:
    """Return the definition of a quantity as a sentence of a caption."""
    entry = QUANTITIES[quantity]
    return f"{entry.label}: {entry.definition}; modules pooled by {_POOLS[entry.pool]}."


def axis_label(quantity: str) -> str:
    """Return the label and unit of a quantity."""
    entry = QUANTITIES[quantity]
    return f"{entry.label} ({entry.unit})" if entry.unit else entry.label


def _gates(group: Group) -> str:
    """Return the gates at which the updates of the runs are evaluated; "" if they do not depend on the input."""
    return " and ".join(filter(None, dict.fromkeys(map(_gates_or_empty, group.runs))))


def _gates_or_empty(run: Result) -> str:
    try:
        return gate_description(run)
    except ValueError:  # the run has no snapshot of its last step
        return ""


def _run_label(run: Result) -> str:
    return present_label(run.label, (run.meta.recipe or {}).get("name", ""))


def _dense_moments(recipe: Mapping[str, Any]) -> str:
    """Return the parameters whose second moments this Adapprox stores without factors, as text."""
    if recipe.get("min_dim", 0) is None:
        return "all parameters"
    given = recipe.get("dense", ())
    named: list[str] = [given] if isinstance(given, str) else list(given)
    small = ["small matrices"] if recipe.get("min_dim", 64) > 1 else []
    *others, last = ["vectors", *named, *small]
    return " and ".join([", ".join(others), last] if others else [last])


def _groups(runs: Runs, control: bool = False) -> tuple[Group, ...]:
    if isinstance(runs, Mapping):
        lists = {label: (found,) if isinstance(found, Result) else tuple(found) for label, found in runs.items()}
        return tuple(Group(label, found, control) for label, found in lists.items() if found)
    by_label: dict[str, list[Result]] = {}
    for run in [runs] if isinstance(runs, Result) else runs:
        by_label.setdefault(f"control: {_run_label(run)}" if control else _run_label(run), []).append(run)
    for label, found in by_label.items():
        _check_same(label, found)
    return tuple(Group(label, tuple(found), control) for label, found in by_label.items())


def _check_same(label: str, runs: Sequence[Result]) -> None:
    """Raise a ValueError if runs of one label are not seeds of one recipe."""
    for run in runs[1:]:
        if differing := [key for key in _SAME if getattr(run.meta, key) != getattr(runs[0].meta, key)]:
            raise ValueError(
                f"cannot average runs {runs[0].id} and {run.id} of label {label!r}: they differ in "
                f"{', '.join(differing)}. Pass a dict label -> runs"
            )
    seeds = [run.meta.seed for run in runs]
    if len(runs) > 1 and (None in seeds or len(set(seeds)) < len(seeds)):
        raise ValueError(
            f"cannot average {len(runs)} runs of label {label!r}: their seeds are not distinct, got seeds {seeds}. "
            "Pass a dict label -> run"
        )


def _count_seeds(group: Group) -> str:
    n, seeds = len(group.runs), group.seeds
    listed = ", ".join(map(str, seeds))
    if not seeds:
        return "1 run" if n == 1 else f"{n} runs"
    if n == 1:
        return f"1 run (seed {listed})"
    return f"{n} seeds ({listed})" if len(seeds) == n else f"{n} runs (seeds {listed})"
