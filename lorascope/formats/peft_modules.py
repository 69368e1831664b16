"""Modules of a PEFT LoRA that are not one weight of the base model with the same name.

- ``nn.MultiheadAttention`` with the name ``att``: ``att.lora_A`` adapts the weight of query, key and value, which is
  shown as ``att.in_proj``, and ``att.base_layer.out_proj.lora_A`` adapts ``att.out_proj``, whose scale is 2 alpha /
  rank: PEFT 0.21 adds this update twice.
- Head tied to the embedding (``ensure_weight_tying``): PEFT stores the update twice, once transposed.
- ``layer_replication``: layers are positions in a stack of copies of the base model's layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from lorascope.files.printable import printable
from lorascope.files.typed_json import Count, to_typed, unreadable
from lorascope.formats.adapter_faults import AdapterFault
from lorascope.formats.pretrained_weights import OptionalBase
from lorascope.formats.readers import Config
from lorascope.formats.stored_update import AdapterFiles, StoredLoRA, StoredUpdate, in_order

OUT_PROJ = ".base_layer.out_proj"
"""End of the name of the output projection of nn.MultiheadAttention."""
# A longer number is not below _MAX_LAYERS.
_LAYER = re.compile(r"(.*?\.(?:layers?|h)\.)(\d{1,4})(\..*)", re.DOTALL)
_MAX_LAYERS = 10_000  # a short configuration may list ranges that do not fit in memory
_CHANGED_BASE = {
    "pissa_niter": "PEFT subtracts components of a randomized SVD of each base weight while loading, others each time",
    "pissa": "PEFT subtracts the leading singular components of each base weight while loading",
    "olora": "PEFT subtracts the leading components of each base weight's QR decomposition while loading",
    "corda": "it requires the base weights that training started from, which PEFT computes from calibration data",
    "loftq": "PEFT replaces the base weights by quantized ones while loading",
    "lora_ga": "it requires the base weights that training started from, without the initial update",
}


class ReplicationConfig(msgspec.Struct, frozen=True):
    """Setting of a PEFT LoRA whose modules are in a stack of layers: first layers and ends of its ranges."""

    layer_replication: list[tuple[Count, Count]] | None = None


def stacked_base(path: Path, config: Config, modules: Iterable[str], base: OptionalBase) -> OptionalBase:
    """Return the base weights by the names of a PEFT LoRA's modules, whose layers may be positions in a stack."""
    stack = _layer_stack(path, config)
    names = {}
    for name in modules:
        if stack and (match := _LAYER.fullmatch(name)):
            if int(match[2]) >= len(stack):
                must = f"layer of {printable(name)} must be < {len(stack)}, the layers of layer_replication"
                raise AdapterFault("rank", path, f"{must}, got {match[2]}")
            names[name] = f"{match[1]}{stack[int(match[2])]}{match[3]}"
    return base.renamed(names) if base is not None and names else base


def complete_lora(files: AdapterFiles) -> AdapterFiles:
    """Return a PEFT LoRA with the module names and cautions that follow from its modules and configuration."""
    updates, configured = _attention_updates(files.parts)
    is_whole = any(getattr(update, "start", None) is not None for update in updates.values())
    notes = list(_configured_notes(files.config, is_whole))
    if configured:
        notes.append("nn.MultiheadAttention: PEFT 0.21 adds the update of out_proj twice, which |dW| includes")
    for embedding, head in _tied_heads(updates):
        del updates[head]
        configured[head] = head  # patterns of the configuration match the head, too
        tie = f"{printable(head)} is tied to {printable(embedding)}: their update is one, and is counted once"
        notes.append(f"{tie}. PEFT 0.21 adds it twice when it merges the adapter")
    if stack := _layer_stack(files.path, files.config):
        layers = f"{', '.join(map(str, stack[:16]))}{', ...' * (len(stack) > 16)}"
        copies = f"layer_replication: layers are positions in a stack of {len(stack)} copies of base layers ({layers})"
        notes.append(f"{copies}. Copies share their base weight, so the adapter cannot be merged")
    notes += files.notes
    return replace(files, parts=updates, notes=tuple(notes), configured={**files.configured, **configured})


def _attention_updates(updates: Mapping[str, StoredUpdate]) -> tuple[dict[str, StoredUpdate], dict[str, str]]:
    """Return the updates with the names of attention projections, and the configured modules of these names."""
    names: dict[str, str] = {}
    for name in updates:
        if name.endswith(OUT_PROJ):
            module = name.removesuffix(OUT_PROJ)
            names |= {module: f"{module}.in_proj", name: f"{module}.out_proj"}
    renamed = {names.get(name, name): update for name, update in updates.items()}
    configured = {name: stored.removesuffix(OUT_PROJ) for stored, name in names.items()}
    return in_order(renamed), configured


def _tied_heads(updates: Mapping[str, StoredUpdate]) -> Iterator[tuple[str, str]]:
    """Yield pairs of an embedding and a head with the same update, transposed."""
    plain = {name: update for name, update in updates.items() if type(update) is StoredLoRA}
    embeddings = {name: update for name, update in plain.items() if ".lora_embedding_" in update.A.name}
    for embedding, table in embeddings.items():
        for head, update in plain.items():
            if update.shape != table.shape[::-1] or head in embeddings or update.scale != table.scale:
                continue
            # Only now read the factors, because embeddings are large.
            if np.array_equal(update.A.read(), table.B.read().T) and np.array_equal(update.B.read(), table.A.read().T):
                yield embedding, head


def _layer_stack(path: Path, config: Config) -> list[int]:
    """Return the base layer of each layer of the stack; empty without ``layer_replication``."""
    stack: list[int] = []
    for first, end in to_typed(config, ReplicationConfig, path).layer_replication or []:
        if len(stack) + end - first > _MAX_LAYERS:
            raise unreadable(path, f"layer_replication must have <= {_MAX_LAYERS} layers")
        stack += range(first, end)  # PEFT excludes the end as well
    return stack


def _configured_notes(config: Config, is_whole: bool) -> Iterator[str]:
    """Yield cautions about changed base weights, and about updates of some tokens only.

    ``is_whole`` is whether updates include the changes of the base weights.
    """
    start = str(config.get("init_lora_weights", True)).lower()
    kind = next(filter(start.startswith, _CHANGED_BASE), None)
    if kind is not None:
        change = "|dW| is the norm of B A only, not of the change from the original base"
        if is_whole:
            change = "|dW| is the change from the original base, of twice the rank"
        yield f"initialized by {printable(start)}: {_CHANGED_BASE[kind]}; {change}"
    if config.get("alora_invocation_tokens"):
        yield (
            "Activated LoRA: the update applies only from the invocation tokens onward "
            f"({printable(config['alora_invocation_tokens'])}), and PEFT cannot merge it"
        )
