"""Forest plot of the nine methods: their effects on text, and in all pairs of planted teachers, in units of the bound.

Effects are in points of accuracy, nats, points of the gap or percent of the loss. Divided by the bound of their claim,
the smallest effect that matters, they share an axis.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lorascope.array_types import Float
from lorascope.charts.chart import Chart, Panels
from lorascope.charts.geometry import MINUS, drawn_number
from lorascope.charts.marks import Axis, Mark, Point, Rule, Text
from lorascope.papers.figures.study_marks import (
    BOUND,
    FAVORABLE,
    GAP,
    OTHER,
    POSITIVE,
    SIDES,
    SIGNS,
    SMALL,
    compared_methods,
    truths,
)
from lorascope.papers.judging.beliefs import format_with_interval
from lorascope.papers.judging.data_folder import PAPERS
from lorascope.papers.judging.registered_study import StudyClaim, StudyRegistration
from lorascope.papers.judging.words import NO_HEADROOM, NOT_LEARNED, NOT_RUN

TEXT, TRUTH = "On text", "On planted teachers, where the truth is known"
_TITLE = "Right of 0, a method is better than its control"
EDITION_2, EDITION_1, PRINTED = "on text, edition 2", "on text, edition 1", "printed by the paper"
_EFFECTS = (FAVORABLE, OTHER, EDITION_1, EDITION_2)
_COLORS = (*SIDES, EDITION_1, BOUND, PRINTED, EDITION_2)
_PREFIXES = {FAVORABLE: "", OTHER: "against_", POSITIVE: "positive_"}
_TICKS = (-30, -10, -3, -1, 0, 1, 3, 10, 30, 100)
_NUMBERS_SHARE = 0.42  # of the width of a panel, for the column of numbers
# Short enough for one line in both renderers.
_X_LABEL = "effect / bound (log beyond ±1)"
_PRINTED_LABEL = "gain (points)"
_WIDE = 4  # places of a panel of effects; the panel next to it has one
_CAPTION = (
    "Effect of each method minus its control, with 95% intervals, divided by the bound of its claim: the smallest gain "
    f"that matters, m, or the largest acceptable cost, d. {SMALL} Numbers are in points unless they have a unit: of "
    f"accuracy on text, and of the gap closed on planted teachers. {GAP} Numbers with % are 100 ln(control's / own "
    f"loss); {MINUS}61 means a loss 85% higher. Orange squares: the other truth of the row above. The positive control "
    "of a cost is a known worse method. Levels are not corrected for many claims: one interval of twenty misses by "
    "chance."
)
_NOTES = {
    EDITION_1: "Edition 1: an earlier set of runs, on real text.",
    PRINTED: "Printed gains are from other models and tasks.",
    NO_HEADROOM: "No headroom: a positive control gains nothing.",
    NOT_LEARNED: "Not learned: runs stay at chance level.",
}
"""Sentences of the caption on marks and words."""


class ForestMark(NamedTuple):
    """Mark of the forest plot in one row of a ground, with its number and interval, or the word that replaces it.

    ``bound`` is positive for a gain and negative for a cost, in the unit of the effect; ``seeds`` is the number of runs
    of an arm.
    """

    ground: str
    row: str
    name: str
    unit: str
    bound: float
    seeds: int
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
        Its claims ``text.NAME``, with the method's name in lower case, and ``pair.NAME`` are the rows.
    earlier : DataFrame
        Estimates of edition 1, ``method, effect, low, high, unit, word, bound, seeds``; a word replaces the effect.
        They are used on text where this edition has no result.

    Returns
    -------
    DataFrame
        ``ground, row, name, unit, bound, seeds, mark, effect, low, high, word``: one row per mark or word of a claim
        with runs; ``position, position_low, position_high`` are on the axis.
    """
    judged: dict[Any, Any] = results.set_index("claim").to_dict("index")
    estimates: dict[Any, Any] = earlier.set_index("method").to_dict("index")
    marks: list[ForestMark] = []
    for method in PAPERS:
        marks += _marks_on_text(method, judged, registration, estimates)
    for claim in registration.claims.values():
        if claim.id.startswith("pair.") and claim.id in judged:
            marks += _marks_of_pair(claim, judged[claim.id])
    table = pd.DataFrame(marks, columns=ForestMark._fields)
    numbers = ["effect", "low", "high", "bound"]
    table = table.astype(dict.fromkeys(numbers, "float64"))
    for name, column in (("effect", "position"), ("low", "position_low"), ("high", "position_high")):
        table[column] = axis_position((table[name] / table["bound"].abs()).to_numpy())
    return table


def axis_position(multiple: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Return positions on an axis that is linear from -1 to 1, and logarithmic beyond with the same slope at 1."""
    size = np.abs(multiple)
    return np.sign(multiple) * np.where(size <= 1, size, 1 + np.log(np.maximum(size, 1)))


def _marks_on_text(
    method: str, judged: Mapping[str, Any], registration: StudyRegistration, estimates: Mapping[str, Any]
) -> Iterator[ForestMark]:
    """Yield the effect of a method on text, or the word that replaces it, with its bound and the printed gain."""
    claim = registration.claims.get(f"text.{method.lower()}")
    result, mark = judged.get(f"text.{method.lower()}", {"word": NOT_RUN}), EDITION_2
    if claim and result["word"] != NOT_RUN:
        unit, bound, seeds = claim.rule.unit, SIGNS[claim.rule.kind] * claim.rule.bound, result["n"]
    elif method in estimates:
        result, mark = estimates[method], EDITION_1
        unit, bound, seeds = result["unit"], result["bound"], result["seeds"]
    else:
        return
    row = ForestMark(TEXT, method, method, unit, bound, int(seeds), mark)
    # An effect at one of these words may not be read.
    if result["word"] in (NOT_LEARNED, NO_HEADROOM):
        yield row._replace(word=result["word"])
    else:
        yield row._replace(effect=result["effect"], low=result["low"], high=result["high"])
        yield row._replace(mark=BOUND, effect=bound)
    printing = claim or registration.claims.get(f"pair.{method.lower()}")
    if printing and printing.paper.printed_unit == unit:
        yield row._replace(mark=PRINTED, effect=printing.paper.printed)  # type: ignore[arg-type]


def _marks_of_pair(claim: StudyClaim, result: Mapping[str, Any]) -> Iterator[ForestMark]:
    """Yield the effects of a pair at both truths and its positive control, or the word that replaces them."""
    bound, names = SIGNS[claim.rule.kind] * claim.rule.bound, truths(claim)
    compared = compared_methods(claim)
    truth = names[FAVORABLE].replace(compared.partition(" vs ")[0] + "'s", "its")  # a name has little room
    name = f"{compared}, {truth}"
    row = ForestMark(TRUTH, claim.id, name, claim.rule.unit, bound, int(result["n"]), BOUND)
    if result["word"] == NOT_RUN:
        return
    if result["word"] in (NOT_LEARNED, NO_HEADROOM):
        yield row._replace(mark=FAVORABLE, word=result["word"])
        return
    yield row._replace(effect=bound)
    for mark, prefix in _PREFIXES.items():
        effect, low, high = (float(result[f"{prefix}{name}"]) for name in ("effect", "low", "high"))
        if math.isnan(effect):
            continue
        of_mark = row._replace(mark=mark, effect=effect, low=low, high=high)
        if mark == OTHER:  # on a separate line, below
            of_mark = of_mark._replace(row=f"{claim.id}, other", name=names[OTHER])
        yield of_mark


def forest(results: pd.DataFrame, registration: StudyRegistration, earlier: pd.DataFrame) -> Panels:
    """Draw the forest plot; for its arguments see ``forest_table``. Pairs without runs are counted in the caption."""
    table = forest_table(results, registration, earlier)
    pairs = [id for id in registration.claims if id.startswith("pair.")]
    waiting = [id for id in pairs if id not in set(table["row"])]
    grounds = [ground for ground in (TEXT, TRUTH) if (table["ground"] == ground).any()]
    caption = _CAPTION
    for subject, note in _NOTES.items():
        if (table[["mark", "word"]] == subject).any(axis=None):
            caption += f" {note}"
    if waiting:
        unfinished = ", ".join(compared_methods(registration.claims[id]) for id in waiting)
        caption += f" {len(waiting)} of {len(pairs)} pairs are not finished: {unfinished}."
    ends = table.loc[table["mark"] != PRINTED, ["position", "position_low", "position_high"]].to_numpy().ravel()
    low, high = min(-1.0, np.nanmin(ends)), max(1.0, np.nanmax(ends))
    room = 0.04 * (high - low)
    low, high = low - room, high + room
    right = high + _NUMBERS_SHARE / (1 - _NUMBERS_SHARE) * (high - low)
    ticks = {}
    for tick, position in zip(_TICKS, axis_position(np.array(_TICKS, np.float64)).tolist(), strict=True):
        if low <= position <= high:
            ticks[position] = str(tick).replace("-", MINUS)
    x, charts = Axis(label=_X_LABEL, limits=(low, right), ticks=ticks), []
    for ground in grounds:
        rows = table[table["ground"] == ground]
        if ground == TEXT:  # words are below effects; in pairs, the truths stay together
            with_word = set(rows.loc[rows["word"] != "", "row"])
            rows = rows.sort_values("row", key=lambda methods: methods.isin(with_word), kind="stable")
        names = dict(zip(rows["row"], rows["name"], strict=True))
        marks = [Rule(x=0), *_marks(rows), *_numbers(rows, (high + right) / 2)]
        y, title, beside = Axis(order=names, ticks=names, compact=True), ground, []
        if ground == TRUTH:
            beside.append(_list_bounds(rows, y, caption))
        else:
            title += _count_seeds(rows)
            if (rows["mark"] == PRINTED).any():
                beside.append(_draw_printed(rows, y, caption))
        effects = Chart(rows, marks, title=title, x=x, y=y, colors=_COLORS, caption=caption, span=_WIDE)
        charts.append((effects, *beside))
    return Panels(tuple(charts), title=_title(table))


def _title(table: pd.DataFrame) -> str:
    """Return the title of the plot: how many intervals are above zero, on text and where the truth is favorable."""
    counts = []
    for ground, name in ((TEXT, "on text"), (TRUTH, "at its truth")):
        is_effect = table["mark"].isin([FAVORABLE, EDITION_1, EDITION_2]) & (table["word"] == "")
        effects = table[is_effect & (table["ground"] == ground)]
        if len(effects):
            counts.append(f"{name} {(effects['low'] > 0).sum()} of {len(effects)}")
    return ": ".join([_TITLE, *filter(None, [", ".join(counts)])])


def _marks(rows: pd.DataFrame) -> Iterator[Mark]:
    """Yield the bounds, then controls, and the effects with their intervals on top."""
    yield Point("position", "row", "mark", symbol="line-ns-open", data=rows[rows["mark"] == BOUND])
    # Without a bar, a positive control does not hide the interval of the effect on its line.
    yield Point("position", "row", "mark", data=rows[rows["mark"] == POSITIVE])
    effects = rows[rows["mark"].isin(_EFFECTS) & (rows["word"] == "")]
    yield Point("position", "row", "mark", low="position_low", high="position_high", data=effects)


def _draw_printed(rows: pd.DataFrame, y: Axis, caption: str) -> Chart:
    """Draw the gains that papers print next to the effects: they are of other models and tasks."""
    marks = [Rule(x=0), Point("effect", "row", "mark", symbol="diamond", hollow=True)]
    printed, x = rows[rows["mark"] == PRINTED], Axis(label=_PRINTED_LABEL)
    return Chart(printed, marks, title="Printed", x=x, y=y, colors=_COLORS, caption=caption)


def _list_bounds(rows: pd.DataFrame, y: Axis, caption: str) -> Chart:
    """Draw a column with the bound of every pair, negative for a cost, and its number of seeds."""
    texts: list[tuple[float, str, str]] = []
    pairs: list[dict[Any, Any]] = rows[rows["mark"] != OTHER].drop_duplicates("row").to_dict("records")
    for pair in pairs:
        unit = "%" if pair["unit"].startswith("percent") else ""
        texts.append((0.0, pair["row"], f"{drawn_number(pair['bound'], '+g')}{unit}, n = {pair['seeds']}"))
    bounds, x = pd.DataFrame(texts, columns=["x", "row", "text"]), Axis(limits=(-1, 1), ticks={})
    return Chart(bounds, [Text("x", "row", "text")], title="Bound, seeds", x=x, y=y, colors=_COLORS, caption=caption)


def _numbers(rows: pd.DataFrame, position: float) -> Iterator[Text]:
    """Yield the column of effects with their intervals, and in gray the words that replace them."""
    texts: list[tuple[float, str, str, bool]] = []
    effects: list[dict[Any, Any]] = rows[rows["mark"].isin(_EFFECTS)].to_dict("records")
    for row in effects:
        number = row["word"] or format_with_interval(row, row["unit"]).replace("-", MINUS)
        texts.append((position, row["row"], number, row["word"] != ""))
    table = pd.DataFrame(texts, columns=["position", "row", "number", "is_word"])
    for is_word in (False, True):
        yield Text("position", "row", "number", muted=is_word, data=table[table["is_word"] == is_word])


def _count_seeds(rows: pd.DataFrame) -> str:
    """Return how many seeds the effects have, for the title of their panel."""
    counts = sorted(set(rows.loc[(rows["word"] == "") & (rows["mark"] != PRINTED), "seeds"]))
    return f" ({' or '.join(map(str, counts))} seeds)" if counts else ""
