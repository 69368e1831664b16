"""Figures of LISA."""

from __future__ import annotations

from dataclasses import replace

from lorascope import plots
from lorascope.evidence.statistics import lisa as statistics
from lorascope.gallery.base import GalleryFigure, own_labels, training_loss

HEADING = "LISA"


_SMALL, _USUAL = "LoRA, small initial B", "LoRA"

FIGURES = [
    GalleryFigure(
        name="mean-norm",
        alt="Mean norms by layer, in four readings, on minilm",
        arms={statistics.FULL: statistics.FULL, _USUAL: statistics.ADAPTED, _SMALL: statistics.SMALL},
        draw=plots.mean_norm,
        quantities=("weight_norm", "update_norm", "adapter_norm", "learned_norm"),
    ),
    GalleryFigure(
        name="mean-norm-decoder",
        alt="Mean norms by layer, in four readings, on SmolLM2",
        arms={
            statistics.FULL: statistics.WHOLE_FULL,
            _USUAL: statistics.ADAPTED_DECODER,
            _SMALL: statistics.SMALL_DECODER,
        },
        draw=plots.mean_norm,
        quantities=("weight_norm", "update_norm", "adapter_norm", "learned_norm"),
    ),
    GalleryFigure(
        name="active-layers",
        alt="Blocks that LISA trained, and the number of blocks trained so far",
        arms=own_labels(statistics.DRAWN, statistics.ONCE),
        draw=plots.active_layers,
        quantities=("active", "draw_probability", "weight_norm"),
    ),
    GalleryFigure(
        name="draw-frequency",
        alt="How often LISA drew each block",
        arms=own_labels(statistics.DRAWN),
        draw=plots.draw_frequency,
        quantities=("active", "draw_probability"),
    ),
    GalleryFigure(
        name="training-curves-lisa",
        alt="Training loss on the whole of SmolLM2: full fine-tuning, LoRA and LISA",
        arms={
            statistics.FULL: statistics.WHOLE_FULL,
            "LoRA": statistics.WHOLE_LORA,
            "LISA": statistics.WHOLE,
            "LISA, one draw": statistics.WHOLE_ONCE,
        },
        draw=training_loss,
        quantities=("loss",),
    ),
    GalleryFigure(
        name="accuracy-lisa",
        alt="Accuracy of LISA by number of blocks, and of full fine-tuning",
        arms={
            "full": statistics.FULL,
            "no block": statistics.ENDS,
            "2 blocks": statistics.DRAWN,
            "4 blocks": statistics.FOUR,
            "2, one draw": statistics.ONCE,
        },
        draw=lambda runs: replace(plots.ablations(runs, start=0.5), title="LISA compared with full fine-tuning"),
        seeds=None,
        scores_only=True,
    ),
]
