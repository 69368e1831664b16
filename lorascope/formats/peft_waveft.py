"""Reader of PEFT WaveFT folders.

Each module has ``waveft_spectrum`` (n,), the wavelet coefficients at n random places, drawn by ``random_loc_seed`` as
the entries of FourierFT. The update is ``scaling`` times their inverse Haar transform of one level (``wavelet_family``
db1), or the sparse matrix itself without ``use_idwt``. PEFT merges other wavelets. Shapes are stored nowhere and read
from the base model.

Source: Bilican et al. (arXiv 2505.12532), as in PEFT.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from lorascope.array_types import Float
from lorascope.files.printable import printable
from lorascope.files.safetensors_io import TensorFile
from lorascope.files.typed_json import Finite, Positive
from lorascope.formats.peft_format import Arrays, PeftFormat, PeftModule
from lorascope.updates import Dense
from lorascope.updates.fourier import SEEDS, entries


class WaveFT(PeftFormat, frozen=True):
    """PEFT's WaveFT: sparse coefficients in a basis of wavelets."""

    kind, needs = "WaveFT", "shapes"
    tensors = {"waveft_spectrum": "n_frequency"}
    n_frequency: Positive = 2592
    n_frequency_pattern: dict[str, Positive] | None = None
    proportional_parameters: bool = False
    scaling: Finite = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: int = 777
    fan_in_fan_out: bool | None = None

    @property
    def scale(self) -> float:
        return self.scaling

    def requires_peft(self, files: Iterable[TensorFile]) -> bool:
        return self.use_idwt and self.wavelet_family != "db1"

    def required(self, module: PeftModule) -> dict[str, str]:
        # With proportional_parameters, PEFT divides the number among the modules by their sizes.
        return {"waveft_spectrum": "n"} if self.proportional_parameters else self.tensors

    def check(self, module: PeftModule) -> None:
        (outer, inner), (n, _) = module.shape, module.tensors["waveft_spectrum"].shape
        if n > outer * inner:
            must = f"{printable(module.name)} must have 1 to {outer} x {inner} coefficients (its base)"
            raise module.error(f"{must}, got {n}")

    def update(self, arrays: Arrays, module: PeftModule) -> Dense:
        values, (outer, inner) = arrays["waveft_spectrum"], module.shape
        rows, columns = entries(module.shape, len(values), self.random_loc_seed % SEEDS)
        # The transform needs even sides; PEFT cuts the surplus row and column off.
        matrix = np.zeros((outer + outer % 2, inner + inner % 2))
        matrix[rows, columns] = self.scaling * values
        if self.use_idwt:
            matrix = _inverse_haar(matrix)
        return Dense(matrix[:outer, :inner])


def _inverse_haar(quarters: Float[np.ndarray, "rows columns"]) -> Float[np.ndarray, "rows columns"]:
    """Invert one level of the two-dimensional Haar transform.

    The quarters of the argument contain the averages (upper left), and the differences between columns (upper right),
    between rows (lower left) and of both (lower right), as PEFT arranges them.
    """
    (top, bottom) = np.split(quarters, 2)
    (average, upper), (lower, diagonal) = np.split(top, 2, axis=1), np.split(bottom, 2, axis=1)
    matrix = np.empty_like(quarters)
    matrix[0::2, 0::2] = (average + upper + lower + diagonal) / 2
    matrix[0::2, 1::2] = (average + upper - lower - diagonal) / 2
    matrix[1::2, 0::2] = (average - upper + lower - diagonal) / 2
    matrix[1::2, 1::2] = (average - upper - lower + diagonal) / 2
    return matrix
