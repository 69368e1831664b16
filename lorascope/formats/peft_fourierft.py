"""Reader of PEFT FourierFT folders.

They store the coefficients of each module, ``<module>.fourierft_spectrum`` (n,), and the seed of the spectral entries,
``random_loc_seed``, but no shapes, which determine the entries and norms. Shapes are read from the headers of the base
model's files: those in the given folder, else in the folder that the configuration names, if it exists.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from lorascope.array_types import Int
from lorascope.files.printable import printable
from lorascope.files.typed_json import Finite, Positive, to_typed
from lorascope.formats.adapter_faults import AdapterFault
from lorascope.formats.peft_config import CONFIG, peft_kind
from lorascope.formats.peft_factors import group_factors, no_factors
from lorascope.formats.pretrained_weights import OptionalBase, named_base, require_base
from lorascope.formats.readers import Config, WeightFiles, reads
from lorascope.formats.stored_update import AdapterFiles, StoredTensor, StoredUpdate
from lorascope.schema.name_patterns import per_module
from lorascope.updates.fourier import SEEDS, Fourier, entries

# The adapter name may follow if a state dict was saved by hand.
_FACTOR = re.compile(r"(?s)(?P<module>.+)\.(?P<factor>fourierft_spectrum)(?:\.[^.]+)?")


class FourierConfig(msgspec.Struct, frozen=True):
    """Settings used from PEFT's FourierFT configuration, with its defaults."""

    n_frequency: Positive = 1000
    n_frequency_pattern: dict[str, Positive] | None = None
    scaling: Finite = 150.0
    random_loc_seed: int = 777
    fan_in_fan_out: bool | None = None


@dataclass(frozen=True)
class FourierPart(StoredUpdate):
    """Stored update of PEFT's FourierFT: coefficients and the seed of their entries; ``sides`` is (out, in)."""

    coefficients: StoredTensor
    sides: tuple[int, int]
    scale: float
    transposed: bool
    seed: int

    has_thin_factors = False  # norms follow from Parseval's identity, but singular values require the whole matrix

    @property
    def shape(self) -> tuple[int, int]:
        return self.sides

    @cached_property
    def entries(self) -> Int[np.ndarray, "2 n"]:
        """Spectral entries that PEFT draws."""
        return entries(self.shape, self.size, self.seed)

    @property
    def rank(self) -> int:
        """Largest rank of an update with these entries."""
        # Any nonzero coefficients, because the rank follows from the entries.
        return Fourier(np.ones(self.size), self.entries, self.shape).rank

    def factors(self) -> dict[str, Any]:
        """Load the coefficients, and add entries and shape as in a run."""
        values = self.coefficients.read().reshape(-1)
        return {"coefficients": values, "entries": self.entries, "shape": np.array(self.shape)}


@reads(lambda config, names: peft_kind(config) == "FOURIERFT", "FourierFT (PEFT)", needs="base")
def read_fourier(path: Path, config: Config, files: WeightFiles, base: OptionalBase) -> AdapterFiles:
    """Read the modules of a PEFT FourierFT folder."""
    module_factors, other_names = group_factors(files, _FACTOR)
    if not module_factors:
        raise no_factors(path, "FOURIERFT weights must include fourierft_spectrum", other_names)
    shapes = require_base(path, config, base, "FourierFT stores no shapes")
    settings = to_typed(config, FourierConfig, path / CONFIG)
    count_of = per_module(path / CONFIG, "n_frequency_pattern", settings.n_frequency, settings.n_frequency_pattern)
    seed, transposed, updates = entry_seed(config), bool(settings.fan_in_fan_out), {}
    for module, factors in module_factors.items():
        stored, n, name = factors["fourierft_spectrum"], count_of(module), printable(module)
        if stored.shape != (n, 1):
            raise AdapterFault("rank", path, f"{name} must have {n} coefficients ({CONFIG}), got {stored.shape[0]}")
        outer, inner = sides = shapes.shape(module, transposed)
        if n > outer * inner:
            reason = f"{name} must have <= {outer} x {inner} coefficients (its base), got {n}"
            raise AdapterFault("misfit", path, reason)
        updates[module] = FourierPart(stored, sides, settings.scaling, transposed, seed)
    return AdapterFiles(path, dict(config), updates, other_names, files, "FourierFT", named_base(config) is None)


def entry_seed(config: Mapping[str, Any]) -> int:
    """Return the seed of a PEFT FourierFT adapter's spectral entries, modulo 2^32 as in torch's CPU generator."""
    return to_typed(config, FourierConfig, CONFIG).random_loc_seed % SEEDS
