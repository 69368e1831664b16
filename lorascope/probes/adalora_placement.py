"""Where low rank pays: one type of weight, or one group of layers, at exactly equal parameters.

Source: AdaLoRA (arXiv 2303.10512), figure 1: the observation that made its authors allot the ranks.

Departs: a small encoder in place of DeBERTaV3-base. The paper does not say how its layers are grouped; here they are
three groups of two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import pandas as pd

from lorascope import plots
from lorascope.analysis.baseline_ranks import equal_parameters
from lorascope.inputs import models
from lorascope.methods import LoRA
from lorascope.probes import rank_statistics
from lorascope.probes.base import Arm, Findings, Probe, encoder_settings, exhibit, register
from lorascope.probes.claims import Claim
from lorascope.runs.run import Run
from lorascope.schema import module_table

TYPES = {"W_q": "q", "W_k": "k", "W_v": "v", "W_o": "o", "W_f1": "ffn_in", "W_f2": "ffn_out"}
BOTTOM, MIDDLE, TOP = "layers 0, 1", "layers 2, 3", "layers 4, 5"
GROUPS = {BOTTOM: (0, 1), MIDDLE: (2, 3), TOP: (4, 5)}
# The vertical axis begins where both classes are guessed.
_GUESS = 0.5

FEED_FORWARD = Claim(
    sentence="The same parameters do more in the feed-forward matrices than in attention.",
    statistic="test accuracy of LoRA on one of the two feed-forward types, mean of both",
    control="test accuracy of LoRA on one of the four attention types at the same parameters, mean of all",
    margin=0.005,
    source="figure 1 (a)",
)
UPPER = Claim(
    sentence="The same parameters do more in the upper layers than in the lower.",
    statistic="test accuracy of LoRA on the last two layers",
    control="test accuracy of LoRA on the first two at the same parameters",
    margin=0.005,
    source="figure 1 (b)",
)


@cache
def _minilm_modules() -> pd.DataFrame:
    return module_table.describe(models.load("minilm"))


def targets() -> dict[str, tuple[str, ...]]:
    """What each arm adapts: a role in all layers, or all six roles in two layers."""
    modules = _minilm_modules()
    linear = modules[modules["role"].isin(list(TYPES.values()))]
    layers = {label: tuple(linear["module"][linear["layer"].isin(group)]) for label, group in GROUPS.items()}
    return {label: (role,) for label, role in TYPES.items()} | layers


def arms(quick: bool) -> list[Arm]:
    """LoRA in nine places, at the least number of parameters that all of them can spend."""
    places = targets()
    ranks = equal_parameters(_minilm_modules(), places)
    # Nine places: half the steps of the other probes, and fewer still in a quick run.
    settings = encoder_settings(quick) | {"steps": 10 if quick else 150}
    return [
        Arm(
            label=label,
            method=LoRA(rank=ranks[label], alpha=float(ranks[label]), targets=place, lr=1e-3, head_lr=1e-3),
            settings=settings,
        )
        for label, place in places.items()
    ]


def judge(runs: Mapping[str, Sequence[Run]]) -> Findings:
    """Feed-forward types against attention types, and the upper layers against the lower."""
    accuracy = {label: rank_statistics.accuracy(found) for label, found in runs.items()}
    attention, feed_forward = list(TYPES)[:4], list(TYPES)[4:]
    verdicts = [
        FEED_FORWARD.judge(_mean_accuracy(accuracy, feed_forward), _mean_accuracy(accuracy, attention)),
        UPPER.judge(accuracy[TOP], accuracy[BOTTOM]),
    ]
    exhibits = [
        exhibit("adapted_types", plots.adapted_types({label: runs[label] for label in part}, start=_GUESS))
        for part in (TYPES, GROUPS)
    ]
    notes = [
        "Held fixed: model, text, splits, batch size, steps, rate, scale 1, and the number of adapter parameters.",
        "Seeds vary head, adapters, data order, dropout. The head trains in every arm.",
    ]
    return Findings(verdicts, exhibits, notes=notes)


def _mean_accuracy(accuracy: Mapping[str, rank_statistics.BySeed], labels: Sequence[str]) -> rank_statistics.BySeed:
    return {seed: sum(accuracy[label][seed] for label in labels) / len(labels) for seed in accuracy[labels[0]]}


PROBE = register(
    Probe(
        name="placement",
        title="AdaLoRA's motive: the same parameters in different places",
        source="Zhang et al., AdaLoRA, arXiv 2303.10512",
        question="Does it matter which type of weight, and which layers, a given number of parameters goes to?",
        quick_budget=90,
        arms=arms,
        judge=judge,
    )
)
