"""Evidence about an adapter or a run for the rules: measures of its modules, computed on access.

The folder of an adapter contains its factors; with its base model, the weights are known as well. A run also has a
training history.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

import numpy as np

from lorascope.analysis.rank_use import SHARE, ModuleUse, RankUse
from lorascope.analysis.stored_measurements import PRICE, READING, read_dial, read_document
from lorascope.diagnosis.change_from_base import BaseChange, compare_with_base
from lorascope.diagnosis.nonfinite import first_nonfinite
from lorascope.files.lazy_pandas import pandas as pd
from lorascope.formats.pretrained_weights import PretrainedWeights
from lorascope.formats.stored_update import AdapterFiles, StoredUpdate
from lorascope.runs.adapter import Adapter
from lorascope.runs.manifest import Manifest
from lorascope.runs.module_summary import ModuleSummary, without_nan
from lorascope.runs.result import Result
from lorascope.runs.series import Series
from lorascope.updates import Residual, WeightDecomposed, constant_factors, effective_rank, energy_rank, stable_rank
from lorascope.updates.low_rank import count_used

Module = TypeVar("Module")

_ROUNDED = 1e-6  # of |W|: rounding of a magnitude in float32
UNUSED = 1e-6  # fraction of the largest singular value, below which the two ways to compute them differ


@dataclass
class TrainedModule(ModuleSummary):
    """Evidence of a case about a module that trains or has an adapter; NaN or None if unknown.

    ``moved`` is the norm of the learned update, ``used`` the number of nonzero components, and ``empty`` whether all
    factors are zero.
    """

    moved: float = np.nan
    adapted: bool = False
    scale: float = np.nan
    used: float = np.nan
    empty: bool = False

    @property
    def unchanged(self) -> bool:
        """Whether the adapter has a zero update, although its scale and one of its factors are not zero."""
        # The update of DoRA with its base is never exactly zero: its magnitude is rounded.
        rounded = self.used == 0 and self.update_norm <= _ROUNDED * self.weight_norm
        return self.adapted and (self.update_norm == 0 or rounded) and self.scale != 0 and not self.empty


@dataclass
class MeasuredModule:
    """Evidence of a case about a module with an update; NaN or None if unknown.

    ``energy`` is the fraction of the summed |dW|^2. ``dead`` counts unused components: those within the rank whose
    singular value is below 1e-6 of the largest. The last three fields equal ``BaseChange``.
    """

    module: str
    stack: str
    layer: int | None
    role: str
    rank: int | None
    scale: float
    parameters: int
    update_norm: float
    relative_update: float
    energy: float
    stable_rank: float
    effective_rank: float
    energy_rank: float
    dead: float
    exact: bool
    intruders: float
    neuron_median: float
    neuron_largest: float


def known_rows(rows: Iterable[Module], name: str) -> list[Module]:
    """Return the modules of a case in which a field is known: not NaN."""
    return [row for row in rows if not math.isnan(getattr(row, name))]


def largest_rows(rows: Iterable[Module], name: str, count: int = 1) -> list[Module]:
    """Return the modules of a case with the largest values of a field, the first of equal ones first, without NaN."""
    return sorted(known_rows(rows, name), key=attrgetter(name), reverse=True)[:count]


class TotalChange(NamedTuple):
    """Modules of a case with known change and weight, the norm of all these changes, and that of all these weights."""

    modules: list[TrainedModule]
    moved: float
    weight_norm: float


class ModuleEvidence:
    """Base class of a case: evidence about the modules of a folder or of a training in progress."""

    modules: list[TrainedModule]

    @property
    def adapted(self) -> list[TrainedModule]:
        """Modules with an adapter of rank 1 or more."""
        return [module for module in self.modules if module.adapted]

    @property
    def total_change(self) -> TotalChange:
        """Change of the adapted modules together, or without adapters of all but the head."""
        rows = self.adapted or [row for row in self.modules if row.role != "head"]
        measured, changes, weights = [], [], []
        for row in rows:
            if math.isfinite(row.moved) and math.isfinite(row.weight_norm):
                measured.append(row)
                changes.append(row.moved)
                weights.append(row.weight_norm)
        return TotalChange(measured, math.hypot(*changes), math.hypot(*weights))

    @property
    def unchanged_adapters(self) -> list[TrainedModule]:
        """Adapters with a zero update, although their scale and one of their factors are not zero."""
        return [module for module in self.modules if module.unchanged]


@dataclass
class Case(ModuleEvidence):
    """Case for the rules: evidence about one adapter or run, and more if the adapter was loaded with its base.

    For a series of checkpoints, the last one is used.

    ``spectra`` also runs full SVDs (slow): singular values of FourierFT and of DoRA with its base, and intruder
    dimensions in weights of any size.
    """

    run: Result
    spectra: bool = False
    fewest_losses = 0  # for an estimate of their noise: they may be means over epochs

    def __post_init__(self) -> None:
        if isinstance(self.run, Series):
            self.run = self.run.last

    def has(self, need: str) -> bool:
        """Return whether there is evidence of this kind; see ``Kind.needs``."""
        if need == "weights":
            return bool(known_rows(self.modules, "weight_norm"))
        if need == "dial":
            return self.stored_dial is not None
        history = self.run.has_history
        base = history or self.base is not None
        available = {"config": isinstance(self.run, Adapter), "base": base, "history": history, "training": False}
        return available.get(need, True)

    @property
    def meta(self) -> Manifest:
        """Description of the run or the adapter."""
        return self.run.meta

    @property
    def files(self) -> AdapterFiles:
        """Opened folder of an adapter."""
        assert isinstance(self.run, Adapter)
        return self.run.files

    @property
    def stored_updates(self) -> Mapping[str, StoredUpdate]:
        """Stored updates of an adapter by module, none of a run or of a view with fixed gate weights."""
        return self.run.files.parts if isinstance(self.run, Adapter) else {}

    @property
    def notes(self) -> tuple[str, ...]:
        """Cautions about an adapter that follow from its format and configuration."""
        return self.run.files.notes if isinstance(self.run, Adapter) else ()

    @property
    def configured(self) -> dict[str, str]:
        """Name of each module of an adapter that the configuration matches."""
        names = dict(zip(self.stored_updates, self.stored_updates, strict=True))
        return names | dict(self.files.configured)

    @property
    def base(self) -> PretrainedWeights | None:
        """Base weights of an adapter, None if they are unknown."""
        return self.run.base if isinstance(self.run, Adapter) else None

    @property
    def steps(self) -> int:
        """Last step with a recorded loss."""
        return max(self.losses, default=0)

    @property
    def learning_rate(self) -> float | None:
        """Learning rate of the training, None if unknown."""
        return self.meta.settings.get("lr")

    @property
    def error(self) -> str:
        """Reason why the training stopped, "" if it did not."""
        return str(self.meta.error or "")

    @property
    def frozen(self) -> Mapping[str, Sequence[str]]:
        """Parameters of each adapter of a run that had no ``requires_grad`` when it began."""
        return self.meta.frozen or {}

    @property
    def expects_adapters(self) -> bool:
        """Whether adapters should have trained, and all of them are readable."""
        # PEFT's prompt and prefix methods adapt no module; the others have target_modules.
        method = self.meta.method
        promised = (method.get("name") == "peft" and method.get("target_modules")) or self.adapted
        # Parameters that trained in a module that is left out are in no update.
        return bool(promised and self.meta.states and not self.meta.left_out)

    @property
    def masks_components(self) -> bool:
        """Whether an allocator masks components and does not delete them, as AdaLoRA's."""
        return bool(self.run.fact("masks_components"))

    @cached_property
    def losses(self) -> dict[int, float]:
        """Training loss by step of a run."""
        return {int(row.step): float(row.value) for row in self._records("loss")}

    @cached_property
    def nonfinite(self) -> str:
        """First value of a run that was not finite, see ``describe_nonfinite``; "" if unknown or its updates are."""
        if "records.parquet" not in self.meta.checksums:
            return ""
        return first_nonfinite(self.run.table)

    @cached_property
    def alarms(self) -> dict[int, list[Any]]:
        """Recorded alarms of a training: number of the id -> rows with step and module, "" for the whole run."""
        alarms: dict[int, list[Any]] = {}
        for row in self._records("alarm"):
            alarms.setdefault(int(row.value), []).append(row)
        return alarms

    @cached_property
    def stored_dial(self) -> pd.DataFrame | None:
        """Summary of the dial in the folder; see ``read_dial``."""
        return read_dial(self.run)

    @cached_property
    def stored_price(self) -> Mapping[str, Any] | None:
        """JSON form of the price of rank in the folder; see ``read_document``."""
        return read_document(self.run, PRICE)

    @cached_property
    def stored_reading(self) -> Mapping[str, Any] | None:
        """JSON form of the reading in the folder; see ``read_document``."""
        return read_document(self.run, READING)

    @property
    def has_gauge(self) -> bool:
        """Whether the run recorded finite losses by row, and with them the distance from the base."""
        return any(math.isfinite(row.value) for row in self._records("row_loss"))

    def _records(self, quantity: str) -> Iterator[Any]:
        """Yield the records of a quantity of a run with step, module and value, ordered by step."""
        if "records.parquet" in self.meta.checksums:
            rows = self.run.table[self.run.table["quantity"] == quantity].sort_values("step")
            yield from rows[["step", "module", "value"]].itertuples(index=False)

    @cached_property
    def tied(self) -> list[tuple[str, str]]:
        """Pairs of adapted modules that are one weight of the base."""
        if not self.meta.states:
            return []
        if self.stored_updates:
            return self._embeddings_without_head()
        ranks = self.run.ranks()
        pairs = []
        for module in self.meta.modules:
            for other in (module.tied or "").split(","):
                if ranks.get(module.module) and ranks.get(other):
                    pairs.append((module.module, other))
        return pairs

    def _embeddings_without_head(self) -> list[tuple[str, str]]:
        """Return the pairs of an embedding and a head that the base lacks, because safetensors stores one of them."""
        if self.base is None:
            return []
        embeds, heads = [], []
        for module in self.meta.modules:
            if module.role == "embed":
                embeds.append(module.module)
            if module.role == "head" and not self.base.has_weight(module.module):
                heads.append(module.module)
        return [*product(embeds, heads)]

    @cached_property
    def _summaries(self) -> list[ModuleSummary]:
        return self.run.summaries()

    @cached_property
    def modules(self) -> list[TrainedModule]:  # type: ignore[override]  # computed on access
        """Modules that train or have an adapter."""
        if not self.meta.states:
            return []
        recorded, updates = self._recorded_modules(), self.run.updates()
        modules = []
        for summary in self._summaries:
            if summary.rank is None and summary.module not in recorded:
                continue
            moved = summary.learned_norm
            if math.isnan(moved):  # a single adapter does not contain its initial update
                moved = summary.update_norm
            if summary.rank == 0:  # it has not moved, even if it was recorded before PEFT's allocator masked it
                moved = 0.0
            components = component_evidence(updates.get(summary.module))._asdict()
            modules.append(TrainedModule(**vars(summary) | components, moved=moved, adapted=bool(summary.rank)))
        return modules

    def _recorded_modules(self) -> set[str]:
        """Return the modules of a run with a recorded update norm; those of an adapter all have a rank."""
        if isinstance(self.run, Adapter):
            return set()
        table = self.run.table
        return set(table["module"][table["quantity"] == "update_norm"])

    @cached_property
    def measured(self) -> list[MeasuredModule]:
        """Modules with an update, in the order of the axes.

        Raises
        ------
        ValueError
            The run has no update: it is unfinished, or no update was recorded.
        """
        summaries = self._measured_summaries
        if not summaries:
            raise ValueError(
                f"cannot inspect run {self.run.id}: no update was recorded. Train with observe=[ls.observe.norms()]"
            )
        sigmas = self._singular_values
        # A float that is too large for its power raises an OverflowError; a product is infinite.
        energies = [summary.update_norm * summary.update_norm for summary in summaries]
        total = sum(without_nan(energies))
        changes = compare_with_base(self.stored_updates, self.base, self.spectra)
        updates: Mapping[str, Any] = self.stored_updates or self.run.updates()
        sizes = self._parameter_counts(summaries)
        rows = []
        for summary, energy in zip(summaries, energies, strict=True):
            ranks = _measure_spectrum(sigmas.get(summary.module), summary.rank)
            if not math.isnan(summary.effective_rank):
                ranks = ranks._replace(stable_rank=summary.stable_rank, effective_rank=summary.effective_rank)
            rows.append(
                MeasuredModule(
                    summary.module,
                    summary.stack,
                    summary.layer,
                    summary.role,
                    summary.rank,
                    # A dense update has no scale.
                    scale=float(getattr(updates.get(summary.module), "scale", np.nan)),
                    parameters=sizes[summary.module],
                    update_norm=summary.update_norm,
                    relative_update=summary.relative_update,
                    # Zero updates have no energy to divide by.
                    energy=energy / (total or 1.0),
                    exact=summary.exact,
                    **ranks._asdict(),
                    **changes.get(summary.module, BaseChange())._asdict(),
                )
            )
        return rows

    @cached_property
    def rank_use(self) -> RankUse | None:
        """Use of the allocated ranks; None unless the whole updates are products of two factors with known spectra."""
        if not self.meta.states:
            return None
        updates = self.run.updates()
        ranked = [summary for summary in self._measured_summaries if summary.rank is not None]
        # All updates of an adapter have one form, and loading each of them would read the files twice.
        first = next((updates.get(summary.module) for summary in ranked), None)
        # The recorded ranks of DoRA are not those of its product; the change of both factors of PiSSA has up to twice
        # the rank that is allocated.
        if first is None or first.low_rank is None or not first.whole or isinstance(first, Residual):
            return None
        shapes = {}
        for described in self.meta.modules:
            if described.out_features and described.in_features:
                shapes[described.module] = described.out_features, described.in_features
        modules = []
        for summary in ranked:
            sigma = self._singular_values.get(summary.module)
            if sigma is None or not np.isfinite(sigma).all():
                continue
            # The second name of a tied weight has no row.
            shape = shapes.get(summary.module) or updates[summary.module].shape
            ranks, rank = _measure_spectrum(sigma, summary.rank), summary.rank or 0
            # The spectrum may have been recorded before the allocator masked components.
            if ranks.energy_rank <= rank:
                modules.append(ModuleUse(summary.module, rank, int(ranks.energy_rank), ranks.effective_rank, shape))
        if not modules:
            return None
        return RankUse(modules)

    @property
    def _measured_summaries(self) -> list[ModuleSummary]:
        """Summaries of an adapter; a run lists all modules, also those whose update was not recorded."""
        return self._summaries if self.stored_updates else known_rows(self._summaries, "update_norm")

    def _parameter_counts(self, summaries: Iterable[ModuleSummary]) -> dict[str, int]:
        """Return the number of values of every module that an adapter stores or a run trains.

        Counts that are not stored follow from the rank.
        """
        if self.stored_updates:
            return {summary.module: self.stored_updates[summary.module].size for summary in summaries}
        shapes = {module.module: (module.out_features or 0, module.in_features or 0) for module in self.meta.modules}
        updates, factors, constants = self.run.updates(), self.run.factors(), constant_factors()
        has_constants = not constants.isdisjoint(next(iter(factors.values()), ()))
        counts = {}
        for summary in summaries:
            module = summary.module
            if has_constants and module in factors:
                arrays = factors[module]
                counts[module] = sum(int(arrays[name].size) for name in arrays.keys() - constants)
                continue
            # The second name of a tied weight has no row.
            outer, inner = shapes.get(module) or updates[module].shape
            if summary.rank is None:
                counts[module] = outer * inner
            else:
                counts[module] = summary.rank * (outer + inner)
        return counts

    @cached_property
    def _singular_values(self) -> Mapping[str, np.ndarray]:
        """Spectra of the factored updates, and of the dense ones recorded at the last step."""
        spectra: dict[str, np.ndarray] = {}
        # The other updates take a full SVD each.
        if self.spectra or all(update.has_thin_factors for update in self.stored_updates.values()):
            spectra.update(self.run.spectra)
        last = self.meta.states["last"].step
        for summary in self._measured_summaries:
            name = f"{summary.module}/singular_values"
            if summary.module not in spectra and last in self.run.snapshot_steps(name):
                spectra[summary.module] = self.run.snapshot(name, last)["value"].to_numpy()
        return spectra


class ComponentEvidence(NamedTuple):
    """Evidence of a case about components: scale, number of nonzero ones, and whether all factors are zero."""

    scale: float = np.nan
    used: float = np.nan
    empty: bool = False


def component_evidence(update: Any) -> ComponentEvidence:
    """Return a case's evidence of an update that is a product B A, or whose direction is; else nothing is known."""
    if isinstance(update, WeightDecomposed):
        update = update.direction
    factors = update and update.low_rank
    if factors is None:
        return ComponentEvidence()
    empty = not (factors.A.any() or factors.B.any())
    return ComponentEvidence(float(factors.scale), float(count_used(factors)), empty)


class _SpectrumMeasures(NamedTuple):
    stable_rank: float = np.nan
    effective_rank: float = np.nan
    energy_rank: float = np.nan
    dead: float = np.nan


def _measure_spectrum(sigma: np.ndarray | None, rank: int | None) -> _SpectrumMeasures:
    """Return the ranks of singular values, and the number of unused components within a rank."""
    if sigma is None:
        return _SpectrumMeasures()
    unused = np.nan
    if rank is not None and np.isfinite(sigma).all():
        used = np.count_nonzero(sigma > UNUSED * np.max(sigma, initial=0.0))
        unused = max(float(rank - used), 0.0)
    return _SpectrumMeasures(stable_rank(sigma), effective_rank(sigma), energy_rank(sigma, SHARE), unused)
