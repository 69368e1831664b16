"""LISA's motivation: under LoRA the outer layers carry far larger norms than the blocks, under full fine-tuning not.

The paper's figure 2 draws "the weight norm" of every layer, averaged over training, without saying which tensor of LoRA
is meant. Its factor of hundreds cannot be the effective weight, so it is the update or the adapter. Both are drawn;
each is judged against what would give the same picture without the claimed cause.

Skew of a layer: log10 of its norm, averaged over the recorded steps, over the median of the blocks' norms.

Source: LISA (arXiv 2403.17919), section 3.1 and figure 2.

Departs: a small encoder and the first blocks of a small decoder in place of GPT-2 and LLaMA-2-7B; ranks to match. The
encoder's classifier starts random, so it is drawn but not judged; both ends are judged on the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lorascope import observe, plots
from lorascope.analysis import norms
from lorascope.methods import Full, LoRA
from lorascope.probes.base import Arm, Findings, Probe, encoder_settings, exhibit, register
from lorascope.probes.claims import Claim, Verdict
from lorascope.runs.run import Run

FULL, ADAPTED = "full fine-tuning", "LoRA, embeddings too"
FULL_DECODER, ADAPTED_DECODER = "full fine-tuning, SmolLM2", "LoRA, both ends too, SmolLM2"

# A factor of two is the least that one would call "far larger"; the paper says hundreds.
_MARGIN = float(np.log10(2))


def _layer_claims(layer: str, where: str) -> tuple[Claim, Claim]:
    return (
        Claim(
            sentence=f"LoRA moves the {layer} more, against the blocks, than full fine-tuning does ({where}).",
            statistic=f"skew of the {layer}'s update norm under LoRA (log10)",
            control="the same under full fine-tuning, at the same steps and seeds",
            margin=_MARGIN,
            source="section 3.1, figure 2",
        ),
        Claim(
            sentence=f"Training under LoRA raises the {layer}'s adapter norm above the blocks' ({where}).",
            statistic=f"skew of the {layer}'s adapter norm over training (log10)",
            control="the same before the first step: what initialisation alone draws",
            margin=_MARGIN,
            source="section 3.1, figure 2",
        ),
    )


BOTTOM, BOTTOM_LEARNED = _layer_claims("embedding", "minilm")
DECODER_BOTTOM, DECODER_BOTTOM_LEARNED = _layer_claims("embedding", "SmolLM2, first blocks")
DECODER_TOP, DECODER_TOP_LEARNED = _layer_claims("head", "SmolLM2, first blocks")


def arms(quick: bool) -> list[Arm]:
    """Full fine-tuning and LoRA with adapters on every linear and on the ends, on an encoder and on a decoder."""
    settings = encoder_settings(quick)
    encoder = LoRA(rank=16, alpha=16.0, targets=("all-linear", "embed"), lr=1e-3, head_lr=1e-3)
    found = [
        Arm(label=FULL, method=Full(lr=1e-4, head_lr=1e-4), settings=settings),
        Arm(label=ADAPTED, method=encoder, settings=settings),
    ]
    if quick:
        return found
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
    """The skew of the ends, against full fine-tuning and against the initialisation."""
    verdicts = _judge_layer(runs[ADAPTED], runs[FULL], "embed", BOTTOM, BOTTOM_LEARNED)
    encoder = {FULL: runs[FULL], ADAPTED: runs[ADAPTED]}
    exhibits = [
        exhibit("mean_norm", plots.mean_norm(encoder)),
        exhibit("norm_over_steps", plots.norm_over_steps(encoder)),
    ]
    notes = [
        "Held fixed: model, text, splits, batch size, number of steps. Seeds vary head, adapters, data order, dropout.",
        "The classifier of minilm starts random and trains in both: it is drawn as head, and enters no claim.",
        "The update of an embedding's adapter scales with its random B: in minilm |B a| is near 20 |a|, a linear's "
        "|b A| near 0.6 |b|, a factor of 34 (log10 1.53). Full fine-tuning has no such factor, and takes none off.",
    ]
    if ADAPTED_DECODER in runs:
        adapted, full = runs[ADAPTED_DECODER], runs[FULL_DECODER]
        verdicts += _judge_layer(adapted, full, "embed", DECODER_BOTTOM, DECODER_BOTTOM_LEARNED)
        verdicts += _judge_layer(adapted, full, "head", DECODER_TOP, DECODER_TOP_LEARNED, full_role="embed")
        exhibits.append(exhibit("mean_norm", plots.mean_norm({FULL_DECODER: full, ADAPTED_DECODER: adapted})))
        notes.append(
            "SmolLM2's head is its embedding: full fine-tuning trains one tensor, which is the control of both ends. "
            "The adapter of its head end has no random B, and is the comparison for that of the embedding end."
        )
    else:
        notes.append("SmolLM2's first blocks, with both ends, belong to the full run.")
    return Findings(verdicts, exhibits, {"Skew by layer": skew_table(runs)}, notes)


def _judge_layer(
    adapted: Sequence[Run], full: Sequence[Run], role: str, moved: Claim, learned: Claim, full_role: str | None = None
) -> list[Verdict]:
    def over_seeds(found: Sequence[Run], quantity: str, role: str, start: bool = False) -> dict[int, float]:
        return {run.meta["seed"]: skew(run, quantity, role, start) for run in found}

    return [
        moved.judge(over_seeds(adapted, "update_norm", role), over_seeds(full, "update_norm", full_role or role)),
        learned.judge(over_seeds(adapted, "adapter_norm", role), over_seeds(adapted, "adapter_norm", role, start=True)),
    ]


def skew(run: Run, quantity: str, role: str, start: bool = False) -> float:
    """log10 of a role's norm over the median of the blocks' norms.

    Parameters
    ----------
    run : Run
    quantity : str
        A norm recorded by module.
    role : str
        A role outside the blocks: ``"embed"`` or ``"head"``.
    start : bool
        At step 0, in place of the mean over all recorded steps after it.
    """
    layers = _ratios(run, quantity, start)
    return float(np.log10(layers.loc[layers["place"] == role, "value"].iloc[0]))


def _ratios(run: Run, quantity: str, start: bool) -> pd.DataFrame:
    """Every layer's norm over the median of the blocks."""
    cells = norms.pool(norms.select(run.table, quantity))
    return norms.ratio_to_block_median(cells[cells["step"] == 0] if start else norms.mean_over_steps(cells))


def skew_table(runs: Mapping[str, Sequence[Run]]) -> pd.DataFrame:
    """How many times the median block's norm each end has, by arm, quantity and moment; geometric mean over seeds."""
    rows = []
    for label, found in runs.items():
        for quantity, start in (("update_norm", False), ("adapter_norm", False), ("adapter_norm", True)):
            if (found[0].table["quantity"] == quantity).any():
                ends = [role for role in ("embed", "head") if role in set(_ratios(found[0], quantity, start)["place"])]
                factors = {role: 10 ** np.mean([skew(run, quantity, role, start) for run in found]) for role in ends}
                moment = "at the start" if start else "mean over training"
                rows.append({"": label, "norm": quantity.replace("_", " "), "when": moment} | factors)
    return pd.DataFrame(rows)


PROBE = register(
    Probe(
        name="lisa",
        title="LISA's motivation: where LoRA's norm sits",
        source="Pan et al., LISA, arXiv 2403.17919",
        question="Does LoRA put its update at the ends of the network, and is that learned or drawn?",
        quick_budget=50,
        arms=arms,
        judge=judge,
    )
)
