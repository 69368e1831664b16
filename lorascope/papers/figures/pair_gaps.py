"""Figure of the pairs: gap that each arm closes at both planted truths, one panel per pair."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from lorascope.charts.chart import Chart, Panels
from lorascope.charts.marks import Axis, Mark, Point
from lorascope.charts.text_wrapping import wrap_text
from lorascope.papers.figures.study_marks import FAVORABLE, OTHER, arrange, claim_arms, write_word
from lorascope.papers.judging.kept_study import StudyEvidence
from lorascope.papers.judging.registered_study import StudyClaim, StudyRegistration

CLOSED, LOSS = "gap closed (points)", "final loss (% of first)"
_NAME_WIDTH, _SIZE = 92.0, 7.4  # points, of the longest line of an arm's name and of its font
_CAPTION = (
    "Each dot is one seed. Upper line of an arm: the truth that favors the method; lower line: the other one. On the "
    "quadratic of Adapprox, a lower loss is better. Every panel has limits that fit its dots. A positive control has "
    "one truth. Pairs without runs are left out."
)


def gap_table(claim: StudyClaim, evidence: StudyEvidence) -> pd.DataFrame:
    """Tabulate ``arm, method, truth, side, seed, value, unit`` of a pair: one row per arm and seed.

    The value is the gap closed in points or, on the quadratic, the final loss in percent of the first.
    """
    rows = []
    for arm in claim_arms(claim):
        for seed in evidence.seeds(arm.arm):
            of_run = evidence.of_phase(arm.arm, seed)
            value, unit = evidence.closed(arm.arm, seed), CLOSED
            if of_run["base_gap"].isna().all():
                value, unit = float(np.mean(100 * of_run["loss"] / of_run["first_loss"])), LOSS
            rows.append((*arm, seed, value, unit))
    columns = ["arm", "method", "truth", "side", "seed", "value", "unit"]
    return pd.DataFrame(rows, columns=columns).astype({"value": "float64"})


def pair_gaps(registration: StudyRegistration, evidence: StudyEvidence) -> Panels:
    """Draw the gap closed by every arm of all registered pairs, a dot per seed."""
    charts: list[Chart] = []
    for claim in registration.claims.values():
        if claim.id.startswith("pair."):
            charts.append(replace(_draw_pair(claim, gap_table(claim, evidence)), title=claim.id))
    charts[0] = replace(charts[0], caption=_CAPTION)
    return arrange(charts)


def _draw_pair(claim: StudyClaim, table: pd.DataFrame) -> Chart:
    """Draw one pair; every arm has a line per truth."""
    # Separate limits, because an effect of a few points would be invisible between 0 and 100.
    low, high = table["value"].min(), table["value"].max()
    if not low < high:
        low, high = 0.0, 100.0
    room = 0.06 * (high - low)
    x = Axis(label=CLOSED, limits=(low - room, high + room))
    if claim.rule.unit.startswith("percent"):
        x = replace(x, label=LOSS)
    table = table.assign(row=table["method"].where(table["side"] == FAVORABLE, table["method"] + ", other"))
    marks: list[Mark] = [Point("value", "row", "side")]
    names: dict[str, str] = {}
    lines: list[str] = []
    for arm in claim_arms(claim):
        if arm.method not in names:
            names[arm.method] = wrap_text(arm.method, _NAME_WIDTH, _SIZE)
            lines += [arm.method, f"{arm.method}, other"]
            if arm.method not in set(table["method"]):
                marks.append(write_word((low + high) / 2, arm.method))
    return Chart(table, marks, x=x, y=Axis(order=lines, ticks=names, compact=True), colors=(FAVORABLE, OTHER))
