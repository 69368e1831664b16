"""Figure of a claim's training: loss by step of its arms."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from lorascope.charts.chart import Chart, Panels
from lorascope.charts.marks import Axis, Band, Line, Mark
from lorascope.papers.figures.study_marks import arrange, claim_arms, write_word
from lorascope.papers.judging.kept_study import StudyEvidence
from lorascope.papers.judging.registered_study import StudyClaim

WINDOW = 10  # steps, of which a batch's loss is the mean
_LOG = 20  # ratio of the largest loss to the smallest from which an axis is logarithmic


def loss_table(claim: StudyClaim, evidence: StudyEvidence) -> pd.DataFrame:
    """Tabulate ``method, truth, phase, step, value, low, high``: mean and range over seeds of the loss in ten steps."""
    tables = []
    for arm in claim_arms(claim):
        for seed in evidence.seeds(arm.arm):
            losses = evidence.table("losses", arm.arm, seed).astype({"loss": "float64"})
            # Some methods count from 0, others from 1.
            step = (losses["step"] - losses["step"].min()) // WINDOW * WINDOW + WINDOW / 2
            by_step = losses.assign(step=step).groupby(["phase", "step"])["loss"].mean().reset_index()
            tables.append(by_step.assign(method=arm.method, truth=arm.truth))
    keys = ["method", "truth", "phase", "step"]
    if not tables:
        empty = pd.DataFrame(columns=[*keys, "value", "low", "high"])
        return empty.astype(dict.fromkeys(["step", "value", "low", "high"], "float64"))
    by_seed = pd.concat(tables, ignore_index=True).groupby(keys, sort=False)["loss"]
    return by_seed.agg(value="mean", low="min", high="max").reset_index()


def claim_losses(claim: StudyClaim, evidence: StudyEvidence) -> Panels:
    """Draw the training loss of the arms of a claim by step: mean and range over seeds, a panel per truth and phase."""
    table, arms = loss_table(claim, evidence), claim_arms(claim)
    is_log = bool(table["high"].max() > _LOG * table["low"].min())
    caption = f"{claim.id}: mean of {WINDOW} steps; lines are means and bands ranges over seeds."
    missing = [arm.arm for arm in arms if not evidence.seeds(arm.arm)]
    if 0 < len(missing) < len(arms):
        caption += f" Not run: {'; '.join(missing)}."
    charts: list[Chart] = []
    for truth in dict.fromkeys(arm.truth for arm in arms):
        of_truth = table[table["truth"] == truth]
        # Without runs, the panel of the last phase says so.
        for phase in sorted(set(of_truth["phase"]) | {""}, reverse=True):
            rows = of_truth[of_truth["phase"] == phase]
            marks: list[Mark] = [Band("step", "low", "high", "method"), Line("step", "value", "method")]
            x, y = Axis(label="step"), Axis(label="training loss", log=is_log)
            if rows.empty:
                # A median is within the limits, which all panels share.
                marks.append(write_word(0.0, table["value"].median()))
                x, y = replace(x, ticks={}), replace(y, ticks={})
            title = ", ".join(filter(None, [truth, phase]))
            chart = Chart(rows, marks, title=title, x=x, y=y, caption=caption)
            charts.append(replace(chart, colors=dict.fromkeys(arm.method for arm in arms)))
    return arrange(charts)
