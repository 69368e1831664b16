"""Reader of LoRA adapters for llama.cpp: GGUF files whose ``general.type`` is ``adapter``.

Each weight has ``.lora_a`` (rank, in) and ``.lora_b`` (out, rank), and all have one ``adapter.lora.alpha``. The scale
is alpha / rank, or 1 if alpha is 0. Modules have llama.cpp's names, such as ``blk.0.attn_q``.

llama.cpp permutes the rows of queries and keys in models like LLaMA. Norms and singular values equal those of the
original adapter, but rows differ, and no weights of a base have these names.

Source: llama.cpp (``convert_lora_to_gguf.py``, ``src/llama-adapter.cpp``).
"""

from __future__ import annotations

import re
from pathlib import Path

from lorascope.files.printable import printable
from lorascope.files.typed_json import Finite, to_typed, unreadable
from lorascope.formats.adapter_faults import AdapterFault
from lorascope.formats.peft_factors import group_factors
from lorascope.formats.pretrained_weights import OptionalBase
from lorascope.formats.readers import Config, WeightFiles, reads
from lorascope.formats.stored_update import AdapterFiles, StoredLoRA

_FACTOR = re.compile(r"(?s)(?P<module>.+)\.weight\.(?P<factor>lora_a|lora_b)")
_PERMUTED = "llama.cpp permutes the rows of queries and keys: norms and singular values are kept, rows are not"
_EMBEDDING = "token_embd"


@reads(lambda config, names: config.get("general.type") == "adapter", "LoRA in GGUF files")
def read_gguf(path: Path, config: Config, files: WeightFiles, base: OptionalBase) -> AdapterFiles:
    """Read the modules of a LoRA adapter in GGUF files."""
    if config.get("adapter.type") != "lora":
        raise unreadable(path, f"adapter.type must be lora, got {printable(config.get('adapter.type'))}")
    module_factors, other_names = group_factors(files, _FACTOR)
    alpha = to_typed(config.get("adapter.lora.alpha", 0.0), Finite, f"adapter.lora.alpha of {path}")
    updates = {}
    for module, factors in module_factors.items():
        if missing := {"lora_a", "lora_b"} - factors.keys():
            raise AdapterFault("incomplete", path, f"{printable(module)} has no {min(missing)}")
        a, b = factors["lora_a"], factors["lora_b"]
        rank = a.shape[0]
        if rank != b.shape[1] or not rank:
            reason = f"{printable(module)} must have factors of one rank, got {rank} and {b.shape[1]}"
            raise AdapterFault("shape", path, reason)
        updates[module] = StoredLoRA(b, a, alpha / rank if alpha else 1.0, module == _EMBEDDING)
    if not updates:
        raise unreadable(path, "it has no tensor whose name ends in .lora_a")
    model = config.get("general.base_model.0.name") or config.get("general.architecture")
    described = {"spelling": "gguf", "lora_alpha": alpha, "base_model_name_or_path": str(model or "unknown")}
    notes = (_PERMUTED,) * any(module.endswith((".attn_q", ".attn_k")) for module in updates)
    return AdapterFiles(path, described, updates, other_names, files, notes=notes)
