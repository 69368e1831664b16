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

from collections.abc import Mapping, Sequence

import pandas as pd

from lorascope import plots
from lorascope.analysis import lisa_schedule
from lorascope.methods import LISA
from lorascope.probes import lora
from lorascope.probes.base import Arm, Findings, Probe, encoder_settings, make_report_figure, register
from lorascope.probes.claims import Claim
from lorascope.probes.rank_statistics import accuracy
from lorascope.runs.run import Run
from lorascope.schema import records

DRAWN, ONCE, ENDS = "LISA, 2 blocks", "LISA, 2 blocks, one draw", "LISA, no block"
ONE, FOUR, SELDOM = "LISA, 1 block", "LISA, 4 blocks", "LISA, 2 blocks, 5 draws"
FULL, ADAPTED = lora.FULL, lora.LOW

PARITY = Claim(
    sentence="LISA is non-inferior to full fine-tuning (tolerance 2 points).",
    statistic="test accuracy of LISA, 2 of 6 blocks at a time",
    control="test accuracy of full fine-tuning at the same steps and learning rate, minus 2 points",
    margin=0.001,
    source="section 4, tables 2 and 3",
)
REDRAWN = Claim(
    sentence="LISA with resampled blocks outperforms LISA with blocks drawn once.",
    statistic="test accuracy of LISA, 2 of 6 blocks at a time",
    control="the same with blocks drawn once per seed and trained to the end",
    margin=0.002,
    source="table 12",
)
BLOCKS = Claim(
    sentence="LISA outperforms training only the parameters outside the blocks.",
    statistic="test accuracy of LISA, 2 of 6 blocks at a time",
    control="test accuracy of LISA without blocks",
    margin=0.002,
    source="table 10",
)
MORE = Claim(
    sentence="LISA with more blocks at a time is more accurate.",
    statistic="test accuracy of LISA, 4 of 6 blocks at a time",
    control="test accuracy of LISA, 2 of 6 blocks at a time",
    margin=0.002,
    source="section 4.5, figure 8",
)
OVER_LORA = Claim(
    sentence="LISA outperforms LoRA of rank 8.",
    statistic="test accuracy of LISA, 2 of 6 blocks at a time",
    control="test accuracy of LoRA, rank 8, on all linear layers after the same number of steps",
    margin=0.002,
    source="section 4, tables 2 and 3",
)


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
        *(arm for arm in lora.arms(quick) if arm.label in (FULL, ADAPTED)),
    ]


def judge(runs: Mapping[str, Sequence[Run]]) -> Findings:
    """Compare the accuracy of LISA with full fine-tuning, LoRA, one draw, and other numbers of blocks."""
    reached = {label: accuracy(found) for label, found in runs.items()}
    # The tolerance is subtracted from the control, so that non-inferiority is a positive effect.
    verdicts = [
        PARITY.judge(reached[DRAWN], {seed: value - 0.02 for seed, value in reached[FULL].items()}),
        REDRAWN.judge(reached[DRAWN], reached[ONCE]),
        OVER_LORA.judge(reached[DRAWN], reached[ADAPTED]),
    ]
    shown = {label: found for label, found in runs.items() if label not in (ONE, FOUR, SELDOM)}
    figures = [
        make_report_figure("active_layers", plots.active_layers({label: runs[label] for label in (DRAWN, ONCE)})),
        make_report_figure("draw_frequency", plots.draw_frequency({DRAWN: runs[DRAWN]})),
        make_report_figure("training_curves", plots.training_curves(shown)),
        make_report_figure("update_norm", plots.update_norm(shown)),
        make_report_figure("norm_over_steps", plots.norm_over_steps(shown)),
    ]
    notes = [
        "Held fixed: model, data, splits, batch size, number of steps. Seeds vary the draws of blocks, the classifier "
        "head, adapter initialization, data order and dropout.",
        "The learning rate is 1e-3 for LoRA and 1e-4 for all other arms.",
        "Embedding, its norm, pooler and classifier head train at all steps in all arms of LISA.",
    ]
    if ENDS in runs:
        verdicts += [BLOCKS.judge(reached[DRAWN], reached[ENDS]), MORE.judge(reached[FOUR], reached[DRAWN])]
        grid = {label: runs[label] for label in (ONE, DRAWN, FOUR, SELDOM, ONCE)}
        figures.append(make_report_figure("draw_grid", plots.draw_grid(grid)))
        for varied in ((ONE, DRAWN, FOUR), (DRAWN, SELDOM, ONCE)):
            figures.append(
                make_report_figure("training_curves", plots.training_curves({label: runs[label] for label in varied}))
            )
    else:
        notes.append("LISA without blocks, with 1 or 4 blocks, and with 5 draws is trained only in a full run.")
    return Findings(verdicts, figures, {"Draws by block": draws_table(runs)}, notes)


def draws_table(runs: Mapping[str, Sequence[Run]]) -> pd.DataFrame:
    """Tabulate the fraction of draws that include each block, mean over seeds, and its expected value."""
    rows = []
    for label in (DRAWN, ONCE):
        found = lisa_schedule.visits(records.concat(run.table for run in runs[label]))
        shares = found.groupby("place", observed=True)[["frequency", "expected"]].mean()
        rows.append({"": label} | {f"block {place}": f"{share:.2f}" for place, share in shares["frequency"].items()})
        rows[-1]["chance"] = f"{shares['expected'].mean():.2f}"
    return pd.DataFrame(rows)


PROBE = register(
    Probe(
        name="lisa_training",
        title="LISA: a few blocks at a time compared with full fine-tuning",
        source="Pan et al., LISA, arXiv 2403.17919",
        question="Does training a few blocks at a time match full fine-tuning, and does resampling them help?",
        quick_budget=85,
        arms=arms,
        judge=judge,
        seeds=5,
    )
)
