"""Probe of LISA: accuracy compared with full fine-tuning, LoRA, blocks drawn once, and other numbers of blocks.

Source: LISA (arXiv 2403.17919), tables 2 and 3 (quality compared with full fine-tuning and LoRA), table 10 (only
embedding and head), table 12 (blocks drawn once), figures 8 and 9 (number of blocks, steps between draws).

Departs:

- A small encoder on one task.
- One learning rate for LISA and full fine-tuning; the paper tunes each.
- Two of six blocks train at a time, a third; in the paper's 7B model it is a sixteenth.
- More than half of this encoder's parameters are outside the blocks, most of them in the embedding.
"""

from __future__ import annotations

import pandas as pd

from lorascope.analysis import lisa_schedule
from lorascope.evidence.statistics import lisa as statistics
from lorascope.methods import LISA, Full, LoRA
from lorascope.probes import lora
from lorascope.probes.base import (
    Arm,
    Probe,
    ReportFigure,
    draw,
    encoder_settings,
    registered_decoder_settings,
    registered_settings,
    select,
)
from lorascope.probes.seed_statistics import EachRun, Runs, accuracy
from lorascope.schema import records

DRAWN, ONCE, ENDS = "LISA, 2 blocks", "LISA, 2 blocks, one draw", "LISA, no block"
ONE, FOUR, SELDOM = "LISA, 1 block", "LISA, 4 blocks", "LISA, 2 blocks, 5 draws"
FULL, ADAPTED = lora.FULL, lora.LOW
_QUICK = "LISA without blocks, with 1 or 4 blocks, and with 5 draws is trained only in a full run."


def arms(quick: bool) -> list[Arm]:
    """Return the arms: LISA, LISA with one draw, full fine-tuning and LoRA.

    A full run also has LISA without blocks, with 1 and 4 blocks, and with 5 draws.
    """
    settings = encoder_settings(quick)
    steps = settings["steps"]
    own = {DRAWN: (LISA(n_active=2), 0.75), ONCE: (LISA(n_active=2, interval=steps), 0.75)}
    if not quick:
        own |= {ENDS: (LISA(n_active=0), 0.65), ONE: (LISA(n_active=1), 0.7), FOUR: (LISA(n_active=4), 0.85)}
        own |= {SELDOM: (LISA(n_active=2, interval=steps // 5), 0.75)}
    return [
        *(Arm(label=label, method=method, settings=settings, cost=cost) for label, (method, cost) in own.items()),
        *lora.shared_arms(quick, FULL, ADAPTED),
    ]


def registered() -> list[Arm]:
    """Return the registered arms: LISA on minilm, and LISA, full fine-tuning and LoRA on the whole of SmolLM2."""
    settings = registered_settings()
    steps = settings["steps"]
    encoder = {
        DRAWN: LISA(n_active=2),
        ONCE: LISA(n_active=2, interval=steps),
        ENDS: LISA(n_active=0),
        FOUR: LISA(n_active=4),
    }
    whole = registered_decoder_settings() | {"test_size": 1000}
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


def figures(runs: Runs) -> list[ReportFigure]:
    """Draw the draws of blocks, the training curves and norms, and in a full run the numbers of blocks and draws."""
    shown = select(runs, *(label for label in runs if label not in (ONE, FOUR, SELDOM)))
    found = [
        draw("active_layers", select(runs, DRAWN, ONCE)),
        draw("draw_frequency", select(runs, DRAWN)),
        draw("training_curves", shown),
        draw("update_norm", shown),
        draw("norm_over_steps", shown),
    ]
    if ENDS in runs:
        found.append(draw("draw_grid", select(runs, ONE, DRAWN, FOUR, SELDOM, ONCE)))
        found += [draw("training_curves", select(runs, *of)) for of in ((ONE, DRAWN, FOUR), (DRAWN, SELDOM, ONCE))]
    return found


def draws_table(runs: Runs) -> pd.DataFrame:
    """Tabulate the fraction of draws that include each block, mean over seeds, and its expected value."""
    rows = []
    for label in (DRAWN, ONCE):
        found = lisa_schedule.visits(records.concat(run.table for run in runs[label]))
        shares = found.groupby("place", observed=True)[["frequency", "expected"]].mean()
        rows.append({"": label} | {f"block {place}": f"{share:.2f}" for place, share in shares["frequency"].items()})
        rows[-1]["chance"] = f"{shares['expected'].mean():.2f}"
    return pd.DataFrame(rows)


PROBE = Probe(
    name="lisa_training",
    title="LISA: a few blocks at a time compared with full fine-tuning",
    source="Pan et al., LISA, arXiv 2403.17919",
    question="Does training a few blocks at a time match full fine-tuning, and does resampling them help?",
    quick_budget=85,
    arms=arms,
    registered=registered,
    claims={
        "lisa.parity": (EachRun(accuracy, DRAWN), EachRun(accuracy, FULL) - 0.02),
        "lisa.redrawn": (EachRun(accuracy, DRAWN), EachRun(accuracy, ONCE)),
        "lisa.over_lora": (EachRun(accuracy, DRAWN), EachRun(accuracy, ADAPTED)),
        "lisa.blocks": (EachRun(accuracy, DRAWN), EachRun(accuracy, ENDS)),
        "lisa.more": (EachRun(accuracy, FOUR), EachRun(accuracy, DRAWN)),
    },
    figures=figures,
    tables=lambda runs: {"Draws by block": draws_table(runs)},
    notes=lambda runs: [
        "Held fixed: model, data, splits, batch size, number of steps. Seeds vary the draws of blocks, the classifier "
        "head, adapter initialization, data order and dropout.",
        "The learning rate is 1e-3 for LoRA and 1e-4 for all other arms.",
        "Embedding, its norm, pooler and classifier head train at all steps in all arms of LISA.",
        *([] if ENDS in runs else [_QUICK]),
    ],
    seeds=5,
)
