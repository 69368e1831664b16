"""Figure of the training of the pairs: loss by step, compared with that of the control, one panel per pair."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from lorascope.analysis.seed_intervals import seed_cells
from lorascope.charts.chart import Chart, Panels
from lorascope.charts.marks import Axis, Band, Line, Mark, Rule
from lorascope.charts.text_wrapping import wrap_text
from lorascope.files.printable import count_phrase
from lorascope.papers.figures.study_marks import (
    FAVORABLE,
    OTHER,
    POSITIVE,
    SIDES,
    arrange,
    compared_methods,
    write_word,
)
from lorascope.papers.judging.kept_study import StudyEvidence
from lorascope.papers.judging.registered_study import StudyClaim, StudyRegistration
from lorascope.plots.run_groups import INTERVAL

WINDOW = 10  # steps, of which a batch's loss is the mean
_TITLE_WIDTH, _TITLE_SIZE = 150.0, 8.0  # points
_CAPTION = (
    f"Training loss, mean of {WINDOW} steps, minus that of the control of the same seed, in percent of the latter. "
    f"Lines: means over seeds; bands: {INTERVAL}. Panels have different scales. The positive control shows that there "
    "is something to gain."
)


def loss_table(claim: StudyClaim, evidence: StudyEvidence) -> pd.DataFrame:
    """Tabulate ``side, step, value, low, high, n``: training loss minus the control's, in ten steps of the last phase.

    The value is the mean over seeds in percent of the control's loss, with a 95% t-interval. Arms of a positive control
    that learn one task each are averaged.
    """
    sides = {FAVORABLE: claim.for_arms, OTHER: claim.against_arms, POSITIVE: claim.control_arms}
    tables = [pd.DataFrame(columns=["side", "seed", "step", "value"])]
    for side, (*arms, control) in ((side, arms) for side, arms in sides.items() if arms):
        ratio = _mean_losses(evidence, arms) / _mean_losses(evidence, [control])
        tables.append((100 * (ratio - 1)).dropna().rename("value").reset_index().assign(side=side))
    by_seed = pd.concat(tables).astype({"step": "float64", "value": "float64"})
    return seed_cells(by_seed, ["side", "step"])


def _mean_losses(evidence: StudyEvidence, arms: list[str]) -> pd.Series:
    """Return the mean loss of judged runs by seed and by the middle of ten steps, averaged over arms."""
    runs = evidence.runs
    judged = runs.loc[(runs["role"] == "judged") & runs["arm"].isin(arms), "run"]
    losses = evidence.tables.get("losses", pd.DataFrame(columns=["arm", "run", "seed", "phase", "step", "loss"]))
    losses = losses[losses["run"].isin(judged) & (losses["phase"] == "")]
    # Some methods count from 0, others from 1.
    step = losses["step"] - losses.groupby("run")["step"].transform("min")
    binned = losses.assign(step=step // WINDOW * WINDOW + WINDOW / 2, loss=losses["loss"].astype("float64"))
    return binned.groupby(["seed", "step"])["loss"].mean()


def pair_losses(registration: StudyRegistration, evidence: StudyEvidence) -> Panels:
    """Draw the training loss of the registered pairs by step, compared with that of their controls."""
    charts: list[Chart] = []
    for claim in registration.claims.values():
        if not claim.id.startswith("pair."):
            continue
        table = loss_table(claim, evidence)
        title = wrap_text(compared_methods(claim), _TITLE_WIDTH, _TITLE_SIZE)
        # Without a label, the axes of panels have different limits.
        x, y = Axis(label="step"), Axis()
        marks: list[Mark] = [Rule(y=0), Band("step", "low", "high", "side"), Line("step", "value", "side")]
        if table.empty:
            x, y = Axis(label="step", ticks={}, limits=(-1, 1)), Axis(ticks={}, limits=(-1, 1))
            marks.append(write_word(0.0, 0.5))
        else:
            title += f"\n{count_phrase(int(table['n'].max()), 'seed')}"
        charts.append(Chart(table, marks, title=title, x=x, y=y, colors=SIDES))
    charts[0] = replace(charts[0], caption=_CAPTION)
    return arrange(charts, title="Training loss compared with the control (%): below 0, it is lower")
