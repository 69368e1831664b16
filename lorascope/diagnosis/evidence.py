"""Evidence about an adapter or a run for the rules: tables of its modules, computed on access.

The folder of an adapter contains its factors; with its base model, the weights are known as well. A run also has a
training history.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from lorascope.diagnosis.base_comparison import BASE_COLUMNS, compare_with_base
from lorascope.runs.adapter import Adapter
from lorascope.runs.formats.pretrained_weights import PretrainedWeights
from lorascope.runs.formats.stored_update import AdapterFiles, StoredUpdate
from lorascope.runs.manifest import Manifest
from lorascope.runs.result import Result
from lorascope.updates import constant_factors, effective_rank, energy_rank, stable_rank

SHARE = 0.9  # fraction of the energy that ``energy_rank`` counts
_UNUSED = 1e-6  # fraction of the largest singular value, below which the two ways to compute them differ
_TRAINED = "module stack layer role rank scale update_norm moved weight_norm relative_update effective_rank used"
_MEASURED = (
    "module stack layer role rank scale parameters update_norm relative_update energy stable_rank effective_rank"
)


@dataclass
class Case:
    """Evidence about one adapter or run; more is known about an adapter that was loaded with its base.

    ``spectra`` also runs full SVDs (slow): singular values of FourierFT and of DoRA with its base, and intruder
    dimensions in weights of any size.
    """

    run: Result
    spectra: bool = False

    def has(self, need: str) -> bool:
        """Return whether there is evidence of this kind; see ``Rule.needs``."""
        if need == "weights":
            return bool(self.modules["weight_norm"].notna().any())
        history = self.run.has_history
        base = history or self.base is not None
        return {"config": isinstance(self.run, Adapter), "base": base, "history": history}.get(need, True)

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
    def masks_components(self) -> bool:
        """Whether an allocator masks components and does not delete them, as AdaLoRA's."""
        return bool(self.run.fact("masks_components"))

    @cached_property
    def losses(self) -> pd.Series:
        """Training loss by step of a run."""
        if "records.parquet" not in self.meta.checksums:
            return pd.Series(dtype="float64")
        rows = self.run.table[self.run.table["quantity"] == "loss"].sort_values("step")
        return pd.Series(rows["value"].to_numpy(), index=rows["step"].to_numpy(dtype="int64"))

    @cached_property
    def tied(self) -> list[tuple[str, str]]:
        """Pairs of adapted modules that are one weight of the base."""
        if not self.meta.states:
            return []
        modules = self.run.modules
        if self.parts:
            # safetensors stores a shared weight once: a head that is missing in the base is tied to the embedding.
            ends = {role: modules["module"][modules["role"] == role] for role in ("embed", "head")}
            lacking = [name for name in ends["head"] if self.base is not None and not self.base.has_weight(name)]
            return [(one, other) for one in ends["embed"] for other in lacking]
        adapted = {name for name, rank in self.run.ranks().items() if rank}
        pairs = zip(modules["module"], modules["tied"], strict=True)
        return [(one, other) for one, tied in pairs for other in tied.split(",") if {one, other} <= adapted]

    @cached_property
    def _summary(self) -> pd.DataFrame:
        return self.run.summary(all=True)

    @cached_property
    def modules(self) -> pd.DataFrame:
        """Table of the modules that train or have an adapter.

        Columns are ``module, stack, layer, role, rank, adapted, scale, update_norm, moved, weight_norm,
        relative_update, effective_rank, used, empty``. ``moved`` is the norm of the learned update, ``used`` the number
        of nonzero components, and ``empty`` whether all factors are zero.
        """
        if not self.meta.states:
            return pd.DataFrame(columns=_TRAINED.split(), dtype="float64").assign(adapted=False, empty=False)
        table, frame = self.run.table, self._summary
        recorded = table["module"][table["quantity"] == "update_norm"]
        frame = frame[frame["rank"].notna() | frame["module"].isin(recorded)].reset_index(drop=True)
        frame["adapted"] = (frame["rank"] > 0).fillna(False).astype(bool)
        # A pruned module has not moved, even if it was recorded before PEFT's allocator masked it.
        pruned = frame["rank"].eq(0).fillna(False)
        frame["moved"] = frame["learned_norm"].fillna(frame["update_norm"]).mask(pruned, 0.0)
        updates = self.run.updates()
        parts = [_component_evidence(updates.get(name)) for name in frame["module"]]
        frame[["scale", "used", "empty"]] = pd.DataFrame(parts, columns=["scale", "used", "empty"], index=frame.index)
        return frame

    @property
    def adapted(self) -> pd.DataFrame:
        """Modules with an adapter of rank 1 or more."""
        return self.modules[self.modules["adapted"]]

    @property
    def unchanged_adapters(self) -> pd.DataFrame:
        """Adapters with a zero update, although their scale and one of their factors are not zero."""
        adapted = self.adapted
        return adapted[(adapted["update_norm"] == 0) & (adapted["scale"] != 0) & ~adapted["empty"]]

    @cached_property
    def measured(self) -> pd.DataFrame:
        """Table of the modules with an update, ``Inspection.modules``.

        Raises
        ------
        ValueError
            The run has no update: it is unfinished, or no update was recorded.
        """
        frame = self._summary
        frame = frame[frame["update_norm"].notna() | bool(self.parts)].reset_index(drop=True)
        if frame.empty:
            raise ValueError(
                f"cannot inspect run {self.run.id}: no update was recorded. Train with observe=[ls.observe.norms()]"
            )
        found = self._singular_values(frame["module"])
        ranks = frame["rank"].to_numpy("float64", na_value=np.nan)
        rows = [_measure_spectrum(found.get(name), rank) for name, rank in zip(frame["module"], ranks, strict=True)]
        columns = ["stable_rank", "effective_rank", "energy_rank", "dead"]
        spectra, missing = pd.DataFrame(rows, columns=columns), frame["effective_rank"].isna()
        for name in columns[:2]:
            frame[name] = frame[name].fillna(spectra[name].where(missing))
        frame[columns[2:]] = spectra[columns[2:]]
        squares = frame["update_norm"] ** 2
        # Zero updates have no energy to divide by.
        frame["energy"] = squares / squares.sum() if squares.sum() > 0 else squares
        frame["parameters"] = self._parameters(frame)
        updates: Mapping[str, Any] = self.parts or self.run.updates()
        # A dense update has no scale.
        frame["scale"] = [float(getattr(updates.get(name), "scale", np.nan)) for name in frame["module"]]
        frame = frame.join(compare_with_base(self.parts, self.base, self.spectra), on="module")
        return frame[[*_MEASURED.split(), "energy_rank", "dead", "exact", *BASE_COLUMNS]]

    def _parameters(self, frame: pd.DataFrame) -> pd.Series:
        """Count the values per module that an adapter stores or a run trains, from the rank if not stored."""
        if self.parts:
            return frame["module"].map({module: part.size for module, part in self.parts.items()})
        shapes = self.run.modules.set_index("module")[["out_features", "in_features"]].T.to_dict("list")
        # The second name of a tied weight has no row.
        sides = [shapes[name] if name in shapes else self.run.updates()[name].shape for name in frame["module"]]
        outer, inner = np.array(sides, dtype=np.int64).T
        counted = (frame["rank"] * (outer + inner)).astype("Float64").fillna(pd.Series(outer * inner)).astype("int64")
        held, constants = self.run.factors(), constant_factors()
        if constants.isdisjoint(next(iter(held.values()), ())):
            return counted
        sizes = {module: sum(parts[name].size for name in parts.keys() - constants) for module, parts in held.items()}
        return frame["module"].map(sizes).fillna(counted).astype("int64")

    def _singular_values(self, modules: pd.Series) -> Mapping[str, np.ndarray]:
        """Return spectra of the factored updates, and of the dense ones recorded at the last step."""
        thin = all(part.has_thin_factors for part in self.parts.values())
        found = dict(self.run.spectra) if self.spectra or thin else {}
        last = self.meta.states["last"].step
        for module in modules:
            name = f"{module}/singular_values"
            if module not in found and last in self.run.snapshot_steps(name):
                found[module] = self.run.snapshot(name, last)["value"].to_numpy()
        return found


def _component_evidence(update: Any) -> tuple[float, float, bool]:
    """Return the scale of an update, its number of nonzero components, and whether all its factors are zero.

    These are NaN, NaN and False unless the update is a product B A.
    """
    if update is None or (product := update.low_rank) is None:
        return np.nan, np.nan, False
    used = product.A.any(axis=1) & product.B.any(axis=0)
    return float(product.scale), float(np.count_nonzero(used)), not (product.A.any() or product.B.any())


def _measure_spectrum(sigma: np.ndarray | None, rank: float) -> tuple[float, float, float, float]:
    """Return stable, effective and energy rank, and the number of unused components within a rank."""
    if sigma is None:
        return np.nan, np.nan, np.nan, np.nan
    used = np.count_nonzero(sigma > _UNUSED * np.max(sigma, initial=0.0))
    unused = max(rank - used, 0.0) if np.isfinite(sigma).all() else np.nan
    return stable_rank(sigma), effective_rank(sigma), energy_rank(sigma, SHARE), unused
