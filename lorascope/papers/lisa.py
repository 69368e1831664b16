"""LISA: training a few blocks at a time, and its motivation.

Motivation: the paper claims that LoRA gives embedding and head far larger norms than the blocks, and full fine-tuning
does not. Its figure 2 plots "the weight norm" of every layer, averaged over training, without stating which tensor of
LoRA it uses. The factor of hundreds cannot come from the effective weight, so it must come from the update or from the
adapter. The figures plot both, and the claims compare each with a control without the claimed cause. Skew of a layer:
log10 of the ratio of its norm to the median norm of the blocks, with norms averaged over the recorded steps.

Method: does training a few blocks at a time match full fine-tuning and LoRA, and does resampling them help? Controls
are blocks drawn once, and other numbers of blocks.

Source: LISA (arXiv 2403.17919), section 3.1 and figure 2 (motivation), tables 2 and 3 (quality compared with full
fine-tuning and LoRA), table 10 (only embedding and head), table 12 (blocks drawn once), figures 8 and 9 (number of
blocks, steps between draws).

Departs:

- A small encoder and a small decoder instead of GPT-2 and LLaMA-2-7B, with smaller ranks.
- The encoder's classifier head starts random, so it is plotted but not judged. Embedding and head are both judged on
  the decoder.
- Two of six blocks train at a time, a third; in the paper's 7B model it is a sixteenth.
- More than half of this encoder's parameters are outside the blocks, most of them in the embedding.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lorascope.analysis import norms
from lorascope.charts.chart import Chart, Panels
from lorascope.charts.marks import Axis, Point
from lorascope.papers.judging import truth_names
from lorascope.papers.judging.statistics import Accuracy, Constant, LogLikelihood, OfRun
from lorascope.papers.judging.study_statistics import Comparison, OfTable, pair
from lorascope.papers.lora import FULL, LOW
from lorascope.papers.paper_study import PaperStudy
from lorascope.papers.planted_pairs import planted_arms
from lorascope.papers.probe import Arm, KeptTable, Probe, decoder_settings, encoder_settings
from lorascope.plots.builders import curves
from lorascope.runs.run import Run

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from lorascope.methods.method import Method

ADAPTED, SMALL = "LoRA with embedding", "LoRA with embedding, small initial B"
ADAPTED_DECODER = "LoRA with embedding and head, whole SmolLM2"
SMALL_DECODER = "LoRA with embedding and head, small initial B, whole SmolLM2"
DRAWN, ONCE, ENDS, FOUR = "LISA, 2 blocks", "LISA, 2 blocks, one draw", "LISA, no block", "LISA, 4 blocks"
WHOLE, WHOLE_ONCE = "LISA, 2 of 30 blocks, whole SmolLM2", "LISA, 2 of 30 blocks, one draw, whole SmolLM2"
WHOLE_FULL, WHOLE_LORA = "full fine-tuning, whole SmolLM2", "LoRA, rank 8, whole SmolLM2"
NORMS = "layer_norms"
"""Kept table ``quantity, place, block, value``: norms of the layers of a run, mean over the recorded steps after 0."""


def arms() -> list[Arm]:
    """Return the registered arms on LISA's motivation: LoRA with PEFT's and with a small initial B of the embedding."""
    from lorascope.methods import LoRA

    decoder = decoder_settings() | {"test_size": 200}
    encoder = LoRA(rank=16, alpha=16.0, targets=("all-linear", "embed"))
    both_ends = replace(encoder, targets=("all-linear", "embed", "lm_head"))
    # PEFT draws the embedding's B with standard deviation 1, so equal changes of A move it far more than other layers.
    small_ends = replace(both_ends, embedding_init="linear")
    return [
        Arm(label=ADAPTED, method=encoder, settings=encoder_settings()),
        Arm(label=SMALL, method=replace(encoder, embedding_init="linear"), settings=encoder_settings()),
        Arm(label=ADAPTED_DECODER, method=both_ends, settings=decoder, model="smollm2"),
        Arm(label=SMALL_DECODER, method=small_ends, settings=decoder, model="smollm2"),
    ]


def training_arms() -> list[Arm]:
    """Return the registered arms of LISA's training: LISA on minilm; LISA, full fine-tuning and LoRA on SmolLM2."""
    from lorascope.methods import LISA, Full, LoRA

    settings = encoder_settings()
    steps = settings["steps"]
    encoder = {
        DRAWN: LISA(n_active=2),
        ONCE: LISA(n_active=2, interval=steps),  # a single interval has a single draw
        ENDS: LISA(n_active=0),
        FOUR: LISA(n_active=4),
    }
    whole = decoder_settings() | {"test_size": 1000}
    decoder = {
        WHOLE: LISA(n_active=2, interval=whole["steps"] // 10),
        WHOLE_ONCE: LISA(n_active=2, interval=whole["steps"]),
        WHOLE_FULL: Full(),
        WHOLE_LORA: LoRA(rank=8, alpha=8.0, targets="all-linear"),
    }
    return [
        *(Arm(label=label, method=method, settings=settings) for label, method in encoder.items()),
        *(Arm(label=label, method=method, settings=whole, model="smollm2") for label, method in decoder.items()),
    ]


def skew(table: pd.DataFrame, quantity: str, role: str) -> float:
    """Compute LISA's skew: log10 of the norm of a role outside the blocks, divided by the median norm of the blocks."""
    rows = table[table["quantity"] == quantity]
    of_role, blocks = rows.loc[rows["place"] == role, "value"].item(), rows.loc[rows["block"], "value"].median()
    return float(np.log10(of_role / blocks))


def update_skew(arm: str, role: str) -> OfRun:
    """Return the skew of the update's norm, for a claim on LISA's motivation."""
    return OfRun(partial(skew, quantity="update_norm", role=role), NORMS, arm)


def factor_skew(arm: str, role: str) -> OfRun:
    """Return the skew of the norm of the factors minus their initial values, for a claim on LISA's motivation."""
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


def keep_layer_norms(run: Run) -> pd.DataFrame:
    """Return the kept table ``layer_norms`` of the LISA paper, with the norms that were recorded; see ``NORMS``."""
    recorded, tables = set(run.table["quantity"]), []
    for quantity in ("update_norm", "factor_change", "adapter_norm"):
        if quantity in recorded:
            tables.append(norms.mean_over_steps(norms.pool_modules(norms.select_quantity(run.table, quantity))))
    layers = pd.concat([table.astype({"place": "str", "quantity": "str"}) for table in tables], ignore_index=True)
    return layers.assign(block=layers["layer"].notna())[["quantity", "place", "block", "value"]]


NORM_FULL, NORM_LORA = "full fine-tuning, SmolLM2", "LoRA, rank 16, SmolLM2"
NORM_SMALL, NORM_LISA = "LoRA, rank 16, small start, SmolLM2", "LISA, 2 of 30 blocks, SmolLM2"
ENCODER_FULL, ENCODER_LORA = "full fine-tuning, minilm", "LoRA, rank 16, minilm"
ENCODER_LISA = "LISA, 2 of 6 blocks, minilm"
DECODER_NORMS = {
    "full fine-tuning": NORM_FULL,
    "LoRA": NORM_LORA,
    "LoRA, small start": NORM_SMALL,
    "LISA": NORM_LISA,
}
ENCODER_NORMS = {"full fine-tuning": ENCODER_FULL, "LoRA": ENCODER_LORA, "LISA": ENCODER_LISA}
"""Labels in the legend -> arms whose norms by layer are drawn, on the decoder and on the encoder."""
READINGS = {
    "weight": "weight_norm",
    "update": "update_norm",
    "factors": "adapter_norm",
    "factors − start": "factor_change",
}
"""Readings of "weight norm" in the paper's figure 2 -> recorded quantity."""


DEPTH = (truth_names.TWO_BLOCKS, truth_names.ALL_BLOCKS)
"""Truths of LISA's pair: two of eight blocks change at full rank, or all change at rank 2."""
SAMPLED, LOCATED, FACTORED = "LISA, 2 of 8 blocks", "LISA on the two blocks", "LoRA, rank 8"


def study_arms() -> list[Arm]:
    """Return the arms of LISA's pair, and those whose norms by layer are recorded.

    The latter have fixed rates; the claims on norms do not use LISA and the encoder.
    """
    from lorascope import observe
    from lorascope.methods import LISA, Full, LoRA

    # A norm needs no score, but a run must be seen to learn.
    settings = {"eval_every": 0, "eval_size": 16, "test_size": 200}
    decoder = {**settings, "steps": 40, "batch_size": 8, "observe": [observe.norms(every=5)]}
    encoder = {**settings, "steps": 300, "batch_size": 16, "observe": [observe.norms(every=10)]}
    lora = LoRA(rank=16, alpha=16.0, targets=("all-linear", "embed", "lm_head"), lr=1e-3, head_lr=1e-3)
    on_decoder: dict[str, Method] = {
        NORM_FULL: Full(lr=1e-5, head_lr=1e-5),
        NORM_LORA: lora,
        # PEFT draws the embedding's B with standard deviation 1, so equal changes of A move it far more than others.
        NORM_SMALL: replace(lora, embedding_init="linear"),
        # AdamW needs about five steps to settle after each draw.
        NORM_LISA: LISA(n_active=2, interval=5, lr=3e-4, head_lr=3e-4),
    }
    on_encoder: dict[str, Method] = {
        ENCODER_FULL: Full(lr=1e-4, head_lr=1e-4),
        ENCODER_LORA: replace(lora, targets=("all-linear", "embed")),
        ENCODER_LISA: LISA(n_active=2, lr=3e-4, head_lr=3e-4),
    }
    sampled = LISA(n_active=2, interval=10)
    located = replace(sampled, weights=(0, 1, 0, 0, 0, 1, 0, 0))  # of the two blocks that change
    students = {SAMPLED: sampled, FACTORED: LoRA(rank=8, alpha=32.0, targets="all-linear"), FULL: Full()}
    return [
        *(Arm(label=label, method=method, settings=decoder, model="smollm2") for label, method in on_decoder.items()),
        *(Arm(label=label, method=method, settings=encoder) for label, method in on_encoder.items()),
        *planted_arms(students, DEPTH),
        *planted_arms({LOCATED: located}, DEPTH[:1]),
    ]


def norms_by_layer(run: Run) -> pd.DataFrame:
    """Return the table ``norms`` of a run: ``reading, place, block, value``, mean over the recorded steps after 0.

    ``place`` is the number of a block, or the role of any other module; ``block`` says which of them it is.
    """
    tables = []
    for reading, quantity in READINGS.items():
        if (run.table["quantity"] == quantity).any():
            layers = norms.mean_over_steps(norms.pool_modules(norms.select_quantity(run.table, quantity)))
            tables.append(layers.assign(reading=reading, block=layers["layer"].notna()))
    layers = pd.concat([table.astype({"place": "str"}) for table in tables], ignore_index=True)
    return layers[["reading", "place", "block", "value"]]


def log_skew(table: pd.DataFrame, role: str) -> float:
    """Compute log10 of the update's norm in a role outside the blocks over its median norm in the blocks."""
    rows = table[table["reading"] == "update"]
    of_role, blocks = rows.loc[rows["place"] == role, "value"].item(), rows.loc[rows["block"], "value"].median()
    return float(np.log10(of_role / blocks))


def _skew(arm: str, role: str) -> OfTable:
    return OfTable(partial(log_skew, role=role), "norms", arm)


_START = _skew(NORM_LORA, "embed") - _skew(NORM_SMALL, "embed")
# The head of full fine-tuning is tied to the embedding, and its norm recorded there.
JUDGED = {
    "pair.lisa": pair(SAMPLED, FACTORED, LOCATED, truths=DEPTH),
    "norms.embedding": Comparison(_skew(NORM_SMALL, "embed") - _skew(NORM_FULL, "embed"), positive=_START),
    "norms.head": Comparison(_skew(NORM_LORA, "head") - _skew(NORM_FULL, "embed"), positive=_START),
    "norms.start": Comparison(_START),
}
KEPT_TABLES: dict[str, list[KeptTable]] = {
    "norms": [((label,), norms_by_layer) for label in (*DECODER_NORMS.values(), *ENCODER_NORMS.values())]
}


def norms_figure(table: pd.DataFrame) -> Panels:
    """Draw the norms by layer from the kept table ``norms``, the decoder above the encoder, one panel per reading."""
    rows = []
    for model, arms in {"SmolLM2": DECODER_NORMS, "minilm": ENCODER_NORMS}.items():
        labels = dict(zip(arms.values(), arms, strict=True))
        if not set(labels) & set(table["arm"]):  # a small version has the encoder only
            continue
        layers = table[table["arm"].isin(labels) & (table["block"] | table["place"].isin(["embed", "head"]))]
        by_cell = layers.assign(method=layers["arm"].map(labels)).groupby(["method", "reading", "place"], sort=False)
        cells = by_cell["value"].agg(value="mean", low="min", high="max").reset_index()
        blocks = sorted(set(layers.loc[layers["block"], "place"]), key=int)
        x = Axis(label=f"layer of {model}", order=["embed", *blocks, "head"])
        charts: list[Chart] = []
        for reading in READINGS:
            of_reading = cells[cells["reading"] == reading]
            # The paper's claim is about the ends of the axis, and LISA's lines have gaps at blocks that it never drew.
            is_dot = of_reading["place"].isin(["embed", "head"])
            if reading == "update":
                is_dot |= of_reading["method"] == "LISA"
            dots = Point("place", "value", "method", data=of_reading[is_dot])
            # Without a label, the axes of panels have different limits.
            y = Axis(label="" if charts else f"norm, {model}", log=reading != "weight")
            chart = curves(of_reading, "place", (x, y), dots, color="method", points=False, colors=arms)
            charts.append(replace(chart, title=reading))
        rows.append(tuple(charts))
    caption = (
        "Norm of every layer, mean over the recorded steps after step 0. Lines are means and bands ranges over seeds. "
        "Weights hardly change, so their lines coincide. Blocks that LISA never drew have no update. The head of "
        "SmolLM2 is tied to its embedding: only LoRA has a second norm there."
    )
    rows[0] = (replace(rows[0][0], caption=caption), *rows[0][1:])
    return Panels(tuple(rows))


PROBE = Probe(
    name="lisa",
    title="LISA's motivation: norms of embedding and head with LoRA",
    source="Pan et al., LISA, arXiv 2403.17919",
    question="Are LoRA's norms larger in embedding and head than in the blocks, and is that learned or initial?",
    arms=arms,
    keep={
        (NORMS, label): keep_layer_norms for label in (FULL, ADAPTED, SMALL, WHOLE_FULL, ADAPTED_DECODER, SMALL_DECODER)
    },
)

TRAINING = Probe(
    name="lisa_training",
    title="LISA: a few blocks at a time compared with full fine-tuning",
    source="Pan et al., LISA, arXiv 2403.17919",
    question="Does training a few blocks at a time match full fine-tuning, and does resampling them help?",
    arms=training_arms,
)

PAPER = PaperStudy(
    name="LISA",
    authors="Pan et al.",
    question="Are LoRA's norms in embedding and head larger than in the blocks, and does LISA beat LoRA where few "
    "blocks change?",
    # Two thirds of the texts have at most 28 tokens.
    motive={label: {"steps": 60, "test_size": 200, "max_length": 28} for label in ENCODER_NORMS.values()},
)
run = PAPER.run
