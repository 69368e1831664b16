"""Results of a training: a run that was recorded here (``Run``), or an adapter from elsewhere (``Adapter``)."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from lorascope.files.lazy_pandas import pandas as pd
from lorascope.files.printable import printable, utf8_text
from lorascope.runs.finding_lines import Lines, describe_findings
from lorascope.runs.lora_config import peft_keywords
from lorascope.runs.manifest import Manifest, State, Test
from lorascope.runs.module_summary import MEASURES, ModuleSummary
from lorascope.schema.module_table import parse
from lorascope.updates import Update, effective_rank, spectra, stable_rank

T = TypeVar("T")


def is_at_step(table: pd.DataFrame, step: int | None) -> pd.Series:
    """Return which records of a result belong to a step; None means records without a step."""
    if step is None:
        return table["step"].isna()
    return (table["step"] == step).fillna(False)


class Result(ABC):
    """Result of a training: the updates and the description of a model.

    Parameters
    ----------
    path : path or None
        Its folder.
    meta : Manifest
        Its description.
    """

    kind: ClassVar[str]
    """Word for it in messages: run or adapter."""
    has_history: ClassVar[bool]
    """Whether there are records of the training steps."""
    gates: Mapping[str, np.ndarray] = {}
    """Fixed gate weights by module, empty by default; see ``at_gates``."""
    gates_label = ""
    """Description of the fixed gate weights."""

    def __init__(self, path: Path | None, meta: Manifest) -> None:
        self.path, self.meta = path, meta

    @property
    def id(self) -> str:
        """First twelve hex digits of a hash of everything that the result depends on."""
        return self.meta.id

    @property
    def reference(self) -> str:
        """Kind and names of the run for error messages, such as ``"run 1a2b (LoRA rank 8)"``."""
        return f"run {self.id} ({self.label})"

    @property
    def label(self) -> str:
        """Name of the recipe, equal for all seeds, such as ``LoRA, rank 8``."""
        return utf8_text(self.meta.label)

    @property
    def seed(self) -> int:
        """Seed of the training; a ValueError reports that it is unknown, as for an adapter."""
        return self._require(self.meta.seed, "seed")

    @property
    def task(self) -> str:
        """Name of the data; a ValueError reports that it is unknown, as for an adapter."""
        return self._require(self.meta.task, "task")

    def _require(self, value: T | None, name: str) -> T:
        if value is None:
            raise ValueError(f"{self.kind} {self.id} ({self.label}) has no {name}")
        return value

    def fact(self, name: str, default: Any = None) -> Any:
        """Return a fact about the method, as its ``describe`` stored it."""
        return (self.meta.facts or {}).get(name, default)

    @property
    def finished(self) -> bool:
        """Whether the training was recorded here and reached its last step."""
        return self.meta.status == "done"

    @property
    def score(self) -> Test:
        """Score of the final state on the test split.

        Raises
        ------
        ValueError
            There is none: the training has not ended, or had no test split.
        """
        return self._require(self.meta.test, f"test score: it is {self.meta.status}")

    def _state(self, state: str) -> State:
        if state not in ("last", "best"):
            raise ValueError(f"state must be one of 'last', 'best', got {state!r}")
        if state not in self.meta.states:
            raise ValueError(f"cannot read state {state!r} of run {self.id}: the run is {self.meta.status}")
        return self.meta.states[state]

    @property
    def modules(self) -> pd.DataFrame:
        """Modules of the model, as returned by ``module_table.describe``."""
        return self.meta.table()

    @property
    def parents(self) -> list[Any]:
        """Runs of the phases before this one."""
        return []

    @property
    @abstractmethod
    def table(self) -> pd.DataFrame:
        """All records, with the columns ``records.COLUMNS``."""

    @abstractmethod
    def factors(self, step: int | None = None, state: str = "last") -> Mapping[str, dict[str, np.ndarray]]:
        """Return the factors of every adapted module, loaded on access.

        Parameters
        ----------
        step : int, optional
            Step with a snapshot; by default the step of ``state``.
        state : {"last", "best"}

        Returns
        -------
        mapping module -> {factor: array}
            ``{"A": (rank, in), "B": (out, rank)}`` for LoRA; see the form of its updates for others.
        """

    @abstractmethod
    def updates(self, step: int | None = None, state: str = "last") -> Mapping[str, Update]:
        """Return the update of every module that has a stored one, loaded on access.

        Those of ``incomplete_updates`` are only the part that the factors give: for DoRA, that of the direction, s B A.
        """

    def incomplete_updates(self, step: int | None = None, state: str = "last") -> set[str]:
        """Return the modules of a run whose update also depends on W₀, which is not stored, such as DoRA's."""
        return set()

    @abstractmethod
    def input_dependent_modules(self, state: str = "last") -> set[str]:
        """Return the modules with an input-dependent update, such as HydraLoRA's, stored at mean gate weights."""

    @abstractmethod
    def ranks(self, state: str = "last") -> dict[str, int]:
        """Return the rank of every adapted module, including zeros."""

    def summary(self, all: bool = False, state: str = "last") -> pd.DataFrame:
        """Return one row per module: position, rank, norms, stable and effective rank at the state's step.

        Parameters
        ----------
        all : bool
            Include modules that did not train; False by default.
        state : {"last", "best"}
        """
        saved_state = self._state(state)
        modules = self.modules
        # A block only repeats its modules, and the weight of a norm is a vector without a rank.
        modules = modules[~modules["role"].isin(["block", "norm"])].set_index("module")
        frame = modules[["stack", "layer", "role"]].copy()
        for name in saved_state.ranks.keys() - set(frame.index):  # the second name of a tied weight, adapted separately
            frame.loc[name] = parse(name)
        frame["rank"] = pd.Series(saved_state.ranks, dtype="Int64").reindex(frame.index)
        measures = self._recorded_measures(saved_state.step)
        frame = frame.join(measures.reindex(index=frame.index, columns=list(MEASURES)))
        updates = self.updates(state=state)
        # Recorded values take precedence, because they include a weight that trains below its adapter.
        complete = updates.keys() - self.incomplete_updates(state=state)
        unmeasured = [name for name in frame.index[frame["stable_rank"].isna()] if name in complete]
        if unmeasured:
            measured = [
                [float(np.linalg.norm(sigma)), stable_rank(sigma), effective_rank(sigma)]
                for sigma in spectra([updates[name] for name in unmeasured])
            ]
            frame.loc[unmeasured, ["update_norm", "stable_rank", "effective_rank"]] = measured
        frame["exact"] = ~frame.index.isin(self.input_dependent_modules(state))
        if not all:
            frame = frame[frame["update_norm"].notna()]
        return frame.reset_index()

    def _recorded_measures(self, step: int | None) -> pd.DataFrame:
        """Return the records of ``MEASURES`` at a step, one row per module; None means records without a step."""
        table = self.table
        is_measure = table["quantity"].isin(MEASURES) & table["index"].isna()
        rows = table[is_measure & is_at_step(table, step)]
        return rows.pivot(index="module", columns="quantity", values="value").astype("float64")

    def summaries(self) -> list[ModuleSummary]:
        """Return the rows of ``summary(all=True)``."""
        frame = self.summary(all=True).astype({"layer": object, "rank": object})
        rows: Any = frame.where(frame.notna() | ~frame.columns.isin(["layer", "rank"]), None).to_dict("records")
        return [ModuleSummary(**row) for row in rows]

    @cached_property
    def spectra(self) -> dict[str, np.ndarray]:
        """Singular values of every stored update, largest first; NaN if a factor contains NaN."""
        updates = self.updates()
        return dict(zip(updates, spectra(updates.values()), strict=True))

    def lora_config(self, state: str = "last") -> dict[str, Any]:
        """Return PEFT's keywords for a LoRA with these ranks and scales, with patterns for modules that differ.

        Modules of rank 0 are not targets, and each pattern key matches exactly one module. To train a LoRA at the ranks
        of a pruned one, use ``export.rank_pattern``, which keeps alpha instead of the scale. For HydraLoRA, the ranks
        and scales are those that one token sees; such a LoRA has neither its router nor its experts.

        Raises
        ------
        ValueError
            No module has a factored update of rank >= 1, or an update is not a product of two factors.
        """
        return peft_keywords(self, self.ranks(state), self.updates(state=state))

    def snapshot(self, name: str, step: int | None = None) -> pd.DataFrame:
        """Return a saved array in long form: one column per axis, and ``value``; all steps if ``step`` is None.

        Raises
        ------
        ValueError
            There is no such snapshot.
        """
        steps = self.snapshot_steps(name) if step is None else [step]
        if not steps:
            raise self._no_snapshot(name)
        return pd.concat([self._long_snapshot(name, saved_step) for saved_step in steps], ignore_index=True)

    def _no_snapshot(self, name: str) -> ValueError:
        """Return the error for a snapshot that was not saved, or not at this step."""
        if steps := self.snapshot_steps(name):
            return ValueError(f"step of snapshot {name!r} must be one of {', '.join(map(str, steps))}")
        names = self.snapshot_names()
        hint = f"expected one of {', '.join(names[:3]) or 'none'} ({len(names)} snapshots)"
        if near := difflib.get_close_matches(name, names, 3):
            hint = f"did you mean {' or '.join(map(repr, near))}?"
        return ValueError(f"unknown snapshot {name!r} in {self.kind} {self.id}; {hint}")

    def _long_snapshot(self, name: str, step: int) -> pd.DataFrame:
        raise ValueError(f"{self.kind} {self.id} has no snapshots")

    def snapshot_steps(self, name: str) -> list[int]:
        """Return the steps that have a snapshot of this name."""
        return []

    def snapshot_names(self) -> list[str]:
        """Return the names of all snapshots."""
        return []

    def update_steps(self) -> list[int]:
        """Return the steps whose updates are stored, so that ``updates(step)`` reads them."""
        return []

    def __repr__(self) -> str:
        return "\n".join(f"{key:8}{printable(value)}" for key, value in self._lines())

    def _repr_html_(self) -> str:
        import html  # slow import

        rows = ""
        for key, value in self._lines():
            text = html.escape(printable(value))
            rows += f"<tr><th style='text-align:left'>{key}</th><td style='text-align:left'>{text}</td></tr>"
        return f"<table>{rows}</table>"

    def _lines(self) -> Lines:
        """Return the facts that represent the result, each with its key."""
        meta = self.meta
        training, model = describe_training(self)
        steps = f"{meta.settings['steps']}"
        if (batch_size := meta.settings.get("batch_size")) is not None:
            steps += f", batch size {batch_size}"
        lines = [("run", f"{self.id}  {training}"), ("model", model), ("steps", steps), ("folder", str(self.path))]
        if meta.error is not None:
            lines.append(("error", meta.error))
        if "last" not in meta.states:
            return lines
        if meta.test:
            tested = f"{meta.test.name} {meta.test.metric:.4g}, loss {meta.test.loss:.4g}"
            if meta.tested_state:
                tested += f" ({meta.tested_state})"
            lines.append(("test", tested))
        return lines + self._finding_lines()

    def _finding_lines(self) -> Lines:
        """Return the lines about the update, the missing records and the next call."""
        recorded = set(self.table["quantity"].cat.categories)
        return describe_findings(self.summary(), self._missing(recorded), recorded, self.kind)

    def _missing(self, recorded: set[str]) -> list[str]:
        """Return what was not recorded or stored, given the recorded quantities."""
        return []


def describe_training(run: Result) -> tuple[str, str]:
    """Return label, seed and status of a run, and the name of its model with that of its task."""
    training, model, meta = run.label, run.meta.model, run.meta
    if meta.seed is not None:
        training += f", seed {meta.seed}"
    if not run.finished:
        training += f", {meta.status}"
    if meta.task is not None:
        model += f" on {meta.task}"
    return training, model
