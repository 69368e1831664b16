"""Figure of the training of the pairs: loss by step, compared with that of the control, one panel per pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from lorascope.analysis.seed_intervals import seed_cells
from lorascope.charts.chart import Chart, Panels
from lorascope.charts.geometry import drawn_number
from lorascope.charts.marks import Axis, Band, Line, Mark, Rule
from lorascope.charts.text_wrapping import wrap_text
from lorascope.files.printable import count_phrase
from lorascope.papers.figures.pair_gaps import name_quadratics, padded_limits
from lorascope.papers.figures.study_marks import (
    FAVORABLE,
    OTHER,
    POSITIVE,
    SIDES,
    arrange,
    compared_methods,
    short_method,
    split_label,
    truths,
    write_word,
)
from lorascope.papers.judging.kept_study import StudyEvidence
from lorascope.papers.judging.registered_study import StudyClaim, StudyRegistration
from lorascope.plots.run_groups import INTERVAL

WINDOW = 10  # steps, of which a batch's loss is the mean
_TITLE_WIDTH, _TITLE_SIZE = 150.0, 8.0  # points
_OF_ROUNDS = "pair.alora"
_CAPTION = (
    f"Training loss on planted teachers, of the judged runs of every pair, mean of {WINDOW} steps, minus that of the "
    f"control of the same seed, in percent of the latter. Lines: means over the seeds in the titles; bands: "
    f"{INTERVAL}, often narrower than a line. Titles: difference at the end where the truth favors the method; lower: "
    "an interval below 0. Panels are sorted by it; their scales differ."
)
_REPEATS = "Jumps near steps 190 and 380, and for ALoRA near 170 and 340, are where texts repeat."
"""ALoRA trains on nine tenths of the 3,000 texts, in batches of 16 like all students."""


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
    claims: list[StudyClaim] = []
    ends: list[pd.Series] = []
    last: list[float] = []  # of each chart
    for claim in registration.claims.values():
        if not claim.id.startswith("pair."):
            continue
        claims.append(claim)
        last.append(np.inf)
        table = loss_table(claim, evidence)
        title = wrap_text(compared_methods(claim), _TITLE_WIDTH, _TITLE_SIZE)
        # Axes with one label would share their limits.
        numbers = table[["low", "high", "value"]].to_numpy(np.float64).ravel()
        x, y = Axis(label="step"), Axis(label="difference (%)", limits=padded_limits(np.append(numbers, 0.0)))
        marks: list[Mark] = [Rule(y=0), Band("step", "low", "high", "side"), Line("step", "value", "side")]
        marks += [Rule(x=step) for step in _ends_of_rounds(claim, evidence)]
        if table.empty:
            x, y = Axis(label="step", ticks={}, limits=(-1, 1)), Axis(ticks={}, limits=(-1, 1))
            marks.append(write_word(0.0, 0.5))
        else:
            seeds = count_phrase(claim.rule.seeds, "seed")
            if (finished := int(table["n"].min())) < claim.rule.seeds:
                seeds = f"{finished} of {seeds}"
            title += f"\n{seeds}"
            favorable = table[table["side"] == FAVORABLE]
            if len(favorable):
                end = favorable.sort_values("step").iloc[-1]
                ends.append(pd.concat([end, pd.Series({"pair": compared_methods(claim)})]))
                last[-1:] = [end["value"]]
                title += f": {drawn_number(end['value'], '+.1f')}%"
        charts.append(Chart(table, marks, title=title, x=x, y=y, colors=SIDES))
    # Pairs without runs are last.
    charts = [charts[number] for number in np.argsort(last, kind="stable")]
    charts[0] = replace(charts[0], caption=_caption(claims))
    title = "Training loss compared with the control"
    if ends:
        at_end = pd.DataFrame(ends).sort_values("value", kind="stable")
        title += f": lower at the end in {(at_end['high'] < 0).sum()} of {len(at_end)} pairs"
        if len(at_end) > 1:
            values, pairs = at_end["value"].to_list(), at_end["pair"].to_list()
            lowest, highest = (f"{drawn_number(values[end], '+.1f')}% ({pairs[end]})" for end in (0, -1))
            title += f", from {lowest} to {highest}"
    return arrange(charts, title=title)


def _describe_arms(claims: Sequence[StudyClaim]) -> str:
    """Return a sentence with the truths and the positive control of every pair, in the order of the legend."""
    pairs: dict[str, list[str]] = {}  # with the same truths and control
    for claim in claims:
        names = [*truths(claim).values()]
        for arm in claim.control_arms[:1]:
            names.append(short_method(split_label(arm)[0]))
        pairs.setdefault(" | ".join(names), []).append(compared_methods(claim))
    rows = [f"{' and '.join(names)}: {arms}" for arms, names in pairs.items()]
    return f"Truth that favors the method | other truth | positive control of {'; '.join(rows)}."


def _ends_of_rounds(claim: StudyClaim, evidence: StudyEvidence) -> list[int]:
    """Return the steps of the first and last round of a pair of ALoRA, which scores components in every round."""
    scores = evidence.tables.get("scores")
    arm = claim.for_arms[0]
    if scores is None or claim.id != _OF_ROUNDS:
        return []
    steps = sorted(map(int, scores.loc[scores["arm"] == arm, "step"]))
    return [*steps[:1], *steps[-1:]]


def _caption(claims: Sequence[StudyClaim]) -> str:
    """Return the caption, which names the positive controls that are worse methods."""
    sentences = [_CAPTION, _describe_arms(claims)]
    worse = []
    for claim in claims:
        # A pair that claims a small cost needs a method whose cost is visible.
        if claim.rule.kind == "cost" and claim.control_arms:
            worse.append(f"{split_label(claim.control_arms[0])[0]} ({compared_methods(claim)})")
    gains = "The positive control shows that there is something to gain"
    if worse:
        gains += f"; a known worse method shows that a cost would be seen: {' and '.join(worse)}"
    sentences.append(f"{gains}.")
    if any(claim.id == _OF_ROUNDS for claim in claims):
        sentences += ["ALoRA's rounds are between the vertical lines.", _REPEATS]
    return " ".join(sentences) + name_quadratics(claims)
