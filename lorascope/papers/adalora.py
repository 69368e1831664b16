"""AdaLoRA: where the rank goes, agreement of seeds and tasks, accuracy, and the places where the same rank helps."""

from __future__ import annotations

from lorascope.evidence.statistics.base import Accuracy, Constant, OfPairs, OfRun, average
from lorascope.evidence.statistics.lora import LOW
from lorascope.evidence.statistics.ranks import FEED_FORWARD, RANKS, agreement, of_roles, residual_tau, top_fraction

ADAPTED = "AdaLoRA, from rank 12 to 8"
DOMAINS, UNIFORM = f"{ADAPTED}, domains", "AdaLoRA, from rank 8 to 8"
# Only figures show these.
SMALLER = {1: "AdaLoRA, from rank 2 to 1", 2: "AdaLoRA, from rank 4 to 2", 4: "AdaLoRA, from rank 6 to 4"}
FREE, RAW = f"{ADAPTED}, no penalty", f"{ADAPTED}, sensitivity only"
ATTENTION_TYPES, FEED_FORWARD_TYPES = ("W_q", "W_k", "W_v", "W_o"), ("W_f1", "W_f2")
BOTTOM, TOP = "layers 0, 1", "layers 4, 5"

CLAIMS = {
    "placement.ffn": (average(map(Accuracy, FEED_FORWARD_TYPES)), average(map(Accuracy, ATTENTION_TYPES))),
    "placement.upper": (Accuracy(TOP), Accuracy(BOTTOM)),
    "adalora.ffn": (of_roles(ADAPTED, *FEED_FORWARD), Constant(1 / 3)),
    "adalora.top": (OfRun(top_fraction, RANKS, ADAPTED), Constant(1 / 3)),
    "adalora.stable": (agreement(ADAPTED), Constant(0.0)),
    "adalora.beyond": (OfPairs(residual_tau, RANKS, ADAPTED, ADAPTED), Constant(0.0)),
    "adalora.task": (average([agreement(ADAPTED), agreement(DOMAINS)]), agreement(ADAPTED, DOMAINS)),
    "adalora.better": (Accuracy(ADAPTED), Accuracy(LOW)),
    "adalora.allocation": (Accuracy(ADAPTED), Accuracy(UNIFORM)),
}
