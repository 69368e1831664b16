"""Figures of the pairs: gap that each arm closes at both planted truths, and its difference from the control."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from lorascope.charts.chart import Chart, Panels
from lorascope.charts.geometry import drawn_number
from lorascope.charts.marks import Axis, Mark, Point, Rule
from lorascope.charts.text_wrapping import wrap_text
from lorascope.files.printable import count_phrase
from lorascope.papers.figures.study_marks import (
    BOUND,
    FAVORABLE,
    GAP,
    OTHER,
    POSITIVE,
    SIDES,
    SIGNS,
    SMALL,
    arrange,
    claim_arms,
    compared_methods,
    short_method,
    split_label,
    truths,
    write_word,
)
from lorascope.papers.judging.beliefs import shown_word
from lorascope.papers.judging.kept_study import StudyEvidence
from lorascope.papers.judging.registered_study import StudyClaim, StudyRegistration
from lorascope.papers.judging.words import NO_HEADROOM, NOT_LEARNED

CLOSED, LOSS = "gap closed (points)", "final loss (% of first)"
_POINTS, _PERCENT = "points of the gap", "change of the loss (%)"
_CHANGES = (200, 100, 60, 30, -20, -40, -60)
"""Ticks of an axis of losses, in percent of change; right is better, so they fall to the right."""
DIFFERENCE, _MEAN = "difference between truths", "mean"
_COLORS = (*SIDES, _MEAN, BOUND, DIFFERENCE)
_PAIRS = "pairs of planted truths"
_NAME_WIDTH, _SIZE = 160.0, 7.4  # points, of the longest line of an arm's name and of its font
_PREFIXES = {FAVORABLE: "", OTHER: "against_", DIFFERENCE: "difference_", POSITIVE: "positive_"}
_EFFECT = f"method minus control by seed, with 95% intervals; right of 0 (dashed), the method is better. {SMALL}"
_PHRASES = {
    "not even there": "failed even where favored",
    "gain below m": "gain below the bound",
    "cost below d": "cost below the bound",
}
"""What a reader who has only the figure understands instead of some words."""
_MEANINGS = {
    "as claimed": "where the truth favors the method, an interval above 0 that is not all below the bound (of a cost, "
    "above the bound and not all below 0), and less at the other truth",
    "not only there": "a gain, but not less at the other truth",
    "not even there": "no gain, a loss or a cost even where the truth favors the method",
    "gain below m": "an interval between 0 and the bound",
    "cost below d": "an interval between the bound and 0",
    "open": "the interval allows several answers",
    NO_HEADROOM: "the positive control has no effect, so neither could the method",
    NOT_LEARNED: "an arm did not learn its task",
}
"""Meanings of the words of pairs, for captions."""


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

    For ``results`` see ``study_results.compute``. A claim that is not among them, as in a small version, has no
    panel of effects.
    """
    judged = set(results["claim"]) if "claim" in results else set()
    pairs = [claim for claim in registration.claims.values() if claim.id.startswith("pair.")]
    quadratics = name_quadratics(pairs)
    caption = (
        "Small decoders, trained on the text of planted teachers, whose changes (truths) are known and begin the names "
        "of the rows; each hollow symbol is one seed, or a task of a seed."
    )
    if _POINTS in map(_unit_of, pairs):
        caption += f" {GAP}"
    elif pairs:
        caption = (
            "Quadratics without a network, whose planted second moments (truths) begin the names of the rows; each "
            "hollow symbol is one seed. Axes of the right panels fall, so above 0 the loss is lower than the control's."
        )
        quadratics = ""
    if judged:
        caption += f" Right: {_EFFECT}{_explain_words(registration, results)}"
    caption += quadratics
    rows: list[tuple[Chart, ...]] = []
    for claim in pairs:
        row: tuple[Chart, ...] = (_draw_gaps(claim, gap_table(claim, evidence), caption),)
        if claim.id in judged:
            names = truths(claim)
            # The row of the positive control has the name of its method.
            for arm in claim.control_arms[:1]:
                names[POSITIVE] = short_method(split_label(arm)[0])
            chart = _draw_effects(claim, results, "Difference from the control", names)
            if 0 < (finished := _count_finished(claim, evidence)) < claim.rule.seeds:
                # Its gaps are drawn, so that "not run" would contradict them.
                words = f"{finished} of {count_phrase(claim.rule.seeds, 'seed')}: not finished"
                chart = replace(chart, marks=[write_word(0.0, FAVORABLE, words)])
            row += (chart,)
        rows.append(row)
    return Panels(tuple(rows), columns=max(map(len, rows)), title=_title(pairs, results))


def pair_effects(registration: StudyRegistration, results: pd.DataFrame) -> Panels:
    """Draw the effects of all registered pairs at both truths, and of their positive controls; see ``pair_gaps``."""
    judged = set(results.loc[results["n"] > 0, "claim"])
    claims = [claim for claim in registration.claims.values() if claim.id.startswith("pair.")]
    # A panel without an effect would be empty, as that of a pair whose runs are not finished.
    claims = [claim for claim in claims if claim.id in judged] or claims
    # Panels in a row share the names of their rows, so that there is room for the effects.
    names = {FAVORABLE: "favorable truth", OTHER: OTHER, POSITIVE: POSITIVE}
    charts = []
    for claim in claims:
        ground = truths(claim)[FAVORABLE]
        charts.append(_draw_effects(claim, results, compared_methods(claim), names, ground))
    counts = results.loc[results["claim"].isin(judged.intersection(claim.id for claim in claims)), "n"].astype(int)
    ends = " to ".join(map(str, sorted({*counts.agg(["min", "max"]).dropna()})))
    seeds = f"; {ends} seeds" if ends else ""
    caption = (
        f"Small decoders, trained on the text of planted teachers, whose changes (truths) are known{seeds}."
        f"{name_quadratics(claims)} Titles name the truth that favors the method. Effect: {_EFFECT} Panels have "
        f"different scales. {GAP}"
        f"{_explain_words(registration, results)}"
    )
    if not all(claim.control_arms for claim in claims):
        caption += " A pair without a positive control has none."
    of_pairs = results[results["claim"].str.startswith("pair.")]
    if waiting := int((of_pairs["n"] == 0).sum()):
        caption += f" {waiting} of {len(of_pairs)} pairs are not finished."
    charts[0] = replace(charts[0], caption=caption)
    return arrange(charts, title=_count_words(claims, results))


def _title(claims: Sequence[StudyClaim], results: pd.DataFrame) -> str:
    """Return the title of the pairs of one method: its effects by control; numbers of words for several methods."""
    methods, effects, ground = set(), [], ""
    for claim in claims:
        method, _, control = compared_methods(claim).partition(" vs ")
        methods.add(method)
        if not results.empty:
            effects.append(_describe_effect(claim, results, control))
        if _unit_of(claim) == _PERCENT:
            ground = ", on a quadratic"
    if results.empty or len(methods) > 1:
        return _count_words(claims, results)
    return f"Where the truth favors {methods.pop()}{ground}: {'; '.join(effects)}"


def _describe_effect(claim: StudyClaim, results: pd.DataFrame, control: str) -> str:
    """Return the effect of a pair where the truth favors the method, or the word that replaces it."""
    result: dict[Any, Any] = results.set_index("claim").loc[claim.id].to_dict()
    if not result["n"]:
        return f"{_word_of(claim, results)} against {control}"
    if result["word"] in (NO_HEADROOM, NOT_LEARNED):
        return f"{result['word']} against {control}"
    numbers = [result[name] for name in ("effect", "low", "high", "against_effect")]
    if _unit_of(claim) == _POINTS:
        effect, low, high, other = map(drawn_number, numbers, ("+.1f", ".1f", ".1f", "+.1f"))
        return f"{effect} [{low}, {high}] points against {control} (otherwise {other})"
    # A reader knows percent of a loss, not of its logarithm.
    changes = [100 * math.expm1(-number / 100) for number in numbers]
    effect, high, low, other = map(drawn_number, changes, ("+.1f", ".0f", ".0f", "+.1f"))
    return f"loss {effect}% [{low}, {high}] against {control} (otherwise {other}%)"


def _count_words(claims: Sequence[StudyClaim], results: pd.DataFrame) -> str:
    """Return the title of pairs of several methods: how many have each word."""
    if results.empty:
        return f"{len(claims)} {_PAIRS}: every seed"
    counts = Counter(_word_of(claim, results) for claim in claims)
    return f"{len(claims)} {_PAIRS}: " + ", ".join(f"{number} {word}" for word, number in counts.most_common())


def _word_of(claim: StudyClaim, results: pd.DataFrame) -> str:
    """Return the word of a pair, or that it is not finished."""
    result: dict[Any, Any] = results.set_index("claim").loc[claim.id].to_dict()
    return _phrase(shown_word(result)) if result["n"] else "not finished"


def _phrase(word: str) -> str:
    return _PHRASES.get(word, word)


def _explain_words(registration: StudyRegistration, results: pd.DataFrame) -> str:
    """Return what the words of these pairs mean."""
    words, sentences = set(), []
    for _, row in results[results["claim"].isin(list(registration.claims))].iterrows():
        words.add(row["pair"] or row["word"])
    for word, meaning in _MEANINGS.items():
        if word in words:
            sentences.append(f" {_phrase(word).capitalize()}: {meaning}.")
    worse = []
    for claim in registration.claims.values():
        # A pair that claims a small cost needs a method whose cost is visible.
        if claim.id.startswith("pair.") and claim.rule.kind == "cost" and claim.control_arms:
            worse.append(compared_methods(claim))
    if worse:
        sentences.append(f" The positive control of {' and '.join(worse)} is a known worse method.")
    return "".join(sentences)


def _count_finished(claim: StudyClaim, evidence: StudyEvidence) -> int:
    """Return the number of seeds that all arms of a pair have finished."""
    return len(set.intersection(*(set(evidence.seeds(arm.arm)) for arm in claim_arms(claim))))


def effect_table(result: Mapping[str, Any]) -> pd.DataFrame:
    """Tabulate ``side, effect, low, high`` of a judged claim: truths, their difference, and the positive control."""
    rows: list[tuple[Any, ...]] = []
    for side, prefix in _PREFIXES.items():
        # Nothing can be read off the effect of an arm that did not learn.
        if result["word"] == NOT_LEARNED:
            break
        rows.append((side, *(result[f"{prefix}{name}"] for name in ("effect", "low", "high"))))
    table = pd.DataFrame(rows, columns=["side", "effect", "low", "high"]).dropna(subset="effect")
    return table.astype(dict.fromkeys(["effect", "low", "high"], "float64"))


def _draw_effects(
    claim: StudyClaim, results: pd.DataFrame, title: str, names: Mapping[str, str], ground: str = ""
) -> Chart:
    """Draw the effects of one pair with the bound, a row for each of ``names`` and one for their difference.

    The title has the word of the pair after ``ground``, the name of a truth, by default after the number of seeds.
    """
    result: dict[Any, Any] = results.set_index("claim").loc[claim.id].to_dict()
    table = effect_table(result)
    order, x = dict.fromkeys([*names, DIFFERENCE, *table["side"]]), Axis(label=_unit_of(claim))
    marks: list[Mark] = [Rule(x=0), Point("effect", "row", "kind", low="low", high="high")]
    if table.empty:
        marks, x = [write_word(0.0, FAVORABLE, result["word"])], replace(x, limits=(-1, 1), ticks={})
    else:
        bound = SIGNS[claim.rule.kind] * claim.rule.bound
        at_bound = pd.DataFrame({"effect": [bound], "row": [FAVORABLE], "kind": [BOUND]})
        marks.insert(1, Point("effect", "row", "kind", symbol="line-ns-open", data=at_bound))
        # Separate limits, because an effect of a few points would be invisible next to one of fifty.
        ends = np.append(table[["effect", "low", "high"]].to_numpy().ravel(), [0.0, bound])
        limits = padded_limits(ends)
        x = replace(x, limits=limits)
        if _unit_of(claim) == _PERCENT:
            x = replace(x, ticks=_ticks_of_changes(*limits))
        title += f"\n{ground or count_phrase(int(result['n']), 'seed')}: {_phrase(shown_word(result))}"
        # A gain below the bound is judged by its interval, which the dot would seem to contradict.
        if result["pair"] == "as claimed" and result["effect"] < bound:
            title += ", mean below the bound"
    ticks = {side: names.get(side, side) for side in order} | {DIFFERENCE: "first minus second row"}
    table, y = table.assign(row=table["side"], kind=table["side"]), Axis(order=order, ticks=ticks, compact=True)
    return Chart(table, marks, title=title, x=x, y=y, colors=_COLORS)


def _ticks_of_changes(low: float, high: float) -> dict[float, str]:
    """Return ticks at changes of a loss in percent, by their effect 100 ln(control's / own loss), within limits."""
    ticks = {0.0: "0"}
    for change in _CHANGES:
        position = -100 * math.log1p(change / 100)
        if low <= position <= high:
            ticks[position] = drawn_number(change, "+.0f")
    return ticks


def name_quadratics(claims: Sequence[StudyClaim]) -> str:
    """Return the sentence of captions on the pairs whose ground is a quadratic, or ""."""
    names = []
    for claim in claims:
        if _unit_of(claim) == _PERCENT:
            names.append(compared_methods(claim))
    return f" {' and '.join(names)}: a quadratic with planted second moments, without a network." if names else ""


def _unit_of(claim: StudyClaim) -> str:
    return _PERCENT if claim.rule.unit.startswith("percent") else _POINTS


def padded_limits(numbers: np.ndarray) -> tuple[float, float]:
    """Return the ends of an axis around numbers; from 0 to 100 without two of them."""
    low, high = float(np.nanmin(numbers, initial=np.inf)), float(np.nanmax(numbers, initial=-np.inf))
    if not low < high:
        low, high = 0.0, 100.0
    room = 0.06 * (high - low)
    return low - room, high + room


def _draw_gaps(claim: StudyClaim, table: pd.DataFrame, caption: str) -> Chart:
    """Draw the arms of one pair; every arm has a line per truth."""
    limits, title, label = padded_limits(table["value"].to_numpy()), compared_methods(claim), CLOSED
    if _unit_of(claim) == _PERCENT:
        label, title = LOSS, f"{title}: lower is better"
    compared = {*claim.for_arms, *claim.against_arms}
    table = table.assign(kind=table["side"].where(table["arm"].isin(compared), POSITIVE))
    table["row"] = table["side"] + ": " + table["method"]
    means = table.groupby("row", sort=False)["value"].mean().reset_index().assign(kind=_MEAN)
    marks: list[Mark] = [
        Point("value", "row", "kind", hollow=True),
        Point("value", "row", "kind", symbol="line-ns-open", data=means),
    ]
    names: dict[str, str] = {}
    of_side = truths(claim)
    # A method is next to its control at the same truth, because these are compared.
    for arm in sorted(claim_arms(claim), key=lambda arm: arm.side != FAVORABLE):
        row = f"{arm.side}: {arm.method}"
        if row not in names:
            names[row] = wrap_text(f"{of_side[arm.side]}: {short_method(arm.method)}", _NAME_WIDTH, _SIZE)
            if arm.side == FAVORABLE and row not in set(table["row"]):
                marks.append(write_word(sum(limits) / 2, row))
    x, y = Axis(label=label, limits=limits), Axis(order=names, ticks=names, compact=True)
    return Chart(table, marks, title=title, x=x, y=y, colors=_COLORS, caption=caption)
