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
from lorascope.files.printable import count_phrase
from lorascope.papers.figures.study_marks import FAVORABLE, OTHER, claim_arms, split_label, write_word
from lorascope.papers.judging.kept_study import StudyEvidence
from lorascope.papers.judging.registered_study import StudyClaim, StudyRegistration

CLOSED, LOSS = "gap closed (points)", "final loss (% of first)"
_POINTS, _PERCENT = "points of the gap", "percent of the control's loss"
POSITIVE = "positive control"
_NAME_WIDTH, _LONG_NAME, _SIZE = 92.0, 200.0, 7.4  # points, of the longest line of an arm's name and of its font
_SIDES = (FAVORABLE, OTHER, POSITIVE)
_SHORT = {
    "FourierFT, 192 coefficients from zero": "Fourier basis",
    "FourierFT, 192 coefficients, random basis": "random basis",
    "HydraLoRA, 4 experts of rank 4": "HydraLoRA, one A",
    "HydraLoRA, separate A's of rank 3": "separate A's",
    "HydraLoRA, separate A's of rank 6": "separate, rank 6",
}
"""Short names of arms whose labels differ in a detail that the page of the paper explains."""
_CAPTION = (
    "Left: each dot is one seed. Right: difference between method and control by seed, with 95% intervals; right of 0 "
    "(dashed), the method is better. Bound: the smallest effect that matters. A pair without a positive control has "
    "none."
)
_EFFECT_CAPTION = (
    "Differences between method and control by seed ({seeds} seeds), with 95% intervals; right of 0 (dashed), the "
    "method is better. Pairs without runs are left out."
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

    ``results`` are those of ``study_results.compute``; a claim that is not among them, as in a small version, has no
    panel of effects.
    """
    judged = set(results["claim"]) if "claim" in results else set()
    rows: list[tuple[Chart, ...]] = []
    for claim in registration.claims.values():
        if claim.id.startswith("pair."):
            row: tuple[Chart, ...] = (_draw_gaps(claim, gap_table(claim, evidence)),)
            if claim.id in judged:
                row += (_draw_effects(claim, effect_table([claim], results), results),)
            rows.append(row)
    return Panels(
        tuple(rows), columns=max(map(len, rows)), title="Pairs of planted teachers: every seed, and the effect"
    )


def pair_effects(registration: StudyRegistration, results: pd.DataFrame) -> Panels:
    """Draw the effects of all registered pairs at both truths, and of their positive controls; see ``pair_gaps``."""
    by_unit: dict[str, list[StudyClaim]] = {}
    for claim in registration.claims.values():
        if claim.id.startswith("pair."):
            by_unit.setdefault(_unit_of(claim), []).append(claim)
    judged = results[results["claim"].isin(list(registration.claims)) & (results["n"] > 0)]
    caption = _EFFECT_CAPTION.format(seeds=" or ".join(map(str, sorted(set(judged["n"].astype(int))))))
    rows = []
    for unit, claims in by_unit.items():
        names = {claim.id: compared_methods(claim) for claim in claims}
        table = effect_table(claims, results)
        table = table.assign(row=table["claim"].map(names) + table["side"].map({OTHER: ", other"}).fillna(""))
        order: list[str] = []
        for name in names.values():
            order += [name, f"{name}, other"]
        marks = [Rule(x=0), Point("effect", "row", "side", low="low", high="high")]
        ticks = {name: wrap_text(name, _LONG_NAME, _SIZE) for name in names.values()}
        ticks |= {f"{name}, other": OTHER for name in names.values()}
        y = Axis(order=order, ticks=ticks, compact=True)
        title = "Gap closed, minus the control" if unit == _POINTS else "Reduction of the control's loss"
        rows.append((Chart(table, marks, title=title, x=Axis(label=unit), y=y, colors=_SIDES, caption=caption),))
    return Panels(tuple(rows), title="Effect in pairs of planted teachers")


def compared_methods(claim: StudyClaim) -> str:
    """Return the method of a claim and its control as a title."""
    method, control = (split_label(arm)[0] for arm in claim.for_arms)
    return f"{_SHORT.get(method, method)} against {_SHORT.get(control, control)}"


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


def _draw_effects(claim: StudyClaim, table: pd.DataFrame, results: pd.DataFrame) -> Chart:
    """Draw the effects of one pair, a row per truth and one for the positive control, with the bound."""
    marks: list[Mark] = [Rule(x=0), Point("effect", "side", "side", low="low", high="high")]
    sides = [side for side in (FAVORABLE, OTHER, POSITIVE) if side in set(table["side"])]
    title = "Reduction of the control's loss" if _unit_of(claim) == _PERCENT else "Difference from the control"
    if table.empty:
        sides = [FAVORABLE]
        marks.append(write_word(0.0, FAVORABLE))
    else:
        sign = {"gain": 1, "cost": -1}[claim.rule.kind]
        bound = pd.DataFrame({"effect": [sign * claim.rule.bound], "side": [FAVORABLE]})
        marks.append(Point("effect", "side", symbol="line-ns-open", label="bound", data=bound))
        seeds = int(results.loc[results["claim"] == claim.id, "n"].iloc[0])
        title += f", {count_phrase(seeds, 'seed')}"
    names = {side: wrap_text(side, _NAME_WIDTH, _SIZE) for side in sides}
    y = Axis(order=sides, ticks=names, compact=True)
    return Chart(table, marks, title=title, x=Axis(label=_unit_of(claim)), y=y, colors=_SIDES)


def _unit_of(claim: StudyClaim) -> str:
    return _PERCENT if claim.rule.unit.startswith("percent") else _POINTS


def _draw_gaps(claim: StudyClaim, table: pd.DataFrame) -> Chart:
    """Draw the arms of one pair; every arm has a line per truth."""
    # Separate limits, because an effect of a few points would be invisible between 0 and 100.
    low, high = table["value"].min(), table["value"].max()
    if not low < high:
        low, high = 0.0, 100.0
    room = 0.06 * (high - low)
    x, title = Axis(label=CLOSED, limits=(low - room, high + room)), compared_methods(claim)
    if _unit_of(claim) == _PERCENT:
        x, title = replace(x, label=LOSS), f"{title}: lower is better"
    compared = {*claim.for_arms, *claim.against_arms}
    table = table.assign(
        row=table["method"].where(table["side"] == FAVORABLE, table["method"] + ", other"),
        kind=table["side"].where(table["arm"].isin(compared), POSITIVE),
    )
    means = table.groupby("row", sort=False)["value"].mean().reset_index()
    marks: list[Mark] = [Point("value", "row", "kind")]
    if len(means):
        marks.append(Point("value", "row", symbol="diamond", hollow=True, label="mean", data=means))
    names: dict[str, str] = {}
    lines: list[str] = []
    for arm in claim_arms(claim):
        row = arm.method if arm.side == FAVORABLE else f"{arm.method}, other"
        if row not in names:
            name = _SHORT.get(arm.method, arm.method) if arm.side == FAVORABLE else OTHER
            names[row] = wrap_text(name, _NAME_WIDTH, _SIZE)
            lines.append(row)
            if row == arm.method and row not in set(table["method"]):
                marks.append(write_word((low + high) / 2, row))
    y = Axis(order=_by_method(lines), ticks=names, compact=True)
    return Chart(table, marks, title=title, x=x, y=y, colors=_SIDES, caption=_CAPTION)


def _by_method(rows: Sequence[str]) -> list[str]:
    """Sort rows so that the other truth of a method is below the favorable one."""
    methods = list(dict.fromkeys(row.removesuffix(", other") for row in rows))
    return sorted(rows, key=lambda row: (methods.index(row.removesuffix(", other")), row.endswith(", other")))
