"""Reader of PEFT DoRA folders.

In addition to the factors of LoRA, each module has ``lora_magnitude_vector`` (out,), the row norms of the weight:
W = m * V / |V| with V = W_0 + scale * B @ A, per row. The full update W - W_0 therefore requires the base model.
Without it, only the update of the direction is known, scale * B @ A.

Source: Liu et al. (arXiv 2402.09353), equation 5, as in PEFT, which uses the row norms of (out, in).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorascope.files.printable import printable
from lorascope.formats.adapter_faults import AdapterFault
from lorascope.formats.peft_config import peft_kind
from lorascope.formats.peft_lora import lora_factors, lora_parts
from lorascope.formats.peft_modules import complete_lora, stacked_base
from lorascope.formats.peft_residual import SubtractedStart, subtracted_starts
from lorascope.formats.pretrained_weights import OptionalBase, base_with_weight
from lorascope.formats.readers import Config, WeightFiles, reads
from lorascope.formats.stored_update import AdapterFiles, StoredLoRA, StoredTensor
from lorascope.updates import Update, from_factors
from lorascope.updates.low_rank import Residual


@dataclass(frozen=True)
class DoraPart(StoredLoRA):
    """Stored update of PEFT's DoRA, with the magnitude (out,); without a base, it includes only the direction."""

    magnitude: StoredTensor
    module: str
    base: OptionalBase
    start: SubtractedStart | None = None

    @property
    def has_thin_factors(self) -> bool:
        """Return whether the update has low-rank factors: only without a base, as the update of the direction."""
        return self.base is None

    def factors(self) -> dict[str, Any]:
        return super().factors() | {"magnitude": self.magnitude.read().reshape(-1)}

    def update(self) -> Update:
        """Load the factors, and return the full update if there is a base, else the update of the direction."""
        factors = self.factors()
        if self.base is None:
            return from_factors(factors, self.scale)
        factors["W0"] = self.base.weight(self.module, self.shape, self.transposed)
        if self.start is not None:
            # W_0 - s B_0 A_0 + s B A is the original base with a residual as its direction.
            residual = Residual.from_factors(factors | self.start.fitting_factors(factors["A"]))
            factors |= {"A": residual.A, "B": residual.B}
        return from_factors(factors, self.scale)


@reads(
    lambda config, names: peft_kind(config) == "LORA" and bool(config.get("use_dora")), "DoRA (PEFT)", needs="direction"
)
def read_dora(path: Path, config: Config, files: WeightFiles, base: OptionalBase) -> AdapterFiles:
    """Read the modules of a PEFT DoRA folder."""
    module_factors, other_names = lora_factors(path, files, ("A", "B", "magnitude_vector"))
    base, updates = stacked_base(path, config, module_factors, base), {}
    plain_updates = lora_parts(path, config, module_factors)
    starts = subtracted_starts(config, plain_updates, base)
    for module, plain in plain_updates.items():
        magnitude, outer = module_factors[module]["magnitude_vector"], plain.shape[0]
        if math.prod(magnitude.shape) != outer:  # a convolution stores it as (1, out, 1, 1)
            must = f"lora_magnitude_vector of {printable(module)} must have {outer} values (outputs)"
            raise AdapterFault("shape", path, f"{must}, got shape {magnitude.shape}")
        weights = base_with_weight(base, module)
        start = starts.get(module)
        updates[module] = DoraPart(**vars(plain), magnitude=magnitude, module=module, base=weights, start=start)
    return complete_lora(AdapterFiles(path, dict(config), updates, other_names, files, "DoRA", base=base))
