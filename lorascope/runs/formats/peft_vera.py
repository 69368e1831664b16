"""Reader of PEFT VeRA folders.

Each module has ``vera_lambda_b`` (out,) and ``vera_lambda_d`` (rank,). The random factors of all modules are
``vera_A`` (rank, largest in) and ``vera_B`` (largest out, rank), which PEFT stores by default. The folder has no widths
of the inputs, so the shapes are read from the base model's files.

Source: Kopiczko et al. (arXiv 2310.11454), as in PEFT.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorascope.files.printable import printable
from lorascope.files.safetensors_io import TensorFile
from lorascope.files.typed_json import Positive, to_typed, unreadable
from lorascope.runs.formats.peft_lora import CONFIG, float_factor, group_factors, peft_kind
from lorascope.runs.formats.pretrained_weights import PretrainedWeights, base_with_shapes, named_base
from lorascope.runs.formats.registry import reads
from lorascope.runs.formats.stored_update import AdapterFiles, StoredTensor, StoredUpdate

_FACTOR = re.compile(r"(?s)(?P<module>.+)\.vera_(?P<factor>lambda_b|lambda_d)(?:\.[^.]+)?")
_SHARED = re.compile(r"(^|\.)vera_[AB]$")


@dataclass(frozen=True)
class VeraConfig:
    """Settings used from ``adapter_config.json``, with PEFT's defaults."""

    r: Positive = 256
    fan_in_fan_out: bool | None = None


@dataclass(frozen=True)
class VeraPart(StoredUpdate):
    """Update of one module: diag(lambda_b) B diag(lambda_d) A, with the random factors A and B of all modules.

    ``inner`` is the number of inputs of this module.
    """

    lambda_b: StoredTensor
    lambda_d: StoredTensor
    A: StoredTensor
    B: StoredTensor
    inner: int
    transposed: bool
    scale = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.lambda_b.shape[0], self.inner

    @property
    def rank(self) -> int:
        return self.lambda_d.shape[0]

    @property
    def size(self) -> int:
        """Number of trained values."""
        return self.lambda_b.shape[0] + self.rank

    def factors(self) -> dict[str, Any]:
        """Load the vectors, multiplied with the module's part of the random factors."""
        A, B = self.A.read()[:, : self.inner], self.B.read()[: self.shape[0]]
        return {"A": self.lambda_d.read().reshape(-1, 1) * A, "B": self.lambda_b.read().reshape(-1, 1) * B}


@reads(lambda config, names: peft_kind(config) == "VERA")
def read_vera(
    path: Path, config: Mapping[str, Any], files: tuple[TensorFile, ...], base: PretrainedWeights | None
) -> AdapterFiles:
    """Read the modules of an opened VeRA folder."""
    settings = to_typed(config, VeraConfig, path / CONFIG)
    found, others = group_factors(files, _FACTOR)
    kept = {name[-1]: float_factor(file, name) for file in files for name in file if _SHARED.search(name)}
    if not found or kept.keys() != {"A", "B"}:
        raise unreadable(path, "VERA weights must include vera_lambda_b, vera_lambda_d, vera_A and vera_B")
    shapes = base_with_shapes(path, config, base, "VeRA")
    parts, transposed = {}, bool(settings.fan_in_fan_out)
    for module, each in found.items():
        if lacking := {"lambda_b", "lambda_d"} - each.keys():
            raise unreadable(path, f"{printable(module)} has no vera_{min(lacking)}")
        outer, inner = shapes.shape(module, transposed)
        part = VeraPart(each["lambda_b"], each["lambda_d"], kept["A"], kept["B"], inner, transposed)
        must = f"factors of {printable(module)} must"
        if part.rank != settings.r or part.A.shape[0] != settings.r or part.B.shape[1] != settings.r:
            raise unreadable(path, f"{must} have rank {settings.r} ({CONFIG})")
        if part.shape[0] != outer or part.A.shape[1] < inner or part.B.shape[0] < outer:
            raise unreadable(path, f"{must} fit its base weight, {outer} x {inner}")
        parts[module] = part
    others = tuple(name for name in others if not _SHARED.search(name))
    return AdapterFiles(path, dict(config), parts, others, files, "VeRA", named_base(config) is None)
