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

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lorascope import observe, plots
from lorascope.analysis import norms
from lorascope.methods import Full, LoRA
from lorascope.probes.base import Arm, Findings, Probe, encoder_settings, make_report_figure, register
from lorascope.probes.claims import Claim, Verdict
from lorascope.runs.run import Run

FULL, ADAPTED = "full fine-tuning", "LoRA with embedding"
FULL_DECODER, ADAPTED_DECODER = "full fine-tuning, SmolLM2", "LoRA with embedding and head, SmolLM2"

# The paper claims factors of hundreds. A factor of two is a lenient lower bound for "far larger".
_MARGIN = float(np.log10(2))


def _layer_claims(layer: str, where: str) -> tuple[Claim, Claim]:
    return (
        Claim(
            sentence=f"LoRA gives the {layer} a larger update norm, relative to the blocks, than full fine-tuning "
            f"({where}).",
            statistic=f"skew of the {layer}'s update norm with LoRA (log10)",
            control="the same with full fine-tuning, at the same steps and seeds",
            margin=_MARGIN,
            source="section 3.1, figure 2",
        ),
        Claim(
            sentence=f"LoRA training increases the {layer}'s adapter norm relative to the blocks ({where}).",
            statistic=f"skew of the {layer}'s adapter norm, mean over training (log10)",
            control="the same at step 0, with the random initialization",
            margin=_MARGIN,
            source="section 3.1, figure 2",
        ),
    )


BOTTOM, BOTTOM_LEARNED = _layer_claims("embedding", "minilm")
DECODER_BOTTOM, DECODER_BOTTOM_LEARNED = _layer_claims("embedding", "SmolLM2, first blocks")
DECODER_TOP, DECODER_TOP_LEARNED = _layer_claims("head", "SmolLM2, first blocks")


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
    decoder = {
        "steps": 30,
        "batch_size": 8,
        "test_size": 200,
        "eval_size": 100,
        "eval_every": 0,
        "observe": [observe.norms(every=5)],
    }
    both_ends = LoRA(rank=16, alpha=16.0, targets=("all-linear", "embed", "lm_head"), lr=1e-3)
    shared: dict[str, Any] = {"settings": decoder, "model": "smollm2", "blocks": 6, "cost": 10.0}
    return [
        *found,
        Arm(label=FULL_DECODER, method=Full(lr=5e-5), **shared),
        Arm(label=ADAPTED_DECODER, method=both_ends, **shared),
    ]


def judge(runs: Mapping[str, Sequence[Run]]) -> Findings:
    """Compare the skew of embedding and head with full fine-tuning and with the initialization."""
    verdicts = _judge_layer(runs[ADAPTED], runs[FULL], "embed", BOTTOM, BOTTOM_LEARNED)
    encoder = {FULL: runs[FULL], ADAPTED: runs[ADAPTED]}
    figures = [
        make_report_figure("mean_norm", plots.mean_norm(encoder)),
        make_report_figure("norm_over_steps", plots.norm_over_steps(encoder)),
    ]
    notes = [
        "Held fixed: model, data, splits, batch size, number of steps. Seeds vary the classifier head, adapter "
        "initialization, data order and dropout.",
        "The classifier head of minilm starts random and trains in both arms. It is plotted as head, and no claim uses "
        "it.",
        "The update of an embedding's adapter scales with its random B: in minilm |B a| is about 20 |a|, and |b A| of "
        "a linear layer is about 0.6 |b|, a factor of 34 (log10: 1.53). Full fine-tuning has no such factor, so the "
        "comparison does not remove it.",
    ]
    if ADAPTED_DECODER in runs:
        adapted, full = runs[ADAPTED_DECODER], runs[FULL_DECODER]
        verdicts += _judge_layer(adapted, full, "embed", DECODER_BOTTOM, DECODER_BOTTOM_LEARNED)
        # Full fine-tuning records the norm of the tied tensor as that of the embedding.
        verdicts += _judge_layer(adapted, full, "head", DECODER_TOP, DECODER_TOP_LEARNED, full_role="embed")
        figures.append(make_report_figure("mean_norm", plots.mean_norm({FULL_DECODER: full, ADAPTED_DECODER: adapted})))
        notes.append(
            "SmolLM2's head and embedding share one tensor, so full fine-tuning of this tensor is the control of both. "
            "LoRA's adapter of the head has no random B, so it is the comparison for the adapter of the embedding."
        )
    else:
        notes.append("The first blocks of SmolLM2, with embedding and head, are trained only in a full run.")
    return Findings(verdicts, figures, {"Skew by layer": skew_table(runs)}, notes)


def _judge_layer(
    adapted: Sequence[Run], full: Sequence[Run], role: str, update: Claim, learned: Claim, full_role: str | None = None
) -> list[Verdict]:
    def over_seeds(found: Sequence[Run], quantity: str, role: str, start: bool = False) -> dict[int, float]:
        return {run.seed: skew(run, quantity, role, start) for run in found}

    return [
        update.judge(over_seeds(adapted, "update_norm", role), over_seeds(full, "update_norm", full_role or role)),
        learned.judge(over_seeds(adapted, "adapter_norm", role), over_seeds(adapted, "adapter_norm", role, start=True)),
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


def skew_table(runs: Mapping[str, Sequence[Run]]) -> pd.DataFrame:
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


PROBE = register(
    Probe(
        name="lisa",
        title="LISA's motivation: norms of embedding and head with LoRA",
        source="Pan et al., LISA, arXiv 2403.17919",
        question="Are LoRA's norms larger in embedding and head than in the blocks, and is that learned or initial?",
        quick_budget=50,
        arms=arms,
        judge=judge,
        former_labels={"LoRA, embeddings too": ADAPTED, "LoRA, both ends too, SmolLM2": ADAPTED_DECODER},
    )
)
