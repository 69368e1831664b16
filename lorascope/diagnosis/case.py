"""Evidence about an adapter or a run for the rules: measures of its modules, computed on access.

The folder of an adapter contains its factors; with its base model, the weights are known as well. A run also has a
training history.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from lorascope.diagnosis.change_from_base import BaseChange, compare_with_base
from lorascope.formats.pretrained_weights import PretrainedWeights
from lorascope.formats.stored_update import AdapterFiles, StoredUpdate
from lorascope.runs.adapter import Adapter
from lorascope.runs.manifest import Manifest
from lorascope.runs.module_summary import ModuleSummary
from lorascope.runs.result import Result
from lorascope.runs.series import Series
from lorascope.updates import WeightDecomposed, constant_factors, effective_rank, energy_rank, stable_rank
from lorascope.updates.low_rank import count_used

SHARE = 0.9  # fraction of the energy that ``energy_rank`` counts
_ROUNDED = 1e-6  # of |W|: rounding of a magnitude in float32
UNUSED = 1e-6  # fraction of the largest singular value, below which the two ways to compute them differ


@dataclass
class TrainedModule(ModuleSummary):
    """A module that trains or has an adapter; NaN or None if unknown.

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
    """A module with an update; NaN or None if unknown.

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


def largest(rows: Iterable[Any], name: str, count: int = 1) -> list[Any]:
    """Return the rows with the largest values of a field, the first of equal ones first, without NaN."""
    known = [row for row in rows if not math.isnan(getattr(row, name))]
    return sorted(known, key=lambda row: getattr(row, name), reverse=True)[:count]


class TotalChange(NamedTuple):
    """Modules whose change and weight are known, the norm of all these changes, and that of all these weights."""

    modules: list[TrainedModule]
    moved: float
    weight_norm: float


class ModuleEvidence:
    """Evidence about modules, of a folder or of a training in progress."""

    modules: list[TrainedModule]

    @property
    def adapted(self) -> list[TrainedModule]:
        """Modules with an adapter of rank 1 or more."""
        return [each for each in self.modules if each.adapted]

    @property
    def total_change(self) -> TotalChange:
        """Change of the adapted modules together, or without adapters of all but the head."""
        rows = self.adapted or [row for row in self.modules if row.role != "head"]
        measured = [row for row in rows if math.isfinite(row.moved) and math.isfinite(row.weight_norm)]
        moved, weight_norm = (
            math.hypot(*(getattr(row, name) for row in measured)) for name in ("moved", "weight_norm")
        )
        return TotalChange(measured, moved, weight_norm)

    @property
    def unchanged_adapters(self) -> list[TrainedModule]:
        """Adapters with a zero update, although their scale and one of their factors are not zero."""
        return [each for each in self.modules if each.unchanged]


@dataclass
class Case(ModuleEvidence):
    """Evidence about one adapter or run; more is known about an adapter that was loaded with its base.

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
            return any(not math.isnan(each.weight_norm) for each in self.modules)
        history = self.run.has_history
        base = history or self.base is not None
        known = {"config": isinstance(self.run, Adapter), "base": base, "history": history, "training": False}
        return known.get(need, True)

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
    def parts(self) -> Mapping[str, StoredUpdate]:
        """Stored updates of an adapter by module, none of a run or of a view with fixed gate weights."""
        return self.run.files.parts if isinstance(self.run, Adapter) else {}

    @property
    def notes(self) -> tuple[str, ...]:
        """Cautions about an adapter that follow from its format and configuration."""
        return self.run.files.notes if isinstance(self.run, Adapter) else ()

    @property
    def configured(self) -> dict[str, str]:
        """Name of each module of an adapter that the configuration matches."""
        return {name: name for name in self.parts} | dict(self.files.configured)

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
        if "records.parquet" not in self.meta.checksums:
            return {}
        rows = self.run.table[self.run.table["quantity"] == "loss"].sort_values("step")
        return dict(zip(rows["step"].tolist(), rows["value"].tolist(), strict=True))

    @cached_property
    def tied(self) -> list[tuple[str, str]]:
        """Pairs of adapted modules that are one weight of the base."""
        modules = self.meta.modules if self.meta.states else []
        if self.parts:
            # safetensors stores a shared weight once: a head that is missing in the base is tied to the embedding.
            embeds, heads = ([each.module for each in modules if each.role == role] for role in ("embed", "head"))
            lacking = [name for name in heads if self.base is not None and not self.base.has_weight(name)]
            return [(one, other) for one in embeds for other in lacking]
        adapted = {name for name, rank in self.run.ranks().items() if rank} if modules else set()
        pairs = [(each.module, other) for each in modules for other in (each.tied or "").split(",")]
        return [pair for pair in pairs if set(pair) <= adapted]

    @cached_property
    def _summaries(self) -> list[ModuleSummary]:
        return self.run.summaries()

    @cached_property
    def modules(self) -> list[TrainedModule]:  # type: ignore[override]  # computed on access
        """Modules that train or have an adapter."""
        if not self.meta.states:
            return []
        recorded, updates = self._recorded_modules(), self.run.updates()
        found = []
        for each in self._summaries:
            if each.rank is None and each.module not in recorded:
                continue
            moved = each.update_norm if math.isnan(each.learned_norm) else each.learned_norm
            # A pruned module has not moved, even if it was recorded before PEFT's allocator masked it.
            moved = 0.0 if each.rank == 0 else moved
            scale, used, empty = component_evidence(updates.get(each.module))
            own = {"moved": moved, "adapted": bool(each.rank), "scale": scale, "used": used, "empty": empty}
            found.append(TrainedModule(**vars(each) | own))
        return found

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
        chosen = [each for each in self._summaries if self.parts or not math.isnan(each.update_norm)]
        if not chosen:
            raise ValueError(
                f"cannot inspect run {self.run.id}: no update was recorded. Train with observe=[ls.observe.norms()]"
            )
        sigmas = self._singular_values([each.module for each in chosen])
        squares = [each.update_norm * each.update_norm for each in chosen]
        total = sum(square for square in squares if not math.isnan(square))
        changes = compare_with_base(self.parts, self.base, self.spectra)
        updates: Mapping[str, Any] = self.parts or self.run.updates()
        count = self._parameter_counts()
        rows = []
        for each, square in zip(chosen, squares, strict=True):
            stable, effective, needed, unused = _measure_spectrum(sigmas.get(each.module), each.rank)
            if not math.isnan(each.effective_rank):
                stable, effective = each.stable_rank, each.effective_rank
            rows.append(
                MeasuredModule(
                    each.module,
                    each.stack,
                    each.layer,
                    each.role,
                    each.rank,
                    # A dense update has no scale.
                    scale=float(getattr(updates.get(each.module), "scale", np.nan)),
                    parameters=count(each),
                    update_norm=each.update_norm,
                    relative_update=each.relative_update,
                    # Zero updates have no energy to divide by.
                    energy=square / (total or 1.0),
                    stable_rank=stable,
                    effective_rank=effective,
                    energy_rank=needed,
                    dead=unused,
                    exact=each.exact,
                    **changes.get(each.module, BaseChange())._asdict(),
                )
            )
        return rows

    def _parameter_counts(self) -> Callable[[ModuleSummary], int]:
        """Return a function that counts the values of a module which an adapter stores or a run trains.

        Counts that are not stored follow from the rank.
        """
        if self.parts:
            return lambda each: self.parts[each.module].size
        shapes = {each.module: (each.out_features or 0, each.in_features or 0) for each in self.meta.modules}
        updates, held, constants = self.run.updates(), self.run.factors(), constant_factors()
        varied = not constants.isdisjoint(next(iter(held.values()), ()))

        def count(each: ModuleSummary) -> int:
            if varied and each.module in held:
                factors = held[each.module]
                return sum(int(factors[name].size) for name in factors.keys() - constants)
            # The second name of a tied weight has no row.
            outer, inner = shapes[each.module] if each.module in shapes else updates[each.module].shape
            return outer * inner if each.rank is None else each.rank * (outer + inner)

        return count

    def _singular_values(self, modules: Iterable[str]) -> Mapping[str, np.ndarray]:
        """Return spectra of the factored updates, and of the dense ones recorded at the last step."""
        thin = all(part.has_thin_factors for part in self.parts.values())
        found = dict(self.run.spectra) if self.spectra or thin else {}
        last = self.meta.states["last"].step
        for module in modules:
            name = f"{module}/singular_values"
            if module not in found and last in self.run.snapshot_steps(name):
                found[module] = self.run.snapshot(name, last)["value"].to_numpy()
        return found


def component_evidence(update: Any) -> tuple[float, float, bool]:
    """Return the scale of an update, its number of nonzero components, and whether all its factors are zero.

    These are NaN, NaN and False unless the update, or that of its direction, is a product B A.
    """
    product = update.direction if isinstance(update, WeightDecomposed) else update and update.low_rank
    if product is None:
        return np.nan, np.nan, False
    return float(product.scale), float(count_used(product)), not (product.A.any() or product.B.any())


def _measure_spectrum(sigma: np.ndarray | None, rank: int | None) -> tuple[float, float, float, float]:
    """Return stable, effective and energy rank, and the number of unused components within a rank."""
    if sigma is None:
        return np.nan, np.nan, np.nan, np.nan
    used = np.count_nonzero(sigma > UNUSED * np.max(sigma, initial=0.0))
    unused = max(float(rank - used), 0.0) if rank is not None and np.isfinite(sigma).all() else np.nan
    return stable_rank(sigma), effective_rank(sigma), energy_rank(sigma, SHARE), unused
