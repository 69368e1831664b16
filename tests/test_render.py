"""Numbers of a chart read back from the artists and traces of both renderers, never from pixels."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from readers import Mpl, Plotly

from lorascope.charts import matplotlib_backend
from lorascope.charts.chart import Chart, Panels, set_side_by_side, stack_vertically
from lorascope.charts.geometry import Curve, build
from lorascope.charts.marks import Axis, Band, Bar, Heat, Line, Mark, Point, Rule, Text
from lorascope.charts.theme import ON_LIGHT, THEMES, channels, contrast

both = pytest.mark.parametrize("reader", [Mpl, Plotly])
BLUE, VERMILLION, GREEN = ON_LIGHT[:3]


def table(columns: str, *rows: tuple) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=columns.split())


@pytest.fixture
def runs() -> pd.DataFrame:
    return table(
        "step value low high method",
        (10, 2.0, 1.5, 2.5, "LoRA"),
        (0, 1.0, 0.5, 1.5, "LoRA"),
        (20, 3.0, 2.0, 4.5, "LoRA"),
        (0, 5.0, 4.0, 6.0, "Full"),
        (10, 6.0, 5.5, 6.5, "Full"),
    )


@both
def test_lines_are_sorted_by_x_and_colored_by_category(reader, runs) -> None:
    shown = reader(Chart(runs, [Line("step", "value", "method")]))
    assert shown.lines() == [([0, 10, 20], [1, 2, 3], BLUE), ([0, 10], [5, 6], VERMILLION)]


@pytest.mark.parametrize("theme", ["light", "dark", "paper"])
def test_muted_lines_are_thin_gray_and_not_in_the_legend(theme: str, runs: pd.DataFrame) -> None:
    bold = Line("step", "value", "method")
    thin = Line("step", "value", stretch="method", muted=True)
    chart = Chart(runs, [bold, thin])
    *bold_lines, line = chart.mpl(theme=theme).axes[0].lines
    assert line.get_linewidth() < 0.5 * bold_lines[0].get_linewidth()
    *traces, trace = (trace for trace in chart.plotly(theme=theme).data if len(trace.x) > 1)
    assert trace.line.width < traces[0].line.width
    assert trace.line.color == to_hex(line.get_color())
    red, green, blue = channels(trace.line.color)
    assert max(red, green, blue) - min(red, green, blue) < 8
    assert contrast(trace.line.color, THEMES[theme].background) > 4.5
    for reader in (Mpl, Plotly):
        assert reader(chart).lines()[-1][:2] == ([0, 10, 20, None, 0, 10], [1, 2, 3, None, 5, 6])


@dataclass(frozen=True)
class Mean(Mark):
    """A mark that this test adds: the mean of y as a line."""

    encodings = ("x", "y")
    x: str
    y: str


@build.register
def _(mark: Mean, panel, frame):
    x, y = panel.positions(mark, panel.rows(mark, frame))
    yield Curve(np.unique(x), np.full(len(np.unique(x)), y.mean()), panel.color(mark, {}), "solid", "")


@both
def test_new_kind_of_mark_is_drawn_by_both_renderers(reader, runs) -> None:
    shown = reader(Chart(runs, [Mean("step", "value")]))
    assert shown.lines() == [([0, 10, 20], [3.4] * 3, BLUE)]


@both
def test_colors_sets_the_order_of_palette_and_legend(reader, runs) -> None:
    shown = reader(Chart(runs, [Line("step", "value", "method")], colors=["Full", "ReFT", "LoRA"]))
    assert [color for *_, color in shown.lines()] == [BLUE, GREEN]
    assert shown.legend() == ["Full", "LoRA"]


@both
def test_line_with_missing_values_has_gaps(reader) -> None:
    data = pd.DataFrame({"x": [0, 1, 2, 3], "y": pd.array([1.0, None, np.inf, 2.0], dtype="Float64")})
    assert reader(Chart(data, [Line("x", "y")])).lines() == [([0, 1, 2, 3], [1, None, None, 2], BLUE)]


@both
def test_categories_differ_in_dash_and_marker_as_in_the_legend(reader) -> None:
    data = pd.DataFrame([(x, x * k, f"recipe {k}") for k in range(1, 7) for x in range(3)], columns=["x", "y", "who"])
    lines, dots = reader(Chart(data, [Line("x", "y", "who")])), reader(Chart(data, [Point("x", "y", "who")]))
    assert len(set(map(str, lines.styles()))) == 6
    assert len(set(dots.symbols())) == 6
    assert list(map(str, lines.legend_styles())) == list(map(str, lines.styles()))
    # Categories that an axis shows need no other shape.
    assert len(set(reader(Chart(data, [Point("y", "who", "who")])).symbols())) == 1


def test_artists_have_the_labels_of_the_legend(runs) -> None:
    marks = [Band("step", "low", "high", "method"), Line("step", "value", "method"), Point("step", "value", "method")]
    ax = Chart(runs, marks).mpl().axes[0]
    handles, labels = ax.get_legend_handles_labels()
    assert labels == ["LoRA", "Full"]
    assert [handle.get_color() for handle in handles] == [BLUE, VERMILLION]
    bars = Chart(runs, [Bar("step", "value", "method")]).mpl().axes[0]
    assert bars.get_legend_handles_labels()[1] == labels
    runs["seed"] = [0, 0, 0, 1, 1]
    dashed = Chart(runs, [Line("step", "value", "method", "seed")]).mpl().axes[0]
    assert dashed.get_legend_handles_labels()[1] == [*labels, "0", "1"]
    without = Chart(runs, marks).mpl(legend=False)
    assert without.legends == []
    assert without.axes[0].get_legend_handles_labels()[1] == labels
    assert Chart(runs, marks).mpl(Figure().subplots(), legend=False).get_legend() is None


@both
def test_dash_column_gives_each_value_its_own_dash(reader, runs) -> None:
    runs["seed"] = [0, 0, 0, 1, 1]
    shown = reader(Chart(runs, [Line("step", "value", "method", dash="seed")]))
    assert len(set(map(str, shown.styles()))) == 2
    assert shown.legend() == ["LoRA", "Full", "0", "1"]


@both
def test_bands_fill_between_low_and_high(reader, runs) -> None:
    (lora, color), (full, _) = reader(Chart(runs, [Band("step", "low", "high", "method")])).bands()
    assert lora == {(0, 0.5), (10, 1.5), (20, 2.0), (20, 4.5), (10, 2.5), (0, 1.5)}
    assert full == {(0, 4.0), (10, 5.5), (10, 6.5), (0, 6.0)}
    assert color == BLUE


@both
def test_band_with_missing_value_is_split(reader) -> None:
    data = pd.DataFrame({"x": range(5), "low": [0, 0, np.nan, 0, 0], "high": [1, 1, 1, 2, 2]})
    ((corners, _),) = reader(Chart(data, [Band("x", "low", "high")])).bands()
    assert corners == {(0, 0), (1, 0), (1, 1), (0, 1), (3, 0), (4, 0), (4, 2), (3, 2)}


@both
def test_points_have_error_bars(reader, runs) -> None:
    shown = reader(Chart(runs, [Point("step", "value", "method", low="low", high="high")]))
    assert shown.dots() == [([10, 0, 20], [2, 1, 3], [BLUE] * 3), ([0, 10], [5, 6], [VERMILLION] * 2)]
    assert shown.errors() == [(1.5, 2.5), (0.5, 1.5), (2.0, 4.5), (4.0, 6.0), (5.5, 6.5)]


@both
def test_interval_without_its_value_is_drawn(reader) -> None:
    data = table("x y low high", (0, 5.0, 1.0, 2.0))
    shown = reader(Chart(data, [Point("x", "y", low="low", high="high")]))
    assert shown.errors() == [(1.0, 2.0)]
    assert shown.ends("y")[0] < 1.0 < 5.0 < shown.ends("y")[1]


@both
def test_error_bars_with_categorical_y_are_horizontal(reader) -> None:
    data = table("effect claim low high", (0.5, "first", 0.1, 0.9), (-1.0, "second", -2.0, 0.0))
    shown = reader(Chart(data, [Point("effect", "claim", low="low", high="high")]))
    assert shown.dots() == [([0.5, -1.0], [0, 1], [BLUE, BLUE])]
    assert shown.errors() == [(0.1, 0.9), (-2.0, 0.0)]
    assert shown.ends("y") == (1.5, -0.5)
    assert shown.names("y") == {0: "first", 1: "second"}


@both
def test_dot_area_is_proportional_to_size(reader) -> None:
    data = table("x y size", (0, 0, 1.0), (1, 1, 4.0), (2, 2, 0.0))
    small, large, none = reader(Chart(data, [Point("x", "y", size="size")])).diameters()
    assert large == pytest.approx(2 * small)
    assert none == 0


@both
def test_many_dots_shrink_regardless_of_color(reader) -> None:
    """With four times as many dots as fit, each is half as wide, also those of a rare color."""
    data = pd.DataFrame({"x": range(240), "y": range(240), "size": 1.0, "kind": ["few"] * 20 + ["many"] * 220})
    crowded = reader(Chart(data, [Point("x", "y", "kind", size="size")])).diameters()
    sparse = reader(Chart(data[:60], [Point("x", "y", "kind", size="size")])).diameters()
    assert crowded == pytest.approx([sparse[0] / 2] * 20)
    data["frame"] = [0, 1, 2, 3] * 60
    assert reader(Chart(data, [Point("x", "y", size="size")], frame="frame")).diameters()[0] == pytest.approx(sparse[0])


@both
def test_small_dots_next_to_a_large_one_do_not_shrink(reader) -> None:
    """Their total area decides, not their number."""
    data = pd.DataFrame({"x": range(1000), "y": range(1000), "size": [1.0] + [0.01] * 999})
    large, *_ = reader(Chart(data, [Point("x", "y", size="size")])).diameters()
    assert large == reader(Chart(data[:1], [Point("x", "y", size="size")])).diameters()[0]


@both
def test_square_panels_are_as_high_as_wide(reader) -> None:
    data = table("x y", (0, 0), (1, 1))
    plane = Chart(data, [Point("x", "y")], square=True)
    for drawable in (plane, Panels(((plane,) * 2, (plane,) * 4))):
        for width, height in reader(drawable).sizes():
            assert height == pytest.approx(width, rel=0.01)


@both
def test_panels_have_the_widths_of_their_spans(reader) -> None:
    data = table("x y", (0, 0), (1, 1))
    wide, narrow = (Chart(data, [Point("x", "y")], span=span) for span in (3, 1))
    (wide_width, _), (narrow_width, _), *_ = sizes = reader(Panels(((wide, narrow), (wide, narrow)))).sizes()
    assert wide_width / narrow_width == pytest.approx(3, rel=0.01)
    np.testing.assert_allclose(sizes[2:], sizes[:2], rtol=0.01)


def test_panels_of_different_spans_stack_where_the_narrow_one_has_no_room() -> None:
    data = table("x y", (0, 0), (1, 1))
    row = Panels(((Chart(data, [Point("x", "y")], span=3), Chart(data, [Point("x", "y")])),))
    starts = [ax.get_position().y0 for ax in row.mpl(width=6.75).axes]
    assert starts[0] == pytest.approx(starts[1], abs=0.01)
    top, bottom = (ax.get_position() for ax in row.mpl(width=3.25).axes)
    assert top.y0 > bottom.y1
    assert top.width == pytest.approx(bottom.width, rel=0.05)


def test_plotly_rows_of_small_squares_are_low() -> None:
    plane = Chart(table("x y", (0, 0), (1, 1)), [Point("x", "y")], square=True)
    low, high = (Panels(((plane,) * count,)).plotly().layout.height for count in (4, 2))
    assert low < high - 100


@both
def test_many_numbers_get_a_color_scale(reader) -> None:
    data = pd.DataFrame({"x": range(30), "y": range(30), "layer": range(30)})
    for mark in (Point("x", "y", "layer"), Line("x", "y", "layer")):
        shown = reader(Chart(data, [mark], color_label="layer"))
        assert shown.legend() == []
        assert shown.color_bars() == ["layer"]
    ((*_, colors),) = reader(Chart(data, [Point("x", "y", "layer")])).dots()
    assert len(set(colors)) == 30
    assert len(reader(Chart(data, [Line("x", "y", "layer")])).lines()) == 30


@both
def test_grouped_bars_are_side_by_side(reader) -> None:
    data = table(
        "layer rank role low high", ("0", 4, "q", 3, 5), ("1", 2, "q", 1, 3), ("0", 6, "v", 5, 7), ("1", 8, "v", 7, 9)
    )
    shown = reader(Chart(data, [Bar("layer", "rank", "role", low="low", high="high")]))
    assert shown.bars() == [([-0.2, 0.8], [0, 0], [4, 2], BLUE), ([0.2, 1.2], [0, 0], [6, 8], VERMILLION)]
    assert shown.errors() == [(3, 5), (1, 3), (5, 7), (7, 9)]
    assert shown.ends("y")[0] == 0
    assert shown.ends("x") == (-0.5, 1.5)


@both
def test_bars_stack_upwards_and_downwards(reader) -> None:
    data = table(
        "x y part", ("a", 1, "p"), ("b", -1, "p"), ("a", 2, "r"), ("b", -2, "r"), ("a", -4, "s"), ("b", 3, "s")
    )
    shown = reader(Chart(data, [Bar("x", "y", "part", mode="stack")]))
    assert [(places, bases, tops) for places, bases, tops, _ in shown.bars()] == [
        ([0, 1], [0, 0], [1, -1]),
        ([0, 1], [1, -1], [3, -3]),
        ([0, 1], [0, 0], [-4, 3]),
    ]


@both
def test_error_bars_of_a_stack_start_at_their_pieces(reader) -> None:
    data = table("x y part low high", ("a", 1.0, "p", 0.5, 1.5), ("a", 2.0, "r", 1.0, 3.0))
    shown = reader(Chart(data, [Bar("x", "y", "part", mode="stack", low="low", high="high")]))
    assert shown.errors() == [(0.5, 1.5), (2.0, 4.0)]


@both
def test_bars_with_categorical_y_are_horizontal_and_full_width_if_colored_by_y(reader) -> None:
    data = table("norm module", (3.0, "k"), (1.0, "v"))
    shown = reader(Chart(data, [Bar("norm", "module", "module")]))
    assert shown.bars() == [([0], [0], [3], BLUE), ([1], [0], [1], VERMILLION)]
    assert shown.legend() == []


@both
def test_bars_over_numbers_are_as_wide_as_the_smallest_distance(reader) -> None:
    data = table("x y", (0.0, 1), (0.25, 2), (1.0, 3))
    shown = reader(Chart(data, [Bar("x", "y")]))
    assert shown.bars()[0][:1] == ([0, 0.25, 1.0],)
    low, high = shown.ends("x")
    assert low < -0.1
    assert high > 1.1
    width = shown.axes[0].patches[0].get_width() if reader is Mpl else shown.figure.data[0].width
    assert width == pytest.approx(0.2)


@pytest.fixture
def cells() -> pd.DataFrame:
    return table("layer role value", (0, "q", 1.0), (1, "q", 2.0), (0, "v", -4.0), (1, "v", np.nan), (10, "v", 3.0))


@both
def test_heat_with_missing_cells_is_hatched(reader, cells) -> None:
    shown = reader(Chart(cells, [Heat("layer", "role", "value", "norm")], x=Axis(label="layer")))
    assert shown.heat() == ([1, 2, None, -4, None, 3], (-4, 3))
    assert shown.hatched()
    assert shown.names("x") == {0: "0", 1: "1", 2: "10"}
    assert shown.names("y") == {0: "q", 1: "v"}
    assert shown.ends("y") == (1.5, -0.5)
    assert shown.color_bars() == ["norm"]


@both
def test_full_heat_has_no_hatching(reader) -> None:
    data = table("x y v", (0, 0, 1.0), (1, 0, 2.0))
    assert not reader(Chart(data, [Heat("x", "y", "v")])).hatched()


@both
def test_axis_order_places_cells_and_keeps_empty_categories(reader, cells) -> None:
    axes = {"x": Axis(order=["embed", 1, 0, 10]), "y": Axis(order=["v", "k"])}
    assert reader(Chart(cells, [Heat("layer", "role", "value")], **axes)).heat()[0] == (
        [None, None, -4, 3] + [None] * 4 + [None, 2, 1, None]
    )


@both
def test_diverging_scale_is_centered_at_zero(reader, cells) -> None:
    assert reader(Chart(cells, [Heat("layer", "role", "value", scale="diverging")])).heat()[1] == (-4, 4)


@both
def test_heat_limits_set_the_color_range(reader, cells) -> None:
    assert reader(Chart(cells, [Heat("layer", "role", "value", limits=[0, 1])])).heat()[1] == (0, 1)


def test_heat_with_text_writes_numbers_in_cells(cells) -> None:
    chart = Chart(cells, [Heat("layer", "role", "value", text=".1f")])
    assert {(x, y): text for x, y, text in Mpl(chart).words()} == {
        (0, 0): "1.0", (1, 0): "2.0", (0, 1): "−4.0", (2, 1): "3.0"
    }  # fmt: skip
    (shown, *_) = chart.plotly().data
    texts = [[re.sub("<[^>]*>", "", text) for text in row] for row in shown.text]
    assert texts == [["1.0", "2.0", ""], ["−4.0", "", "3.0"]]
    assert "%{z:.1f}" in shown.hovertemplate
    assert chart.plotly().data[0].texttemplate == "%{text}"


def test_numbers_too_wide_for_cells_are_omitted() -> None:
    data = pd.DataFrame({"x": range(60), "y": 0, "v": 1.0})
    assert Mpl(Chart(data, [Heat("x", "y", "v", text=".3f")])).words() == []


@pytest.mark.parametrize("scale", ["sequence", "diverging"])
def test_numbers_in_cells_have_a_contrast_of_4_5(scale) -> None:
    data = pd.DataFrame({"x": range(64), "y": 0, "value": np.linspace(-1, 1, 64)})
    chart = Chart(data, [Heat("x", "y", "value", text=".0f", scale=scale, limits=(-1, 1))])
    figure = chart.mpl(width="page")
    (mesh,), texts = figure.axes[0].collections, figure.axes[0].texts
    assert len(texts) == 64
    cells = [to_hex(mesh.cmap(mesh.norm(value))) for value in data["value"]]
    assert min(map(contrast, cells, (text.get_color() for text in texts))) >= 4.5
    inks = [re.search("#[0-9a-f]{6}", text)[0] for text in chart.plotly().data[0].text[0]]
    assert min(map(contrast, cells, inks)) >= 4.5


def test_numbers_in_cells_are_white_on_dark_and_black_on_light() -> None:
    data = table("x y v", (0, 0, 0.0), (1, 0, 1.0))
    dark, light = Mpl(Chart(data, [Heat("x", "y", "v", text=".0f")])).axes[0].texts
    assert (dark.get_color(), light.get_color()) == ("#ffffff", "#000000")


@both
def test_texts_are_at_their_positions(reader, runs) -> None:
    notes = table("step value word", (0, 1.0, "start"), (20, 3.0, "end < here"))
    shown = reader(Chart(runs, [Line("step", "value", "method"), Text("step", "value", "word", data=notes)]))
    assert shown.words() == [(0, 1, "start"), (20, 3, "end < here" if reader is Mpl else "end &lt; here")]


def test_rules_are_at_their_positions(runs) -> None:
    marks = [Line("step", "value", "method"), Rule(x=10, label="final"), Rule(y=30, label="top")]
    shown = Mpl(Chart(runs, marks))
    upright, flat = shown.axes[0].lines[-2:]
    assert set(upright.get_xdata()) == {10}
    assert set(flat.get_ydata()) == {30}
    assert [text.get_text() for text in shown.axes[0].texts] == ["final", "top"]
    first, second = Chart(runs, marks).plotly().layout.shapes
    assert (first.x0, first.x1, first.yref, first.label.text) == (10, 10, "y domain", "final")
    assert (second.y0, second.y1, second.xref, second.label.text) == (30, 30, "x domain", "top")
    assert shown.ends("y")[1] > 30


@both
def test_rules_on_categorical_axes_are_placed_or_rejected(reader, cells) -> None:
    heat = Heat("layer", "role", "value")
    chart = Chart(cells, [heat, Rule(x=5.5), Rule(y="v")])
    if reader is Mpl:
        upright, flat = reader(chart).axes[0].lines
        places = upright.get_xdata()[0], flat.get_ydata()[0]
    else:
        upright, flat = chart.plotly().layout.shapes
        places = upright.x0, flat.y0
    assert places == (1.5, 1)
    with pytest.raises(ValueError, match="'role' must be one of q, v, got 'k'"):
        reader(Chart(cells, [heat, Rule(y="k")], y=Axis(label="role")))


@both
def test_logarithmic_axes_leave_gaps_at_zero(reader) -> None:
    data = table("x y", (1, 1.0), (10, 0.0), (100, 1000.0))
    shown = reader(Chart(data, [Line("x", "y")], x=Axis(log=True), y=Axis(log=True)))
    assert shown.is_log("x")
    assert shown.is_log("y")
    assert shown.lines() == [([1, 10, 100], [1, None, 1000], BLUE)]
    low, high = shown.ends("y")
    assert 0.5 < low < 1
    assert 1000 < high < 2000


def test_logarithmic_axis_below_a_decade_has_plain_numbers() -> None:
    data = table("x y", (1, 12.0), (2, 70.0))
    shown = Mpl(Chart(data, [Line("x", "y")], y=Axis(log=True)))
    assert {"20", "50"} <= set(shown.names("y").values())


def test_logarithmic_axis_between_2_and_5_has_integers() -> None:
    panel = Chart(table("x y", (0, 2.4), (1, 4.3)), [Line("x", "y")], y=Axis(log=True))
    figure = set_side_by_side(*[panel] * 4).mpl()
    figure.canvas.draw()
    low, high = figure.axes[0].get_ylim()
    labels = [label for label in figure.axes[0].get_yticklabels() if low <= label.get_position()[1] <= high]
    assert [label.get_text() for label in labels] == ["3", "4"]


@pytest.mark.parametrize("values", [(0.75, 1.45), (1.1, 1.9), (13, 17)])
def test_ticks_of_a_short_logarithmic_axis_reach_its_upper_end(values) -> None:
    panel = Chart(table("x y", *enumerate(values)), [Line("x", "y")], y=Axis(log=True))
    figure = panel.mpl()
    figure.canvas.draw()
    low, high = figure.axes[0].get_ylim()
    ticks = [tick for tick in figure.axes[0].get_yticks() if low <= tick <= high]
    assert len(ticks) >= 2
    assert np.log(high / ticks[-1]) < np.log(high / low) / 3


def test_labels_of_a_short_logarithmic_axis_do_not_overlap() -> None:
    data = table("x y", (3e-6, 1.0), (3e-4, 2.0))
    panel = Chart(data, [Line("x", "y")], x=Axis(label="learning rate", log=True))
    for columns, fewest in ((1, 4), (2, 2)):
        figure = matplotlib_backend.to_matplotlib(set_side_by_side(*[panel] * columns), width="column")
        figure.canvas.draw()
        for ax in figure.axes:
            inside = [
                label
                for label in ax.get_xticklabels()
                if ax.get_xlim()[0] <= label.get_position()[0] <= ax.get_xlim()[1]
            ]
            boxes = [label.get_window_extent() for label in inside if label.get_text()]
            assert len(boxes) >= fewest
            assert all(one.x1 < other.x0 for one, other in pairwise(boxes))


@both
def test_axis_limits_and_ticks_are_applied(reader, runs) -> None:
    chart = Chart(
        runs, [Line("step", "value", "method")], x=Axis(ticks={0: "start", 20: "end"}), y=Axis(limits=(0, None))
    )
    shown = reader(chart)
    assert shown.names("x") == {0: "start", 20: "end"}
    assert shown.ends("y")[0] == 0
    assert shown.ends("y")[1] == pytest.approx(6.2)


@both
def test_single_color_has_no_legend(reader, runs) -> None:
    marks = [Band("step", "low", "high", "method"), Line("step", "value", "method"), Point("step", "value", "method")]
    assert reader(Chart(runs[runs["method"] == "LoRA"], marks)).legend() == []
    assert reader(Chart(runs, marks)).legend() == ["LoRA", "Full"]
    assert reader(Chart(runs, [Line("step", "value", dash="method")])).legend() == ["LoRA", "Full"]


def test_traces_of_a_category_share_a_legend_group(runs) -> None:
    marks = [Band("step", "low", "high", "method"), Line("step", "value", "method")]
    data = Chart(runs, marks).plotly().data
    assert [trace.legendgroup for trace in data] == ["method=LoRA", "method=Full"] * 3


@both
def test_panels_share_legend_colors_and_range(reader, runs) -> None:
    left = Chart(runs, [Line("step", "value", "method")], y=Axis(label="norm"), title="all")
    half = runs.assign(value=100 * runs["value"])[runs["method"] == "Full"]
    right = Chart(half, [Line("step", "value", "method")], y=Axis(label="norm"), title="full")
    other = Chart(half, [Line("step", "value", "method")], y=Axis(label="loss"))
    shown = reader(stack_vertically(set_side_by_side(left, right), other))
    assert shown.legend() == ["LoRA", "Full"]
    assert shown.lines(1) == [([0, 10], [500, 600], VERMILLION)]
    assert shown.ends("y", 0) == shown.ends("y", 1) != shown.ends("y", 2)
    assert shown.ends("y", 0)[0] < 1.0 < 600 < shown.ends("y", 0)[1]


@pytest.mark.parametrize("encoding", ["shape", "dash"])
def test_category_has_one_style_in_all_panels(encoding) -> None:
    data = table("x y role panel", (0, 1, "q", 0), (1, 2, "v", 0), (0, 3, "v", 1), (1, 4, "o", 1))
    draw = Point if encoding == "shape" else Line
    panels = [Chart(data[data["panel"] == number], [draw("x", "y", **{encoding: "role"})]) for number in (0, 1)]
    traces = [trace for trace in Plotly(set_side_by_side(*panels)).figure.data if trace.x[0] is not None]
    q, v, same, o = (trace.marker.symbol if encoding == "shape" else trace.line.dash for trace in traces)
    assert v == same
    assert len({q, v, o}) == 3
    handles = Mpl(set_side_by_side(*panels)).figure.legends[0].get_lines()
    assert [handle.get_label() for handle in handles] == ["q", "v", "o"]
    assert encoding == "dash" or len({handle.get_marker() for handle in handles}) == 3


@both
def test_category_drawn_by_several_marks_has_one_legend_entry(reader, runs) -> None:
    panels = set_side_by_side(
        Chart(runs, [Bar("step", "value", "method")]), Chart(runs, [Line("step", "value", "method", dash="method")])
    )
    shown = reader(panels)
    assert shown.legend() == ["LoRA", "Full"]
    if reader is Mpl:
        assert [handle.get_linestyle() for handle in shown.figure.legends[0].get_lines()] == ["-", "--"]
    else:
        assert [trace.mode for trace in shown.figure.data if trace.showlegend] == ["lines", "lines"]


@both
def test_heats_of_one_quantity_share_a_color_bar(reader) -> None:
    one, two = table("x y v", (0, 0, 1.0), (1, 0, 2.0)), table("x y v", (0, 0, 5.0), (1, 0, 3.0))
    same = reader(set_side_by_side(*(Chart(data, [Heat("x", "y", "v", "norm")]) for data in (one, two))))
    assert same.color_bars() == ["norm"]
    assert [same.heat(panel)[1] for panel in (0, 1)] == [(1, 5), (1, 5)]
    apart = reader(
        set_side_by_side(Chart(one, [Heat("x", "y", "v", "norm")]), Chart(two, [Heat("x", "y", "v", "rank")]))
    )
    assert sorted(apart.color_bars()) == ["norm", "rank"]
    assert [apart.heat(panel)[1] for panel in (0, 1)] == [(1, 2), (3, 5)]


@pytest.fixture
def replay() -> Chart:
    steps = range(0, 300, 10)
    data = pd.DataFrame([(s, x, g, float(s + x)) for s in steps for x in (0, 1) for g in "ab" if (s, g) != (0, "b")])
    data.columns = ["step", "x", "group", "value"]
    return Chart(data, [Line("x", "value", "group"), Rule(y=5)], frame="step", title="replay")


def test_frames_are_steps_of_a_slider(replay) -> None:
    figure = replay.plotly()
    (slider,) = figure.layout.sliders
    assert [step.label for step in slider.steps] == [str(step) for step in range(0, 300, 10)]
    assert [step.args[0] for step in slider.steps] == [(frame.name,) for frame in figure.frames]
    assert slider.currentvalue.prefix == "step "
    first, last = figure.frames[0], figure.frames[-1]
    assert first.traces == last.traces == (0, 1)
    assert [list(trace.y) for trace in first.data] == [[0, 1], []]
    for shown in (last.data, figure.data[:2]):  # the slider opens at the last frame
        assert [list(trace.y) for trace in shown] == [[290, 291], [290, 291]]
    assert figure.layout.sliders[0].active == 29
    assert figure.layout.yaxis.range[0] < 0
    assert figure.layout.yaxis.range[1] > 291


def test_frames_are_small_multiples_in_matplotlib(replay) -> None:
    shown = Mpl(replay)
    titles = [ax.get_title(loc="left") for ax in shown.axes]
    assert len(titles) == 8
    assert (titles[0], titles[-1]) == ("step 0", "step 290")
    assert shown.lines(7)[0][1] == [290, 291]
    assert len({shown.ends("y", panel) for panel in range(8)}) == 1
    assert shown.title() == "replay"
    numbers = [int(title.removeprefix("step ")) for title in titles]
    assert max(np.diff(numbers)) - min(np.diff(numbers)) <= 10
    assert len(Mpl(replay.at(290)).axes) == 1


def test_panels_share_the_slider_and_panels_without_frames_do_not_move(replay, runs) -> None:
    still = Chart(runs, [Line("step", "value", "method")], title="still")
    figure = set_side_by_side(replay, still, replay).plotly()
    assert len(figure.layout.sliders) == 1
    assert figure.frames[0].traces == (0, 1, 4, 5)
    shown = Mpl(set_side_by_side(replay, still))
    assert len(shown.axes) == 5
    assert shown.lines(4)[0][1] == [1, 2, 3]
    assert shown.axes[3].get_title(loc="left") == "replay, step 290"


def test_panels_with_different_frames_raise(replay) -> None:
    other = Chart(replay.data.rename(columns={"step": "epoch"}), [Line("x", "value", "group")], frame="epoch")
    with pytest.raises(ValueError, match="same frame column, got step, epoch"):
        set_side_by_side(replay, other).plotly()


@both
def test_title_and_caption_are_drawn(reader, runs) -> None:
    caption = "Mean over 3 seeds with its 95% interval; " * 6
    shown = reader(Chart(runs, [Line("step", "value", "method")], title="Norms", caption=caption))
    assert shown.title() == "Norms"
    assert shown.caption().split() == caption.split()


@both
def test_captions_of_panels_are_joined(reader, runs) -> None:
    line = [Line("step", "value", "method")]
    one, two = (Chart(runs, line, title=title, caption=f"What {title} shows.") for title in ("left", "right"))
    assert reader(set_side_by_side(one, one)).caption() == "What left shows."
    assert (
        " ".join(reader(set_side_by_side(one, two)).caption().split())
        == "left: What left shows. right: What right shows."
    )


@both
def test_markup_in_text_is_not_interpreted(reader, runs) -> None:
    shown = reader(Chart(runs, [Line("step", "value", "method")], title="<b>$r</b>"))
    assert shown.title() == (r"<b>\$r</b>" if reader is Mpl else "&lt;b&gt;&#36;r&lt;/b&gt;")
    if reader is Mpl:
        shown.figure.draw_without_rendering()


@both
@pytest.mark.parametrize(
    "marks",
    [
        [Line("x", "y", "kind"), Band("x", "y", "y", "kind"), Point("x", "y", "kind", size="y", low="y", high="y")],
        [Bar("x", "y", "kind", mode="stack", low="y", high="y")],
        [Heat("x", "kind", "y", text=".1f")],
        [Heat("x", "kind", "y"), Text("x", "kind", "kind")],
        [Heat("x", "kind", "y", scale="diverging"), Rule(x=1)],
    ],
)
@pytest.mark.parametrize(
    "data",
    [
        pd.DataFrame({"x": [], "y": [], "kind": pd.Series([], dtype=str)}),
        table("x y kind", (1, np.nan, "a"), (2, np.nan, "b")),
        table("x y kind", (1, 0.0, "a")),
        table("x y kind", (1, 5, True), (1, 6, False)).astype({"x": "Int16", "y": "float32"}),
        table("x y kind", (1, 5, "b"), (1, 6, "a")).astype({"kind": "category", "y": "Int64"}),
    ],
    ids=["empty", "unknown", "zero", "nullable", "categorical"],
)
def test_empty_missing_and_nullable_tables_are_drawn(reader, marks, data) -> None:
    if data.empty:
        marks = [mark for mark in marks if not isinstance(mark, Rule)]
    shown = reader(Chart(data, marks, frame=None))
    if reader is Mpl:
        shown.figure.draw_without_rendering()


@both
def test_categorical_dtype_sets_the_order(reader) -> None:
    kind = pd.Categorical(["low", "high", "low"], categories=["high", "low", "none"], ordered=True)
    data = pd.DataFrame({"x": [0, 1, 2], "y": [1.0, 2.0, 3.0], "kind": kind})
    assert reader(Chart(data, [Line("x", "y", "kind")])).legend() == ["high", "low"]


@pytest.mark.parametrize("panels", range(2, 9))
def test_any_number_of_panels_fits_the_page_width(panels: int) -> None:
    table = pd.DataFrame({"x": [0, 1]})
    charts = [Chart(table, [Point("x", "x")], x=Axis(label="x"), y=Axis(label=f"y{n}")) for n in range(panels)]
    domains = [axis.domain for axis in set_side_by_side(*charts).plotly().select_xaxes()]
    assert len(domains) == panels
    assert all(0 <= start < stop <= 1 for start, stop in domains)


@pytest.mark.parametrize("dpi", [100, 300])
@pytest.mark.parametrize("width", ["column", "page"])
def test_caption_has_the_same_lines_at_every_resolution(runs, width, dpi) -> None:
    """The height is measured once: another line in the file would overlap the legend, a missing one leaves a gap."""
    chart = Chart(runs, [Line("step", "value", "method")], caption="Mean over 3 seeds, with an interval; " * 9)
    made = matplotlib_backend.to_matplotlib(chart, "paper", width)
    text = made.texts[0].get_text()
    assert " ".join(text.split()) == chart.caption.strip()
    made.set_dpi(dpi)
    made.canvas.draw()
    assert made.texts[0].get_text() == text
    box = made.texts[0].get_window_extent()
    assert box.x0 >= 0
    assert 0.85 * made.bbox.width < box.x1 <= made.bbox.width


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [[1e308, -1e308], [1.7e308, 1.79e308], [5e-324, 1e200, 1.0], [1e308, 1.0, 2.0]])
def test_values_near_the_limit_of_float64_are_drawn_or_omitted(values, log, tmp_path):
    """Values that no axis can show are omitted, like infinite ones."""
    data = pd.DataFrame({"x": range(len(values)), "y": values})
    chart = Chart(data, [Line("x", "y")], y=Axis(log=log))
    for ending in ("svg", "html"):
        chart.save(tmp_path / f"chart.{ending}")
    low, high = chart.mpl().axes[0].get_ylim()
    assert np.isfinite([low, high]).all()
    known = [value for value in values if abs(value) < 1e200 and (value > 0 or not log)]
    assert all(low <= value <= high for value in known if value > 1e-300)


@pytest.mark.parametrize("rows", [3, 40])
def test_long_names_beside_a_panel_leave_room_for_it(rows: int) -> None:
    names = [f"NeFT, parameter_share 0.1, tune_lr 0.001, seed {number}" for number in range(rows)]
    cells = pd.DataFrame({"one": names, "other": names[:1] * rows, "value": 1.0})
    chart = Chart(cells, [Heat("other", "one", "value", "overlap", ".2f")], y=Axis(order=names))
    made = matplotlib_backend.to_matplotlib(chart, width="column")
    width = made.axes[0].get_window_extent().width / made.dpi
    assert width > 0.15 * made.get_figwidth()
    written = {label.get_text().replace("\n", " ") for label in made.axes[0].get_yticklabels()}
    assert written
    assert all(text in names or ("…" in text and text[-1].isdigit()) for text in written)


def test_labels_of_numbers_do_not_overlap_in_a_narrow_panel() -> None:
    """Losses that differ in the fourth digit have labels of six characters."""
    table = pd.DataFrame({"loss": [0.6923, 0.6938, 0.6929], "recipe": ["a", "b", "c"]})
    figure = Chart(table, [Point("loss", "recipe")]).mpl(width=1.0)
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
    assert len(boxes) > 1
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_numbers_in_cells_have_the_size_of_notes_or_less_where_cells_are_narrow() -> None:
    for columns, sizes in ((4, (11, 11)), (30, (5, 9))):
        data = pd.DataFrame({"x": np.arange(columns), "y": "a", "v": 0.25})
        chart = Chart(data, [Heat("x", "y", "v", text=".2f")])
        (cells,) = (trace for trace in chart.plotly().data if trace.type == "heatmap")
        assert sizes[0] <= cells.textfont.size <= sizes[1]


def test_overlapping_stretches_are_lines_of_their_own() -> None:
    """Two intervals on the x-axis at different heights, of which one lies inside the other."""
    table = pd.DataFrame({"x": [0, 3, 1, 2], "y": [0, 0, 1, 1], "part": list("aabb")})
    (line,) = Chart(table, [Line("x", "y", stretch="part")]).mpl().axes[0].get_lines()
    np.testing.assert_array_equal(line.get_xdata(), [0, 3, np.nan, 1, 2])
    np.testing.assert_array_equal(line.get_ydata(), [0, 0, np.nan, 1, 1])
