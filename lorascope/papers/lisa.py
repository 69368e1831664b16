"""LISA: training a few blocks at a time, and its motivation.

Motivation: the paper claims that LoRA gives embedding and head far larger norms than the blocks, and full fine-tuning
does not. Its figure 2 plots "the weight norm" of every layer, averaged over training, without stating which tensor of
LoRA it uses. The factor of hundreds cannot come from the effective weight, so it must come from the update or from the
adapter. The figures plot both, and the claims compare each with a control without the claimed cause. Skew of a layer:
log10 of the ratio of its norm to the median norm of the blocks, with norms averaged over the recorded steps.

Method: does training a few blocks at a time beat LoRA where two of eight blocks change at full rank, and gain less
where all change at rank 2? The positive control trains the two blocks only.

Source: LISA (arXiv 2403.17919), section 3.1 and figure 2 (motivation), tables 2 and 3 (quality compared with full
fine-tuning and LoRA).

Departs:

- A small encoder and a small decoder instead of GPT-2 and LLaMA-2-7B, with smaller ranks.
- The encoder's classifier head starts random, so it is plotted but not judged. Embedding and head are both judged on
  the decoder.
- Two of eight blocks train at a time, a quarter; in the paper's 7B model it is a sixteenth.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lorascope.analysis import norms
from lorascope.charts.chart import Chart, Panels, set_side_by_side, stack_vertically
from lorascope.charts.marks import Axis, Point
from lorascope.papers.arms import Arm, KeptTable
from lorascope.papers.judging import truth_names
from lorascope.papers.judging.study_statistics import Comparison, OfTable, pair
from lorascope.papers.lora import FULL
from lorascope.papers.paper_study import PaperStudy
from lorascope.papers.planted_pairs import planted_arms
from lorascope.plots.builders import curves
from lorascope.runs.run import Run

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from lorascope.methods.method import Method


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
LEARNED = "factors − start"
"""Reading of the factors that is zero before training."""


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


_MODELS = {"SmolLM2": DECODER_NORMS, "MiniLM": ENCODER_NORMS}
_SMALL_START = "Small start: the embedding's B begins with the gain of a linear layer's A instead of PEFT's. "


def norms_figure(table: pd.DataFrame) -> Panels:
    """Draw the norm of the update by layer from the kept table ``norms``: of embedding, blocks and head."""
    panels = _norm_panels(table, {"update": "{model}"}, "")
    norms = []
    for chart in panels.panels:
        dots = chart.table(chart.marks_of(Point)[0]).set_index(["method", "place"])["value"]
        for method in ("LoRA", "LoRA, small start"):
            if (method, "embed") in dots.index:
                norms.append(f"{dots[method, 'embed']:.2g} on {chart.title}")
                if method != "LoRA":
                    norms[-1] += " with a small start"
    panels = replace(panels, title=f"Norm of LoRA's update of the embedding over that of a block: {', '.join(norms)}")
    return _with_caption(
        panels,
        f"Models trained on sentiment. Norm over that of the median block. {_mean_and_range(table, ['update'])} "
        f"{_SMALL_START}LISA trains random blocks, so its embedding and head only are drawn, over the median block "
        "that it drew. The head of SmolLM2 is tied to its embedding: only LoRA has a second norm there.",
    )


def factor_norms_figure(table: pd.DataFrame) -> Panels:
    """Draw the norms of LoRA's factors by layer from the kept table ``norms``, and below them the learned ones.

    The norm of the weight, the paper's fourth reading, hardly changes in training.
    """
    titles = {"factors": "{model}: A and B", LEARNED: "{model}: A and B minus start"}
    panels = _norm_panels(table, titles, "")
    norms = []
    for chart, *_ in panels.grid:
        dots = chart.table(chart.marks_of(Point)[0]).set_index(["method", "place"])["value"]
        norms.append(dots["LoRA", "embed"])
    # A small version has no decoder, so its first panel is of the encoder.
    model, (drawn, learned) = panels.panels[0].title.partition(":")[0], norms
    title = f"LoRA's factors of {model}'s embedding: norm {drawn:.2g} times a block's, {learned:.2g} without the start"
    panels = replace(panels, title=title)
    return _with_caption(
        panels,
        f"Norm over that of the median block. {_mean_and_range(table, titles)} {_SMALL_START}Minus start: change of A "
        "and B in training, without their initial values. The small start was trained on SmolLM2 only, and MiniLM's "
        "new head has no LoRA.",
    )


def _mean_and_range(table: pd.DataFrame, readings: Iterable[str]) -> str:
    """Return what lines and bands are, with the number of seeds of each model, and of methods that have fewer."""
    seeds = table[table["reading"].isin(list(readings))].groupby("arm")["seed"].nunique()
    numbers = []
    for model, arms in _MODELS.items():
        counts = seeds.reindex(list(arms.values())).set_axis(list(arms)).dropna().astype("int64")
        if counts.empty:  # a small version has the encoder only
            continue
        fewer = ""
        for method, count in counts[counts < counts.max()].items():
            fewer += f" ({method}: {count})"
        numbers.append(f"{model} {counts.max()}{fewer}")
    return (
        "Means over the recorded steps after step 0; lines and dots, bands and bars: mean and range over seeds: "
        f"{', '.join(numbers)}."
    )


def _with_caption(panels: Panels, caption: str) -> Panels:
    (first, *next_panels), *rows = panels.grid
    return replace(panels, grid=((replace(first, caption=caption), *next_panels), *rows))


def _norm_panels(table: pd.DataFrame, titles: dict[str, str], title: str) -> Panels:
    """Draw one row of panels per reading of ``titles`` and one column per model."""
    rows = []
    for reading, title_of_model in titles.items():
        charts = []
        for model, arms in _MODELS.items():
            labels = dict(zip(arms.values(), arms, strict=True))
            is_drawn = table["arm"].isin(labels) & (table["block"] | table["place"].isin(["embed", "head"]))
            layers = table[is_drawn & (table["reading"] == reading)]
            if layers.empty:  # a small version has the encoder only
                continue
            layers = layers.assign(method=layers["arm"].map(labels))
            charts.append(_layer_norms(layers, title_of_model.format(model=model), list(arms)))
        rows.append(set_side_by_side(*charts))
    return replace(stack_vertically(*rows), title=title)


def _layer_norms(layers: pd.DataFrame, title: str, methods: list[str]) -> Chart:
    """Draw one norm of one model over the median block: a line of the blocks, and dots of embedding and head."""
    keys = ["method", "seed"]
    changed_blocks = layers[layers["block"] & (layers["value"] > 0)]
    medians = changed_blocks.groupby(keys)["value"].median().rename("median").reset_index()
    # A block of LISA has an update only from the step at which it is first drawn.
    layers = layers[~layers["block"] | (layers["method"] != "LISA")].merge(medians)
    cells = _spread_over_seeds(layers.assign(value=layers["value"] / layers["median"]), ["method", "place", "block"])
    number = cells.loc[cells["block"], "place"].nunique()
    gap = 1 + number // 8  # so that the dots are apart from the lines and from the frame
    positions = {"embed": -gap} | {str(block): block for block in range(number)} | {"head": number - 1 + gap}
    cells = cells.assign(layer=cells["place"].map(positions))
    numbered = range(0, number, 1 if number < 12 else 10)
    ticks = {}
    for name in ("embed", *map(str, numbered), "head"):
        if name in set(cells["place"]):
            ticks[positions[name]] = name
    across = Axis(label="layer", ticks=ticks, limits=(cells["layer"].min() - gap / 2, cells["layer"].max() + gap / 2))
    dots = Point("layer", "value", "method", low="low", high="high", data=cells[~cells["block"]])
    axes = across, Axis(label="norm / median block", log=True)
    look: dict[str, Any] = {"color": "method", "points": False, "title": title, "colors": methods}
    return curves(cells[cells["block"]], "layer", axes, dots, **look)


def _spread_over_seeds(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    return rows.groupby(keys, sort=False)["value"].agg(value="mean", low="min", high="max").reset_index()


PAPER = PaperStudy(
    name="LISA",
    authors="Pan et al.",
    question="Are LoRA's norms in embedding and head larger than in the blocks, and does LISA beat LoRA where few "
    "blocks change?",
    # Two thirds of the texts have at most 28 tokens.
    motive={label: {"steps": 60, "test_size": 200, "max_length": 28} for label in ENCODER_NORMS.values()},
)
run = PAPER.run
