"""Input of a figure: runs grouped by label, their joint table, and the marks and caption that show seeds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias, TypeVar, cast

import pandas as pd

from lorascope.analysis import initial_update, norms
from lorascope.charts.chart import Chart, Drawable, Panels
from lorascope.plots.requirements import OF_UPDATES, missing_reason
from lorascope.runs.gated_run import gate_description
from lorascope.runs.result import Result
from lorascope.schema import records
from lorascope.schema.records import QUANTITIES

Runs: TypeAlias = Result | Sequence[Result] | Mapping[str, Result | Sequence[Result]]
AnyDrawable = TypeVar("AnyDrawable", bound=Drawable)

INTERVAL = "95% t-interval over seeds"
MIXTURES = "mixtures"
"""Key of a chart's ``meta``: label -> gate weights at which its input-dependent updates are evaluated."""
_SAME = ("model", "task", "recipe", "settings")
_DRAWN = "entry_seed"  # a seed as well: the arms of a study can draw entries from the seed of the run
_POOLS = {"norm": "root sum of squares", "sum": "sum", "mean": "mean"}


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed, with their label in the legend."""

    label: str
    runs: tuple[Result, ...]
    control: bool = False

    @property
    def sample(self) -> str:
        """Number of runs and their seeds as text."""
        n, seeds = len(self.runs), sorted({run.meta.seed for run in self.runs if run.meta.seed is not None})
        consecutive = len(seeds) > 3 and seeds[-1] - seeds[0] == len(seeds) - 1
        listed = f"{seeds[0]} to {seeds[-1]}" if consecutive else ", ".join(map(str, seeds))
        if not seeds:
            return "1 run" if n == 1 else f"{n} runs"
        if n == 1:
            return f"1 run (seed {listed})"
        return f"{n} seeds ({listed})" if len(seeds) == n else f"{n} runs (seeds {listed})"

    @property
    def run_names(self) -> dict[str, str]:
        """Label and seed of each run by its id, or label and id if the seeds are not distinct."""
        seeds = {run.id: run.meta.seed for run in self.runs}
        distinct = len({*seeds.values()} - {None}) == len(seeds)
        return {id: f"{self.label}, " + (f"seed {seed}" if distinct else f"run {id}") for id, seed in seeds.items()}


@dataclass(frozen=True)
class Cohort:
    """All runs of a figure by label.

    ``name`` is the name of the figure or of the quantity that it shows, ``needs`` are the records that it requires.
    """

    name: str
    groups: tuple[Group, ...]
    needs: tuple[str, ...] = ()

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
        gates: dict[str, dict[str, None]] = {}
        for group in self.groups if not OF_UPDATES.isdisjoint(self.needs) else ():
            for run in group.runs:
                # Without a snapshot of its last step, a run has no gates to describe.
                with suppress(ValueError):
                    gates.setdefault(group.label, {})[gate_description(run)] = None
        mixtures = {label: text for label, found in gates.items() if (text := " and ".join(filter(None, found)))}
        return {"figure": self.name, "runs": [run.id for run in self.runs]} | ({MIXTURES: mixtures} if mixtures else {})

    def require(self, *needs: str, history: bool = False) -> None:
        """Raise a ValueError for the first run that lacks one of these records."""
        for run in self.runs:
            for need in needs:
                if lacking := missing_reason(run, need, history):
                    raise ValueError(f"{self.name} needs {lacking} (run {run.id}, {run.label})")

    def require_runs(self, least: int) -> None:
        """Raise a ValueError if there are fewer runs than this."""
        if len(self.runs) < least:
            raise ValueError(f"{self.name} needs at least {least} run{'s' * (least > 1)}, got {len(self.runs)}")

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
        for run in self.runs:
            for part in ("recipe", "settings"):
                one, other = getattr(first.meta, part), getattr(run.meta, part)
                for key in sorted({*one, *other} - {*free, _DRAWN}):
                    if one.get(key) != other.get(key):
                        allowed = " and ".join(free)
                        raise ValueError(
                            f"{self.name} needs runs that differ only in {allowed}, got {key} {one.get(key)} "
                            f"(run {first.id}) and {other.get(key)} (run {run.id})"
                        )

    def no_common_module(self, module: str | None, common: Sequence[str]) -> ValueError:
        """Return the error for a module that not all runs have; ``common`` lists those that they have."""
        given = "" if module is None else f", got {module!r}"
        if not common:
            return ValueError(f"{self.name} needs a module that all runs have, and these have none in common{given}")
        listed = ", ".join(common[:5]) + (f" or {len(common) - 5} others" if len(common) > 5 else "")
        return ValueError(f"{self.name} needs a module that all runs have{given}; expected one of {listed}")

    def label(self, table: pd.DataFrame) -> pd.DataFrame:
        """Add the columns ``recipe`` (the label) and ``kind`` (run or control) to a table with a column ``run``."""
        labels = {run.id: group.label for group in self.groups for run in group.runs}
        kinds = {run.id: "control" if group.control else "run" for group in self.groups for run in group.runs}
        run = table["run"].astype("str")
        return table.assign(recipe=run.map(labels), kind=run.map(kinds))

    def select(self, *quantities: str) -> pd.DataFrame:
        """Return the labeled records of these quantities."""
        return self.label(self.table[self.table["quantity"].isin(quantities)])

    def scores(self) -> pd.DataFrame:
        """Return the final test metric of every run."""
        return norms.last_recorded(self.select("test_metric"))

    @property
    def metric(self) -> str:
        """Axis label of test metrics: the name of the metric if all runs share it."""
        names = {run.meta.test.name if run.meta.test else "metric" for run in self.runs}
        return f"test {names.pop()}" if len(names) == 1 else QUANTITIES["test_metric"].label

    @property
    def sample(self) -> str:
        """Number of runs and their seeds as text, by label if the labels differ."""
        return join_by_label({group.label: group.sample for group in self.groups})

    @property
    def sample_sentence(self) -> str:
        """Number of runs and their seeds as a sentence."""
        return f"{self.sample}."

    def split(self, table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
        """Return the rows of every label, in the order of the legend."""
        return [(label, table[table["recipe"] == label]) for label in self.labels]

    def title(self, label: str) -> str:
        """Return the title of the panel of one label: none if it is the only one."""
        return label if len(self.groups) > 1 else ""

    def caption(self, *sentences: str, interval: str = f"bands and bars: {INTERVAL}") -> str:
        """Return the sentences of a caption, followed by the number of runs, their seeds and the kind of interval."""
        if not any(len(group.runs) > 1 for group in self.groups):
            return " ".join([*sentences, f"{self.sample_sentence[:-1]}, so no interval."])
        equal = len({group.sample for group in self.groups}) == 1
        return " ".join([*sentences, f"{'Mean of' if equal else 'Mean over seeds:'} {self.sample}; {interval}."])

    def complete(self, drawn: AnyDrawable) -> AnyDrawable:
        """Add the origin of the figure to its charts, and the gates of input-dependent updates to every caption."""
        mixtures: dict[str, str] = {}
        for chart in drawn.charts():
            mixtures |= (self.meta | dict(chart.meta)).get(MIXTURES, {})
        sentences = mixture_sentences(mixtures)

        def complete_chart(chart: Chart) -> Chart:
            caption = " ".join([chart.caption, *sentences])
            return replace(chart, caption=caption, meta=self.meta | dict(chart.meta))

        rows = tuple(tuple(map(complete_chart, row)) for row in drawn.rows())
        return cast("AnyDrawable", Panels(rows) if isinstance(drawn, Panels) else rows[0][0])

    def method_notes(self) -> list[str]:
        """Return the sentences that the methods of the runs add to captions, such as which moments are not factored."""
        noted: dict[str, dict[str, str]] = {}
        for group in self.groups:
            for run in group.runs:
                for note in run.fact("caption_notes", ()):
                    noted.setdefault(note, {})[group.label] = run.label.partition(",")[0]
        one = len(noted) == 1
        return [f"{next(iter(by.values())) if one else ', '.join(by)} {note}." for note, by in noted.items()]

    def missing_initial_updates(self) -> list[str]:
        """Return a sentence on the recipes whose initial update cannot be subtracted, because it was not saved."""
        lacking = [group.label for group in self.groups if any(map(initial_update.lacks_initial_update, group.runs))]
        return [f"Includes the initial update, which was not saved: {', '.join(lacking)}."] if lacking else []


def gather(name: str, runs: Runs, control: Runs | None = None, needs: tuple[str, ...] = ()) -> Cohort:
    """Group runs by label; without labels, runs of one recipe have the label of the recipe and count as its seeds.

    Raises
    ------
    ValueError
        There is no run, a run or label occurs twice, or unlabeled runs of one recipe differ in more than their seed.
    """
    groups = _groups(runs) + (_groups(control, control=True) if control is not None else ())
    cohort = Cohort(name, groups, needs)
    cohort.require_runs(1)
    ids = [run.id for run in cohort.runs]
    if twice := sorted({id for id in ids if ids.count(id) > 1}):
        raise ValueError(f"{name}: duplicate run {twice[0]}")
    if twice := sorted({label for label in cohort.labels if cohort.labels.count(label) > 1}):
        raise ValueError(f"{name}: duplicate label {twice[0]!r} in runs and control")
    return cohort


def require_counts(**counts: int | None) -> None:
    """Raise a ValueError for the first count below 1."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be >= 1, got {count}")


def require_choice(**given: tuple[str, Collection[str]]) -> None:
    """Raise a ValueError for the first value that is not among its choices."""
    for name, (value, choices) in given.items():
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def join_by_label(notes: Mapping[str, str]) -> str:
    """Join the notes of all labels, or return the note once if it is the same for all."""
    if len(set(notes.values())) == 1:
        return next(iter(notes.values()))
    return "; ".join(f"{label}: {text}" for label, text in notes.items())


def mixture_sentences(mixtures: Mapping[str, str]) -> list[str]:
    """Return sentences such as "Updates of HydraLoRA at mean gates." from a mapping label -> gates."""
    labels = {gates: [label for label in mixtures if mixtures[label] == gates] for gates in mixtures.values()}
    return [f"Updates of {', '.join(names)} at {gates}." for gates, names in labels.items()]


def define(quantity: str) -> str:
    """Return the definition of a quantity as a sentence of a caption."""
    entry = QUANTITIES[quantity]
    return f"{entry.label}: {entry.definition}; modules pooled by {_POOLS[entry.pool]}."


def axis_label(quantity: str) -> str:
    """Return the label and unit of a quantity."""
    entry = QUANTITIES[quantity]
    return f"{entry.label} ({entry.unit})" if entry.unit else entry.label


def _groups(runs: Runs, control: bool = False) -> tuple[Group, ...]:
    if isinstance(runs, Mapping):
        lists = {label: (found,) if isinstance(found, Result) else tuple(found) for label, found in runs.items()}
        return tuple(Group(label, found, control) for label, found in lists.items() if found)
    by_label: dict[str, list[Result]] = {}
    for run in [runs] if isinstance(runs, Result) else runs:
        by_label.setdefault(f"control: {run.label}" if control else run.label, []).append(run)
    for label, found in by_label.items():
        for run in found[1:]:
            if differing := [key for key in _SAME if getattr(run.meta, key) != getattr(found[0].meta, key)]:
                raise ValueError(
                    f"cannot average runs {found[0].id} and {run.id} of label {label!r}: they differ in "
                    f"{', '.join(differing)}. Pass a dict label -> runs"
                )
        seeds = [run.meta.seed for run in found]
        if len(found) > 1 and (None in seeds or len(set(seeds)) < len(seeds)):
            raise ValueError(
                f"cannot average {len(found)} runs of label {label!r}: their seeds are not distinct, got seeds "
                f"{seeds}. Pass a dict label -> run"
            )
    return tuple(Group(label, tuple(found), control) for label, found in by_label.items())
