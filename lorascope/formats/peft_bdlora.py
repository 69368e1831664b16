"""Reader of PEFT BD-LoRA folders: LoRA with a block-diagonal factor.

The configuration ``use_bdlora`` lists parts of module names. If a name contains one of ``target_modules_bd_a``, A is
stored as (rank, in / blocks), and its row blocks are the diagonal blocks of A (rank, in). For ``target_modules_bd_b``
the same holds for B, stored as (out, rank / blocks). The update is the usual product.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from lorascope.array_types import Float
from lorascope.files.printable import printable
from lorascope.files.typed_json import Positive, to_typed
from lorascope.formats.adapter_faults import AdapterFault
from lorascope.formats.peft_config import CONFIG, peft_kind
from lorascope.formats.peft_factors import require_factor_shape
from lorascope.formats.peft_lora import RanksAndScales, lora_factors
from lorascope.formats.peft_modules import complete_lora, stacked_base
from lorascope.formats.pretrained_weights import OptionalBase
from lorascope.formats.readers import Config, WeightFiles, reads
from lorascope.formats.stored_update import AdapterFiles, StoredLoRA, StoredTensor


class Blocks(msgspec.Struct, frozen=True):
    """Settings of BD-LoRA, PEFT's ``use_bdlora``, with their defaults."""

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: Positive = 1

    def count(self, module: str, targets: list[str] | None) -> int:
        """Return the number of blocks of a factor: 1 unless the name of its module contains one of the targets."""
        if any(target in module for target in targets or ()):
            return self.nblocks
        return 1


class BlockConfig(msgspec.Struct, frozen=True):
    """Settings used from PEFT's BD-LoRA configuration in addition to those of LoRA."""

    use_bdlora: Blocks = msgspec.field(default_factory=Blocks)


@dataclass(frozen=True)
class BlockPart(StoredLoRA):
    """Stored update of PEFT's BD-LoRA: scale * B @ A, of which one factor has diagonal blocks only."""

    blocks_a: int
    blocks_b: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[0], self.A.shape[1] * self.blocks_a

    def factors(self) -> dict[str, Any]:
        """Load the factors, with zeros outside the blocks."""
        return {"A": _block_diagonal(self.A, self.blocks_a), "B": _block_diagonal(self.B, self.blocks_b)}


@reads(lambda config, names: peft_kind(config) == "BD-LoRA", "BD-LoRA (PEFT)")
def read_bdlora(path: Path, config: Config, files: WeightFiles, base: OptionalBase) -> AdapterFiles:
    """Read the modules of a PEFT BD-LoRA folder."""
    module_factors, other_names = lora_factors(path, files, ("A", "B"))
    settings, blocks = RanksAndScales(path / CONFIG, config), to_typed(config, BlockConfig, path / CONFIG).use_bdlora
    updates = {}
    for module, factors in module_factors.items():
        count_a = blocks.count(module, blocks.target_modules_bd_a)
        count_b = blocks.count(module, blocks.target_modules_bd_b)
        A, B, rank = factors["A"], factors["B"], settings.rank(module)
        divisible = A.shape[0] % count_a == 0 and B.shape[0] % count_b == 0
        if not divisible or (A.shape[0], B.shape[1] * count_b) != (rank, rank):
            must = f"factors of {printable(module)} must have rank {rank} and {blocks.nblocks} blocks ({CONFIG})"
            raise AdapterFault("rank", path, f"{must}, got lora_A {A.shape} and lora_B {B.shape}")
        # With its zeros, a factor takes the memory of all blocks.
        for name, factor, count in (("A", A, count_a), ("B", B, count_b)):
            require_factor_shape(path, f"lora_{name} of {module}", (factor.shape[0], factor.shape[1] * count))
        updates[module] = BlockPart(B, A, settings.scale(module), False, count_a, count_b)
    base = stacked_base(path, config, module_factors, base)
    return complete_lora(AdapterFiles(path, dict(config), updates, other_names, files, "BD-LoRA", base=base))


def _block_diagonal(stored: StoredTensor, blocks: int) -> Float[np.ndarray, "rows columns"]:
    """Load a factor and move its row blocks to the diagonal."""
    packed = stored.read()
    rows, width = packed.shape
    matrix = np.zeros((rows, width * blocks), packed.dtype)
    for number, block in enumerate(np.split(packed, blocks)):
        row, column = number * len(block), number * width
        matrix[row : row + len(block), column : column + width] = block
    return matrix
