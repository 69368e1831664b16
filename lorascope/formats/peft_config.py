"""Settings of PEFT that adapters and runs share: initializations that change the base, and the schedule of AdaLoRA."""

from __future__ import annotations

import msgspec

from lorascope.files.typed_json import Count, Finite, Positive

RESIDUAL_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")


class Allocation(msgspec.Struct, frozen=True):
    """AdaLoRA's budget and schedule in a PEFT configuration, also under the names of lorascope."""

    kind: str | None = None
    target_rank: Finite = 1
    target_r: Finite = 1
    init_rank: Positive = 1
    init_r: Positive = 1
    tinit: Count = 0
    deltaT: Positive = 1
    tfinal: Count = 0
    total_step: Count | None = None
