"""Reader of PEFT LoRA folders that adapt parameters, such as experts in one tensor (``target_parameters``).

A parameter (experts, d1, d2) has one ``lora_A`` (experts * rank, in) and one ``lora_B`` (out, experts * rank). The rows
of A are ordered by expert and the columns of B by component. With s = alpha / rank, the update of expert e of E is

    ``s B[:, e::E] @ A[e * rank : (e + 1) * rank]``

Every expert is a separate module, named like an expert with its own weights: ``...experts.3.gate_up_proj``. Several
parameters of one module are nested, the one that is registered first innermost, as ``...experts.base_layer.lora_A``.

The product B A is given as PEFT writes it. It is the transposed change of the weight for the unmarked (in, out) experts
of Llama 4 in PEFT >= 0.19, and for (out, in) experts before. Norms, ranks and spectra are the same for both.

Source: PEFT 0.21, ``ParamWrapper``. Unsloth ordered the columns of B by expert before its fix of September 2026; its
environment variable ``UNSLOTH_MOE_LORA_B_LAYOUT=grouped_by_expert`` selects that order here as well.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from lorascope.files.file_names import folder_of
from lorascope.files.printable import first_of, printable
from lorascope.files.typed_json import to_typed, unreadable
from lorascope.formats.adapter_faults import AdapterFault
from lorascope.formats.peft_config import CONFIG
from lorascope.formats.peft_factors import Factors
from lorascope.formats.peft_lora import RanksAndScales, is_lora, lora_factors, lora_parts
from lorascope.formats.peft_modules import complete_lora, stacked_base
from lorascope.formats.pretrained_experts import ExpertWeights
from lorascope.formats.pretrained_weights import OptionalBase
from lorascope.formats.readers import Config, WeightFiles, reads
from lorascope.formats.stored_update import AdapterFiles, StoredLoRA

# Parameters of one module, in the order in which transformers' classes register them.
_ORDER = ("w1", "v1", "w2", "gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
# PEFT wraps a module once per adapted parameter.
_NESTED = re.compile(r"(\.base_layer)+$")
LAYOUT, GROUPED = "UNSLOTH_MOE_LORA_B_LAYOUT", "grouped_by_expert"
_CARD = 2**20  # bytes of a model card
_MAX_EXPERTS = 10_000  # every expert is a module; published models have up to 512
_ORIENTED = (0, 19)  # first version of PEFT whose B A has the orientation of the parameter


class ExpertsConfig(msgspec.Struct, frozen=True):
    """Settings used from PEFT's configuration of LoRA on experts, in addition to those of LoRA."""

    target_parameters: list[str]
    peft_version: str | None = None


@dataclass(frozen=True)
class ExpertPart(StoredLoRA):
    """Stored PEFT update of one of several experts in one parameter; ``B`` and ``A`` contain the factors of all."""

    parameter: str
    """Name of the parameter, which the patterns of the configuration match."""
    expert: int
    experts: int
    grouped: bool = False
    """Whether the columns of B are ordered by expert."""

    @property
    def rank(self) -> int:
        """Rank of one expert."""
        return self.A.shape[0] // self.experts

    @property
    def size(self) -> int:
        """Number of stored values of one expert."""
        return super().size // self.experts

    def factors(self) -> dict[str, Any]:
        """Load the factors of this expert."""
        components = slice(self.expert * self.rank, (self.expert + 1) * self.rank)
        # PEFT orders the columns of B by component, then by expert: column k E + e is component k of expert e.
        columns = components if self.grouped else slice(self.expert, None, self.experts)
        B = self.B.file.unread(self.B.name)[:, columns].read()
        return {"A": self.A.file.unread(self.A.name)[components].read(), "B": np.ascontiguousarray(B)}


@reads(
    lambda config, names: is_lora(config, names) and bool(config.get("target_parameters")),
    "LoRA of experts in one tensor (PEFT)",
)
def read_experts(path: Path, config: Config, files: WeightFiles, base: OptionalBase) -> AdapterFiles:
    """Read the modules of a PEFT LoRA on experts: one per expert, and the modules that are adapted as a whole."""
    settings = to_typed(config, ExpertsConfig, path / CONFIG)
    module_factors, other_names = lora_factors(path, files, ("A", "B"))
    ranks = RanksAndScales(path / CONFIG, config)
    parameters = dict(_parameters(path, settings.target_parameters, module_factors, ranks))
    experts: dict[str, ExpertPart] = {}
    for module, parameter in parameters.items():
        experts |= _expert_parts(path, parameter, module_factors.pop(module), ranks)
    # The remaining factors adapt modules as a whole.
    configured = {name: update.parameter for name, update in experts.items()}
    updates = lora_parts(path, config, module_factors) | experts
    base = stacked_base(path, config, (*updates, *configured.values()), base)
    shared = {name: update for name, update in experts.items() if update.experts > 1}
    notes = tuple(_notes(path, config, settings, shared.values()))
    if base is not None:
        base = ExpertWeights(base, {name: (update.parameter, update.expert) for name, update in shared.items()})
    adapter = AdapterFiles(path, dict(config), updates, other_names, files, "LoRA", False, notes, configured, base)
    return complete_lora(adapter)


def _parameters(
    path: Path, targets: Collection[str], module_factors: Mapping[str, Factors], settings: RanksAndScales
) -> Iterator[tuple[str, str]]:
    """Yield (module with ``base_layer``, full name of its parameter) of the factors that adapt a parameter."""
    nests: dict[str, list[str]] = {}
    for module in module_factors:
        nests.setdefault(_NESTED.sub("", module), []).append(module)
    for module, nest in nests.items():
        names = {target.rpartition(".")[2] for target in targets if _is_target(module, target)}
        # A target without a dot may be a parameter of any module.
        if not names and (len(nest) > 1 or module_factors[module]["A"].shape[0] > settings.rank(module)):
            names = {target for target in targets if "." not in target}
        if not names:
            continue
        if len(names) != len(nest):
            parameters = ", ".join(sorted(map(printable, names)))
            must = f"{printable(module)} must have factors of each target parameter ({parameters})"
            raise AdapterFault("incomplete", path, f"{must}, got {len(nest)}")
        ordered = [name for name in _ORDER if name in names] + sorted(names - set(_ORDER))
        # Every wrapper around the innermost one adds base_layer to its name.
        inner_first = sorted(nest, key=len, reverse=True)
        yield from zip(inner_first, (f"{module}.{name}" for name in ordered), strict=True)


def _is_target(module: str, target: str) -> bool:
    """Return whether a target with a dot is the end of the name of a parameter of a module."""
    above, _, _ = target.rpartition(".")
    return bool(above) and (module == above or module.endswith(f".{above}"))


def _expert_parts(path: Path, parameter: str, factors: Factors, settings: RanksAndScales) -> dict[str, ExpertPart]:
    """Return the update of every expert of a parameter, or of the parameter itself if it is a matrix."""
    A, B, rank = factors["A"], factors["B"], settings.rank(parameter)
    A_shape, B_shape = A.file.shape(A.name), B.file.shape(B.name)
    rows = A.shape[0]
    if len(A_shape) != 2 or len(B_shape) != 2 or not rows or rows % rank or B.shape[1] != rows:
        must = f"factors of {printable(parameter)} must have rank {rank} ({CONFIG}) per expert"
        raise AdapterFault("rank", path, f"{must}, got lora_A {A_shape} and lora_B {B_shape}")
    above, _, leaf = parameter.removesuffix(".weight").rpartition(".")
    scale, experts = settings.scale(parameter), rows // rank
    if experts > _MAX_EXPERTS:
        raise unreadable(path, f"{printable(parameter)} must have <= {_MAX_EXPERTS} experts, got {experts}")
    if experts == 1:  # a matrix
        return {parameter.removesuffix(".weight"): ExpertPart(B, A, scale, False, parameter, 0, 1)}
    updates = {}
    for expert in range(experts):
        update = ExpertPart(B, A, scale, False, parameter, expert, experts, _is_grouped())
        updates[f"{above}.{expert}.{leaf}"] = update  # named like an expert with separate weights
    return updates


def _notes(path: Path, config: Config, settings: ExpertsConfig, updates: Collection[ExpertPart]) -> Iterator[str]:
    """Yield cautions about experts whose orientation, order or parameter is not known from the files."""
    square = dict.fromkeys(update.parameter for update in updates if update.shape[0] == update.shape[1])
    version = re.match(r"(\d+)\.(\d+)", settings.peft_version or "")
    if square and (version is None or (int(version[1]), int(version[2])) < _ORIENTED):
        yield (
            f"square experts saved by PEFT < 0.19 ({first_of([*square])}): the update is B A or its transpose, which "
            "the files do not show. PEFT >= 0.19 loads B A for (out, in) experts, although it was trained as the "
            "transpose"
        )
    modules: dict[str, set[str]] = {}
    for update in updates:
        module, _, name = update.parameter.rpartition(".")
        modules.setdefault(module, set()).add(name)
    for names in modules.values():
        if len(names) > 1 and not names <= {*_ORDER}:
            parameters = ", ".join(sorted(map(printable, names)))
            yield f"the order of the parameters {parameters} is not known: their updates may be exchanged"
            break  # one module is example enough
    if updates and _names_unsloth(path, config):
        order = f"in PEFT's order ({LAYOUT}={GROUPED} selects the other)"
        if _is_grouped():
            order = "by expert"
        yield (
            "Unsloth is named in the files: before its fix of September 2026 it ordered the columns of lora_B by "
            f"expert, which no file shows. They are read {order}"
        )


def _is_grouped() -> bool:
    """Return whether the user selected Unsloth's former order of the columns of B."""
    return os.environ.get(LAYOUT) == GROUPED


def _names_unsloth(path: Path, config: Config) -> bool:
    card = folder_of(path) / "README.md"
    text = b""
    if card.is_file():
        with card.open("rb") as file:
            text = file.read(_CARD)
    return b"unsloth" in json.dumps(config).encode().lower() + text.lower()
