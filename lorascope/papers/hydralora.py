"""HydraLoRA: accuracy on a mixture of tasks, whether routers separate them, and ablations of router and shared A."""

from __future__ import annotations

from functools import partial

import pandas as pd

from lorascope.evidence.statistics.base import Accuracy, MeanOverRows, OfRun

ROUTED = "HydraLoRA, 4 experts"
EVEN, SPLIT = f"{ROUTED}, uniform gates", f"{ROUTED}, separate A's"
TWO = "HydraLoRA, 2 experts"  # only a figure shows it
LORA = "LoRA, rank 12, feed-forward"
FULL_MANY, FULL_ONE, LORA_ONE = "full fine-tuning, four tasks", "full fine-tuning, one task", f"{LORA}, one task"
INFORMATION = "gate_information"
"""Kept table ``module, when, information, chance``: mutual information of task and expert, and its mean by chance."""


def information(table: pd.DataFrame, when: str) -> float:
    """Compute the mutual information of task and expert minus its mean under shuffled tasks, mean over modules."""
    rows = table[table["when"] == when]
    return float((rows["information"] - rows["chance"]).mean())


def gap(full: str, lora: str) -> MeanOverRows:
    """Return by how much full fine-tuning is more accurate than LoRA."""
    return MeanOverRows(Accuracy(full) - Accuracy(lora))


CLAIMS = {
    "hydralora.better": (Accuracy(ROUTED), Accuracy(LORA)),
    "hydralora.gap": (gap(FULL_MANY, LORA), gap(FULL_ONE, LORA_ONE)),
    "hydralora.tasks": (
        OfRun(partial(information, when="end"), INFORMATION, ROUTED),
        OfRun(partial(information, when="start"), INFORMATION, ROUTED),
    ),
    "hydralora.routing": (Accuracy(ROUTED), Accuracy(EVEN)),
    "hydralora.sharing": (Accuracy(ROUTED), Accuracy(SPLIT)),
}
