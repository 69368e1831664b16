"""Forest plot of the nine methods: their effects on text, and where the truth is known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lorascope.charts.chart import Chart, Panels
from lorascope.charts.marks import Axis, Line, Mark, Point, Rule, Text
from lorascope.papers.figures.study_marks import FAVORABLE, OTHER
from lorascope.papers.judging.registered_study import StudyRegistration
from lorascope.papers.judging.words import NO_HEADROOM, NOT_LEARNED, NOT_RUN

_ACCURACY, _GAP = "points of accuracy", "points of the gap"
_ON_ACCURACY = ("LoRA", "AdaLoRA", "AutoLoRA", "ALoRA", "FourierFT", "HydraLoRA", "NeFT")
ROWS = {
    _ON_ACCURACY: (_ACCURACY, _GAP),
    ("LISA",): ("nats", _GAP),
    ("Adapprox",): ("nats", "percent of the loss"),
}
"""Methods of each row of panels, and the units on text and where the truth is known."""
TEXT, TRUTH = "On text", "Where the truth is known"
_TITLE = "Effect of a method: right of 0, it is better than its control"
EDITION_2, EDITION_1, PRINTED, BOUND, POSITIVE = "edition 2", "edition 1", "printed gain", "bound", "positive control"
SYMBOLS = {
    BOUND: "line-ns-open", POSITIVE: "x", EDITION_1: "circle-open", OTHER: "circle-open",
    EDITION_2: "circle", FAVORABLE: "circle",
}  # fmt: skip
"""Marks in the order in which they are drawn."""
_PREFIXES = {FAVORABLE: "", OTHER: "against_", POSITIVE: "positive_"}
_MISSING = {"word": NOT_RUN}
_CAPTION = (
    "Effect of each method minus its control, with 95% intervals. Bound: the largest acceptable cost, or the smallest "
    "gain that matters. No headroom: a positive control gains nothing; not learned: the runs stay at chance level. "
    "Printed gains are from other models and tasks. No seed is left out or added. Levels are not corrected for many "
    "claims: of 40 intervals at 95%, about two miss by chance."
)


class ForestMark(NamedTuple):
    """Mark of the forest plot with its number and interval, or the word that replaces it."""

    mark: str
    effect: float = math.nan
    low: float = math.nan
    high: float = math.nan
    word: str = ""


def forest_table(results: pd.DataFrame, registration: StudyRegistration, earlier: pd.DataFrame) -> pd.DataFrame:
    """Tabulate what the forest plot shows.

    Parameters
    ----------
    results : DataFrame
        Results of ``study_results.compute``.
    registration : StudyRegistration
        Its claims ``text.NAME`` and ``pair.NAME``, with the method's name in lower case, are the rows.
    earlier : DataFrame
        Estimates of edition 1, ``method, effect, low, high, unit, word``, in the units of ``ROWS``; a word replaces
        the effect. They are used on text where this edition has no result.

    Returns
    -------
    DataFrame
        ``method, ground, unit, mark, effect, low, high, word``: one row per mark or word.

    Raises
    ------
    ValueError
        An estimate of edition 1 is in another unit than its row.
    """
    judged: dict[Any, Any] = results.set_index("claim").to_dict("index")
    rows = []
    for methods, units in ROWS.items():
        for method, (ground, unit) in product(methods, zip((TEXT, TRUTH), units, strict=True)):
            text, pair = f"text.{method.lower()}", f"pair.{method.lower()}"
            if ground == TRUTH:
                marks = _judged_marks(judged.get(pair, _MISSING), _PREFIXES)
                claim = registration.claims.get(pair)
            else:
                marks = _judged_marks(judged.get(text, _MISSING), {EDITION_2: ""})
                estimate = earlier[earlier["method"] == method]
                if marks[0].word == NOT_RUN and len(estimate):
                    marks = [_earlier_mark(estimate.iloc[0], unit)]
                claim = registration.claims.get(text)
            # Next to a word, there is nothing to compare with the bound.
            if claim and not marks[0].word:
                sign = {"gain": 1, "cost": -1}[claim.rule.kind]
                marks.append(ForestMark(BOUND, sign * claim.rule.bound))
            printing = claim or registration.claims.get(pair)
            if printing and ground == TEXT and printing.paper.printed_unit == unit:
                marks.append(ForestMark(PRINTED, printing.paper.printed))  # type: ignore[arg-type]
            rows += [(method, ground, unit, *mark) for mark in marks]
    table = pd.DataFrame(rows, columns=["method", "ground", "unit", *ForestMark._fields])
    # A claim without an effect at the other truth has none to draw.
    return table[table["effect"].notna() | (table["word"] != "")].reset_index(drop=True)


def _judged_marks(result: Mapping[str, Any], prefixes: Mapping[str, str]) -> list[ForestMark]:
    """Return the effects of a result by their marks, or its word if it is not judged by them."""
    if result["word"] in (NOT_RUN, NOT_LEARNED, NO_HEADROOM):
        return [ForestMark(next(iter(prefixes)), word=result["word"])]
    marks = []
    for mark, prefix in prefixes.items():
        marks.append(ForestMark(mark, result[f"{prefix}effect"], result[f"{prefix}low"], result[f"{prefix}high"]))
    return marks


def _earlier_mark(estimate: pd.Series, unit: str) -> ForestMark:
    """Return an estimate of edition 1, or its word."""
    if estimate["unit"] != unit:
        raise ValueError(f"the estimate of {estimate['method']} must be in {unit}, got {estimate['unit']}")
    if estimate["word"]:
        return ForestMark(EDITION_1, word=estimate["word"])
    return ForestMark(EDITION_1, *estimate[["effect", "low", "high"]])


def forest(results: pd.DataFrame, registration: StudyRegistration, earlier: pd.DataFrame) -> Panels:
    """Draw the forest plot; for its arguments see ``forest_table``.

    Claims without runs where the truth is known are counted in the caption; without any run there, it has no panel.
    """
    table = forest_table(results, registration, earlier)
    waits = (table["ground"] == TRUTH) & (table["word"] == NOT_RUN)
    # The effect at the other truth is on a separate line, below.
    table["row"] = table["method"].where(table["mark"] != OTHER, table["method"] + ", other")
    # The bound has the same symbol in both grounds, and one entry in the legend.
    ground_of_bound = TRUTH if ((table["mark"] == BOUND) & (table["ground"] == TRUTH)).any() else TEXT
    measured, printed = table[(table["mark"] != PRINTED) & ~waits], table[table["mark"] == PRINTED]
    # Printed gains are on a separate axis of the same length, because most are on the other side of zero.
    limits, printed_limits = {}, {}
    for unit, of_unit in table.groupby("unit"):
        is_printed = of_unit["mark"] == PRINTED
        limits[unit] = _limits(of_unit[~is_printed])
        if is_printed.any():
            ends = limits[unit], _limits(of_unit[is_printed])
            length = max(high - low for low, high in ends)
            limits[unit], printed_limits[unit] = (_widen(*limit, length) for limit in ends)
    caption = _CAPTION
    if waits.any():
        caption += f" {TRUTH}: the main pair of a method; {waits.sum()} have no runs yet."
    is_effect = measured["effect"].notna() & (measured["mark"] != BOUND)
    judged = set(measured.loc[is_effect, "method"])
    grid = []
    with_truth = set(measured.loc[measured["ground"] == TRUTH, "method"])
    for units, row_methods in _group_methods(with_truth).items():
        order: list[str] = []
        methods = sorted(row_methods, key=lambda method: method not in judged)  # words below effects
        for method in methods:
            order += [method, f"{method}, other"][: len(units)]
        names = dict(zip(methods, methods, strict=True))
        names |= {f"{method}, other": OTHER for method in methods if method in with_truth}
        y = Axis(order=order, ticks=names, compact=True)
        charts: list[Chart] = []
        for ground, unit in zip((TEXT, TRUTH), units, strict=False):
            rows = measured[measured["method"].isin(methods) & (measured["ground"] == ground)]
            low, high = limits[unit]
            side = low
            # A word has room on the wider side of zero.
            if -low <= high:
                side = high
            words = rows[rows["word"] != ""].assign(x=side / 2)
            marks = [Rule(x=0), *_effect_marks(rows, ground_of_bound), Text("x", "row", "word", muted=True, data=words)]
            x = Axis(label=unit, limits=(low, high))
            if rows["effect"].isna().all():  # words only
                x = replace(x, ticks={})
            charts.append(Chart(rows, marks, title=ground, x=x, y=y, caption=caption))
        gains = printed[printed["method"].isin(methods)]
        if len(gains):  # other models and tasks, so on a separate axis
            marks = [Rule(x=0), Point("effect", "row", "ground", symbol="diamond", hollow=True, label=PRINTED)]
            x = Axis(label=f"printed, {units[0]}", limits=printed_limits[units[0]])
            charts.append(replace(charts[0], data=gains, marks=marks, title="Printed by the paper", x=x))
        grid.append(tuple(charts))
    columns = 0
    if with_truth:  # rows without a printed gain are as wide as those with one
        columns = max(map(len, grid))
    return Panels(tuple(grid), columns=columns, title=_TITLE)


def _group_methods(with_truth: Set[str]) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Return the units of the panels of each row, and its methods; one without an effect at a truth has one panel."""
    groups: dict[tuple[str, ...], tuple[str, ...]] = {}
    for methods, units in ROWS.items():
        row_units = units if not with_truth.isdisjoint(methods) else units[:1]
        # Methods in one unit share a row, because a panel of one line is mostly empty.
        groups[row_units] = groups.get(row_units, ()) + methods
    return groups


def _effect_marks(rows: pd.DataFrame, ground_of_bound: str) -> list[Mark]:
    """Return a line between the effects of each pair, then the marks in their order."""
    judged = rows[rows["word"] == ""]
    marks: list[Mark] = []
    for _, pair in judged[judged["mark"].isin([FAVORABLE, OTHER])].groupby("method", sort=False):
        marks.append(Line("effect", "row", "ground", data=pair))
    for mark, symbol in SYMBOLS.items():
        of_mark, label = judged[judged["mark"] == mark], mark
        if mark == BOUND and (of_mark["ground"] != ground_of_bound).any():
            label = ""
        point = Point("effect", "row", "ground", symbol=symbol, label=label, data=of_mark)
        # The interval of a positive control is on the line of the effect, and would cover that of the effect.
        if mark != POSITIVE:
            point = replace(point, low="low", high="high")
        marks.append(point)
    return marks


def _limits(rows: pd.DataFrame) -> tuple[float, float]:
    """Return the ends of an axis around its marks and zero."""
    ends = np.append(rows[["effect", "low", "high"]].to_numpy().ravel(), 0.0)
    low, high = float(np.nanmin(ends)), float(np.nanmax(ends))
    if low == high:  # words only
        return -1.0, 1.0
    room = 0.06 * (high - low)
    return low - room, high + room


def _widen(low: float, high: float, length: float) -> tuple[float, float]:
    """Return the ends of an axis with the same center and a longer length."""
    center = (low + high) / 2
    return center - length / 2, center + length / 2
