"""Sentences about PEFT's trained prompts, which change no weights: virtual tokens, or keys and values of attention.

They are stored as ``prompt_embeddings`` (tokens, width), except for ADAPTION_PROMPT, which stores one
``adaption_prompt`` (1, tokens, width) per layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorascope.files.safetensors_io import TensorFile
from lorascope.files.typed_json import unreadable
from lorascope.formats.nearest_tokens import describe_nearest
from lorascope.formats.peft_lora import float_factor, peft_kind
from lorascope.formats.pretrained_weights import PretrainedWeights
from lorascope.formats.readers import says, unread
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
def describe_prompt(
    path: Path, config: Mapping[str, Any], files: tuple[TensorFile, ...], base: PretrainedWeights | None
) -> str:
    """Return the number of virtual tokens, their width and their norms; with a base, its nearest tokens."""
    kind = peft_kind(config)
    prompts = [float_factor(file, name) for file in files for name in file if _PROMPT.fullmatch(name)]
    shapes = [tensor.file.shape(tensor.name)[-2:] for tensor in prompts]
    if not prompts or any(len(shape) < 2 or 0 in shape for shape in shapes):
        raise unreadable(path, f"{kind} weights must include prompt_embeddings (tokens, width)")
    tokens = [
        as_float64(tensor.file[tensor.name]).reshape(-1, tensor.file.shape(tensor.name)[-1]) for tensor in prompts
    ]
    norms = np.concatenate([np.linalg.norm(rows, axis=1) for rows in tokens])
    count = f"{len(tokens[0])} virtual tokens" + (f" in each of {len(tokens)} layers" if len(tokens) > 1 else "")
    span = f"{norms.min():.4g} to {norms.max():.4g}, median {np.median(norms):.4g}"
    width = tokens[0].shape[1]
    other_names = [name for file in files for name in file if not (_PROMPT.fullmatch(name) or _FACTORS.fullmatch(name))]
    trains = f"it trains {count} of width {width}, {_WHERE[kind]}, with norms {span}"
    nearest = f"; {describe_nearest(tokens[0], base)}" if base is not None and kind in _EMBEDDED else ""
    return f"{kind} changes no weights: {trains}{nearest}{unread(other_names)}"
