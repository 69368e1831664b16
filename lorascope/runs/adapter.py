"""Adapter that was trained elsewhere, read from its files."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from functools import cached_property

import numpy as np

from lorascope.files.hub import label, model_name
from lorascope.files.lazy_pandas import pandas as pd
from lorascope.files.printable import printable
from lorascope.formats.pretrained_weights import PretrainedWeights
from lorascope.formats.stored_update import AdapterFiles
from lorascope.runs.finding_lines import Lines
from lorascope.runs.layout import Lazy
from lorascope.runs.manifest import Manifest, Module, Parameters, State
from lorascope.runs.module_summary import ModuleSummary, table_of
from lorascope.runs.result import Result
from lorascope.schema import records
from lorascope.schema.module_roles import parse
from lorascope.schema.records import Record
from lorascope.updates import Dense, Update, effective_rank, spectra, stable_rank


class Adapter(Result):
    """Adapter that was trained elsewhere: its factors, without a training history.

    Other tools load its weights, such as ``PeftModel.from_pretrained(model, path)``.

    Parameters
    ----------
    files : AdapterFiles
        The opened folder; ``meta.source`` is its path. Factors are loaded on access, one layer at a time.
    base : PretrainedWeights, optional
        Weights of the base model.
    """

    kind = "adapter"
    has_history = False

    def __init__(self, files: AdapterFiles, base: PretrainedWeights | None = None) -> None:
        self.files, self.base = files, base
        config, stored = files.config, files.parts
        # Trained tensors that all modules share, such as the vector bank of VB-LoRA, count once.
        size = sum(update.size for update in stored.values()) + files.shared_size
        meta = Manifest(
            id="",  # the property reads all files, so that it is computed on access
            label=label(files.path),
            method=config | {"name": files.kind.lower()},
            recipe={"source": str(files.path.resolve())},
            model=model_name(config.get("base_model_name_or_path") or "unknown"),
            task=None,
            seed=None,
            status="not trained here",
            settings={},
            parameters=Parameters(size),
            modules=[Module(module, *parse(module), *update.shape) for module, update in stored.items()],
            states={"last": State(None, {module: update.rank for module, update in stored.items()})},
            source=str(files.path),
        )
        super().__init__(files.path, meta)

    @cached_property
    def id(self) -> str:
        """First twelve hex digits of the SHA-256 of configuration and weights."""
        digest = hashlib.sha256(json.dumps(self.files.config, sort_keys=True).encode())
        for file in self.files.files:
            with file.path.open("rb") as stream:
                hashlib.file_digest(stream, lambda: digest)
        return digest.hexdigest()[:12]

    @property
    def reference(self) -> str:
        """Kind and name of the adapter for error messages, such as ``"adapter my-adapter"``."""
        return f"adapter {printable(self.label)}"

    @cached_property
    def table(self) -> pd.DataFrame:
        """Norms and ranks of every module, with step NA; NaN if they require base weights or slow spectra."""
        rows = []
        for module, rank in self.ranks().items():
            values = {"rank": float(rank)} | self.measures[module]
            for quantity, value in values.items():
                rows.append((-1, Record(quantity, value, module)))  # step -1 becomes NA
        return records.frame(self.id, rows, self.modules)

    @cached_property
    def measures(self) -> dict[str, dict[str, float]]:
        """Norms and ranks by module; NaN if they require base weights or slow spectra."""
        return {module: self._measure_module(module) for module in self.files.parts}

    @cached_property
    def spectra(self) -> dict[str, np.ndarray]:
        """See `Result.spectra`; factors are read in tiles that stay in the cache."""
        stored = self.files.parts
        return dict(zip(stored, spectra(update.unread() for update in stored.values()), strict=True))

    def _measure_module(self, module: str) -> dict[str, float]:
        stored = self.files.parts[module]
        if stored.has_thin_factors:
            sigma = self.spectra[module]
            norm, stable, effective = math.hypot(*sigma.tolist()), stable_rank(sigma), effective_rank(sigma)
        else:
            # The ranks of a dense update would require a full SVD, which is slow.
            norm, stable, effective = stored.update().norm(), np.nan, np.nan
        values = {"update_norm": norm, "stable_rank": stable, "effective_rank": effective}
        if self.base is None or not self.base.has_weight(module):
            return values | {"weight_norm": np.nan, "relative_update": np.nan}
        W0 = self.base.weight(module, stored.shape, stored.transposed)
        base_norm = Dense(W0).norm()
        relative = np.inf
        if base_norm:
            relative = norm / base_norm
        # The norm of W₀ + ΔW without forming it; rounding may make the square negative.
        weight = max(base_norm**2 + 2.0 * stored.update().inner_weight(W0) + norm**2, 0.0) ** 0.5
        return values | {"weight_norm": weight, "relative_update": relative}

    def factors(self, step: int | None = None, state: str = "last") -> Mapping[str, dict[str, np.ndarray]]:
        """Return ``{"A": (rank, in), "B": (out, rank)}`` per module, loaded on access; see `Result.factors`."""
        self._require_last_state(step, state)
        stored = self.files.parts
        return Lazy(list(stored), lambda module: stored[module].factors())

    def updates(self, step: int | None = None, state: str = "last") -> Mapping[str, Update]:
        self._require_last_state(step, state)
        return Lazy(list(self.files.parts), lambda module: self.files.parts[module].update())

    def input_dependent_modules(self, state: str = "last") -> set[str]:
        """Return the modules whose update depends on the input, from the file headers."""
        self._require_last_state(None, state)
        return {module for module, update in self.files.parts.items() if not update.exact}

    def ranks(self, state: str = "last") -> dict[str, int]:
        self._require_last_state(None, state)
        return dict(self.meta.states["last"].ranks)

    def summary(self, all: bool = False, state: str = "last") -> pd.DataFrame:
        """Return one row per adapted module: position, rank, norms, stable and effective rank."""
        self._require_last_state(None, state)
        return table_of(ModuleSummary, self.summaries())

    def summaries(self) -> list[ModuleSummary]:
        summaries = []
        for module in self.meta.modules:
            name, update = module.module, self.files.parts[module.module]
            summary = ModuleSummary(
                name, module.stack, module.layer, module.role, update.rank, exact=update.exact, **self.measures[name]
            )
            summaries.append(summary)
        return summaries

    def _require_last_state(self, step: int | None, state: str) -> None:
        if step is not None or state != "last":
            requested = f"state {state!r}"
            if step is not None:
                requested = f"step {step}"
            raise ValueError(f"cannot read {requested} of adapter {self.label!r}: it has only the state 'last'")

    def _lines(self) -> Lines:
        smallest, largest = min(self.ranks().values()), max(self.ranks().values())
        ranks = f"rank {largest}"
        if smallest < largest:
            ranks = f"ranks {smallest} to {largest}"
        return [
            ("adapter", f"{self.label}  {self.files.kind}, {ranks}"),
            ("base", self.meta.model),
            ("size", f"{len(self.files.parts)} modules, {self.meta.parameters.trained:,} parameters"),
            ("folder", str(self.path)),
            *self._finding_lines(),
        ]

    def _missing(self, recorded: set[str]) -> list[str]:
        missing = ["the training history"]
        if self.base is None:
            missing.append("the base weights")
        return missing
