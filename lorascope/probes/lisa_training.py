"""Probe of LISA: accuracy compared with full fine-tuning, LoRA, blocks drawn once, and other numbers of blocks.

Source: LISA (arXiv 2403.17919), tables 2 and 3 (quality compared with full fine-tuning and LoRA), table 10 (only
embedding and head), table 12 (blocks drawn once), figures 8 and 9 (number of blocks, steps between draws).

Departs:

- A small encoder on one task.
- Two of six blocks train at a time, a third; in the paper's 7B model it is a sixteenth.
- More than half of this encoder's parameters are outside the blocks, most of them in the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping

from lorascope.evidence.statistics import lisa as statistics
from lorascope.methods import LISA, Full, LoRA
from lorascope.pages.report_figure import ReportFigure, draw
from lorascope.probes.base import (
    Arm,
    Probe,
    decoder_settings,
    encoder_settings,
)
from lorascope.runs.run import Run


def arms() -> list[Arm]:
    """Return the registered arms: LISA on minilm, and LISA, full fine-tuning and LoRA on the whole of SmolLM2."""
    settings = encoder_settings()
    steps = settings["steps"]
    encoder = {
        statistics.DRAWN: LISA(n_active=2),
        statistics.ONCE: LISA(n_active=2, interval=steps),
        statistics.ENDS: LISA(n_active=0),
        statistics.FOUR: LISA(n_active=4),
    }
    whole = decoder_settings() | {"test_size": 1000}
    decoder = {
        statistics.WHOLE: LISA(n_active=2, interval=whole["steps"] // 10),
        statistics.WHOLE_ONCE: LISA(n_active=2, interval=whole["steps"]),
        statistics.WHOLE_FULL: Full(),
        statistics.WHOLE_LORA: LoRA(rank=8, alpha=8.0, targets="all-linear"),
    }
    return [
        *(Arm(label=label, method=method, settings=settings) for label, method in encoder.items()),
        *(Arm(label=label, method=method, settings=whole, model="smollm2") for label, method in decoder.items()),
    ]


def figures(runs: Mapping[str, Run]) -> list[ReportFigure]:
    """Draw the blocks that trained."""
    run = {statistics.DRAWN: runs[statistics.DRAWN]}
    return [draw(figure, run) for figure in ("active_layers", "draw_frequency")]


PROBE = Probe(
    name="lisa_training",
    title="LISA: a few blocks at a time compared with full fine-tuning",
    source="Pan et al., LISA, arXiv 2403.17919",
    question="Does training a few blocks at a time match full fine-tuning, and does resampling them help?",
    arms=arms,
    figures=figures,
    notes=("Embedding, its norm, pooler and classifier head train at all steps.",),
)
