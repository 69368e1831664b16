"""Figures of the pairs: gap that each arm closes at both planted truths, and its difference from the control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from lorascope.charts.chart import Chart, Panels
from lorascope.charts.marks import Axis, Mark, Point, Rule
from lorascope.charts.text_wrapping import wrap_text
from lorascope.papers.figures.study_marks import FAVORABLE, OTHER, claim_arms, split_label, write_word
from lorascope.papers.judging.kept_study import StudyEvidence
from lorascope.papers.judging.registered_study import StudyClaim, StudyRegistration

CLOSED, LOSS = "gap closed (points)", "final loss (% of first)"
_POINTS, _PERCENT = "points of the gap", "percent of the control's loss"
POSITIVE = "positive control"
_NAME_WIDTH, _LONG_NAME, _SIZE = 92.0, 200.0, 7.4  # points, of the longest line of an arm's name and of its font
_CAPTION = (
    "Left: each dot is one seed; upper line of an arm: the truth that favors the method, lower line: the other one. A "
    "positive control has one truth. Right: difference by seed, with 95% intervals. Limits fit the dots."
)
_EFFECT_CAPTION = (
    "Differences between method and control by seed, with 95% intervals; 0 (dashed): no effect. Pairs without runs are "
    "left out."
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


def pair_gaps(registration: StudyRegistration, evidence: StudyEvidence, results: pd.DataFrame) -> Panels:
    """Draw the gap closed by every arm of all registered pairs, a dot per seed, next to the effects at both truths.

    ``results`` are those of ``study_results.compute``.
    """
    rows = []
    for claim in registration.claims.values():
        if not claim.id.startswith("pair."):
            continue
        table = gap_table(claim, evidence)
        caption = _CAPTION
        if LOSS in set(table["unit"]):
            caption += " On the quadratic, a lower loss is better, and an effect is the part of the control's loss."
        gaps = replace(_draw_gaps(claim, table), title=compared_methods(claim), caption=caption)
        rows.append((gaps, _draw_effects(claim, effect_table([claim], results))))
    return Panels(tuple(rows), columns=2)


def pair_effects(registration: StudyRegistration, results: pd.DataFrame) -> Panels:
    """Draw the effects of all registered pairs at both truths, and of their positive controls; see ``pair_gaps``."""
    by_unit: dict[str, list[StudyClaim]] = {}
    for claim in registration.claims.values():
        if claim.id.startswith("pair."):
            by_unit.setdefault(_unit_of(claim), []).append(claim)
    rows = []
    for unit, claims in by_unit.items():
        names = {claim.id: compared_methods(claim) for claim in claims}
        table = effect_table(claims, results)
        table = table.assign(row=table["claim"].map(names) + table["side"].map({OTHER: ", other"}).fillna(""))
        order: list[str] = []
        for name in names.values():
            order += [name, f"{name}, other"]
        marks = [Rule(x=0), *_effect_points(table)]
        ticks = {name: wrap_text(name, _LONG_NAME, _SIZE) for name in names.values()}
        y = Axis(order=order, ticks=ticks, compact=True)
        title = "Gap closed, minus the control" if unit == _POINTS else "Reduction of the control's loss"
        rows.append((Chart(table, marks, title=title, x=Axis(label=unit), y=y, caption=_EFFECT_CAPTION),))
    return Panels(tuple(rows), title="Effect in pairs of planted teachers")


def compared_methods(claim: StudyClaim) -> str:
    """Return the method of a claim and its control as a title."""
    method, control = (split_label(arm)[0] for arm in claim.for_arms)
    return f"{method} against {control}"


def effect_table(claims: Sequence[StudyClaim], results: pd.DataFrame) -> pd.DataFrame:
    """Tabulate ``claim, truth, side, effect, low, high`` of judged claims: both truths, and the positive control."""
    judged: dict[Any, Any] = results.set_index("claim").to_dict("index")
    rows = []
    for claim in claims:
        for side, prefix, arms in (
            (FAVORABLE, "", claim.for_arms),
            (OTHER, "against_", claim.against_arms),
            (POSITIVE, "positive_", claim.control_arms),
        ):
            effect, low, high = (judged[claim.id][f"{prefix}{name}"] for name in ("effect", "low", "high"))
            if pd.notna(effect):
                rows.append((claim.id, split_label(arms[0])[1], side, effect, low, high))
    table = pd.DataFrame(rows, columns=["claim", "truth", "side", "effect", "low", "high"])
    return table.astype(dict.fromkeys(["effect", "low", "high"], "float64"))


def _draw_effects(claim: StudyClaim, table: pd.DataFrame) -> Chart:
    """Draw the effects of one pair, a row per truth and one for the positive control."""
    rows = {FAVORABLE: FAVORABLE, OTHER: OTHER, POSITIVE: POSITIVE}
    table = table.assign(row=table["side"].map(rows))
    marks: list[Mark] = [Rule(x=0), *_effect_points(table)]
    if table.empty:
        marks.append(write_word(0.0, FAVORABLE))
    names = {side: wrap_text(side, _NAME_WIDTH, _SIZE) for side in rows}
    y = Axis(order=list(rows), ticks=names, compact=True)
    return Chart(table, marks, title="Minus the control, 95%", x=Axis(label=_unit_of(claim)), y=y)


def _effect_points(table: pd.DataFrame) -> list[Mark]:
    points: list[Mark] = []
    for side, symbol in ((FAVORABLE, "circle"), (OTHER, "circle-open"), (POSITIVE, "x")):
        of_side = table[table["side"] == side]
        points.append(Point("effect", "row", "side", symbol=symbol, low="low", high="high", data=of_side))
    return points


def _unit_of(claim: StudyClaim) -> str:
    return _PERCENT if claim.rule.unit.startswith("percent") else _POINTS


def _draw_gaps(claim: StudyClaim, table: pd.DataFrame) -> Chart:
    """Draw the arms of one pair; every arm has a line per truth."""
    # Separate limits, because an effect of a few points would be invisible between 0 and 100.
    low, high = table["value"].min(), table["value"].max()
    if not low < high:
        low, high = 0.0, 100.0
    room = 0.06 * (high - low)
    x = Axis(label=CLOSED, limits=(low - room, high + room))
    if _unit_of(claim) == _PERCENT:
        x = replace(x, label=LOSS)
    table = table.assign(row=table["method"].where(table["side"] == FAVORABLE, table["method"] + ", other"))
    means = table.groupby(["row", "side"], sort=False)["value"].mean().reset_index()
    marks: list[Mark] = [Point("value", "row", "side")]
    if len(means):
        marks.append(Point("value", "row", symbol="line-ns-open", label="mean", data=means))
    names: dict[str, str] = {}
    lines: list[str] = []
    for arm in claim_arms(claim):
        if arm.method not in names:
            names[arm.method] = wrap_text(arm.method, _NAME_WIDTH, _SIZE)
            lines += [arm.method, f"{arm.method}, other"]
            if arm.method not in set(table["method"]):
                marks.append(write_word((low + high) / 2, arm.method))
    return Chart(table, marks, x=x, y=Axis(order=lines, ticks=names, compact=True), colors=(FAVORABLE, OTHER))
