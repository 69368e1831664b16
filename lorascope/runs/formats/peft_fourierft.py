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

import numpy as np
from jaxtyping import Int

from lorascope.files.printable import printable
from lorascope.files.safetensors_io import TensorFile
from lorascope.files.typed_json import Finite, Positive, to_typed
from lorascope.runs.formats.peft_lora import CONFIG, group_factors, peft_kind
from lorascope.runs.formats.pretrained_weights import PretrainedWeights, named_base
from lorascope.runs.formats.registry import reads
from lorascope.runs.formats.stored_update import AdapterFiles, StoredTensor, StoredUpdate
from lorascope.schema.name_patterns import Patterns
from lorascope.updates.fourier import SEEDS, Fourier, entries

# The adapter name may follow if a state dict was saved by hand.
_FACTOR = re.compile(r"(?s)(?P<module>.+)\.(?P<factor>fourierft_spectrum)(?:\.[^.]+)?")


@dataclass(frozen=True)
class FourierConfig:
    """Settings used from ``adapter_config.json``, with PEFT's defaults."""

    n_frequency: Positive = 1000
    n_frequency_pattern: dict[str, Positive] | None = None
    scaling: Finite = 150.0
    random_loc_seed: int = 777
    fan_in_fan_out: bool | None = None


@dataclass(frozen=True)
class FourierPart(StoredUpdate):
    """Update of one module, given by its coefficients.

    Parameters
    ----------
    coefficients : StoredTensor
    sides : (int, int)
        (out, in).
    scale : float
    transposed : bool
        Whether the base stores its weight as (in, out).
    seed : int
        Seed of the spectral entries.
    """

    coefficients: StoredTensor
    sides: tuple[int, int]
    scale: float
    transposed: bool
    seed: int

    @property
    def has_thin_factors(self) -> bool:
        """Return False: norms follow from Parseval's identity, but singular values require the whole matrix."""
        return False

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.sides

    @cached_property
    def entries(self) -> Int[np.ndarray, "2 n"]:
        """Spectral entries that PEFT draws."""
        return entries(self.shape, self.size, self.seed)

    @property
    def rank(self) -> int:
        """Largest rank of an update with these entries."""
        return Fourier(np.ones(self.size), self.entries, self.shape).rank

    @property
    def size(self) -> int:
        """Number of coefficients."""
        return self.coefficients.shape[0]

    @property
    def dtype(self) -> str:
        """Stored dtype, such as ``"BF16"``."""
        return self.coefficients.file.dtype(self.coefficients.name)

    def factors(self) -> dict[str, Any]:
        """Load the coefficients, and add entries and shape as in a run."""
        values = self.coefficients.read().reshape(-1)
        return {"coefficients": values, "entries": self.entries, "shape": np.array(self.shape)}

    def update(self) -> Fourier:
        """Load the coefficients, and return the update."""
        return Fourier(self.coefficients.read().reshape(-1), self.entries, self.shape, self.scale)


@reads(lambda config, names: peft_kind(config) == "FOURIERFT")
def read_fourier(
    path: Path, config: Mapping[str, Any], files: tuple[TensorFile, ...], base: PretrainedWeights | None
) -> AdapterFiles:
    """Read the modules of an opened FourierFT folder.

    Raises
    ------
    ValueError
        The shapes of the base are unknown, or configuration and weights disagree.
    """
    found, others = group_factors(files, _FACTOR)
    if not found:
        first = others[0] if others else "no tensor"
        raise ValueError(
            f"cannot read {printable(path)}: FOURIERFT weights must include fourierft_spectrum, got {printable(first)}"
        )
    shapes = base or named_base(config)
    if shapes is None:
        name = config.get("base_model_name_or_path") or "unnamed"
        raise ValueError(
            f"cannot read {printable(path)}: FourierFT stores no shapes, pass the folder of its base {printable(name)}"
        )
    settings = to_typed(config, FourierConfig, path / CONFIG)
    keys = Patterns(settings.n_frequency_pattern or {}, f"n_frequency_pattern of {path / CONFIG}")
    seed = entry_seed(config)
    parts = {
        module: _fourier_part(path, module, factors["fourierft_spectrum"], settings, keys.first(module), seed, shapes)
        for module, factors in found.items()
    }
    return AdapterFiles(path, dict(config), parts, others, files, "FourierFT", named_base(config) is None)


def entry_seed(config: Mapping[str, Any]) -> int:
    """Return the seed of the spectral entries, modulo 2^32 as in torch's CPU generator."""
    return to_typed(config, FourierConfig, CONFIG).random_loc_seed % SEEDS


def _fourier_part(
    path: Path,
    module: str,
    stored: StoredTensor,
    config: FourierConfig,
    key: str | None,
    seed: int,
    base: PretrainedWeights,
) -> FourierPart:
    n = config.n_frequency if key is None else (config.n_frequency_pattern or {})[key]
    where = f"cannot read {printable(path)}:"
    if stored.shape != (n, 1):
        raise ValueError(f"{where} {printable(module)} must have {n} coefficients ({CONFIG}), got {stored.shape[0]}")
    transposed = bool(config.fan_in_fan_out)
    shape = base.shape(module, transposed)
    if n > shape[0] * shape[1]:
        raise ValueError(
            f"{where} {printable(module)} must have <= {shape[0]} x {shape[1]} coefficients (its base), got {n}"
        )
    return FourierPart(stored, shape, config.scaling, transposed, seed)
