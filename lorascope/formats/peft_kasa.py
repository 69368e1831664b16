"""Reader of PEFT KaSA folders: LoRA with a diagonal, on a truncated base weight.

Each module has ``lora_diag`` (rank,) in addition to the factors of LoRA. While loading, PEFT removes the smallest
``rank`` singular components of each base weight W_0, so the change of the weight is

    ``scale * B @ diag(lora_diag) @ A - U S V^T``

with these components. It requires the base model. Without it, only the trained product is known.

Source: Wang et al. (arXiv 2412.06071), as in PEFT 0.21.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lorascope.array_types import Float
from lorascope.files.printable import printable
from lorascope.files.typed_json import unreadable
from lorascope.formats.adapter_faults import AdapterFault
from lorascope.formats.peft_config import peft_kind
from lorascope.formats.peft_lora import lora_factors, lora_parts
from lorascope.formats.peft_modules import complete_lora, stacked_base
from lorascope.formats.pretrained_weights import OptionalBase, base_with_weight
from lorascope.formats.readers import Config, WeightFiles, reads
from lorascope.formats.stored_update import AdapterFiles, StoredLoRA, StoredTensor
from lorascope.updates.linalg import as_float64, one_thread

_TRAINED_PRODUCT = (
    "KaSA: PEFT also removes the smallest singular components of each base weight while loading; |dW| is the "
    "norm of the trained product only; add --base DIR for the whole update"
)


@dataclass(frozen=True)
class KasaPart(StoredLoRA):
    """Stored update of PEFT's KaSA; without a base it is the trained product only."""

    diagonal: StoredTensor
    module: str
    base: OptionalBase

    @cached_property
    def _removed(self) -> tuple[Float[np.ndarray, "out rank"], Float[np.ndarray, "rank in"]]:
        """Components of the base weight that PEFT removes, as U S and V^T."""
        assert self.base is not None
        with one_thread():
            U, sigma, Vt = np.linalg.svd(as_float64(self.base.weight(self.module, self.shape)), full_matrices=False)
        # numpy orders the singular values from the largest to the smallest.
        return U[:, -self.rank :] * sigma[-self.rank :], Vt[-self.rank :]

    def factors(self) -> dict[str, Any]:
        """Load the factors, of twice the rank with a base."""
        A, B = self.A.read(), self.B.read() * self.diagonal.read().reshape(-1)
        if self.base is None:
            return {"A": A, "B": B}
        left, right = self._removed
        # The update multiplies all factors by the scale, but PEFT removes the components as they are.
        return {"A": np.vstack([A, right]), "B": np.hstack([B, -left / self.scale])}


@reads(lambda config, names: peft_kind(config) == "KaSA", "KaSA (PEFT)", needs="direction")
def read_kasa(path: Path, config: Config, files: WeightFiles, base: OptionalBase) -> AdapterFiles:
    """Read the modules of a PEFT KaSA folder."""
    module_factors, other_names = lora_factors(path, files, ("A", "B", "diag"))
    base, updates = stacked_base(path, config, module_factors, base), {}
    for module, plain in lora_parts(path, config, module_factors).items():
        diagonal = module_factors[module]["diag"]
        if diagonal.shape != (plain.rank, 1):
            must = f"lora_diag of {printable(module)} must have {plain.rank} values"
            raise AdapterFault("shape", path, f"{must}, got shape {diagonal.shape}")
        weights = base_with_weight(base, module)
        if plain.scale == 0 and weights is not None:
            raise unreadable(path, f"lora_alpha of {printable(module)} must not be 0")
        updates[module] = KasaPart(**vars(plain), diagonal=diagonal, module=module, base=weights)
    notes: tuple[str, ...] = ()
    if any(update.base is None for update in updates.values()):
        notes = (_TRAINED_PRODUCT,)
    return complete_lora(AdapterFiles(path, dict(config), updates, other_names, files, "KaSA", notes=notes, base=base))
