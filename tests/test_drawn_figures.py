"""Faults of drawn figures: each planted one is named, and the figures of the examples and of the study have none."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
import pytest
from drawn_figures import GRAY_STEP, MARK_CONTRAST, faults, figure_faults, lightness

import lorascope as ls
from lorascope.charts.chart import Chart
from lorascope.charts.marks import Axis, Bar, Heat, Line, Mark, Point, Text
from lorascope.charts.theme import THEMES, contrast
from lorascope.papers.study_figures import read_figures
from lorascope.plots.figure_registry import FIGURES, example_code

TABLE = pd.DataFrame({"x": [1.0, 2.0, 3.0], "y": [1.0, 2.0, 3.0], "name": ["one", "two", "three"]})
NAMED = TABLE.assign(x=["a", "b", "c"])
CROWD = pd.DataFrame({"x": [f"module {number}" for number in range(60)], "y": 1.0})
BARS = pd.DataFrame({"x": ["a", "a", "b", "b"], "y": [1.0, 2.0, 3.0, 4.0], "color": ["one", "two"] * 2})


def chart(*marks: Mark, data: pd.DataFrame = TABLE, **settings: Any) -> Chart:
    return Chart(data, marks, **settings)


def text_at(x: list[float], y: list[float], text: list[str]) -> Text:
    return Text("x", "y", "text", data=pd.DataFrame({"x": x, "y": y, "text": text}))


POINTS = Point("x", "y")
PLANTED: dict[str, tuple[Chart, dict[str, Any], str]] = {
    "faint text": (chart(POINTS, x=Axis(label="layer")), {}, "text 'layer' has a contrast of 1.9 to #ffffff"),
    "faint mark": (chart(POINTS), {"palette": ["#ffcc00"]}, "1 colors of marks are faint, such as #ffcc00"),
    "two texts": (chart(POINTS, text_at([2, 2.02], [1, 1], ["left", "right"])), {}, "'left' and 'right' overlap"),
    "long text": (
        chart(POINTS, text_at([2], [1], ["very " * 20 + "long"]), y=Axis(ticks={})),
        {},
        "outside the figure",
    ),
    "no tick": (chart(Point("x", "y"), data=NAMED, x=Axis(ticks={"a": "a", "c": "c"})), {}, "no tick on x for cate"),
    "crowded ticks": (chart(Point("x", "y"), data=CROWD), {}, "no tick on x for category 1, labels are module 0"),
    "cut dot": (chart(POINTS, y=Axis(limits=(0, 2.5))), {}, "1 of 3 dots are cut by up to"),
    "cut bar": (chart(Bar("x", "y"), data=NAMED, y=Axis(limits=(0.5, 4))), {}, "3 of 3 bars are cut by up to"),
    "alike in gray": (
        chart(Bar("x", "y", "color"), data=BARS),
        {"palette": ["#009e73", "#d55e00"]},
        "'one' and 'two' differ in gray by 4 of 100",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_fault_is_named_in_one_line(name: str) -> None:
    drawn, how, line = PLANTED[name]
    settings = {"axes.labelcolor": "#bbbbbb"} if name == "faint text" else {}
    with matplotlib.rc_context(settings):
        found = faults(name, drawn, width=3.3, theme="light", **how)
    assert found
    assert all(line.startswith(f"{name} (3.3, light") for line in found)
    assert [text for text in found if line in text] == found[:1] or name in ("crowded ticks", "long text")


def test_text_on_the_symbols_of_a_legend_is_named() -> None:
    figure = chart(Line("x", "y", "name")).mpl()
    left, bottom, _, top = figure.transFigure.inverted().transform_bbox(figure.legends[0].get_window_extent()).extents
    figure.text(left + 0.02, (bottom + top) / 2, "x")
    assert list(figure_faults(figure)) == ["text 'x' is on the legend"]


def test_figure_without_fault_has_no_line() -> None:
    bars = Bar("x", "y", "color")
    for theme in THEMES:
        assert faults("bars", chart(bars, data=BARS), theme=theme) == []
        assert faults("lines", chart(Line("x", "y", "name"), Point("x", "y", "name")), theme=theme) == []


def test_ticks_between_evenly_spaced_numbers_are_not_missed() -> None:
    layers = pd.DataFrame({"x": list(range(48)), "y": 1.0})
    powers = pd.DataFrame({"x": [2**number for number in range(40)], "y": 1.0})
    assert faults("layers", chart(POINTS, data=layers, x=Axis(order=layers["x"])), width=3.3) == []
    assert faults("powers", chart(POINTS, data=powers, x=Axis(order=powers["x"])), width=3.3) != []


@pytest.mark.slow
def test_figures_of_the_study_are_readable() -> None:
    lines = []
    for name, figure in read_figures(Path(__file__).parents[1] / "data").items():
        lines += faults(name, figure.chart, width="page", theme="light")
        for title in {figure.chart.title, *(panel.title for panel in figure.chart.panels)}:
            # Words may have a hyphen, and negative numbers have a minus sign.
            if re.search(r"(?<!\w)-\d", title):
                lines.append(f"{name}: {title}")
    assert lines == []


@pytest.mark.parametrize("name", ["atlas", "adapter_pairs", "gate_course", "training_curves"])
def test_figures_of_the_gallery_fit_into_a_column(name: str) -> None:
    *lines, last = example_code(FIGURES[name].draw).splitlines()
    names = {"ls": ls}
    exec("\n".join(lines), names)
    assert faults(name, eval(last, names), width=3.25, theme="light") == []


@pytest.mark.parametrize("name", THEMES)
def test_colors_are_distinct_in_gray_and_visible_on_the_background(name: str) -> None:
    theme = THEMES[name]
    for color in (*theme.palette, *theme.ramp):
        assert contrast(color, theme.background) >= MARK_CONTRAST
    for color, other in combinations(theme.palette[:4], 2):
        assert abs(lightness(color) - lightness(other)) >= GRAY_STEP


def test_words_next_to_numbers_are_turned_instead_of_hiding_them() -> None:
    places = ["embed", *map(str, range(6)), "norm", "head"]
    table = pd.DataFrame({"x": places, "y": 1.0})
    drawn = chart(POINTS, data=table, x=Axis(order=places))
    labels = drawn.mpl(width=2.2).axes[0].get_xticklabels()
    assert [label.get_text() for label in labels] == places
    assert [label.get_rotation() for label in labels] == [90.0, *[0.0] * 6, 90.0, 90.0]
    assert faults("layers", drawn, width=2.2) == []


def test_vertical_names_take_height_once_in_a_stack_of_frames() -> None:
    """A further frame is as high with vertical names as with short ones, because only the lowest frame has them."""
    added = {}
    for kind in ("x", "expert of a module"):
        heights = []
        for frames in (3, 4):
            names = [f"{kind} {number}" for number in range(9)]
            cells = pd.MultiIndex.from_product([range(frames), names, ["a", "b"]])
            table = cells.to_frame(index=False, name=["layer", "x", "y"]).assign(value=1.0)
            heat = Chart(table, [Heat("x", "y", "value", "value")], y=Axis(compact=True), frame="layer")
            heights.append(heat.mpl(width=3.25).get_figheight())
        added[kind] = heights[1] - heights[0]
    assert added["expert of a module"] == pytest.approx(added["x"], abs=0.05)
