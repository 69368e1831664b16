"""LISA: norms of embedding and head under LoRA, and a few blocks at a time, on an encoder and a decoder."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd

from lorascope.evidence.statistics.base import Accuracy, Constant, LogLikelihood, OfRun
from lorascope.evidence.statistics.lora import FULL, LOW

ADAPTED, SMALL = "LoRA with embedding", "LoRA with embedding, small initial B"
ADAPTED_DECODER = "LoRA with embedding and head, whole SmolLM2"
SMALL_DECODER = "LoRA with embedding and head, small initial B, whole SmolLM2"
DRAWN, ONCE, ENDS, FOUR = "LISA, 2 blocks", "LISA, 2 blocks, one draw", "LISA, no block", "LISA, 4 blocks"
WHOLE, WHOLE_ONCE = "LISA, 2 of 30 blocks, whole SmolLM2", "LISA, 2 of 30 blocks, one draw, whole SmolLM2"
WHOLE_FULL, WHOLE_LORA = "full fine-tuning, whole SmolLM2", "LoRA, rank 8, whole SmolLM2"
NORMS = "layer_norms"
"""Kept table ``quantity, place, block, value``: norms of the layers of a run, mean over the recorded steps after 0."""


def skew(table: pd.DataFrame, quantity: str, role: str) -> float:
    """Compute log10 of the norm of a role outside the blocks, divided by the median norm of the blocks."""
    rows = table[table["quantity"] == quantity]
    own, blocks = rows.loc[rows["place"] == role, "value"].item(), rows.loc[rows["block"], "value"].median()
    return float(np.log10(own / blocks))


def update_skew(arm: str, role: str) -> OfRun:
    """Return the skew of the update's norm."""
    return OfRun(partial(skew, quantity="update_norm", role=role), NORMS, arm)


def factor_skew(arm: str, role: str) -> OfRun:
    """Return the skew of the norm of the factors minus their initial values."""
    return OfRun(partial(skew, quantity="factor_change", role=role), NORMS, arm)


# Full fine-tuning of a decoder records the norm of its tied tensor as that of the embedding.
CLAIMS = {
    "lisa.embed": (update_skew(SMALL, "embed"), update_skew(FULL, "embed")),
    "lisa.embed_decoder": (update_skew(SMALL_DECODER, "embed"), update_skew(WHOLE_FULL, "embed")),
    "lisa.head_decoder": (update_skew(ADAPTED_DECODER, "head"), update_skew(WHOLE_FULL, "embed")),
    "lisa.learned": (factor_skew(ADAPTED, "embed"), Constant(0.0)),
    "lisa.learned_decoder": (factor_skew(ADAPTED_DECODER, "embed"), Constant(0.0)),
    "lisa.learned_head": (factor_skew(ADAPTED_DECODER, "head"), Constant(0.0)),
    "lisa.parity": (Accuracy(DRAWN), Accuracy(FULL)),
    "lisa.redrawn": (Accuracy(DRAWN), Accuracy(ONCE)),
    "lisa.blocks": (Accuracy(DRAWN), Accuracy(ENDS)),
    "lisa.more": (Accuracy(FOUR), Accuracy(DRAWN)),
    "lisa.over_lora": (Accuracy(DRAWN), Accuracy(LOW)),
    "lisa.decoder": (LogLikelihood(WHOLE), LogLikelihood(WHOLE_LORA)),
    "lisa.decoder_parity": (LogLikelihood(WHOLE), LogLikelihood(WHOLE_FULL)),
    "lisa.decoder_redrawn": (LogLikelihood(WHOLE), LogLikelihood(WHOLE_ONCE)),
}
