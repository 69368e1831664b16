"""Sentences about PEFT adapters without a single update per weight: routed ones, changes outside the weights."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from lorascope.formats.peft_config import peft_kind
from lorascope.formats.peft_factors import peft_factors
from lorascope.formats.pretrained_weights import OptionalBase
from lorascope.formats.readers import Config, WeightFiles, says, unread
from lorascope.formats.stored_update import plain_name, stored_tensors
from lorascope.updates.linalg import as_float64

_REASONS = {
    "Arrow": "a router mixes task adapters per token; inspect those adapters instead",
    "LILY": "a router mixes experts per input",
    "POLY": "a router mixes skills per task",
    "XLORA": "a classifier mixes whole LoRA adapters per token; inspect those adapters instead",
    "SHADOW": "a small network next to the model changes its hidden states",
}
_MODULE = re.compile(r"(?s)(.+)\.(?:lily|poly)_.+")


@says(lambda config, names: peft_kind(config) in _REASONS, f"{', '.join(_REASONS)} (PEFT)")
def describe_routing(path: Path, config: Config, files: WeightFiles, base: OptionalBase) -> str:
    """Return why a PEFT adapter with routing has no update per weight, and its number of modules and tensors."""
    kind = peft_kind(config)
    names = [plain_name(tensor.name) for tensor in stored_tensors(files)]
    modules = {match[1] for match in map(_MODULE.fullmatch, names) if match}
    count = f"{len(modules)} modules, " * bool(modules)
    return f"{kind} has no single update per weight: {_REASONS[kind]} ({count}{len(names)} tensors)"


@says(lambda config, names: peft_kind(config) == "BEFT", "BEFT (PEFT)")
def describe_biases(path: Path, config: Config, files: WeightFiles, base: OptionalBase) -> str:
    """Describe PEFT's BEFT, which has no update of weights: the number of changed biases and the norms of changes."""
    module_factors, other_names = peft_factors(path, files, ["beft_bias"])
    biases = [factors["beft_bias"] for factors in module_factors.values()]
    norms = [float(np.linalg.norm(as_float64(bias.read()))) for bias in biases]
    span = f"norms {min(norms):.4g} to {max(norms):.4g}"
    return f"BEFT changes no weights: it adds to the biases of {len(biases)} modules, with {span}{unread(other_names)}"
