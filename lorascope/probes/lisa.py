"""Probe of LISA's motivation: norms of embedding and head relative to the blocks, for LoRA and full fine-tuning.

The paper claims that LoRA gives embedding and head far larger norms than the blocks, and full fine-tuning does not. Its
figure 2 plots "the weight norm" of every layer, averaged over training, without stating which tensor of LoRA it uses.
The factor of hundreds cannot come from the effective weight, so it must come from the update or from the adapter. This
probe plots both, and judges each against a control without the claimed cause.

Skew of a layer: log10 of the ratio of its norm to the median norm of the blocks, with norms averaged over the recorded
steps.

Source: LISA (arXiv 2403.17919), section 3.1 and figure 2.

Departs:

- A small encoder and a small decoder instead of GPT-2 and LLaMA-2-7B, with smaller ranks.
- The encoder's classifier head starts random, so it is plotted but not judged. Embedding and head are both judged on
  the decoder.
"""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from lorascope.analysis import norms
from lorascope.evidence.statistics import lisa as statistics
from lorascope.methods import LoRA
from lorascope.probes.base import Arm, Probe, decoder_settings, encoder_settings
from lorascope.runs.run import Run


def arms() -> list[Arm]:
    """Return the registered arms: LoRA with PEFT's initial B of the embedding and with a small one, on both models."""
    decoder = decoder_settings() | {"test_size": 200}
    encoder = LoRA(rank=16, alpha=16.0, targets=("all-linear", "embed"))
    both_ends = replace(encoder, targets=("all-linear", "embed", "lm_head"))
    return [
        Arm(label=statistics.ADAPTED, method=encoder, settings=encoder_settings()),
        Arm(label=statistics.SMALL, method=replace(encoder, embedding_init="linear"), settings=encoder_settings()),
        *(
            Arm(label=label, method=method, settings=decoder, model="smollm2")
            for label, method in (
                (statistics.ADAPTED_DECODER, both_ends),
                (statistics.SMALL_DECODER, replace(both_ends, embedding_init="linear")),
            )
        ),
    ]


def keep_layer_norms(run: Run) -> pd.DataFrame:
    """Return the kept table ``layer_norms``, with the norms that were recorded; see ``evidence.statistics.lisa``."""
    recorded = set(run.table["quantity"])
    layers = pd.concat(
        norms.mean_over_steps(norms.pool(norms.select(run.table, quantity))).astype({"place": "str"})
        for quantity in ("update_norm", "factor_change", "adapter_norm")
        if quantity in recorded
    )
    found = layers.assign(block=layers["layer"].notna())[["quantity", "place", "block", "value"]]
    return found.astype({"quantity": "str"}).reset_index(drop=True)


PROBE = Probe(
    name="lisa",
    title="LISA's motivation: norms of embedding and head with LoRA",
    source="Pan et al., LISA, arXiv 2403.17919",
    question="Are LoRA's norms larger in embedding and head than in the blocks, and is that learned or initial?",
    arms=arms,
    keep={
        (statistics.NORMS, label): keep_layer_norms
        for label in (
            statistics.FULL,
            statistics.ADAPTED,
            statistics.SMALL,
            statistics.WHOLE_FULL,
            statistics.ADAPTED_DECODER,
            statistics.SMALL_DECODER,
        )
    },
)
