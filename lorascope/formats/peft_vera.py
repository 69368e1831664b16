"""Reader of PEFT VeRA folders.

Each module has ``vera_lambda_b`` (out,) and ``vera_lambda_d`` (rank,). The random factors of all modules are ``vera_A``
(rank, largest in) and ``vera_B`` (largest out, rank), which PEFT stores by default. Without ``save_projection`` they
are drawn from ``projection_prng_key``, which requires the shapes of all modules. The folder has no widths of the
inputs, so the shapes are read from the base model's files.

Source: Kopiczko et al. (arXiv 2310.11454), as in PEFT.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from lorascope.files.printable import printable
from lorascope.files.typed_json import Positive, to_typed, unreadable
from lorascope.formats.adapter_faults import AdapterFault
from lorascope.formats.peft_config import CONFIG, peft_kind
from lorascope.formats.peft_factors import MAX_VALUES, group_factors, require_factor
from lorascope.formats.pretrained_weights import OptionalBase, named_base, require_base
from lorascope.formats.readers import Config, WeightFiles, reads
from lorascope.formats.stored_update import AdapterFiles, StoredTensor, StoredUpdate, stored_tensors
from lorascope.updates.fourier import SEEDS
from lorascope.updates.random_projection import projections

_FACTOR = re.compile(r"(?s)(?P<module>.+)\.vera_(?P<factor>lambda_b|lambda_d)(?:\.[^.]+)?")
_SHARED = re.compile(r"(^|\.)vera_[AB]$")


class VeraConfig(msgspec.Struct, frozen=True):
    """Settings used from PEFT's VeRA configuration, with its defaults."""

    r: Positive = 256
    save_projection: bool = True
    projection_prng_key: int = 0
    fan_in_fan_out: bool | None = None


@dataclass(frozen=True)
class VeraPart(StoredUpdate):
    """Stored update of PEFT's VeRA: diag(lambda_b) B diag(lambda_d) A, with the same random A and B in all modules.

    ``shared`` returns A and B. ``inner`` is the number of inputs of this module.
    """

    lambda_b: StoredTensor
    lambda_d: StoredTensor
    shared: Callable[[], tuple[np.ndarray, np.ndarray]]
    inner: int
    transposed: bool
    scale = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.lambda_b.shape[0], self.inner

    @property
    def rank(self) -> int:
        return self.lambda_d.shape[0]

    def factors(self) -> dict[str, Any]:
        """Load the vectors, multiplied with the module's part of the random factors."""
        A, B = self.shared()
        A, B = A[:, : self.inner], B[: self.shape[0]]
        return {"A": self.lambda_d.read().reshape(-1, 1) * A, "B": self.lambda_b.read().reshape(-1, 1) * B}


@reads(lambda config, names: peft_kind(config) == "VERA", "VeRA (PEFT)", needs="base")
def read_vera(path: Path, config: Config, files: WeightFiles, base: OptionalBase) -> AdapterFiles:
    """Read the modules of a PEFT VeRA folder."""
    settings = to_typed(config, VeraConfig, path / CONFIG)
    module_factors, other_names = group_factors(files, _FACTOR)
    shared_factors = {}
    for tensor in stored_tensors(files):
        if _SHARED.search(tensor.name):
            shared_factors[tensor.name[-1]] = require_factor(tensor)
    if not module_factors or (settings.save_projection and shared_factors.keys() != {"A", "B"}):
        raise unreadable(path, "VERA weights must include vera_lambda_b, vera_lambda_d, vera_A and vera_B")
    shapes = require_base(path, config, base, "VeRA stores no shapes")
    transposed = bool(settings.fan_in_fan_out)
    sides = {module: shapes.shape(module, transposed) for module in module_factors}
    # All modules use the same factors, cut to their own sides.
    if settings.save_projection:
        (rank, widest_in), (widest_out, width) = shared_factors["A"].shape, shared_factors["B"].shape
        shared = partial(_read_both, shared_factors["A"], shared_factors["B"])
    else:
        widest_out, widest_in = map(max, zip(*sides.values(), strict=True))
        rank = width = settings.r
        if rank * max(widest_in, widest_out) > MAX_VALUES:
            raise unreadable(path, f"random factors must have <= {MAX_VALUES} values")
        # torch's generator on the CPU uses 32 bits of the seed.
        shared = partial(projections, settings.projection_prng_key % SEEDS, rank, widest_in, widest_out)
    updates = {}
    for module, factors in module_factors.items():
        if missing := {"lambda_b", "lambda_d"} - factors.keys():
            raise AdapterFault("incomplete", path, f"{printable(module)} has no vera_{min(missing)}")
        outer, inner = sides[module]
        update = VeraPart(factors["lambda_b"], factors["lambda_d"], shared, inner, transposed)
        must = f"factors of {printable(module)} must"
        if update.rank != settings.r or rank != settings.r or width != settings.r:
            raise AdapterFault("rank", path, f"{must} have rank {settings.r} ({CONFIG})")
        if update.shape[0] != outer or widest_in < inner or widest_out < outer:
            raise AdapterFault("misfit", path, f"{must} fit its base weight, {outer} x {inner}")
        updates[module] = update
    # The shared factors belong to no module, so they are among the other tensors.
    other_names = tuple(name for name in other_names if not _SHARED.search(name))
    return AdapterFiles(path, dict(config), updates, other_names, files, "VeRA", named_base(config) is None)


def _read_both(A: StoredTensor, B: StoredTensor) -> tuple[np.ndarray, np.ndarray]:
    return A.read(), B.read()
