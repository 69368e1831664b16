"""Verdicts and best scales of a dial from worked numbers, without a model."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lorascope.analysis.dial import (
    Dial,
    MeasuredRows,
    RowValues,
    best_scales,
    dial_of_rows,
)
from lorascope.analysis.paired_rows import add_estimates, estimate_rows, rows_to_decide
from lorascope.analysis.part_verdicts import Effects, even_share, judge_parts, rows_needed
from lorascope.analysis.seed_intervals import Estimate
from lorascope.charts.figure_plan import plan_figure
from lorascope.charts.marks import Band, Line, Point
from lorascope.charts.theme import THEMES
from lorascope.plots import dial as draw_dial
from lorascope.plots import learn_forget
from lorascope.runs.receipt import Receipt

ROWS = 200


def effect(mean: float, error: float = 0.001) -> Estimate:
    return Estimate(mean, ROWS, ((error, ROWS - 1.0),))


def test_the_mean_of_single_rows_has_the_interval_of_scipys_t_test() -> None:
    values = np.random.default_rng(0).normal(0.1, 1, 50)
    estimate = estimate_rows(values, np.ones(50), np.arange(50))
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    np.testing.assert_allclose(estimate.interval(0.025)[1:3], expected, rtol=1e-12)


def test_rows_of_one_cluster_count_as_one_sum() -> None:
    """Four rows in two clusters of equal rows: the error equals the error of the two sums."""
    estimate = estimate_rows(np.array([1.0, 1.0, 3.0, 3.0]), np.ones(4), np.array([0, 0, 1, 1]))
    assert estimate.mean == 2
    assert estimate.errors == ((math.sqrt(2 / 1 * (2**2 + 2**2)) / 4, 1.0),)


def test_a_mean_per_token_is_a_ratio_of_sums() -> None:
    """A row's difference in proportion to its tokens has no spread."""
    counts = np.array([1.0, 2.0, 5.0])
    estimate = estimate_rows(0.3 * counts, counts, np.arange(3))
    assert estimate.mean == pytest.approx(0.3)
    assert estimate.errors[0][0] == pytest.approx(0, abs=1e-15)


def test_one_cluster_has_no_interval() -> None:
    with pytest.raises(ValueError, match="rows must be in at least 2 clusters, got 1"):
        estimate_rows(np.ones(3), np.ones(3), np.zeros(3, int))


def test_a_sum_of_estimates_has_welchs_degrees_of_freedom() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.normal(1, 1, 30), rng.normal(0, 3, 12)
    estimates = [estimate_rows(values, np.ones(len(values)), np.arange(len(values))) for values in (first, second)]
    joint = add_estimates(*estimates, -1.0)
    test = stats.ttest_ind(first, second, equal_var=False)
    np.testing.assert_allclose(joint.interval(0.025)[1:3], test.confidence_interval(0.95), rtol=1e-12)


def test_four_times_the_rows_halve_an_interval() -> None:
    """Half an interval of 1.96 errors has twice the distance to 0, so it needs four times the rows."""
    assert rows_to_decide(effect(0.5 * 1.96 * 0.001), 0.0, ROWS) == pytest.approx(4 * ROWS)
    assert rows_to_decide(effect(0.0), 0.0, ROWS) == math.inf


WHOLE = Effects(effect(0.1), effect(0.2))
MARGINS = even_share(0.1, 20), even_share(0.2, 20)  # 0.005 and 0.01
PARTS = {
    "keep": Effects(effect(0.02), effect(0.03)),  # the whole's ratio is 2
    "trade": Effects(effect(0.02), effect(0.06)),
    "only forgets": Effects(effect(0.0), effect(0.05)),
    "idle": Effects(effect(0.0), effect(0.0)),
    "hurts": Effects(effect(-0.02), effect(0.03)),
    "undecided": Effects(effect(0.004, 0.01), effect(0.02, 0.02)),
}


def test_every_verdict_has_its_condition() -> None:
    assert MARGINS == (0.005, 0.01)
    assert judge_parts(PARTS, WHOLE, *MARGINS) == list(PARTS)


def test_a_part_that_forgets_and_learns_less_than_the_margin_only_forgets() -> None:
    parts = {
        "part": Effects(effect(1e-4, 1e-5), effect(0.05)),
        "in proportion": Effects(effect(1e-4, 1e-5), effect(1e-4)),
    }
    assert judge_parts(parts, WHOLE, *MARGINS) == ["only forgets", "keep"]


def test_the_margin_of_few_parts_is_a_tenth() -> None:
    assert even_share(-0.5, 6) == 0.05


def test_an_update_that_does_not_learn_has_nothing_to_keep() -> None:
    verdicts = judge_parts(PARTS, Effects(effect(-0.1), effect(0.2)), *MARGINS)
    assert not {"keep", "trade"} & set(verdicts)
    assert verdicts[2:5] == ["only forgets", "idle", "hurts"]


def test_parts_without_effect_are_rarely_decided_among_many() -> None:
    """Far fewer than 2.5% of 300 parts of pure noise get a verdict of learning."""
    noise = np.random.default_rng(2).normal(0, 0.001, (300, 2))
    effects = {str(i): Effects(effect(learn), effect(forget)) for i, (learn, forget) in enumerate(noise)}
    verdicts = judge_parts(effects, WHOLE, *MARGINS)
    assert sum(verdict in ("keep", "trade", "only forgets") for verdict in verdicts) <= 1


def test_rows_needed_come_from_the_axis_that_needs_more() -> None:
    learn, forget = effect(0.0, 0.01), effect(0.5)
    expected = ROWS * (1.96 * 0.01 / 0.005) ** 2  # learn is at 0, so only the margin can be excluded
    assert rows_needed(Effects(learn, forget), WHOLE, *MARGINS, ROWS) == math.ceil(expected)


def test_rows_needed_of_a_part_that_learns_decide_its_proportion() -> None:
    """It forgets 0.005 more than in proportion, and 0.001 is the error of both effects together."""
    learn, forget = effect(0.02, 0.0006 / 2), effect(0.045, 0.0008)
    expected = ROWS * (1.96 * 0.001 / 0.005) ** 2
    assert rows_needed(Effects(learn, forget), WHOLE, *MARGINS, ROWS) == math.ceil(expected)


def test_the_best_scale_forgets_least_within_the_margin() -> None:
    scales = (0.0, 0.5, 0.75, 1.0, 1.25)
    curves = {"task": (0.1, 0.02, 0.004, 0.0, 0.01), "keep": (-0.5, -0.3, -0.2, 0.0, 0.2)}
    table = pd.DataFrame(
        [
            ("whole", scale, axis, change)
            for axis, curve in curves.items()
            for scale, change in zip(scales, curve, strict=True)
        ],
        columns=["part", "scale", "axis", "change"],
    )
    assert best_scales(table, 0.005) == {"whole": 0.75}
    assert best_scales(table, 0.0) == {"whole": 1.0}
    assert best_scales(table, 1.0) == {"whole": 0.0}


def test_figures_draw_the_numbers_of_the_tables() -> None:
    measured = planted_dial()
    dots = learn_forget(measured).tables()[-1][1]
    np.testing.assert_array_equal(dots[["learn", "forget"]], measured.summary().loc[1:, ["learn", "forget"]])
    task, keep = draw_dial(measured).panels
    for panel, axis in ((task, "task"), (keep, "keep")):
        curve = measured.curve()
        np.testing.assert_array_equal(panel.data["change"], curve.loc[curve["axis"] == axis, "change"])
    with pytest.raises(ValueError, match="parts must be 1 to 8 parts with curves, got 0"):
        draw_dial(measured, [])
    with pytest.raises(ValueError, match="part must be one of whole, got 'b'"):
        draw_dial(measured, ["b"])


def test_the_line_of_the_whole_update_has_no_color_of_a_role() -> None:
    measured = planted_dial()
    roles = ("q", "k", "v", "o", "ffn_gate", "ffn_in", "ffn_out")
    part = measured.parts.iloc[[1]]
    parts = [measured.parts.iloc[[0]], *(part.assign(part=role, role=role) for role in roles)]
    chart = learn_forget(replace(measured, parts=pd.concat(parts, ignore_index=True)))
    (proportion,) = [mark for mark in chart.marks if isinstance(mark, Line) and mark.color is None]
    assert proportion.muted
    whole = measured.parts.iloc[0]
    slope = proportion.data["forget"].iloc[1] / proportion.data["learn"].iloc[1]
    assert slope == pytest.approx(whole["forget"] / whole["learn"])
    # The palette has eight colors.
    assert len(chart.colors) == 8


def test_undecided_parts_print_the_rows_that_would_decide() -> None:
    measured = planted_dial()
    assert "would decide" not in repr(measured)
    part = measured.parts.iloc[[1]]
    parts = [measured.parts.iloc[[0]]]
    for name, number in (("a", 300.0), ("b", 4000.0), ("c", 1500.0), ("d", math.inf)):
        parts.append(part.assign(part=name, verdict="undecided", rows_needed=number))
    parts.append(part.assign(part="random", verdict="undecided", rows_needed=9.0, control=True))
    dialed = replace(measured, parts=pd.concat(parts, ignore_index=True))
    assert "  rows     about 1,500 would decide 2 of 4 undecided parts\n" in repr(dialed)


TERMS = (
    "part", "scale", "learn", "forget", "share", "keep rows", "missing direction", "trunk", "fork", "gauge",
    "turning point", "receipt",
)  # fmt: skip


@pytest.mark.parametrize("term", TERMS)
def test_terms_of_the_instruments_are_in_the_glossary(term: str) -> None:
    page = (Path(__file__).parents[1] / "docs" / "glossary.md").read_text(encoding="utf-8")
    assert re.search(rf"^   {term}\n      \S", page, re.MULTILINE)


def test_trades_are_ordered_by_forget_per_learn_and_the_worst_is_named_last() -> None:
    measured = planted_dial()
    part = measured.parts.iloc[[1]]
    parts = [measured.parts.iloc[[0]]]
    for name, learn, low, forget in (
        ("a", 0.1, 0.05, 0.3),
        ("b", 0.1, 0.05, 0.1),
        ("unclear", 0.1, -0.01, 0.0),
        ("c", 0.2, 0.1, 1.8),
        ("d", 0.2, 0.1, 1.0),
    ):
        parts.append(part.assign(part=name, learn=learn, learn_low=low, forget=forget))
    parts.append(part.assign(part="random", learn=1.0, learn_low=0.9, forget=0.0, control=True))
    dialed = replace(measured, parts=pd.concat(parts, ignore_index=True))
    assert dialed.trades().round(9).to_dict() == {"b": 1.0, "a": 3.0, "d": 5.0, "c": 9.0}
    assert dialed.trades().index.to_list() == ["b", "a", "d", "c"]
    whole = measured.parts.loc[0]
    first, *others = [line.strip() for line in repr(dialed).splitlines() if line.startswith(("  trades", " " * 11))]
    assert first == f"trades   {whole['forget'] / whole['learn']:.3g} nats per nat of learning, whole update"
    assert others == ["least 1 b", "least 3 a", "most  9 c"]
    # An update that does not learn has no ratio to compare with.
    dialed.parts.loc[0, "learn_low"] = -0.1
    assert "trades" not in repr(dialed)


def test_the_box_of_the_margins_is_gray_and_only_intruders_have_a_ring() -> None:
    measured = planted_dial()
    chart = learn_forget(measured)
    (box,) = [mark for mark in chart.marks if isinstance(mark, Band)]
    assert box.muted
    assert not [mark for mark in chart.marks if isinstance(mark, Point) and mark.muted]
    parts = measured.parts.assign(control=[False, False, True])
    intruders = replace(measured, parts=parts, receipt=replace(measured.receipt, call={"by": "intruder"}))
    chart = learn_forget(intruders)
    (ring,) = [mark for mark in chart.marks if isinstance(mark, Point) and mark.muted]
    assert ring.data["part"].to_list() == ["a"]
    # A filled ring would hide the dot that is drawn before it.
    points = [mark.muted for mark in chart.marks if isinstance(mark, Point)]
    assert points == [True, False, False]
    entries = {entry.label: entry for entry in plan_figure(chart, THEMES["light"]).entries}
    for name in ("even share", "intruder dimension"):
        assert entries[name].color == THEMES["light"].gray
    assert entries["q"].color != THEMES["light"].gray


def planted_dial() -> Dial:
    """Dial of parts a and b, of which a has all of the effect, with rows that differ little."""
    noise = np.random.default_rng(3).normal(0, 1e-3, 50)
    measured = []
    for part, scale, learn, forget in (
        ("whole", 1.0, 0.0, 0.5), ("whole", 0.5, 0.02, 0.2), ("whole", 0.0, 0.3, 0.0), ("a", 0.0, 0.3, 0.0),
        ("b", 0.0, 0.0, 0.5),
    ):  # fmt: skip
        # Noise in proportion to the change, so that the intervals of both parts are short.
        measured.append(RowValues(part, scale, "task", 1 + learn * (1 + noise)))
        measured.append(RowValues(part, scale, "keep", forget * (1 + noise)))
    rows = {axis: MeasuredRows("nats", np.ones(50), np.arange(50)) for axis in ("task", "keep")}
    parts = pd.DataFrame({"part": ["whole", "a", "b"], "module": None, "layer": None, "role": [None, "q", "k"]})
    parts = parts.assign(component=None, energy=[1.0, 0.5, 0.5], control=False, learn_share=0.0, forget_share=0.0)
    parts = parts.assign(learn_slope=0.0, forget_slope=0.0)
    return dial_of_rows("planted", measured, rows, parts, None, Receipt(run="r", base="b", rows={}))


def test_a_dial_of_planted_effects_finds_them() -> None:
    summary = planted_dial().summary().set_index("part")
    assert summary["verdict"].to_dict() == {"whole": "", "a": "keep", "b": "idle"}
    assert summary.loc["a", "learn"] == pytest.approx(0.3, rel=1e-3)
    assert planted_dial().best(0.03) == {"whole": 0.5}
    assert planted_dial().best(0.0) == {}


def test_the_summary_has_the_changes_at_the_best_scale() -> None:
    """The loss increases by 0.02 and the distance decreases by 0.3, as in the curve; other parts have none."""
    measured = planted_dial()
    summary = measured.summary().set_index("part")
    assert summary.loc["whole", "best_scale"] == 0.5
    assert summary.loc["whole", "best_loss"] == pytest.approx(0.02, rel=1e-3)
    assert summary.loc["whole", "best_distance"] == pytest.approx(-0.3, rel=1e-3)
    curve = measured.curve().query("scale == 0.5").set_index("axis")
    for axis, name in (("task", "best_loss"), ("keep", "best_distance")):
        numbers = summary.loc["whole", [name, f"{name}_low", f"{name}_high"]].to_list()
        assert numbers == curve.loc[axis, ["change", "low", "high"]].to_list()
    assert summary.loc["a", ["best_scale", "best_loss", "best_distance_high"]].isna().all()
