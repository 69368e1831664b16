"""Series of checkpoints of one training: adapters whose norms, spectra and ranks have a history."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from lorascope.files.hub import hub_source, label
from lorascope.files.lazy_pandas import pandas as pd
from lorascope.files.printable import printable
from lorascope.formats.stored_update import StoredLoRA
from lorascope.runs.adapter import Adapter
from lorascope.runs.checkpoint_names import count_and_span
from lorascope.runs.finding_lines import Lines
from lorascope.runs.manifest import Module, State
from lorascope.runs.module_summary import ModuleSummary
from lorascope.runs.result import Result
from lorascope.schema import records
from lorascope.schema.module_roles import position
from lorascope.schema.records import Record
from lorascope.updates import Update, change_norms
from lorascope.updates.linalg import as_float64

_SPECTRUM = "/singular_values"


class Series(Result):
    """Series of checkpoints of one training that were written elsewhere, such as those of a Trainer.

    Its records are those that ``TrainerRecorder`` writes at the same steps, as far as they follow from the adapters:
    ``step_norm`` requires the step before, ``learned_norm`` of an update that starts nonzero requires checkpoint 0, and
    ``adapter_norm`` is known for LoRA only. Blocks have no rows; ``analysis.norms.pool_modules`` sums their modules.
    Checkpoints are read on access, one at a time.

    Parameters
    ----------
    checkpoints : mapping step -> Adapter
        At least one.
    skipped : mapping step -> str
        Why other checkpoints cannot be read.

    Raises
    ------
    ValueError
        The checkpoints have different base models, or one module has different shapes.
    """

    kind = "series"
    has_history = True

    def __init__(self, checkpoints: Mapping[int, Adapter], skipped: Mapping[int, str] | None = None) -> None:
        self.checkpoints = dict(sorted(checkpoints.items()))  # by step, as ``last`` and the records require
        self.skipped = dict(skipped or {})
        *_, (step, self.last) = self.checkpoints.items()
        adapters = list(self.checkpoints.values())
        path, name = _common_folder([adapter.files.path for adapter in adapters])
        _require_one_base(adapters)
        meta = replace(
            self.last.meta,
            label=name,
            recipe={"source": str(path)},
            modules=_all_modules(adapters),
            states={"last": State(step, self.last.ranks())},
            source=str(path),
        )
        super().__init__(path, meta)

    @cached_property
    def id(self) -> str:
        """First twelve hex digits of the SHA-256 of the steps and ids of all checkpoints."""
        text = " ".join(f"{step}:{adapter.id}" for step, adapter in self.checkpoints.items())
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @cached_property
    def table(self) -> pd.DataFrame:
        """Norms and ranks of every module at every checkpoint that has it."""
        return records.frame(self.id, list(self._rows()), self.modules)

    def _rows(self) -> Iterator[tuple[int, Record]]:
        for step, adapter in self.checkpoints.items():
            learned_norms = self._learned_norms(adapter)
            for module, rank in adapter.ranks().items():
                values = {"rank": float(rank)} | adapter.measures[module]
                if module in learned_norms:
                    values["learned_norm"] = learned_norms[module]
                stored = adapter.files.parts[module]
                if type(stored) is StoredLoRA:  # the factors of its subclasses are not those of LoRA
                    values["adapter_norm"] = _joint_norm(stored)
                for quantity, value in values.items():
                    yield step, Record(quantity, value, module)

    def _learned_norms(self, adapter: Adapter) -> dict[str, float]:
        if self.fact("starts_at_zero", True):
            return {module: values["update_norm"] for module, values in adapter.measures.items()}
        if 0 not in self.checkpoints:
            return {}
        initial, updates = self.checkpoints[0].updates(), adapter.updates()
        shared = [module for module in updates if module in initial]
        # A generator, because updates are read on access.
        norms = change_norms((updates[module], initial[module]) for module in shared)
        return dict(zip(shared, norms, strict=True))

    def update_steps(self) -> list[int]:
        return list(self.checkpoints)

    def factors(self, step: int | None = None, state: str = "last") -> Mapping[str, dict[str, np.ndarray]]:
        return self._checkpoint(step, state).factors()

    def updates(self, step: int | None = None, state: str = "last") -> Mapping[str, Update]:
        return self._checkpoint(step, state).updates()

    def input_dependent_modules(self, state: str = "last") -> set[str]:
        return self._checkpoint(None, state).input_dependent_modules()

    def ranks(self, state: str = "last") -> dict[str, int]:
        return self._checkpoint(None, state).ranks()

    def summary(self, all: bool = False, state: str = "last") -> pd.DataFrame:
        """Return one row per adapted module of the last checkpoint; see `Adapter.summary`."""
        return self._checkpoint(None, state).summary(all)

    def summaries(self) -> list[ModuleSummary]:
        return self.last.summaries()

    def _checkpoint(self, step: int | None, state: str) -> Adapter:
        if state != "last":
            raise ValueError(f"state must be 'last' for a series of checkpoints, got {state!r}")
        if step is None:
            return self.last
        if step not in self.checkpoints:
            raise ValueError(f"step must be one of {list(self.checkpoints)} (checkpoints of {self.label}), got {step}")
        return self.checkpoints[step]

    def snapshot_names(self) -> list[str]:
        """Return the names of the spectra of all modules."""
        return sorted(f"{module.module}{_SPECTRUM}" for module in self.meta.modules)

    def snapshot_steps(self, name: str) -> list[int]:
        module = name.removesuffix(_SPECTRUM)
        # A name without the suffix is not that of a spectrum.
        return [step for step, adapter in self.checkpoints.items() if module in adapter.files.parts and module != name]

    def _long_snapshot(self, name: str, step: int) -> pd.DataFrame:
        module, spectra = name.removesuffix(_SPECTRUM), self._checkpoint(step, "last").spectra
        if module == name or module not in spectra:
            raise self._no_snapshot(name)
        sigma = spectra[module]
        return pd.DataFrame({"component": np.arange(len(sigma)), "step": step, "value": sigma})

    def _lines(self) -> Lines:
        return [
            ("series", f"{self.label}  {self.last.files.kind}, checkpoints: {count_and_span(self.checkpoints)}"),
            *self.last._lines()[1:3],
            ("folder", str(self.path)),
            *(("skipped", reason) for reason in self.skipped.values()),
            *self._finding_lines(),
        ]

    def _missing(self, recorded: set[str]) -> list[str]:
        return ["the losses", *self.last._missing(recorded)[1:]]


def _joint_norm(stored: StoredLoRA) -> float:
    """Compute the Frobenius norm of both factors together."""
    return math.hypot(*(np.linalg.norm(as_float64(factor)) for factor in stored.factors().values()))


def _common_folder(paths: list[Path]) -> tuple[Path, str]:
    """Return the folder of all checkpoints and its name; for revisions on the hub, their repository."""
    folder = paths[-1]
    if all(map(hub_source, paths)):
        return folder, label(folder).partition("@")[0]
    if {path.parent for path in paths} == {folder.parent}:
        folder = folder.parent
    return folder, label(folder)


def _require_one_base(adapters: list[Adapter]) -> None:
    first = adapters[0]
    for adapter in adapters:
        if first.meta.model == "unknown":
            first = adapter
        if adapter.meta.model not in ("unknown", first.meta.model):
            pair = f"{_describe_base(adapter)}, and {_describe_base(first)}"
            raise ValueError(f"cannot load checkpoints as a series: {pair}")


def _describe_base(adapter: Adapter) -> str:
    return f"{printable(adapter.files.path)} has base model {printable(adapter.meta.model)}"


def _all_modules(adapters: list[Adapter]) -> list[Module]:
    """Return the modules of all checkpoints in the order of the axes; each has the same shape in all of them."""
    modules: dict[str, Module] = {}
    first_adapters: dict[str, Adapter] = {}
    for adapter in adapters:
        for module in adapter.meta.modules:
            first = modules.setdefault(module.module, module)
            first_adapter = first_adapters.setdefault(module.module, adapter)
            shape, first_shape = (module.out_features, module.in_features), (first.out_features, first.in_features)
            if shape != first_shape:
                raise ValueError(
                    f"cannot load checkpoints as a series: {printable(module.module)} is {shape} in "
                    f"{printable(adapter.files.path)} and {first_shape} in {printable(first_adapter.files.path)}"
                )
    return sorted(modules.values(), key=lambda module: position(module.stack, module.layer, module.role))
