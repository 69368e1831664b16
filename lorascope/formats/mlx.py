"""Reader of adapter folders by mlx-lm: ``adapters.safetensors`` and ``adapter_config.json`` with ``fine_tune_type``.

Each module has ``lora_a`` (in, rank) and ``lora_b`` (rank, out), transposed compared with PEFT's, and the update is
``scale * (lora_a @ lora_b)^T``: ``scale`` is the factor itself. Embeddings have ``lora_a`` (vocabulary, rank). Experts
are stored in one tensor, ``lora_a`` (experts, rank, in) and ``lora_b`` (experts, out, rank), and become one module
each, with the names that transformers uses in its files. DoRA adds ``m``, the row norms. Fine-tuning of whole weights
stores them under their own names, so their updates require the base.

Source: mlx-lm 0.32 (``tuner/lora.py``, ``tuner/dora.py``). Folders of early 2024 have ``alpha``: the factor is then
alpha / rank, times ``scale`` if both are given. Checkpoints (``0000100_adapters.safetensors``) are listed; to read one,
pass its path.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from lorascope.files.file_names import folder_of
from lorascope.files.printable import printable
from lorascope.files.safetensors_io import TensorFile, Unread
from lorascope.files.typed_json import Finite, to_typed, unreadable
from lorascope.formats.adapter_faults import AdapterFault
from lorascope.formats.peft_config import CONFIG
from lorascope.formats.peft_factors import Factors, StoredFactors, check_fit, group_factors, no_factors, stored_shape
from lorascope.formats.pretrained_weights import OptionalBase, PretrainedWeights, base_with_weight
from lorascope.formats.readers import Config, WeightFiles, reads
from lorascope.formats.stored_update import AdapterFiles, StoredTensor, StoredUpdate
from lorascope.schema.module_roles import parse
from lorascope.updates import Dense, Update, from_factors
from lorascope.updates.linalg import as_float64

WEIGHTS = "adapters.safetensors"
SETTINGS = {"fine_tune_type", "lora_parameters", "lora_layers"}
"""Keys of a configuration of mlx-lm, of which it has at least one."""
_FACTOR = re.compile(r"(?s)(?P<module>.+)\.(?P<factor>lora_a|lora_b|m)")
_WEIGHT = re.compile(r"(?s)(?P<module>.+)\.(?P<factor>weight)")
# Names of the projections of experts in the files of Mixtral, whose modules are in ``block_sparse_moe``.
_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


class LoraParameters(msgspec.Struct, frozen=True):
    """Settings used from ``lora_parameters`` of mlx-lm."""

    scale: Finite | None = None
    alpha: Finite | None = None


class MlxConfig(msgspec.Struct, frozen=True):
    """Settings used from mlx-lm's ``adapter_config.json``, with its defaults."""

    fine_tune_type: str = "lora"
    lora_parameters: LoraParameters = msgspec.field(default_factory=LoraParameters)
    model: str | None = None


@dataclass(frozen=True)
class MlxPart(StoredUpdate):
    """Stored update of one module or expert by mlx-lm: scale * B @ A, with B = lora_b^T and A = lora_a^T.

    ``expert`` is the index in tensors of experts, whose A and B are not transposed.
    """

    lora_a: StoredTensor
    lora_b: StoredTensor
    scale: float
    transposed: bool
    expert: int | None
    magnitude: StoredTensor | None
    module: str
    base: OptionalBase

    @property
    def has_thin_factors(self) -> bool:
        """Return whether the update has low-rank factors: not that of DoRA with a base."""
        return self.magnitude is None or self.base is None

    @property
    def shape(self) -> tuple[int, int]:
        inner_axis = 0 if self.expert is None else -1
        return stored_shape(self.lora_b)[1], stored_shape(self.lora_a)[inner_axis]

    @property
    def rank(self) -> int:
        return stored_shape(self.lora_b)[0 if self.expert is None else 2]

    @property
    def size(self) -> int:
        """Number of stored values of this module or expert."""
        size = self.rank * sum(self.shape)
        if self.magnitude is not None:
            size += math.prod(self.magnitude.shape)
        return size

    def factors(self) -> dict[str, Any]:
        """Load A (rank, in), B (out, rank) and for DoRA the magnitude."""
        if self.expert is None:
            factors = {"A": self.lora_a.read().T, "B": self.lora_b.read().T}
        else:
            count = self.lora_b.shape[0]
            A, B = (_read_expert(tensor, count, self.expert) for tensor in (self.lora_a, self.lora_b))
            factors = {"A": A, "B": B}
        if self.magnitude is None:
            return factors
        # The rows of an embedding are the columns of its update.
        return factors | {"magnitude": self.magnitude.read().reshape((1, -1) if self.transposed else -1)}

    def update(self) -> Update:
        """Load the factors, and return the update; without a base, that of DoRA includes only the direction."""
        factors = self.factors()
        if self.magnitude and self.base:
            factors["W0"] = self.base.weight(self.module, self.shape, self.transposed)
        return from_factors(factors, self.scale)


def _read_expert(tensor: StoredTensor, count: int, expert: int) -> np.ndarray:
    """Load the matrix of one of ``count`` experts."""
    experts = tensor.file.unread(tensor.name)
    stored = Unread(experts.stored.reshape(count, -1, experts.shape[-1])[expert], experts.encoding)
    matrix = np.empty(stored.shape, stored.dtype)
    stored.read_into(matrix)
    return matrix


@reads(
    lambda config, names: "peft_type" not in config and not SETTINGS.isdisjoint(config),
    "LoRA and DoRA of MLX",
)
def read_mlx(path: Path, config: Config, files: WeightFiles, base: OptionalBase) -> AdapterFiles:
    """Read the modules of an adapter folder of mlx-lm."""
    source = folder_of(path) / CONFIG
    settings = to_typed(config, MlxConfig, source)
    if settings.fine_tune_type == "full":
        kind, (updates, other_names) = "Full", _full_updates(path, files, base)
    else:
        module_factors, other_names = group_factors(files, _FACTOR)
        if not module_factors:
            raise no_factors(path, "weights must include lora_a and lora_b", other_names)
        updates, kind = {}, "LoRA"
        for module, factors in module_factors.items():
            updates |= _lora_updates(path, module, factors, settings.lora_parameters, base)
            if "m" in factors:
                kind = "DoRA"
    described = dict(config)
    if settings.model:
        described["base_model_name_or_path"] = settings.model
    return AdapterFiles(path, described, updates, other_names, files, kind, kind == "Full")


def _lora_updates(
    path: Path, module: str, factors: Factors, settings: LoraParameters, base: OptionalBase
) -> Iterator[tuple[str, MlxPart]]:
    """Yield name and update of a module, or of each of its experts."""
    name = printable(module)
    if missing := [factor for factor in ("lora_a", "lora_b") if factor not in factors]:
        raise AdapterFault("incomplete", path, f"{name} has {' and '.join(factors)} but no {missing[0]}")
    a, b, magnitude = factors["lora_a"], factors["lora_b"], factors.get("m")
    a_shape, b_shape = stored_shape(a), stored_shape(b)
    if len(b_shape) == 3:
        count, rank = b_shape[0], b_shape[2]
        # A may be stored as one matrix of all experts.
        fits = count > 0 and magnitude is None and math.prod(a_shape[:-1]) == count * rank and len(a_shape) in (2, 3)
    else:
        count, rank = 0, b_shape[0]
        fits = len(b_shape) == 2 and a_shape[1:] == (rank,)
    if not rank or not fits:
        must = "must have lora_a (in, rank) and lora_b (rank, out), or one of each per expert"
        raise AdapterFault("shape", path, f"{name} {must}, got shapes {a_shape} and {b_shape}")
    # lora_a of an embedding is (vocabulary, rank), so its product is the transposed weight.
    scale, transposed = _scale(settings, rank), parse(module).role == "embed"
    experts_by_name: dict[str, int | None] = {module: None}
    if count:
        experts_by_name = {_expert_name(module, expert): expert for expert in range(count)}
    for expert_name, expert in experts_by_name.items():
        weights = base_with_weight(base, expert_name)
        update = MlxPart(a, b, scale, transposed, expert, magnitude, expert_name, weights)
        outer = update.shape[transposed]
        if magnitude is not None and math.prod(magnitude.shape) != outer:
            raise AdapterFault("shape", path, f"m of {name} must have {outer} values, got shape {magnitude.shape}")
        yield expert_name, update


def _scale(settings: LoraParameters, rank: int) -> float:
    """Return the factor of a product of this rank; mlx-lm's default is 20."""
    if settings.alpha is None:
        return 20.0 if settings.scale is None else settings.scale
    factor = settings.alpha / rank
    return factor if settings.scale is None else settings.scale * factor


def _expert_name(module: str, expert: int) -> str:
    # mlx-lm stacks the experts of a layer in switch_mlp; the files of transformers have one module per expert.
    above, _, leaf = module.partition(".switch_mlp.")
    if not leaf:
        return f"{module}.{expert}"
    if above.endswith("block_sparse_moe"):
        leaf = _MIXTRAL.get(leaf, leaf)
    return f"{above}.experts.{expert}.{leaf}"


def _full_updates(
    path: Path, files: tuple[TensorFile, ...], base: OptionalBase
) -> tuple[dict[str, StoredUpdate], tuple[str, ...]]:
    """Return the updates of modules whose whole weights are stored."""
    if base is None:
        raise unreadable(path, "it has whole weights, so their updates require the base model: --base DIR")
    module_factors, other_names = group_factors(files, _WEIGHT)
    updates: dict[str, StoredUpdate] = {}
    for module, factors in module_factors.items():
        if not base.has_weight(module):
            other_names = (*other_names, factors["weight"].name)
            continue
        sides = base.shape(module)
        check_fit(path, module, factors["weight"].shape, sides)
        build = partial(_difference, base, module, sides)
        updates[module] = StoredFactors(factors, sides, min(sides), build, thin=False)
    return updates, other_names


def _difference(base: PretrainedWeights, module: str, sides: tuple[int, int], arrays: dict[str, np.ndarray]) -> Dense:
    weight = as_float64(arrays["weight"]).reshape(sides)
    return Dense(weight - base.weight(module, sides))
