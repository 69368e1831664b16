"""Probe of LISA's motivation: norms of embedding and head relative to the blocks, for LoRA and full fine-tuning.

The paper claims that LoRA gives embedding and head far larger norms than the blocks, and full fine-tuning does not. Its
figure 2 plots "the weight norm" of every layer, averaged over training, without stating which tensor of LoRA it uses.
The factor of hundreds cannot come from the effective weight, so it must come from the update or from the adapter. This
probe plots both, and judges each against a control without the claimed cause.

Skew of a layer: log10 of the ratio of its norm to the median norm of the blocks, with norms averaged over the recorded
steps.

Source: LISA (arXiv 2403.17919), section 3.1 and figure 2.

Departs:

- A small encoder and the first blocks of a small decoder instead of GPT-2 and LLaMA-2-7B, with smaller ranks.
- The encoder's classifier head starts random, so it is plotted but not judged. Embedding and head are both judged on
  the decoder.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from lorascope import observe
from lorascope.analysis import norms
from lorascope.evidence.statistics import lisa as statistics
from lorascope.methods import Full, LoRA
from lorascope.probes.base import (
    HELD_FIXED,
    Arm,
    Probe,
    ReportFigure,
    draw,
    encoder_settings,
    registered_decoder_settings,
    registered_settings,
    select,
)
from lorascope.probes.seed_statistics import EachRun, Runs
from lorascope.runs.run import Run

FULL, ADAPTED = "full fine-tuning", "LoRA with embedding"
FULL_DECODER, ADAPTED_DECODER = "full fine-tuning, SmolLM2", "LoRA with embedding and head, SmolLM2"


def arms(quick: bool) -> list[Arm]:
    """Return the arms: full fine-tuning and LoRA, on an encoder and, in a full run, on a decoder.

    LoRA adapts all linear layers, the embedding and, on the decoder, the head.
    """
    settings = encoder_settings(quick)
    encoder = LoRA(rank=16, alpha=16.0, targets=("all-linear", "embed"), lr=1e-3, head_lr=1e-3)
    found = [
        Arm(label=FULL, method=Full(lr=1e-4, head_lr=1e-4), settings=settings),
        Arm(label=ADAPTED, method=encoder, settings=settings),
    ]
    if quick:
        return found
    # A step of the decoder costs as much as ten of the encoder, so there are few steps and small evaluation sets.
    decoder: dict[str, Any] = {"steps": 30, "batch_size": 8, "test_size": 200, "eval_size": 100, "eval_every": 0}
    decoder |= {"observe": [observe.norms(every=5)]}
    both_ends = LoRA(rank=16, alpha=16.0, targets=("all-linear", "embed", "lm_head"), lr=1e-3)
    shared: dict[str, Any] = {"settings": decoder, "model": "smollm2", "blocks": 6, "cost": 10.0}
    return [
        *found,
        Arm(label=FULL_DECODER, method=Full(lr=5e-5), **shared),
        Arm(label=ADAPTED_DECODER, method=both_ends, **shared),
    ]


def registered() -> list[Arm]:
    """Return the registered arms: LoRA with PEFT's initial B of the embedding and with a small one, on both models."""
    decoder = registered_decoder_settings() | {"test_size": 200}
    encoder = LoRA(rank=16, alpha=16.0, targets=("all-linear", "embed"))
    both_ends = replace(encoder, targets=("all-linear", "embed", "lm_head"))
    return [
        Arm(label=ADAPTED, method=encoder, settings=registered_settings()),
        Arm(label=statistics.SMALL, method=replace(encoder, embedding_init="linear"), settings=registered_settings()),
        *(
            Arm(label=label, method=method, settings=decoder, model="smollm2")
            for label, method in (
                (statistics.ADAPTED_DECODER, both_ends),
                (statistics.SMALL_DECODER, replace(both_ends, embedding_init="linear")),
            )
        ),
    ]


def skew(run: Run, quantity: str, role: str, start: bool = False) -> float:
    """Compute log10 of the ratio of a role's norm to the median norm of the blocks.

    Parameters
    ----------
    run : Run
        Run that recorded the quantity.
    quantity : str
        Norm recorded per module, such as ``"update_norm"``.
    role : str
        Role outside the blocks: ``"embed"`` or ``"head"``.
    start : bool
        Use the norms at step 0 instead of their mean over all later recorded steps. Default False.
    """
    layers = _ratios(run, quantity, start)
    return float(np.log10(layers.loc[layers["place"] == role, "value"].iloc[0]))


def _ratios(run: Run, quantity: str, start: bool) -> pd.DataFrame:
    """Divide the norm of every layer by the median norm of the blocks."""
    cells = norms.pool(norms.select(run.table, quantity))
    return norms.ratio_to_block_median(cells[cells["step"] == 0] if start else norms.mean_over_steps(cells))


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


def _skewed_update(role: str, adapted: str, full: str) -> tuple[EachRun, EachRun]:
    """Return statistic and control of the claim that LoRA's update is more skewed than that of full fine-tuning."""
    # Full fine-tuning of a decoder records the norm of the tied tensor as that of the embedding.
    found, control = (partial(skew, quantity="update_norm", role=each) for each in (role, "embed"))
    return EachRun(found, adapted), EachRun(control, full)


def _skewed_adapter(role: str, adapted: str) -> tuple[EachRun, EachRun]:
    """Return statistic and control of the claim that training increases the skew of LoRA's adapter."""
    found = partial(skew, quantity="adapter_norm", role=role)
    return EachRun(found, adapted), EachRun(partial(found, start=True), adapted)


def figures(runs: Runs) -> list[ReportFigure]:
    """Draw the norms by layer and over the steps."""
    encoder, decoder = select(runs, FULL, ADAPTED), select(runs, FULL_DECODER, ADAPTED_DECODER)
    shown = [draw("mean_norm", encoder), draw("norm_over_steps", encoder)]
    return [*shown, draw("mean_norm", decoder)] if decoder else shown


def skew_table(runs: Runs) -> pd.DataFrame:
    """Tabulate the ratio of embedding and head norms to the median block, by arm, quantity and time.

    Ratios are geometric means over seeds.
    """
    rows = []
    for label, found in runs.items():
        for quantity, start in (("update_norm", False), ("adapter_norm", False), ("adapter_norm", True)):
            if (found[0].table["quantity"] == quantity).any():
                ends = [role for role in ("embed", "head") if role in set(_ratios(found[0], quantity, start)["place"])]
                factors = {role: 10 ** np.mean([skew(run, quantity, role, start) for run in found]) for role in ends}
                moment = "step 0" if start else "mean over training"
                rows.append({"": label, "norm": quantity.replace("_", " "), "when": moment} | factors)
    return pd.DataFrame(rows)


PROBE = Probe(
    name="lisa",
    title="LISA's motivation: norms of embedding and head with LoRA",
    source="Pan et al., LISA, arXiv 2403.17919",
    question="Are LoRA's norms larger in embedding and head than in the blocks, and is that learned or initial?",
    quick_budget=50,
    arms=arms,
    registered=registered,
    keep={
        (statistics.NORMS, label): keep_layer_norms
        for label in (
            FULL,
            ADAPTED,
            statistics.SMALL,
            statistics.WHOLE_FULL,
            statistics.ADAPTED_DECODER,
            statistics.SMALL_DECODER,
        )
    },
    claims={
        "lisa.embed": _skewed_update("embed", ADAPTED, FULL),
        "lisa.learned": _skewed_adapter("embed", ADAPTED),
        "lisa.embed_decoder": _skewed_update("embed", ADAPTED_DECODER, FULL_DECODER),
        "lisa.learned_decoder": _skewed_adapter("embed", ADAPTED_DECODER),
        "lisa.head_decoder": _skewed_update("head", ADAPTED_DECODER, FULL_DECODER),
        "lisa.learned_head": _skewed_adapter("head", ADAPTED_DECODER),
    },
    figures=figures,
    tables=lambda runs: {"Skew by layer": skew_table(runs)},
    notes=lambda runs: [
        HELD_FIXED,
        "The classifier head of minilm starts random and trains in both arms. It is plotted as head, and no claim uses "
        "it.",
        "The update of an embedding's adapter scales with its random B: in minilm |B a| is about 20 |a|, and |b A| of "
        "a linear layer is about 0.6 |b|, a factor of 34 (log10: 1.53). Full fine-tuning has no such factor, so the "
        "comparison does not remove it.",
        "SmolLM2's head and embedding share one tensor, so full fine-tuning of this tensor is the control of both. "
        "LoRA's adapter of the head has no random B, so it is the comparison for the adapter of the embedding."
        if ADAPTED_DECODER in runs
        else "The first blocks of SmolLM2, with embedding and head, are trained only in a full run.",
    ],
    former_labels={"LoRA, embeddings too": ADAPTED, "LoRA, both ends too, SmolLM2": ADAPTED_DECODER},
)
