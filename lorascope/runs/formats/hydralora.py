"""Reader of HydraLoRA folders in the layout of the authors' code.

They are PEFT LoRA folders with other tensor names: each module has ``lora_A.weight`` (rank, in), ``lora_route.weight``
(heads, in) and ``lora_B0.weight`` to ``lora_B<heads - 1>.weight`` (out, rank). Gate weights are not stored, so updates
are evaluated at uniform gate weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorascope.files.printable import printable
from lorascope.files.safetensors_io import TensorFile
from lorascope.files.typed_json import to_typed
from lorascope.runs.formats.peft_lora import CONFIG, LoraConfig, group_factors, has_heads, peft_kind
from lorascope.runs.formats.pretrained_weights import PretrainedWeights
from lorascope.runs.formats.registry import reads
from lorascope.runs.formats.stored_update import AdapterFiles, StoredLoRA, StoredTensor
from lorascope.updates import Mixture

_FACTOR = re.compile(r"(?s)(?P<module>.+)\.lora_(?P<factor>A|B\d+|route)\.weight")


@dataclass(frozen=True)
class HydraPart(StoredLoRA):
    """Experts of one module; ``B`` is the first of them.

    Parameters
    ----------
    heads : tuple of StoredTensor
        Experts, each (out, rank).
    router : StoredTensor
        (heads, in).
    """

    heads: tuple[StoredTensor, ...]
    router: StoredTensor

    @property
    def exact(self) -> bool:
        """Return whether the update is independent of the input: only if there is a single expert."""
        return len(self.heads) == 1

    @property
    def size(self) -> int:
        """Number of stored values, including the router."""
        return sum(math.prod(factor.shape) for factor in (self.A, *self.heads, self.router))

    def factors(self) -> dict[str, Any]:
        """Load A, the experts and the router, and add uniform gate weights."""
        B = np.stack([head.read() for head in self.heads])
        # At least float32: in half precision the gates do not sum to 1, and the experts would be summed in it.
        gates = np.full(len(B), 1 / len(B), np.promote_types(B.dtype, np.float32))
        return {"A": self.A.read(), "B": B, "router": self.router.read(), "gates": gates}

    def update(self) -> Mixture:
        """Load the factors, and return the update at uniform gate weights."""
        factors = self.factors()
        return Mixture.from_factors(factors, self.scale, self.exact)


@reads(lambda config, names: peft_kind(config) in ("LORA", "") and not config.get("use_dora") and has_heads(names))
def read_hydra(
    path: Path, config: Mapping[str, Any], files: tuple[TensorFile, ...], base: PretrainedWeights | None = None
) -> AdapterFiles:
    """Read the modules of an opened HydraLoRA folder.

    Raises
    ------
    ValueError
        A tensor is missing, or configuration and weights disagree.
    """
    found, others = group_factors(files, _FACTOR)
    if not found:
        raise ValueError(f"cannot read {printable(path)}: its experts have no module name")
    settings = to_typed(config, LoraConfig, path / CONFIG)
    parts = {module: _hydra_part(path, module, factors, settings) for module, factors in found.items()}
    return AdapterFiles(path, dict(config), parts, others, files, "HydraLoRA")


def _hydra_part(path: Path, module: str, factors: Mapping[str, StoredTensor], config: LoraConfig) -> HydraPart:
    # Count the factors, because a number in a name may be arbitrarily large.
    count = max(sum(name[0] == "B" for name in factors), 1)
    wanted = ["A", "route", *(f"B{number}" for number in range(count))]
    missing = next((name for name in wanted if name not in factors), None)
    if missing is not None:
        raise ValueError(f"cannot read {printable(path)}: {printable(module)} has no lora_{missing}")
    A, router, *heads = (factors[name] for name in wanted)
    if router.shape[0] != count:
        raise ValueError(
            f"cannot read {printable(path)}: router of {printable(module)} must have {count} rows, one per expert, "
            f"got {router.shape[0]}"
        )
    rank = config.r
    found = sorted({A.shape[0], *(head.shape[1] for head in heads)})
    if found != [rank]:
        raise ValueError(
            f"cannot read {printable(path)}: factors of {printable(module)} must have rank {rank} ({CONFIG}), "
            f"got {' and '.join(map(str, found))}"
        )
    if router.shape[1] != A.shape[1] or len({head.shape for head in heads}) > 1:
        raise ValueError(
            f"cannot read {printable(path)}: {printable(module)} must have experts of one shape, and a router as wide "
            "as its lora_A"
        )
    return HydraPart(heads[0], A, config.lora_alpha / rank, False, tuple(heads), router)
