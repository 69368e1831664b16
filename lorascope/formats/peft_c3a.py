"""Reader of PEFT C3A folders.

Each module has ``c3a_kernel`` (out / b, in / b, b), the kernels of circulant blocks: entry [p, q] of a block is
kernel[(q - p) mod b] / in.

Source: Chen et al. (arXiv 2407.19342), equation 4, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorascope.files.safetensors_io import TensorFile
from lorascope.formats.peft_factors import StoredFactors, check_shapes, peft_factors
from lorascope.formats.peft_lora import peft_kind
from lorascope.formats.pretrained_weights import PretrainedWeights
from lorascope.formats.readers import reads
from lorascope.formats.stored_update import AdapterFiles
from lorascope.updates import Dense
from lorascope.updates.linalg import as_float64


@reads(lambda config, names: peft_kind(config) == "C3A", "C3A (PEFT)")
def read_c3a(
    path: Path, config: Mapping[str, Any], files: tuple[TensorFile, ...], base: PretrainedWeights | None
) -> AdapterFiles:
    """Read the modules of an opened C3A folder."""
    found, others = peft_factors(path, files, "c3a_kernel")
    parts = {}
    for module, factors in found.items():
        sizes = check_shapes(path, module, factors, {"c3a_kernel": "rows columns b"})
        sides = sizes["rows"] * sizes["b"], sizes["columns"] * sizes["b"]
        parts[module] = StoredFactors(factors, sides, min(sides), _circulant, thin=False)
    return AdapterFiles(path, dict(config), parts, others, files, "C3A")


def _circulant(arrays: dict[str, np.ndarray]) -> Dense:
    kernel = as_float64(arrays["c3a_kernel"])
    rows, columns, size = kernel.shape
    places = (np.arange(size) - np.arange(size)[:, None]) % size
    blocks = kernel[:, :, places].swapaxes(1, 2)
    return Dense(blocks.reshape(rows * size, columns * size) / (columns * size))
