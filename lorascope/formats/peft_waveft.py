"""Reader of PEFT WaveFT folders.

Each module has ``waveft_spectrum`` (n,), the wavelet coefficients at n random places, drawn by ``random_loc_seed`` as
the entries of FourierFT. The update is ``scaling`` times their inverse Haar transform of one level (``wavelet_family``
db1), or the sparse matrix itself without ``use_idwt``. PEFT merges other wavelets. Shapes are stored nowhere and read
from the base model.

Source: Bilican et al. (arXiv 2505.12532), as in PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from lorascope.array_types import Float
from lorascope.files.printable import printable
from lorascope.files.safetensors_io import TensorFile
from lorascope.files.typed_json import Finite, Positive, to_typed, unreadable
from lorascope.formats.peft_factors import StoredFactors, check_shapes, peft_factors
from lorascope.formats.peft_lora import CONFIG, peft_kind
from lorascope.formats.peft_merge import read_merged
from lorascope.formats.pretrained_weights import PretrainedWeights, base_with_shapes, named_base
from lorascope.formats.readers import reads
from lorascope.formats.stored_update import AdapterFiles
from lorascope.schema.name_patterns import per_module
from lorascope.updates import Dense
from lorascope.updates.fourier import SEEDS, entries
from lorascope.updates.linalg import as_float64


class WaveFTConfig(msgspec.Struct, frozen=True):
    """Settings used from ``adapter_config.json``, with PEFT's defaults."""

    n_frequency: Positive = 2592
    n_frequency_pattern: dict[str, Positive] | None = None
    proportional_parameters: bool = False
    scaling: Finite = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: int = 777
    fan_in_fan_out: bool | None = None


@reads(lambda config, names: peft_kind(config) == "WAVEFT", "WaveFT (PEFT)", needs="base")
def read_waveft(
    path: Path, config: Mapping[str, Any], files: tuple[TensorFile, ...], base: PretrainedWeights | None
) -> AdapterFiles:
    """Read the modules of an opened WaveFT folder."""
    settings = to_typed(config, WaveFTConfig, path / CONFIG)
    found, others = peft_factors(path, files, "waveft_spectrum")
    if settings.use_idwt and settings.wavelet_family != "db1":
        return read_merged(path, config, files, base)
    weights, transposed = base_with_shapes(path, config, base, "WaveFT"), bool(settings.fan_in_fan_out)
    count_of = per_module(path / CONFIG, "n_frequency_pattern", settings.n_frequency, settings.n_frequency_pattern)
    parts = {}
    for module, factors in found.items():
        # With proportional_parameters, PEFT divides the number among the modules by their sizes.
        known = {} if settings.proportional_parameters else {"n": count_of(module)}
        n = check_shapes(path, module, factors, {"waveft_spectrum": "n"}, **known)["n"]
        outer, inner = sides = weights.shape(module, transposed)
        if not 1 <= n <= outer * inner:
            must = f"{printable(module)} must have 1 to {outer} x {inner} coefficients (its base)"
            raise unreadable(path, f"{must}, got {n}")
        build = partial(_synthesize, settings, sides)
        parts[module] = StoredFactors(
            factors, sides, min(sides), build, settings.scaling, transposed=transposed, thin=False
        )
    return AdapterFiles(path, dict(config), parts, others, files, "WaveFT", named_base(config) is None)


def _synthesize(settings: WaveFTConfig, sides: tuple[int, int], arrays: dict[str, np.ndarray]) -> Dense:
    values = as_float64(arrays["waveft_spectrum"])
    rows, columns = entries(sides, len(values), settings.random_loc_seed % SEEDS)
    even = tuple(side + side % 2 for side in sides)
    matrix = np.zeros(even if settings.use_idwt else sides)
    matrix[rows, columns] = settings.scaling * values
    return Dense(inverse_haar(matrix)[: sides[0], : sides[1]] if settings.use_idwt else matrix)


def inverse_haar(quarters: Float[np.ndarray, "rows columns"]) -> Float[np.ndarray, "rows columns"]:
    """Invert one level of the two-dimensional Haar transform.

    The quarters of the argument contain the averages (upper left), and the differences between columns (upper right),
    between rows (lower left) and of both (lower right), as PEFT arranges them.
    """
    (top, bottom) = np.split(quarters, 2)
    (average, upper), (lower, both) = np.split(top, 2, axis=1), np.split(bottom, 2, axis=1)
    matrix = np.empty_like(quarters)
    matrix[0::2, 0::2] = (average + upper + lower + both) / 2
    matrix[0::2, 1::2] = (average + upper - lower - both) / 2
    matrix[1::2, 0::2] = (average - upper + lower - both) / 2
    matrix[1::2, 1::2] = (average - upper - lower + both) / 2
    return matrix
