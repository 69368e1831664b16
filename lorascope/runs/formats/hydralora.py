"""HydraLoRA folders of the authors' code, read as files.

They are PEFT's LoRA folders but for the names: below a module lie ``lora_A.weight`` (rank, in), ``lora_route.weight``
(heads, in) and ``lora_B0.weight`` to ``lora_B<heads - 1>.weight`` (out, rank). No gates are kept, so that the update
that stands for a module is that at even ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorascope.files.printable import printable
from lorascope.files.safetensors_io import TensorFile
from lorascope.files.typed_json import to_typed
from lorascope.runs.formats.peft_lora import CONFIG, AdapterFiles, LoraConfig, group_factors
from lorascope.runs.formats.stored_update import StoredLoRA, StoredTensor
from lorascope.updates.factor_formats import mix_experts
from lorascope.updates.low_rank import LowRank

_FACTOR = re.compile(r"(?s)(?P<module>.+)\.lora_(?P<factor>A|B\d+|route)\.weight")


@dataclass(frozen=True)
class HydraPart(StoredLoRA):
    """The heads of one module; ``B`` is the first of them.

    Parameters
    ----------
    heads : tuple of Factor
        (out, rank) each.
    router : Factor
        (heads, in).
    """

    heads: tuple[StoredTensor, ...]
    router: StoredTensor

    @property
    def exact(self) -> bool:
        """A single head has no choice."""
        return len(self.heads) == 1

    @property
    def size(self) -> int:
        """Number of stored values, the router's among them."""
        return sum(math.prod(factor.shape) for factor in (self.A, *self.heads, self.router))

    def factors(self) -> dict[str, Any]:
        """A, the heads, the router, and even gates."""
        B = np.stack([head.read() for head in self.heads])
        # As wide as a router's own: in half precision they would not sum to 1, and the heads be added up in it.
        gates = np.full(len(B), 1 / len(B), np.promote_types(B.dtype, np.float32))
        return {"A": self.A.read(), "B": B, "router": self.router.read(), "gates": gates}

    def update(self) -> LowRank:
        """At even gates."""
        held = self.factors()
        return LowRank(*mix_experts(held["B"], held["A"], held["gates"]), self.scale, self.exact)


def has_heads(names: Iterable[str]) -> bool:
    """Are these names of tensors those of a HydraLoRA folder?"""
    return any(".lora_route." in name or ".lora_B0." in name for name in names)


def read_hydra(path: Path, config: Mapping[str, Any], files: tuple[TensorFile, ...]) -> AdapterFiles:
    """The modules of an opened folder.

    Raises
    ------
    ValueError
        A part is missing, or configuration and weights do not fit together.
    """
    found, others = group_factors(files, _FACTOR)
    if not found:
        raise ValueError(f"{printable(path)} holds heads, but of no module that has a name")
    settings = to_typed(config, LoraConfig, path / CONFIG)
    parts = {module: _hydra_part(path, module, factors, settings) for module, factors in found.items()}
    return AdapterFiles(path, dict(config), parts, others, files, "HydraLoRA")


def _hydra_part(path: Path, module: str, factors: Mapping[str, StoredTensor], config: LoraConfig) -> HydraPart:
    # Counted, not read off the names: a number in a name may be of any size.
    count = max(sum(name[0] == "B" for name in factors), 1)
    wanted = ["A", "route", *(f"B{number}" for number in range(count))]
    missing = next((name for name in wanted if name not in factors), None)
    if missing is not None:
        raise ValueError(f"{printable(path)}: {printable(module)} has no lora_{missing}: a part of it is missing")
    A, router, *heads = (factors[name] for name in wanted)
    if router.shape[0] != count:
        raise ValueError(f"{printable(path)}: {printable(module)} has {count} heads, its router has {router.shape[0]}")
    rank = config.r
    held = sorted({A.shape[0], *(head.shape[1] for head in heads)})
    if held != [rank]:
        raise ValueError(
            f"{printable(path)}: {CONFIG} gives rank {rank}, the factors of {printable(module)} have "
            f"{' and '.join(map(str, held))}"
        )
    if router.shape[1] != A.shape[1] or len({head.shape for head in heads}) > 1:
        raise ValueError(
            f"{printable(path)}: {printable(module)} must have heads of one shape, and a router as wide as its lora_A"
        )
    return HydraPart(heads[0], A, config.lora_alpha / rank, False, tuple(heads), router)
