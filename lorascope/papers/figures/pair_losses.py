"""Figure of the training of the pairs: loss by step where the truth favors the method, one panel per pair."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from lorascope.charts.chart import Chart, Panels
from lorascope.charts.marks import Axis, Line, Mark, Point
from lorascope.charts.text_wrapping import wrap_text
from lorascope.papers.figures.pair_gaps import compared_methods
from lorascope.papers.figures.study_marks import FAVORABLE, arrange, claim_arms, write_word
from lorascope.papers.judging.kept_study import StudyEvidence
from lorascope.papers.judging.registered_study import StudyClaim, StudyRegistration

WINDOW = 10  # steps, of which a batch's loss is the mean
_LOG = 20  # ratio of the largest loss to the smallest from which an axis is logarithmic
_TITLE_WIDTH, _TITLE_SIZE = 125.0, 8.0  # points
METHOD, CONTROL, POSITIVE = "method", "control", "positive control"


def loss_table(claim: StudyClaim, evidence: StudyEvidence) -> pd.DataFrame:
    """Tabulate ``role, step, value, low, high``: mean and range over seeds of the loss in ten steps of the last phase.

    Arms of the positive control are averaged, such as those that learn one task each.
    """
    method, control = claim.for_arms
    roles = {arm.arm: POSITIVE for arm in claim_arms(claim) if arm.side == FAVORABLE}
    roles |= {method: METHOD, control: CONTROL}
    runs = evidence.runs
    judged = runs.loc[(runs["role"] == "judged") & runs["arm"].isin(roles), "run"]
    losses = evidence.tables.get("losses", pd.DataFrame(columns=["arm", "run", "seed", "phase", "step", "loss"]))
    losses = losses[losses["run"].isin(judged) & (losses["phase"] == "")]
    # Some methods count from 0, others from 1.
    step = losses["step"] - losses.groupby("run")["step"].transform("min")
    binned = losses.assign(
        role=losses["arm"].map(roles), step=step // WINDOW * WINDOW + WINDOW / 2, loss=losses["loss"].astype("float64")
    )
    by_seed = binned.groupby(["role", "seed", "step"])["loss"].mean()
    cells = by_seed.groupby(["role", "step"]).agg(value="mean", low="min", high="max").reset_index()
    return cells.astype(dict.fromkeys(["step", "value", "low", "high"], "float64"))


def pair_losses(registration: StudyRegistration, evidence: StudyEvidence) -> Panels:
    """Draw the training loss of the registered pairs by step, where the truth favors the method."""
    charts: list[Chart] = []
    drawn: set[frozenset[str]] = set()
    for claim in registration.claims.values():
        if not claim.id.startswith("pair."):
            continue
        table = loss_table(claim, evidence)
        is_log = bool(table["high"].max() > _LOG * table["low"].min())
        # Bands of three roles would cover each other.
        last = table[table["step"] == table.groupby("role")["step"].transform("max")]
        ends = Point("step", "value", "role", low="low", high="high", data=last)
        marks: list[Mark] = [Line("step", "value", "role"), ends]
        # Without a label, the axes of panels have different limits.
        # A pair on the quadratic may have the arms of an earlier one in other roles.
        arms = frozenset(arm.arm for arm in claim_arms(claim) if arm.side == FAVORABLE)
        if arms in drawn:
            continue
        drawn.add(arms)
        title = wrap_text(compared_methods(claim), _TITLE_WIDTH, _TITLE_SIZE)
        chart = Chart(table, marks, title=title, x=Axis(label="step"), y=Axis(log=is_log))
        if table.empty:
            empty = Axis(ticks={}, limits=(-1, 1))
            chart = replace(chart, marks=[*marks, write_word(0.0, 0.0)], x=replace(empty, label="step"), y=empty)
        charts.append(replace(chart, colors=(METHOD, CONTROL, POSITIVE)))
    caption = (
        f"Training loss where the truth favors the method, mean of {WINDOW} steps; lines are means, and bars at the "
        "last step ranges over seeds. Some positive controls have other truths, and no line."
    )
    charts[0] = replace(charts[0], y=replace(charts[0].y, label="training loss"), caption=caption)
    return arrange(charts)
