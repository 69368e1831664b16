"""vLLM: many options are refused, and a module whose full name is not in the model is ignored.

Source: vLLM 0.33, ``vllm.lora``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from lorascope.diagnosis.causes.finding import Finding
from lorascope.diagnosis.runtimes.runtime import (
    Target,
    find_absent_modules,
    find_misfitting_modules,
    largest_rank,
    refusal,
    runtime,
    stored_options,
)
from lorascope.files.printable import first_of

MAX_RANK = 16
"""Default of ``--max-lora-rank``."""
_REQUIRED = ("r", "lora_alpha", "target_modules")
_LOADED = re.compile(
    r"\.lora_[AB]\.weight$|\.lora_embedding_[AB]$|(^|\.)(score|classifier)\.(weight|bias)$|\.base_layer\.weight$"
)


@runtime("vllm")
def check_vllm(target: Target) -> Iterator[Finding]:
    """Find what vLLM refuses, and modules that it ignores."""
    config = target.config
    if missing := [name for name in _REQUIRED if config.get(name) is None]:
        yield refusal(f"adapter_config.json lacks {', '.join(missing)}", "add them")
    options = stored_options(config)
    saved = [name for name in config.get("modules_to_save") or [] if name not in ("classifier", "score")]
    if saved:
        options.append(f"modules_to_save={saved!r}")
    if options:
        yield refusal(f"it does not support {', '.join(options)}", "merge the adapter into the base, and serve that")
    if (rank := largest_rank(target)) > MAX_RANK:
        reason = f"rank {rank} is above --max-lora-rank, {MAX_RANK} by default"
        yield refusal(reason, f"start it with --max-lora-rank {rank}", rank=rank, threshold=MAX_RANK)
    foreign = target.keys_without(_LOADED)
    if foreign and not options:  # an unsupported option explains tensors with other names
        yield refusal(f"it does not load tensors with these names: {first_of(foreign)}",
                      "merge the adapter into the base, and serve that")  # fmt: skip
    yield from find_absent_modules(target, "without a warning")
    yield from find_misfitting_modules(target)
