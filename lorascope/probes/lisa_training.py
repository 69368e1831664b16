"""LISA: do a few blocks at a time reach full fine-tuning, and does it matter that they are drawn anew?

Source: LISA (arXiv 2403.17919), tables 2 and 3 (quality against full fine-tuning and LoRA), table 10 (embedding and
head alone), table 12 (blocks drawn once), figures 8 and 9 (number of blocks, steps between draws).

Departs: a small encoder on one task, the dense methods at one rate, where the paper searches for each. By two blocks of
six at a time a third of the blocks train, in the paper's 7B model a sixteenth. What lies outside the blocks is over
half of this encoder's parameters, most of it the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from lorascope import plots
from lorascope.analysis import lisa_schedule
from lorascope.methods import LISA
from lorascope.probes import lora
from lorascope.probes.base import Arm, Findings, Probe, encoder_settings, exhibit, register
from lorascope.probes.claims import Claim
from lorascope.probes.rank_statistics import accuracy
from lorascope.runs.run import Run
from lorascope.schema import records

DRAWN, ONCE, ENDS = "LISA, 2 blocks", "LISA, 2 blocks, one draw", "LISA, no block"
ONE, FOUR, SELDOM = "LISA, 1 block", "LISA, 4 blocks", "LISA, 2 blocks, 5 draws"
FULL, ADAPTED = lora.FULL, lora.LOW

PARITY = Claim(
    sentence="LISA does as well as full fine-tuning, within two points.",
    statistic="test accuracy of LISA, 2 of 6 blocks at a time",
    control="test accuracy of full fine-tuning at the same steps and rate, less two points",
    margin=0.001,
    source="section 4, tables 2 and 3",
)
REDRAWN = Claim(
    sentence="Blocks that are drawn anew do better than blocks drawn once.",
    statistic="test accuracy of LISA",
    control="test accuracy of LISA whose first blocks train to the end, a draw of its own for every seed",
    margin=0.002,
    source="table 12",
)
BLOCKS = Claim(
    sentence="The blocks that LISA trains are worth more than embedding and head alone.",
    statistic="test accuracy of LISA",
    control="test accuracy of LISA without any block",
    margin=0.002,
    source="table 10",
)
MORE = Claim(
    sentence="More blocks at a time do better.",
    statistic="test accuracy of LISA, 4 of 6 blocks at a time",
    control="test accuracy of LISA, 2 of 6 blocks at a time",
    margin=0.002,
    source="section 4.5, figure 8",
)
OVER_LORA = Claim(
    sentence="LISA does better than LoRA.",
    statistic="test accuracy of LISA",
    control="test accuracy of LoRA, rank 8, on all linear layers at the same steps",
    margin=0.002,
    source="section 4, tables 2 and 3",
)


def arms(quick: bool) -> list[Arm]:
    """LISA and the same with one draw, and the two that it is measured against.

    In the full form also without any block, with fewer and more of them, and with few draws.
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
    """Accuracy against full fine-tuning, one draw, no block and LoRA."""
    reached = {label: accuracy(found) for label, found in runs.items()}
    verdicts = [
        PARITY.judge(reached[DRAWN], {seed: value - 0.02 for seed, value in reached[FULL].items()}),
        REDRAWN.judge(reached[DRAWN], reached[ONCE]),
        OVER_LORA.judge(reached[DRAWN], reached[ADAPTED]),
    ]
    shown = {label: found for label, found in runs.items() if label not in (ONE, FOUR, SELDOM)}
    exhibits = [
        exhibit("active_layers", plots.active_layers({label: runs[label] for label in (DRAWN, ONCE)})),
        exhibit("draw_frequency", plots.draw_frequency({DRAWN: runs[DRAWN]})),
        exhibit("training_curves", plots.training_curves(shown)),
        exhibit("update_norm", plots.update_norm(shown)),
        exhibit("norm_over_steps", plots.norm_over_steps(shown)),
    ]
    notes = [
        "Held fixed: model, text, splits, batch size, number of steps. Seeds vary the draws of blocks, head, adapters, "
        "data order, dropout.",
        "Rate 1e-4 for all but LoRA, which has 1e-3.",
        "Embedding, its norm, pooler and classifier train throughout in all forms of LISA.",
    ]
    if ENDS in runs:
        verdicts += [BLOCKS.judge(reached[DRAWN], reached[ENDS]), MORE.judge(reached[FOUR], reached[DRAWN])]
        grid = {label: runs[label] for label in (ONE, DRAWN, FOUR, SELDOM, ONCE)}
        exhibits.append(exhibit("draw_grid", plots.draw_grid(grid)))
        for varied in ((ONE, DRAWN, FOUR), (DRAWN, SELDOM, ONCE)):
            exhibits.append(exhibit("training_curves", plots.training_curves({label: runs[label] for label in varied})))
    else:
        notes.append("LISA without any block, with fewer or more of them, and with few draws belong to the full form.")
    return Findings(verdicts, exhibits, {"Draws by block": draws_table(runs)}, notes)


def draws_table(runs: Mapping[str, Sequence[Run]]) -> pd.DataFrame:
    """Share of the draws that took each block, by arm with draws, mean over seeds, and the chance of it."""
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
        title="LISA: a few blocks at a time against all of them",
        source="Pan et al., LISA, arXiv 2403.17919",
        question="Do a few blocks at a time reach full fine-tuning, and is it worth drawing them anew?",
        quick_budget=85,
        arms=arms,
        judge=judge,
        seeds=5,
    )
)
