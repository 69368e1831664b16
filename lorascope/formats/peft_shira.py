"""Reader of PEFT SHiRA folders.

Each module has ``shira_weight`` (n,), the changes of n entries of its weight, and ``shira_indices`` (2, n), their rows
and columns. Without the indices, ``random_seed`` draws them: sorted, the first n values of ``torch.randperm``. Shapes
are stored nowhere and read from the base model.

Source: Bhardwaj et al. (arXiv 2406.13175), as in PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from lorascope.files.printable import printable
from lorascope.files.safetensors_io import TensorFile
from lorascope.files.typed_json import to_typed, unreadable
from lorascope.formats.peft_factors import StoredFactors, check_indices, check_shapes, peft_factors
from lorascope.formats.peft_lora import CONFIG, peft_kind
from lorascope.formats.pretrained_weights import PretrainedWeights, base_with_shapes, named_base
from lorascope.formats.readers import reads
from lorascope.formats.stored_update import AdapterFiles
from lorascope.updates import Dense
from lorascope.updates.fourier import SEEDS, entries
from lorascope.updates.linalg import as_float64


class ShiraConfig(msgspec.Struct, frozen=True):
    """Settings used from ``adapter_config.json``, with PEFT's defaults."""

    random_seed: int | None = None


@reads(lambda config, names: peft_kind(config) == "SHIRA", "SHiRA (PEFT)", needs="base")
def read_shira(
    path: Path, config: Mapping[str, Any], files: tuple[TensorFile, ...], base: PretrainedWeights | None
) -> AdapterFiles:
    """Read the modules of an opened SHiRA folder."""
    settings = to_typed(config, ShiraConfig, path / CONFIG)
    found, others = peft_factors(path, files, "shira_weight", "shira_indices")
    weights = base_with_shapes(path, config, base, "SHiRA")
    parts = {}
    for module, factors in found.items():
        drawn = "shira_indices" not in factors and settings.random_seed is not None
        shapes = {"shira_weight": "n"} | ({} if drawn else {"shira_indices": "2 n"})
        n, sides = check_shapes(path, module, factors, shapes)["n"], weights.shape(module)
        if n > sides[0] * sides[1]:
            must = f"shira_weight of {printable(module)} must have <= {sides[0] * sides[1]} values (its base)"
            raise unreadable(path, f"{must}, got {n}")
        if not drawn:
            check_indices(path, module, factors, "shira_indices", *sides)
        build = partial(_scatter, sides, (settings.random_seed or 0) % SEEDS)
        parts[module] = StoredFactors(factors, sides, min(n, *sides), build, thin=False)
    return AdapterFiles(path, dict(config), parts, others, files, "SHiRA", named_base(config) is None)


def _scatter(sides: tuple[int, int], seed: int, arrays: dict[str, np.ndarray]) -> Dense:
    values = as_float64(arrays["shira_weight"])
    if "shira_indices" in arrays:
        rows, columns = arrays["shira_indices"].astype(np.int64)
    else:
        rows, columns = entries(sides, len(values), seed)
        rows, columns = np.divmod(np.sort(rows * sides[1] + columns), sides[1])
    matrix = np.zeros(sides)
    np.add.at(matrix, (rows, columns), values)
    return Dense(matrix)
