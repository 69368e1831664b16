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
from lorascope.inputs import models
from lorascope.methods import LoRA
from lorascope.probes.base import SEEDS_VARY, Arm, Probe, draw, encoder_settings, registered_settings, select
from lorascope.probes.seed_statistics import EachRun, accuracy, average
from lorascope.schema import module_table

TYPES = {"W_q": "q", "W_k": "k", "W_v": "v", "W_o": "o", "W_f1": "ffn_in", "W_f2": "ffn_out"}
BOTTOM, MIDDLE, TOP = "layers 0, 1", "layers 2, 3", "layers 4, 5"
GROUPS = {BOTTOM: (0, 1), MIDDLE: (2, 3), TOP: (4, 5)}
_GUESS = 0.5  # chance level of two classes; the vertical axis starts here


@cache
def _minilm_modules() -> pd.DataFrame:
    return module_table.describe(models.load("minilm"))


def targets() -> dict[str, tuple[str, ...]]:
    """Return the targets of each arm: one role in all layers, or all six roles in two layers."""
    modules = _minilm_modules()
    linear = modules[modules["role"].isin(list(TYPES.values()))]
    layers = {label: tuple(linear["module"][linear["layer"].isin(group)]) for label, group in GROUPS.items()}
    return {label: (role,) for label, role in TYPES.items()} | layers


def arms(quick: bool) -> list[Arm]:
    """Return the arms: LoRA on nine targets, at the smallest parameter count that all of them can match exactly."""
    adapted = targets()
    ranks = equal_parameters(_minilm_modules(), adapted)
    # Nine arms are expensive, so each takes half the steps of the other probes, and even fewer in a quick run.
    settings = encoder_settings(quick) | {"steps": 10 if quick else 150}
    return [
        Arm(
            label=label,
            method=LoRA(rank=ranks[label], alpha=float(ranks[label]), targets=chosen, lr=1e-3, head_lr=1e-3),
            settings=settings,
        )
        for label, chosen in adapted.items()
    ]


def registered() -> list[Arm]:
    """Return the registered arms: LoRA on the eight targets that claims compare, with equal parameters."""
    adapted = targets()
    ranks = equal_parameters(_minilm_modules(), adapted)
    return [
        Arm(
            label=label,
            method=LoRA(rank=ranks[label], alpha=float(ranks[label]), targets=chosen),
            settings=registered_settings(),
        )
        for label, chosen in adapted.items()
        if label != MIDDLE
    ]


PROBE = Probe(
    name="placement",
    title="AdaLoRA's motivation: equal parameters in different modules",
    source="Zhang et al., AdaLoRA, arXiv 2303.10512",
    question="Does accuracy depend on which weight type or which layers are adapted, at equal parameters?",
    quick_budget=90,
    arms=arms,
    registered=registered,
    claims={
        "placement.ffn": (
            average(EachRun(accuracy, label) for label in ("W_f1", "W_f2")),
            average(EachRun(accuracy, label) for label in ("W_q", "W_k", "W_v", "W_o")),
        ),
        "placement.upper": (EachRun(accuracy, TOP), EachRun(accuracy, BOTTOM)),
    },
    figures=lambda runs: [draw("adapted_types", select(runs, *part), start=_GUESS) for part in (TYPES, GROUPS)],
    notes=lambda runs: [
        "Held fixed: model, data, splits, batch size, steps, learning rate, scale 1, and the number of adapter "
        "parameters.",
        f"{SEEDS_VARY} The head trains in every arm.",
    ],
)
