"""Probe of AdaLoRA's motivation: LoRA on one weight type or one group of layers, with exactly equal parameters.

Source: AdaLoRA (arXiv 2303.10512), figure 1, which motivates the allocation of ranks.

Departs:

- A small encoder instead of DeBERTaV3-base.
- Three groups of two layers; the paper does not state its groups.
"""

from __future__ import annotations

from functools import cache

import pandas as pd

from lorascope.analysis.baseline_ranks import equal_parameters
from lorascope.evidence.statistics.adalora import BOTTOM, TOP
from lorascope.inputs import models
from lorascope.methods import LoRA
from lorascope.probes.base import Arm, Probe, encoder_settings
from lorascope.schema import module_table

TYPES = {"W_q": "q", "W_k": "k", "W_v": "v", "W_o": "o", "W_f1": "ffn_in", "W_f2": "ffn_out"}
MIDDLE = "layers 2, 3"
GROUPS = {BOTTOM: (0, 1), MIDDLE: (2, 3), TOP: (4, 5)}


@cache
def _minilm_modules() -> pd.DataFrame:
    return module_table.describe(models.load("minilm"))


def targets() -> dict[str, tuple[str, ...]]:
    """Return the targets of each arm: one role in all layers, or all six roles in two layers."""
    modules = _minilm_modules()
    linear = modules[modules["role"].isin(list(TYPES.values()))]
    layers = {label: tuple(linear["module"][linear["layer"].isin(group)]) for label, group in GROUPS.items()}
    return {label: (role,) for label, role in TYPES.items()} | layers


def arms() -> list[Arm]:
    """Return the registered arms: LoRA on the eight targets that claims compare, with equal parameters."""
    adapted = targets()
    ranks = equal_parameters(_minilm_modules(), adapted)
    return [
        Arm(
            label=label,
            method=LoRA(rank=ranks[label], alpha=float(ranks[label]), targets=chosen),
            settings=encoder_settings(),
        )
        for label, chosen in adapted.items()
        if label != MIDDLE
    ]


PROBE = Probe(
    name="placement",
    title="AdaLoRA's motivation: equal parameters in different modules",
    source="Zhang et al., AdaLoRA, arXiv 2303.10512",
    question="Does accuracy depend on which weight type or which layers are adapted, at equal parameters?",
    arms=arms,
)
