"""Checks when a chart is created, and the data that it stores."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError

import pandas as pd
import pytest

from lorascope.charts.chart import Chart, set_side_by_side, stack_vertically, wrap
from lorascope.charts.marks import Axis, Band, Bar, Heat, Line, Point, Rule, Text


@pytest.fixture
def table() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "step": [0, 1, 0, 1],
            "value": [1.0, 2.0, 3.0, 4.0],
            "role": ["q", "q", "v", "v"],
            "note": ["a", "b", None, "d"],
        }
    )


@pytest.mark.parametrize(
    ("mark", "complaint"),
    [
        (Line("step", "norm"), "line y: unknown column 'norm'; expected one of step, value, role, note"),
        (Line("step", "value", color="layer"), "line color: unknown column 'layer'"),
        (Band("step", "value", "high"), "band high: unknown column 'high'"),
        (Point("step", "value", size="note"), "point size: column 'note' must be numeric, got "),
        (Heat("step", "role", "note"), "heat value: column 'note' must be numeric, got "),
        (Text("step", "value", "note"), "text text: column 'note' .* missing values, got 1"),
        (Line("step", "value", color="note"), "line color: column 'note' .* missing values, got 1"),
        (Bar("step", "value"), "bar: several rows for step=0"),
        (Bar("role", "step", color="role"), "bar: several rows for role=q"),
        (Bar("role", "note"), "missing values"),
        (Heat("step", "step", "value"), "heat: several rows for step=0"),
        (Bar("step", "value", color="role", mode="heap"), "mode must be one of 'group', 'stack', got 'heap'"),
        (Bar("step", "value", color="role", low="value"), "low and high .* got low='value', high=None"),
        (Heat("step", "role", "value", scale="rainbow"), "scale must be .* got 'rainbow'"),
        (Rule(), "got x=None, y=None"),
        (Rule(x=1, y=2), "got x=1, y=2"),
    ],
)
def test_invalid_mark_raises_one_line(table, mark, complaint) -> None:
    with pytest.raises(ValueError, match=complaint) as refused:
        Chart(table, [mark])
    assert "\n" not in str(refused.value)


def test_bar_with_text_length_raises(table) -> None:
    with pytest.raises(ValueError, match="bar y: column 'role' must be numeric, got "):
        Chart(table.head(1), [Bar("note", "role")])


def test_chart_with_two_heats_raises(table) -> None:
    heat = Heat("step", "role", "value")
    with pytest.raises(ValueError, match="at most one Heat, got 2"):
        Chart(table, [heat, heat])


def test_frame_column_missing_or_incomplete_raises(table) -> None:
    line = [Line("step", "value")]
    with pytest.raises(ValueError, match="frame: unknown column 'epoch'"):
        Chart(table, line, frame="epoch")
    with pytest.raises(ValueError, match=r"frame: column 'note' .* missing values"):
        Chart(table, line, frame="note")


def test_bars_and_cells_at_one_position_in_different_frames_are_allowed(table) -> None:
    Chart(table, [Bar("role", "value")], frame="step")
    Chart(table.assign(one=1), [Heat("role", "one", "value")], frame="step")


def test_mark_with_own_data_is_checked_against_that_data(table) -> None:
    own = pd.DataFrame({"x": [1.0], "y": [2.0]})
    chart = Chart(table, [Point("x", "y", data=own)])
    assert chart.table(chart.marks[0]) is own
    with pytest.raises(ValueError, match="expected one of x, y"):
        Chart(table, [Point("step", "value", data=own)])


def test_chart_is_frozen_and_later_edits_do_not_change_it(table) -> None:
    chart = Chart(table, [Line("step", "value")])
    with pytest.raises(FrozenInstanceError):
        chart.title = "other"
    table.loc[0, "value"] = 99.0
    assert chart.data["value"].tolist() == [1.0, 2.0, 3.0, 4.0]


def test_axis_with_order_heat_or_text_is_categorical(table) -> None:
    line = Chart(table, [Line("step", "value", "role")])
    assert not line.is_categorical("x")
    assert not line.is_categorical("y")
    assert Chart(table, [Line("step", "value", "role")], x=Axis(order=[1, 0])).is_categorical("x")
    assert Chart(table, [Heat("step", "role", "value")]).is_categorical("x")
    lying = Chart(table, [Bar("value", "role", color="step")])
    assert lying.is_lying
    assert not line.is_lying


def test_at_selects_one_frame(table) -> None:
    own = pd.DataFrame({"step": [0, 1], "value": [5.0, 6.0]})
    still = pd.DataFrame({"value": [7.0]})
    marks = [Line("value", "value"), Point("value", "value", data=own), Text("value", "value", "value", data=still)]
    chart = Chart(table, marks, frame="step", title="replay")
    last = chart.at(1)
    assert last.frame is None
    assert last.title == "replay"
    assert last.data["value"].tolist() == [2.0, 4.0]
    assert last.table(last.marks[1])["value"].tolist() == [6.0]
    assert last.table(last.marks[2])["value"].tolist() == [7.0]
    with pytest.raises(ValueError, match="step must be one of 0, 1, got 2"):
        chart.at(2)
    with pytest.raises(ValueError, match="has no frames"):
        last.at(1)


def test_panels_are_arranged_in_rows(table) -> None:
    a, b, c, d = (Chart(table, [Line("step", "value")], title=title) for title in "abcd")

    def titles(panels):
        return [[chart.title for chart in row] for row in panels.rows()]

    assert titles(set_side_by_side(a, b, c)) == [["a", "b", "c"]]
    assert titles(stack_vertically(a, b)) == [["a"], ["b"]]
    assert titles(stack_vertically(set_side_by_side(a, b), c)) == [["a", "b"], ["c"]]
    assert stack_vertically(set_side_by_side(a, b, title="row"), c, title="all").title == "all"
    assert set_side_by_side(a, b, title="row").title == "row"
    assert titles(set_side_by_side(stack_vertically(a, b), stack_vertically(c, d))) == [["a", "c"], ["b", "d"]]
    with pytest.raises(ValueError, match="same number of rows, got 2, 1"):
        set_side_by_side(stack_vertically(a, b), c)
    assert titles(wrap([a, b, c], 2)) == [["a", "b"], ["c"]]
    assert titles(wrap([a, b], 0)) == [["a"], ["b"]]
    assert wrap([a], 2).title == a.title


def test_flat_contains_the_data_of_all_panels_and_marks(table) -> None:
    own = pd.DataFrame({"x": [1.0], "y": [2.0]})
    plain = Chart(table, [Line("step", "value"), Rule(x=1)], title="plain")
    assert plain.flat().equals(plain.data)
    marked = Chart(table, [Point("x", "y", data=own)], title="marked")
    flat = set_side_by_side(plain, marked).data
    assert flat["panel"].tolist() == ["1 plain"] * 4 + ["2 marked"] * 5
    assert flat["mark"].tolist() == [""] * 8 + ["point"]
    assert flat["x"].dropna().tolist() == [1.0]


def test_repr_lists_marks_and_counts_rows(table) -> None:
    chart = Chart(table, [Line("step", "value"), Rule(x=1)], title="norms")
    assert repr(chart) == "Chart('norms': line, rule; 4 rows)"
    assert repr(stack_vertically(chart, set_side_by_side(chart, chart))).count("Chart(") == 3


def test_import_chart_imports_no_renderer() -> None:
    code = (
        "import lorascope.charts.chart, sys; print([m for m in ('matplotlib', 'plotly', 'torch') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
