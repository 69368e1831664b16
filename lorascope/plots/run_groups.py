"""Input of a figure: runs grouped by label, their joint table, and the marks and caption that show seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias, TypeVar, cast

import numpy as np
import pandas as pd

from lorascope.analysis import initial_update, norms
from lorascope.analysis.seed_intervals import MINIMUM_SEEDS
from lorascope.charts.chart import Chart, Drawable, Panels
from lorascope.files.printable import count_phrase
from lorascope.plots.requirements import OF_UPDATES, STEPS, UPDATES, missing_reason
from lorascope.runs.gated_run import UNIFORM, gate_description, has_nearly_uniform_gates
from lorascope.runs.result import Result
from lorascope.schema import records
from lorascope.schema.records import QUANTITIES

Runs: TypeAlias = Result | Sequence[Result] | Mapping[str, Result | Sequence[Result]]
Kind: TypeAlias = Literal["run", "control"]
AnyDrawable = TypeVar("AnyDrawable", bound=Drawable)

INTERVAL = "95% t-interval over seeds"
PAIR, PAIR_IN_DATA = "hollow dots: both seeds", "both seeds are in the data"
"""Sentences of captions on two seeds, which are too few for an interval."""
MIXTURES, UNLEARNED, DIRECTIONS = "mixtures", "unlearned_mixtures", "directions"
"""Key of a chart's ``meta``: label -> gate weights at which its input-dependent updates are evaluated."""
# Keys of ``Run.meta`` in which the seeds of one recipe agree.
_SAME = ("model", "task", "recipe", "settings")
_DRAW_SEED = "entry_seed"  # a seed as well: the arms of a study can draw entries from the seed of the run
_MODELS = {"minilm": "MiniLM", "smollm2": "SmolLM2", "planted-base": "Small decoder"}
_POOLS = {"norm": "root sum of squares", "sum": "sum", "mean": "mean"}


@dataclass(frozen=True)
class Group:
    """Group of runs that differ only in their seed, with their label in the legend."""

    label: str
    runs: tuple[Result, ...]
    kind: Kind = "run"

    @property
    def seeds(self) -> list[int | None]:
        """Seed of each run, None if it is unknown."""
        return [run.meta.seed for run in self.runs]

    @property
    def has_distinct_seeds(self) -> bool:
        """Whether all seeds are known and distinct."""
        return None not in self.seeds and len(set(self.seeds)) == len(self.runs)

    @property
    def sample(self) -> str:
        """Number of runs and their seeds as text."""
        n, seeds = len(self.runs), sorted({seed for seed in self.seeds if seed is not None})
        if not seeds:
            return count_phrase(n, "run")
        listing = ", ".join(map(str, seeds))
        # Three seeds are as short as a list.
        if len(seeds) > 3 and seeds[-1] - seeds[0] == len(seeds) - 1:
            listing = f"{seeds[0]} to {seeds[-1]}"
        if n == 1:
            return f"1 run (seed {listing})"
        return f"{n} seeds ({listing})" if self.has_distinct_seeds else f"{n} runs (seeds {listing})"

    @property
    def run_names(self) -> dict[str, str]:
        """Label and seed of each run by its id, or label and id if the seeds are not distinct."""
        names = {}
        for run in self.runs:
            number = f"seed {run.meta.seed}" if self.has_distinct_seeds else f"run {run.id}"
            names[run.id] = f"{self.label}, {number}"
        return names


@dataclass(frozen=True)
class Cohort:
    """All groups of runs in a figure, by label.

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

    @property
    def label_of_run(self) -> dict[str, str]:
        """Label of every run by its id."""
        labels = {}
        for group in self.groups:
            for run in group.runs:
                labels[run.id] = group.label
        return labels

    @cached_property
    def meta(self) -> dict[str, Any]:
        """Origin of the figure for saved files: its name and runs, and the gates of input-dependent updates."""
        meta: dict[str, Any] = {"figure": self.name, "runs": [run.id for run in self.runs]}
        if not OF_UPDATES.isdisjoint(self.needs):
            for group in self.groups:
                if gates := _describe_gates(group):
                    meta.setdefault(MIXTURES, {})[group.label] = gates
                    if gates == "mean gates" and all(map(has_nearly_uniform_gates, group.runs)):
                        meta.setdefault(UNLEARNED, []).append(group.label)
                if any(_shows_direction(run, self.needs) for run in group.runs):
                    meta.setdefault(DIRECTIONS, []).append(group.label)
        return meta

    def without_controls(self) -> Cohort:
        """Return the cohort of the other runs; a chart of it has the same name."""
        return replace(self, groups=tuple(group for group in self.groups if group.kind == "run"))

    def require(self, *needs: str, history: bool = False) -> None:
        """Raise a ValueError for the first run that lacks one of these records."""
        for run in self.runs:
            for need in needs:
                if reason := missing_reason(run, need, history):
                    raise ValueError(f"{self.name} needs {reason} (run {run.id}, {run.label})")

    def has_recorded(self, quantity: str) -> bool:
        """Return whether every run has records of a quantity."""
        return self.table.loc[self.table["quantity"] == quantity, "run"].nunique() == len(self.runs)

    def require_runs(self, minimum: int) -> None:
        """Raise a ValueError if there are fewer runs than this."""
        if len(self.runs) < minimum:
            raise ValueError(f"{self.name} needs at least {count_phrase(minimum, 'run')}, got {len(self.runs)}")

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
            for field in ("recipe", "settings"):
                expected, actual = getattr(first.meta, field), getattr(run.meta, field)
                for key in sorted({*expected, *actual} - {*free, _DRAW_SEED}):
                    if expected.get(key) != actual.get(key):
                        allowed = " and ".join(free)
                        raise ValueError(
                            f"{self.name} needs runs that differ only in {allowed}, got {key} {expected.get(key)} "
                            f"(run {first.id}) and {actual.get(key)} (run {run.id})"
                        )

    def common_module(self, updates: Sequence[Mapping[str, Any]], module: str | None) -> str:
        """Return the module that a figure compares: the given one, or that with the largest mean update.

        ``updates`` has the updates of every run by module, or their singular values.
        """
        common = common_names(updates)
        if module is None and common:
            rows = self.table[(self.table["quantity"] == "update_norm") & self.table["module"].isin(common)]
            if rows.empty:  # no norms were recorded
                return max(common, key=lambda name: sum(_norm_of(by_module[name]) for by_module in updates))
            return str(norms.last_recorded(rows).groupby("module", observed=True)["value"].mean().idxmax())
        if module not in common:
            raise self.no_common_module(module, common)
        return module

    def no_common_module(self, module: str | None, common: Sequence[str]) -> ValueError:
        """Return the error for a module that not all runs have; ``common`` lists those that they have."""
        got = ""
        if module is not None:
            got = f", got {module!r}"
        if not common:
            return ValueError(f"{self.name} needs a module that all runs have, and these have none in common{got}")
        choices = ", ".join(common[:5])
        if len(common) > 5:
            choices += f" or {len(common) - 5} others"
        return ValueError(f"{self.name} needs a module that all runs have{got}; expected one of {choices}")

    def label(self, table: pd.DataFrame) -> pd.DataFrame:
        """Add the columns ``recipe`` (the label) and ``kind`` (run or control) to a table with a column ``run``."""
        kinds = {group.label: group.kind for group in self.groups}
        recipe = table["run"].astype("str").map(self.label_of_run)
        return table.assign(recipe=recipe, kind=recipe.map(kinds))

    def select(self, *quantities: str) -> pd.DataFrame:
        """Return the labeled records of these quantities."""
        return self.label(self.table[self.table["quantity"].isin(quantities)])

    def scores(self) -> pd.DataFrame:
        """Return the final test metric of every run."""
        return norms.last_recorded(self.select("test_metric"))

    @property
    def metric(self) -> str:
        """Axis label of test metrics: the name of the metric if all runs share it, and which state is tested."""
        names = {getattr(run.meta.test, "name", "metric") for run in self.runs}
        states = {run.meta.tested_state for run in self.runs}
        if len(names) > 1 or len(states) > 1:
            return QUANTITIES["test_metric"].label
        state = states.pop()
        return f"test {names.pop()}" + f" ({state})" * bool(state)

    @property
    def lower_is_better(self) -> bool:
        """Whether a lower test metric is better, as for a perplexity."""
        scores = [run.meta.test for run in self.runs]
        return self.metric != QUANTITIES["test_metric"].label and getattr(scores[0], "lower_is_better", False)

    def metric_title(self, by: str = "") -> str:
        """Return the title of a panel of test metrics ``by`` something, which states if lower ones are better."""
        return f"{self.metric.capitalize()}{by}" + " (lower is better)" * self.lower_is_better

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

    def caption(self, *sentences: str, interval: str = f"bands and bars: {INTERVAL}", pair: str = PAIR) -> str:
        """Return the sentences of a caption, followed by the number of runs, their seeds and the kind of interval.

        ``pair`` says how two seeds are shown, which have no interval.
        """
        sizes = {len(group.runs) for group in self.groups}
        # One run per label has no spread.
        if sizes == {1}:
            return " ".join([*sentences, f"{self.sample}, so no interval."])
        equal = len({group.sample for group in self.groups}) == 1
        mean = "Mean of" if equal else "Mean over seeds:"
        spread = {pair: 2 in sizes, interval: max(sizes) >= MINIMUM_SEEDS}
        # Two seeds have a range as well.
        if pair == interval:
            spread = {pair: True}
        spreads = "; ".join(text for text, is_drawn in spread.items() if is_drawn)
        return " ".join([*sentences, f"{mean} {self.sample}; {spreads}."])

    def setting(self) -> str:
        """Return a sentence on the model, the task and the learning rates of the runs, "" if there are several."""
        settings = {(shown_model(run.meta.model or ""), run.meta.task or "") for run in self.runs}
        model, task = settings.pop()
        if settings or not (model and task):
            return ""
        rates: dict[str, dict[str, None]] = {}
        for group in self.groups:
            for run in group.runs:
                if (rate := run.meta.settings.get("lr")) is not None:
                    rates.setdefault(group.label, {})[f"{rate:g}"] = None
        sentence = f"{model} on {task}"
        if rates:
            sentence += "; learning rate: " + ", ".join(f"{label} {' and '.join(rates[label])}" for label in rates)
        return f"{sentence}."

    def complete(self, drawable: AnyDrawable, caption: str | None = None) -> AnyDrawable:
        """Add the origin of the figure to its charts, and the gates of input-dependent updates to every caption.

        A ``caption`` replaces those of the charts.
        """
        mixtures: dict[str, str] = {}
        for chart in drawable.panels:
            # A chart of another cohort, such as separate panels of the controls, has the meta of its runs.
            mixtures |= (self.meta | dict(chart.meta)).get(MIXTURES, {})
        sentences = mixture_sentences(mixtures)
        if labels := self.meta.get(UNLEARNED):
            sentences.append(
                f"The gates of {', '.join(labels)} are within {100 * UNIFORM:.0f}% of uniform: an average of experts, "
                "no learned mixture."
            )
        if labels := self.meta.get(DIRECTIONS):
            sentences.append(f"Updates of {', '.join(labels)} without W₀: only s B A, without the magnitudes.")

        def complete_chart(chart: Chart) -> Chart:
            text = caption or chart.caption
            return replace(chart, caption=" ".join([text, *sentences]), meta=self.meta | dict(chart.meta))

        rows = tuple(tuple(map(complete_chart, row)) for row in drawable.rows())
        return cast("AnyDrawable", replace(drawable, grid=rows) if isinstance(drawable, Panels) else rows[0][0])

    def method_notes(self) -> list[str]:
        """Return the sentences that the methods of the runs add to captions, such as which moments are not factored."""
        methods: dict[str, dict[str, str]] = {}
        for group in self.groups:
            for run in group.runs:
                for note in run.fact("caption_notes", ()):
                    methods.setdefault(note, {})[group.label] = run.label.partition(",")[0]
        # A note on all labels names their method once, several notes name their labels.
        sentences = []
        for note, by_label in methods.items():
            subject = ", ".join(by_label)
            if len(methods) == 1:
                subject = next(iter(by_label.values()))
            sentences.append(f"{subject} {note}.")
        return sentences

    def missing_initial_updates(self) -> list[str]:
        """Return a sentence on the recipes whose initial update cannot be subtracted, because it was not saved."""
        labels = [group.label for group in self.groups if any(map(initial_update.lacks_initial_update, group.runs))]
        if not labels:
            return []
        return [f"Includes the initial update, which was not saved: {', '.join(labels)}."]


def gather(name: str, runs: Runs, control: Runs | None = None, needs: tuple[str, ...] = ()) -> Cohort:
    """Group runs by label; without labels, runs of one recipe have the label of the recipe and count as its seeds.

    Raises
    ------
    ValueError
        There is no run, a run or label occurs twice, or unlabeled runs of one recipe differ in more than their seed.
    """
    groups = _group(runs)
    if control is not None:
        groups += _group(control, "control")
    cohort = Cohort(name, groups, needs)
    cohort.require_runs(1)
    if doubled := _duplicates(run.id for run in cohort.runs):
        raise ValueError(f"{name}: duplicate run {doubled[0]}")
    if doubled := _duplicates(cohort.labels):
        raise ValueError(f"{name}: duplicate label {doubled[0]!r} in runs and control")
    return cohort


def _duplicates(names: Iterable[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)


def require_counts(**counts: int | None) -> None:
    """Raise a ValueError for the first count below 1 among the arguments of a figure of run groups."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be >= 1, got {count}")


def require_choices(**arguments: tuple[str, Collection[str]]) -> None:
    """Raise a ValueError for the first argument of a figure of run groups that is not among its choices."""
    for name, (value, choices) in arguments.items():
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def join_by_label(notes: Mapping[str, str]) -> str:
    """Join the notes of all groups of runs by label, or return the note once if it is the same for all."""
    if len(set(notes.values())) == 1:
        return next(iter(notes.values()))
    return "; ".join(map(": ".join, notes.items()))


def common_names(collections: Sequence[Collection[str]]) -> list[str]:
    """Return the modules that a figure of run groups can compare: those in all collections, in order of the first."""
    shared = set.intersection(*map(set, collections))
    return [name for name in collections[0] if name in shared]


def _norm_of(update: Any) -> float:
    """Return the norm of an update, or of its singular values."""
    return float(np.linalg.norm(update) if isinstance(update, np.ndarray) else update.norm())


def mixture_sentences(mixtures: Mapping[str, str]) -> list[str]:
    """Return caption sentences on the gates of run groups, such as "Updates of HydraLoRA at mean gates"."""
    labels: dict[str, list[str]] = {}
    for label, gates in mixtures.items():
        labels.setdefault(gates, []).append(label)
    return [f"Updates of {', '.join(names)} at {gates}." for gates, names in labels.items()]


def shown_model(model: str) -> str:
    """Return the name of a model in figures, without its folder."""
    name, comma, blocks = model.rpartition("/")[2].partition(",")
    return _MODELS.get(name, name) + comma + blocks


def define(quantity: str) -> str:
    """Return the definition of a quantity as a sentence of the caption for a figure of run groups."""
    entry = QUANTITIES[quantity]
    return f"{entry.label}: {entry.definition}; modules pooled by {_POOLS[entry.pool]}."


def axis_label(quantity: str) -> str:
    """Return the label and unit of a quantity for an axis of a figure of run groups."""
    entry = QUANTITIES[quantity]
    return f"{entry.label} ({entry.unit})" if entry.unit else entry.label


def _describe_gates(group: Group) -> str:
    """Return the gates at which the updates of a group are evaluated, "" if they do not depend on the input."""
    descriptions: dict[str, None] = {}
    for run in group.runs:
        # Without a snapshot of its last step, a run has no gates to describe.
        with suppress(ValueError):
            descriptions[gate_description(run)] = None
    return " and ".join(filter(None, descriptions))


def _shows_direction(run: Result, needs: Collection[str]) -> bool:
    """Return whether a figure shows updates that also depend on W₀, which is unknown, as those of their direction."""
    update = None
    # Without a snapshot of its last step, a run has no updates.
    with suppress(ValueError):
        update = next(iter(run.updates().values()), None)
    if update is None or update.whole:
        return False
    # Norms and spectra of a run are recorded with W₀.
    return not run.incomplete_updates() or not {UPDATES, STEPS}.isdisjoint(needs)


def _group(runs: Runs, kind: Kind = "run") -> tuple[Group, ...]:
    members: dict[str, list[Result]] = {}
    if isinstance(runs, Mapping):
        members = {label: list_runs(of_label) for label, of_label in runs.items()}
    else:
        for run in list_runs(runs):
            label = f"control: {run.label}" if kind == "control" else run.label
            members.setdefault(label, []).append(run)
    groups = tuple(Group(label, tuple(of_label), kind) for label, of_label in members.items() if of_label)
    # The runs of a given label may differ, because the caller decided to average them.
    if not isinstance(runs, Mapping):
        for group in groups:
            _require_same_recipe(group)
    return groups


def list_runs(runs: Result | Sequence[Result]) -> list[Result]:
    """Return the runs of a group as a list, which has one element for a single run."""
    return [runs] if isinstance(runs, Result) else list(runs)


def _require_same_recipe(group: Group) -> None:
    """Raise a ValueError unless the runs differ only in their seed, and all seeds are distinct."""
    first, *other_runs = group.runs
    for run in other_runs:
        if differing := [key for key in _SAME if getattr(run.meta, key) != getattr(first.meta, key)]:
            raise ValueError(
                f"cannot average runs {first.id} and {run.id} of label {group.label!r}: they differ in "
                f"{', '.join(differing)}. Pass a dict label -> runs"
            )
    if other_runs and not group.has_distinct_seeds:
        raise ValueError(
            f"cannot average {len(group.runs)} runs of label {group.label!r}: their seeds are not distinct, got seeds "
            f"{group.seeds}. Pass a dict label -> run"
        )
