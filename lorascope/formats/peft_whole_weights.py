"""Weights that an adapter stores in addition to the factors: full values, rows of tokens, biases, ignored tensors.

PEFT stores full values for ``modules_to_save``, for biases, and for the base of an adapted embedding or a resized
vocabulary. ``trainable_token_indices`` stores the new rows of some tokens under the name ``trainable_tokens_delta``.
Adapters of image models store differences of biases (``diff_b``, ``b_norm``) and new weights (``set_weight``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec

from lorascope.files.printable import printable
from lorascope.files.typed_json import Count, to_typed
from lorascope.formats.adapter_faults import AdapterFault
from lorascope.formats.stored_update import AdapterFiles, StoredTensor, plain_name, stored_tensors

Kind = Literal["full", "copy", "tokens", "bias", "bias update", "bias difference", "ignored", "unread"]
# Kinds by the end of their names, the first that fits.
_ENDS: dict[str, Kind] = {
    ".lora_B.bias": "bias update",
    ".base_layer.bias": "bias",
    ".bias": "bias",
    ".token_adapter.trainable_tokens_delta": "tokens",
    ".base_layer.weight": "copy",
    ".weight": "full",
}
_IMAGE_ENDS: dict[str, Kind] = {".diff_b": "bias difference", ".b_norm": "bias difference", ".set_weight": "full"}
UNUSED = re.compile(r"\.lora_(velora_embed|monteclora_sampler)(\.|$)")
"""Tensors of VeLoRA and MonteCLoRA that have no effect after training."""


class TokensConfig(msgspec.Struct, frozen=True):
    """Setting of a PEFT adapter with rows of tokens as whole weights: ids in the embedding, or by module."""

    trainable_token_indices: list[Count] | dict[str, list[Count]] | None = None


@dataclass(frozen=True)
class WholeWeight:
    """Whole weight in an adapter: a stored tensor that is not a factor; ``rows`` are the token ids of its rows."""

    kind: Kind
    module: str
    tensor: StoredTensor
    rows: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.tensor.shape)


def whole_weights(files: AdapterFiles) -> list[WholeWeight]:
    """Return the whole weights that a PEFT or other adapter stores: its tensors that are not factors.

    Raises
    ------
    ValueError
        The indices of ``trainable_token_indices`` do not fit the stored rows.
    """
    tensors = {plain_name(tensor.name): tensor for tensor in stored_tensors(files.files)}
    weights = []
    # PEFT ignores other tensors when it loads an adapter; what other programs do is not known.
    other: Kind = "ignored" if "peft_type" in files.config else "unread"
    ends = dict(_ENDS)
    if "spelling" in files.config:
        ends |= _IMAGE_ENDS
    for name in files.others:
        module, kind = name, other
        end = next(filter(name.endswith, ends), "")
        if end and not UNUSED.search(name):
            module, kind = name.removesuffix(end), ends[end]
        rows = _token_rows(files, module, tensors[name]) if kind == "tokens" else ()
        weights.append(WholeWeight(kind, module, tensors[name], rows))
    return weights


def _token_rows(files: AdapterFiles, module: str, tensor: StoredTensor) -> tuple[int, ...]:
    """Return the indices of the stored rows of a token table."""
    indices = to_typed(files.config, TokensConfig, files.path).trainable_token_indices or []
    if isinstance(indices, Mapping):
        # A key is the end of a module's name, as in target_modules.
        matches = [rows for end, rows in indices.items() if f".{module}".endswith(f".{end}")]
        indices = next(iter(matches), [])
    if len(indices) != tensor.shape[0]:
        must = f"tokens of {printable(module)} must be those of trainable_token_indices ({len(indices)})"
        raise AdapterFault("rank", files.path, f"{must}, got {tensor.shape[0]} rows")
    return tuple(indices)
