"""Reader of the kinds of PEFT adapters whose update only PEFT computes, such as those of the base's SVD.

PEFT merges the adapter into its base model, and the update is the difference, in float64. This requires the base model
and the extra ``lorascope[peft]``, and takes the memory of the model.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from lorascope.array_types import Float
from lorascope.files.file_names import folder_of
from lorascope.files.printable import printable
from lorascope.files.safetensors_io import FLOATS
from lorascope.files.typed_json import to_typed, unreadable
from lorascope.formats.peft_config import CONFIG, WEIGHTS, peft_kind
from lorascope.formats.peft_factors import INDEX_DTYPES, require_factor
from lorascope.formats.pretrained_weights import OptionalBase, named_base, require_base
from lorascope.formats.readers import Config, WeightFiles, reads
from lorascope.formats.stored_update import PREFIX, AdapterFiles, StoredTensor, StoredUpdate, in_order, stored_tensors
from lorascope.updates import Dense

MERGED = ("ADAMSS", "DEFT", "FROD", "OSF", "PEANUT", "PSOFT", "PVERA", "TINYLORA")
"""Types of adapters that only PEFT reads."""


class MergedConfig(msgspec.Struct, frozen=True):
    """Settings used from the configuration of adapters that only PEFT can merge, with limits for PEFT's memory."""

    task_type: str | None = None
    r: Annotated[int, msgspec.Meta(le=2**14)] | None = None
    depth: Annotated[int, msgspec.Meta(le=2**10)] | None = None
    auto_mapping: dict[str, str | None] | None = None


@dataclass(frozen=True)
class MergedPart(StoredUpdate):
    """Stored update of one module as PEFT merges it; ``tensors`` belong to the module."""

    matrix: Float[np.ndarray, "out in"]
    transposed: bool
    tensors: tuple[StoredTensor, ...]

    scale = 1.0
    has_thin_factors = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def rank(self) -> int:
        return min(self.shape)

    def factors(self) -> dict[str, Any]:
        return {"matrix": self.matrix}

    def update(self) -> Dense:
        return Dense(self.matrix)

    def _tensors(self) -> list[StoredTensor]:
        return list(self.tensors)


@reads(lambda config, names: peft_kind(config) in MERGED, f"{', '.join(MERGED)} (PEFT)", needs="peft")
def read_merged(path: Path, config: Config, files: WeightFiles, base: OptionalBase) -> AdapterFiles:
    """Read the modules of a folder that only PEFT can merge: their changes when it is merged into its base."""
    kind, settings = peft_kind(config), to_typed(config, MergedConfig, path / CONFIG)
    weights = require_base(path, config, base, f"{kind} changes the weights of its base")
    if find_spec("peft") is None:  # which does not import it
        raise unreadable(path, f'only PEFT reads {kind} adapters like this one: pip install "lorascope[peft]"')
    folder = folder_of(path)
    paths = [file.path for file in files]
    if paths != [folder / WEIGHTS]:
        listing = ", ".join(printable(file.name) for file in paths)
        raise unreadable(path, f"PEFT reads only {WEIGHTS}, got {listing}")
    tensors = [require_factor(tensor, (*FLOATS, *INDEX_DTYPES)) for tensor in stored_tensors(files)]
    # Importing it imports torch, which no other reader does.
    merge = importlib.import_module("lorascope.adapters.peft_merged_updates").merged_updates
    try:
        matrices, used = merge(
            folder, weights.folder, (settings.auto_mapping or {}).get("base_model_class"), settings.task_type
        )
    except Exception as error:  # SafetensorError and re.error are not ValueErrors, and PEFT may raise any other
        reason = printable(" ".join(str(error).split())[:300])
        raise unreadable(path, f"PEFT cannot merge it into {printable(weights.folder)}: {reason}") from error
    updates = {}
    floats = tuple(tensor for tensor in tensors if tensor.file.dtype(tensor.name) in FLOATS)
    for module, (matrix, transposed) in in_order(matrices).items():
        module_tensors = tuple(tensor for tensor in floats if tensor.name.startswith(f"{PREFIX}{module}."))
        updates[module] = MergedPart(matrix, transposed, module_tensors or floats)
    other_names = [tensor.name for tensor in tensors if tensor.name not in used]
    for name in other_names:
        if name.startswith(PREFIX):
            raise unreadable(path, f"PEFT finds no module for {printable(name)} in {printable(weights.folder)}")
    return AdapterFiles(path, dict(config), updates, tuple(other_names), files, kind, named_base(config) is None)
