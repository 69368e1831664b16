"""Training run, finished or not: its description, records, snapshots and saved parameters.

A run is a folder: ``run.json``, ``records.parquet``, ``predictions.parquet``, ``snapshots/step-000500.safetensors``,
``state/last.safetensors`` and ``state/best.safetensors``, plus ``resume/`` while it is unfinished, and ``checkpoints/``
if some were kept, ``texts.parquet`` if it generated texts, and ``harness/`` with results of ``ls.harness``.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

import lorascope
from lorascope.files.lazy_pandas import pandas as pd
from lorascope.files.parquet_tables import read_table
from lorascope.files.predictions import choice_columns, collect_references
from lorascope.files.printable import printable
from lorascope.files.safetensors_io import TensorFile
from lorascope.files.typed_json import read_json, unreadable
from lorascope.files.whole_files import file_hash
from lorascope.runs.finding_lines import RECORDED_BY
from lorascope.runs.folders import RunManifest, new_folder
from lorascope.runs.layout import GROWING, PREDICTIONS, REMOVED, TEXTS, Lazy, snapshot_file
from lorascope.runs.manifest import Axes, Manifest, SnapshotAbout, read_about, read_manifest
from lorascope.runs.result import Result
from lorascope.schema import records
from lorascope.updates import Update, from_factors
from lorascope.updates.weight_update import form_named

TRAIN_AGAIN = "Train the run again with overwrite=True"
# By kind of task: a closed set of answers, numbers, and texts; the last one is of runs before there were classes.
_PREDICTION_DTYPES = (
    {"margin": "int8", "nll": "float16", "predicted": "int16"},
    {"nll": "float32", "predicted": "float32"},
    {"nll": "float16"},
    {"margin": "int8", "nll": "float16"},
)
# Prompts with choices, next to the log-likelihoods.
_CHOICE_DTYPES = {"nll": "float16", "predicted": "int16"}


class Run(Result):
    """Training run: its records, snapshots and saved parameters.

    Parameters
    ----------
    path : path or None
        The run folder.
    meta : Manifest
        Content of ``run.json``.
    """

    kind = "run"
    has_history = True

    def __init__(self, path: Path | None, meta: Manifest) -> None:
        super().__init__(path, meta)
        # Headers and descriptions are parsed once, because updates are read module by module.
        self._snapshot_files: dict[int | None, TensorFile] = {}
        self._abouts: dict[Path, SnapshotAbout] = {}

    @classmethod
    def read(cls, path: str | Path) -> Run:
        """Open a run folder.

        Raises
        ------
        FileNotFoundError
            The folder has no ``run.json``.
        ValueError
            The file is broken or was written by a newer version.
        """
        path = Path(path)
        file = path / "run.json"
        if not file.exists():
            raise FileNotFoundError(f"cannot read {printable(path)} as a run: it has no run.json")
        return cls(path, read_manifest(file))

    @cached_property
    def table(self) -> pd.DataFrame:
        """All records, with the columns ``records.COLUMNS``."""
        # The modules that register quantities of methods are not imported here, because they import torch.
        records.adopt(self.meta.quantities or {})
        file = self._file("records.parquet")
        content = read_table(file, file)
        try:
            table = records.validate(content)
        except ValueError as error:
            raise unreadable(file, str(error)) from error
        if foreign_ids := sorted(set(table["run"].cat.categories) - {self.id}):
            raise unreadable(file, f"rows must belong to run {self.id}, got {foreign_ids[0]}")
        return table

    @cached_property
    def predictions(self) -> pd.DataFrame:
        """Predictions of the final state, one row per test row in the order of ``task.split("test")``.

        ``nll`` is the negative log-likelihood in nats; the mean over rows is the test loss. With a closed set of
        answers, ``margin`` is the logit of the right one minus the largest other, in steps of 1/32, rounded away from
        zero and clipped to 127 steps: a row is right if it is above zero. ``predicted`` is the number of the class with
        the largest logit, counted from 0 in the order of the labels; a tie with the right class gives another one. Runs
        of earlier versions do not have it. For a task with numbers, ``nll`` is the squared error and ``predicted`` the
        value. For prompts with choices, ``predicted`` is the number of the choice with the largest log-likelihood, and
        ``choice_0``, ``choice_1`` and so on are the log-likelihoods in nats, -inf beyond the choices of a row.

        Raises
        ------
        FileNotFoundError
            The run is unfinished, or was not written by ``train`` of this version.
        """
        if self.finished and PREDICTIONS not in self.meta.checksums:
            raise FileNotFoundError(
                f"cannot read the predictions of run {self.id}: only ls.train writes them, since 0.2. {TRAIN_AGAIN}"
            )
        file = self._file(PREDICTIONS)
        table = read_table(file, file)
        dtypes = {name: str(dtype) for name, dtype in table.dtypes.items()}
        choices = dict.fromkeys(choice_columns(table), "float32")
        if dtypes not in _PREDICTION_DTYPES and not (choices and dtypes == _CHOICE_DTYPES | choices):
            allowed = (
                "margin (int8), nll (float16) and predicted (int16), nll and predicted (float32), nll, predicted and "
                "choice_0 to the last choice (float32), or nll"
            )
            raise unreadable(file, f"columns must be {allowed}, got {printable(dtypes)}")
        return table

    @cached_property
    def texts(self) -> pd.DataFrame:
        """Texts that the final state generated from the prompts of the test split.

        One row per prompt: ``prompt, text, references``, the list of its responses in the data, and ``group`` if there
        are groups.

        Raises
        ------
        FileNotFoundError
            The run is unfinished, or was trained without ``generation``.
        """
        if self.finished and TEXTS not in self.meta.checksums:
            raise FileNotFoundError(
                f"cannot read the texts of run {self.id}: it was trained without generation=Generation()"
            )
        file = self._file(TEXTS)
        table = read_table(file, file)
        names = printable(", ".join(map(str, table)))
        if set(table) - {"group"} != {"prompt", "text", "references"}:
            raise unreadable(file, f"columns must be prompt, text and references, and group if any, got {names}")
        if not table.map(lambda cell: isinstance(cell, str)).to_numpy().all():
            raise unreadable(file, f"{names} must be texts in each row")
        return collect_references(table)

    @cached_property
    def parents(self) -> list[Run]:
        """Runs of the phases before this one."""
        return [Run.read(self._folder / parent) for parent in self.meta.parents]

    @cached_property
    def trunk(self) -> Run | None:
        """Run that a fork continues, found by its id next to the fork; None for other runs.

        Raises
        ------
        FileNotFoundError
            It is not in the folder that contains the fork.
        """
        if self.meta.fork is None:
            return None
        trunk, folder = self.meta.fork.run, self._folder.absolute().parent
        # The run of a last phase is in the folder of its recipe.
        for file in sorted([*folder.glob("*/run.json"), *folder.glob("*/*/run.json")]):
            with suppress(OSError, ValueError):
                if read_json(file, RunManifest).id == trunk:
                    return Run.read(file.parent)
        raise FileNotFoundError(
            f"cannot find the trunk of run {self.id}: run {trunk} is not in {printable(folder)}; move it next to it"
        )

    def factors(self, step: int | None = None, state: str = "last") -> Mapping[str, dict[str, np.ndarray]]:
        if step is None and not self.ranks(state):  # nothing is adapted, so that the step may have no snapshot
            return {}
        file = self._snapshots(step, state)
        names = self._about(file).factors
        return Lazy(list(names), lambda module: {name: file[f"{module}/{name}"] for name in names[module]})

    def updates(self, step: int | None = None, state: str = "last") -> Mapping[str, Update]:
        stored = self.factors(step, state)
        if not stored:
            return {}
        about = self._about(self._snapshots(step, state))

        def make(module: str) -> Update:
            return from_factors(stored[module], about.scales[module], about.exact[module], about.forms.get(module))

        return Lazy(list(about.scales), make)

    def incomplete_updates(self, step: int | None = None, state: str = "last") -> set[str]:
        if not self.factors(step, state):
            return set()
        about = self._about(self._snapshots(step, state))
        modules = set()
        for module in about.scales:
            names = about.factors[module]
            if form_named(about.forms.get(module), names).needs_weight and "W0" not in names:
                modules.add(module)
        return modules

    @cached_property
    def spectra(self) -> dict[str, np.ndarray]:
        """See `Result.spectra`; those that also depend on W₀ are read from the records of ``observe.norms``."""
        sigmas = super().spectra
        for module in self.incomplete_updates():
            del sigmas[module]
            name = f"{module}/singular_values"
            if (last := self.meta.states["last"].step) in self.snapshot_steps(name):
                sigmas[module] = self.snapshot(name, last)["value"].to_numpy(np.float64)
        return sigmas

    def input_dependent_modules(self, state: str = "last") -> set[str]:
        if not self.ranks(state):
            return set()
        exact = self._about(self._snapshots(None, state)).exact
        return {module for module, is_exact in exact.items() if not is_exact}

    def _long_snapshot(self, name: str, step: int) -> pd.DataFrame:
        file = self._snapshots(step)
        if name not in file:
            raise self._no_snapshot(name)
        axes, array = self._about(file).axes.get(name, Axes()), file[name]
        axis_names = axes.axes or [f"axis{i}" for i in range(array.ndim)]
        labels = [axes.labels.get(axis, range(size)) for axis, size in zip(axis_names, array.shape, strict=True)]
        index = pd.MultiIndex.from_product(labels, names=axis_names)
        return pd.DataFrame({"step": step, "value": array.reshape(-1)}, index=index).reset_index()

    def snapshot_steps(self, name: str) -> list[int]:
        return [step for step in self._all_steps() if name in self._snapshots(step)]

    def snapshot_names(self) -> list[str]:
        return sorted(set[str]().union(*map(self._snapshots, self._all_steps())))

    def update_steps(self) -> list[int]:
        return [step for step in self._all_steps() if self._about(self._snapshots(step)).scales]

    def ranks(self, state: str = "last") -> dict[str, int]:
        return dict(self._state(state).ranks)

    def tensors(self, state: str = "last") -> Mapping[str, np.ndarray]:
        """Return the saved parameters by name: all that training may have changed, loaded on access."""
        return TensorFile(self.state_file(state))

    def state_file(self, state: str = "last") -> Path:
        """Return the verified file of a state; a best state at the last step uses the file of the last one."""
        if self._state(state).step == self._state("last").step:
            state = "last"
        return self._file(f"state/{state}.safetensors")

    @property
    def restorable(self) -> bool:
        """Whether the saved parameters are still stored."""
        stored = any(name.startswith("state/") for name in self.meta.checksums)
        return stored and REMOVED not in self.meta.checksums.values()

    def restore(self, model: Any, state: str = "last", method: Any = None) -> None:
        """Load the trained state into a fresh base model in place; its logits then equal the trained model's.

        Parameters
        ----------
        model : Module
            Base model, freshly loaded.
        state : {"last", "best"}
        method : Method, optional
            Required only for a method that is not registered by name.

        Raises
        ------
        ValueError
            The model is not the base that was trained, or already has adapters.
        """
        # On access, because the function imports torch.
        lorascope.restore(model, self, self.state_file(state), method)

    def save(self, path: str | Path) -> Run:
        """Copy the run to a new folder; a run with earlier phases is copied together with them.

        Raises
        ------
        FileExistsError
            The folder exists.
        """
        path = Path(path)
        source, name = self._folder, ""
        if self.meta.parents:  # they are the folders next to this one
            source, name = self._folder.parent, self._folder.name
        with new_folder(path) as draft:
            shutil.copytree(source, draft)
        return Run.read(path / name)

    def _missing(self, recorded: set[str]) -> list[str]:
        observers = [name for name, quantity in RECORDED_BY.items() if quantity not in recorded]
        # Steps by the names of files: opening all snapshots of a long run takes too long for a representation.
        if self.ranks() and len(self._all_steps()) < 2:
            observers.append("factors")
        if not observers:
            return []
        return [f"records of {', '.join(sorted(observers))}"]

    @property
    def _folder(self) -> Path:
        if self.path is None:
            raise ValueError(f"run {self.id} has no folder")
        return self.path

    def _file(self, name: str) -> Path:
        """Return a file of the folder after checking its checksum; a file without one is incomplete."""
        file = self._folder / name
        expected = self.meta.checksums.get(name)
        if expected == REMOVED:
            raise ValueError(f"cannot read {name} of run {self.id}: it was removed to save disk space. {TRAIN_AGAIN}")
        if expected is None or not file.exists():
            hint = ""
            if not self.finished:
                hint = f"; the run is {self.meta.status}: the same call of ls.train resumes its run"
            elif name.startswith("state/") and not self.restorable:
                hint = "; a recording stores only the weights of adapters that are matrices"
            raise FileNotFoundError(
                f"cannot read {printable(name)} of run {printable(self.id)}: not in {printable(self._folder)}{hint}"
            )
        # A file that still grows has no checksum yet.
        if expected != GROWING and file_hash(file) != expected:
            raise unreadable(file, "checksum differs from run.json (changed or truncated)")
        return file

    def _all_steps(self) -> list[int]:
        is_growing = GROWING in self.meta.checksums.values()
        steps = []
        for path in self._folder.glob("snapshots/step-*.safetensors"):
            if is_growing and f"snapshots/{path.name}" not in self.meta.checksums:
                continue  # a file that is newer than the run.json that was read
            if match := re.fullmatch(r"step-(\d{1,12})", path.stem):
                steps.append(int(match[1]))
        return sorted(steps)

    def _snapshots(self, step: int | None, state: str = "last") -> TensorFile:
        if step is None:
            step = self._state(state).step
        if step not in self._snapshot_files:
            steps = self._all_steps()
            if step is None or step not in steps:
                raise ValueError(f"step must be one of {steps} (snapshots of run {self.id}), got {step}")
            self._snapshot_files[step] = TensorFile(self._file(snapshot_file(step)))
        return self._snapshot_files[step]

    def _about(self, file: TensorFile) -> SnapshotAbout:
        if file.path not in self._abouts:
            self._abouts[file.path] = read_about(file)
        return self._abouts[file.path]
