"""Sentences about PEFT's trained prompts, which change no weights: virtual tokens, or keys and values of attention.

They are stored as ``prompt_embeddings`` (tokens, width), except for ADAPTION_PROMPT, which stores one
``adaption_prompt`` (1, tokens, width) per layer.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from lorascope.formats.adapter_faults import AdapterFault
from lorascope.formats.nearest_tokens import describe_nearest
from lorascope.formats.peft_config import peft_kind
from lorascope.formats.peft_factors import require_factor, stored_shape, ungathered_factors
from lorascope.formats.pretrained_weights import OptionalBase
from lorascope.formats.readers import Config, WeightFiles, says, unread
from lorascope.formats.stored_update import stored_tensors
from lorascope.updates.linalg import as_float64

_WHERE = {
    "PROMPT_TUNING": "put before the input",
    "P_TUNING": "put before the input",
    "MULTITASK_PROMPT_TUNING": "put before the input, as shared by all tasks",
    "CPT": "added to the tokens of a context",
    "PREFIX_TUNING": "put before the keys and values of every layer",
    "CARTRIDGE": "put before the keys and values of every layer",
    "ADAPTION_PROMPT": "attended to by the upper layers",
}
# Factors of the prompt: of one task, which PEFT multiplies with the shared prompt, and of its attention.
_FACTORS = re.compile(r"(?s)(?:.+\.)?(?:prefix_task_(?:cols|rows)|adaption_gate)")
# Kinds whose vectors take the place of embeddings of tokens, with nothing added or multiplied.
_EMBEDDED = ("PROMPT_TUNING", "P_TUNING")
_PROMPT = re.compile(r"(?s)(?:.+\.)?(?:prompt_embeddings|adaption_prompt)")


@says(lambda config, names: peft_kind(config) in _WHERE, f"{', '.join(_WHERE)} (PEFT)")
def describe_prompt(path: Path, config: Config, files: WeightFiles, base: OptionalBase) -> str:
    """Describe a PEFT prompt: number of virtual tokens, their width and norms; with a base, its nearest tokens."""
    kind = peft_kind(config)
    prompts, other_names = [], []
    for tensor in stored_tensors(files):
        if _PROMPT.fullmatch(tensor.name):
            shape = stored_shape(require_factor(tensor))
            if 0 in shape:
                raise ungathered_factors(path, [tensor.name])
            if len(shape) < 2:
                raise AdapterFault("shape", path, f"{kind} weights must include prompt_embeddings (tokens, width)")
            prompts.append(as_float64(tensor.read()).reshape(-1, shape[-1]))
        elif not _FACTORS.fullmatch(tensor.name):
            other_names.append(tensor.name)
    if not prompts:
        raise AdapterFault("incomplete", path, f"{kind} weights must include prompt_embeddings (tokens, width)")
    norms = np.concatenate([np.linalg.norm(prompt, axis=1) for prompt in prompts])
    span = f"{norms.min():.4g} to {norms.max():.4g}, median {np.median(norms):.4g}"
    tokens, width = prompts[0].shape
    layers = f" in each of {len(prompts)} layers" * (len(prompts) > 1)
    trained = f"{tokens} virtual tokens{layers} of width {width}, {_WHERE[kind]}, with norms {span}"
    nearest = ""
    if base is not None and kind in _EMBEDDED:
        nearest = f"; {describe_nearest(prompts[0], base)}"
    return f"{kind} changes no weights: it trains {trained}{nearest}{unread(other_names)}"
