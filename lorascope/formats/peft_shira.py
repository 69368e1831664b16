"""Reader of PEFT SHiRA folders.

Each module has ``shira_weight`` (n,), the changes of n entries of its weight, and ``shira_indices`` (2, n), their rows
and columns. Without the indices, ``random_seed`` draws them: sorted, the first n values of ``torch.randperm``. Shapes
are stored nowhere and read from the base model.

Source: Bhardwaj et al. (arXiv 2406.13175), as in PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from lorascope.files.printable import printable
from lorascope.formats.peft_factors import StoredFactors
from lorascope.formats.peft_format import Arrays, PeftFormat, PeftModule
from lorascope.updates import Dense
from lorascope.updates.fourier import SEEDS, entries


class SHiRA(PeftFormat, frozen=True):
    """PEFT's SHiRA: sparse changes of the weights."""

    kind, needs = "SHiRA", "shapes"
    tensors = {"shira_weight": "n", "shira_indices": "2 n"}
    random_seed: int | None = None

    def required(self, module: PeftModule) -> Mapping[str, str]:
        is_drawn = "shira_indices" not in module.tensors and self.random_seed is not None
        return {"shira_weight": "n"} if is_drawn else self.tensors

    def check(self, module: PeftModule) -> None:
        (outer, inner), n = module.shape, module.sizes["n"]
        if n > outer * inner:
            must = f"shira_weight of {printable(module.name)} must have <= {outer * inner} values (its base)"
            raise module.error(f"{must}, got {n}")
        if "shira_indices" in module.tensors:
            module.check_indices("shira_indices", outer, inner)

    def stored_update(self, module: PeftModule) -> StoredFactors:
        return replace(super().stored_update(module), components=min(module.sizes["n"], *module.shape))

    def update(self, arrays: Arrays, module: PeftModule) -> Dense:
        values, shape = arrays["shira_weight"], module.shape
        if "shira_indices" in arrays:
            rows, columns = arrays["shira_indices"]
        else:
            rows, columns = entries(shape, len(values), (self.random_seed or 0) % SEEDS)
            rows, columns = np.divmod(np.sort(rows * shape[1] + columns), shape[1])
        matrix = np.zeros(shape)
        # A file may list an entry twice; PEFT adds both.
        np.add.at(matrix, (rows, columns), values)
        return Dense(matrix)
