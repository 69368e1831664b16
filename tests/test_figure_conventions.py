"""Conventions of all figures: few seeds, lines over layers, color limits, printed numbers, and accuracies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from planted import plant, profile
from scipy import stats

from lorascope import plots
from lorascope.analysis.seed_intervals import band, seed_cells
from lorascope.charts.chart import Chart, Panels, wrap
from lorascope.charts.figure_plan import plan_figure
from lorascope.charts.geometry import Area, Curve
from lorascope.charts.marks import Axis, Band, Bar, Heat, Line, Point, Rule
from lorascope.charts.stored_chart import pack, unpack
from lorascope.charts.theme import theme
from lorascope.files.printable import number_text
from lorascope.plots.builders import block_stretches, dots
from lorascope.runs.run import Run

PLACES = ["embed", "0", "1", "2", "norm", "head"]


def plan(chart: Any) -> Any:
    return plan_figure(chart, theme("light"))


def stretches(values: Any) -> list[int]:
    """Return the lengths of the stretches of finite values."""
    runs = np.split(values, np.flatnonzero(np.isnan(values)))
    return [count for run in runs if (count := int(np.isfinite(run).sum()))]


# Few seeds


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_fewer_than_three_seeds_have_no_interval(seeds: int) -> None:
    table = pd.DataFrame({"at": "a", "value": [1.0, 4.0, 2.0][:seeds]})
    (cell,) = seed_cells(table, ["at"]).to_dict("records")
    assert cell["value"] == pytest.approx(table["value"].mean())
    two = {1: (np.nan, np.nan), 2: (1.0, 4.0), 3: (np.nan, np.nan)}[seeds]
    np.testing.assert_equal((cell["smaller"], cell["larger"]), two)
    interval = (np.nan, np.nan)
    if seeds == 3:
        interval = stats.t.interval(0.95, 2, 7 / 3, stats.sem([1.0, 4.0, 2.0]))
    np.testing.assert_allclose((cell["low"], cell["high"]), interval)
    assert list(band(table, ["at"])) == ["at", "value", "low", "high", "n"]


def test_cells_of_different_numbers_of_seeds_keep_their_own_seeds() -> None:
    table = pd.DataFrame({"at": [*"babaab"], "value": [9.0, 1.0, 7.0, 2.0, 3.0, np.nan]})
    cells = seed_cells(table, ["at"]).set_index("at")
    assert cells.index.tolist() == ["b", "a"]
    assert cells.loc["b", ["smaller", "larger"]].tolist() == [7.0, 9.0]
    assert cells.loc["a", "n"] == 3
    assert cells.loc["a", "low"] < 1 < 3 < cells.loc["a", "high"]


def test_two_seeds_are_hollow_dots_without_error_bars() -> None:
    cells = seed_cells(pd.DataFrame({"value": [1.0, 3.0], "recipe": "a"}), ["recipe"])
    smaller, larger, mean = dots(cells, "value", "recipe")
    assert [(mark.x, mark.hollow, mark.low) for mark in (smaller, larger, mean)] == [
        ("smaller", True, None), ("larger", True, None), ("value", False, None)
    ]  # fmt: skip
    drawn = Chart(cells, [smaller, larger, mean])
    (first, *_) = plan(drawn).panels[0].shapes()
    assert first.symbol == "circle-open"
    assert first.x.tolist() == [1.0]
    collections = drawn.mpl().axes[0].collections
    assert {tuple(c.get_facecolor()[0]) == (1, 1, 1, 1) for c in collections[:2]} == {True}
    assert [trace.marker.symbol for trace in drawn.plotly().data[:3]] == ["circle-open", "circle-open", "circle"]


def test_three_seeds_have_error_bars_and_no_hollow_dots() -> None:
    cells = seed_cells(pd.DataFrame({"value": [1.0, 3.0, 2.0], "recipe": "a"}), ["recipe"])
    (mean,) = dots(cells, "value", "recipe")
    assert (mean.low, mean.high, mean.hollow) == ("low", "high", False)


@pytest.mark.parametrize(("seeds", "text"), [(1, "so no interval"), (2, "hollow dots: both seeds"), (3, "t-interval")])
def test_captions_say_how_seeds_are_shown(write: Any, seeds: int, text: str) -> None:
    runs = [write(f"s{seed}", profile(1, 3 + seed, 4), seed=seed) for seed in range(seeds)]
    chart = plots.update_norm(runs)
    assert text in chart.caption
    assert ("t-interval" in chart.caption) == (seeds == 3)
    assert bool(chart.marks_of(Band)) == (seeds == 3)
    assert sum(point.hollow for point in chart.marks_of(Point)) == (2 if seeds == 2 else 0)


# Lines over layers


def test_stretches_are_blocks_of_one_stack_and_each_other_place() -> None:
    places = pd.Series(["embed", "encoder 0", "encoder 1", "decoder 0", "head"])
    found = block_stretches(places)
    assert found[1] == found[2]
    assert found.nunique() == 4
    assert block_stretches(pd.Series(PLACES)).nunique() == 4


def test_lines_join_blocks_only() -> None:
    cells = pd.DataFrame({"place": PLACES, "value": np.arange(6.0), "low": 0.0, "high": 9.0})
    cells["stretch"] = block_stretches(cells["place"])
    marks = [Band("place", "low", "high", stretch="stretch"), Line("place", "value", stretch="stretch")]
    chart = Chart(cells, [*marks, Point("place", "value")], x=Axis(order=PLACES))
    area, curve, points = plan(chart).panels[0].shapes()
    assert isinstance(area, Area)
    assert isinstance(curve, Curve)
    assert stretches(curve.y) == stretches(area.low) == [1, 3, 1, 1]
    assert points.y.tolist() == list(range(6))
    (line,) = chart.mpl().axes[0].lines
    assert stretches(np.asarray(line.get_ydata(), float)) == [1, 3, 1, 1]


def test_profiles_of_layers_have_gaps_around_blocks(write: Any) -> None:
    chart = plots.update_norm(write("a", profile(1, 3, 4)))
    curve = next(shape for shape in plan(chart).panels[0].shapes() if isinstance(shape, Curve))
    assert stretches(curve.y) == [1, 2]  # embed, two blocks


def test_marks_with_stretches_are_stored_and_read_again() -> None:
    cells = pd.DataFrame({"x": [0, 1], "y": [1.0, 2.0], "part": ["a", "b"]})
    chart = Chart(cells, [Line("x", "y", stretch="part"), Point("x", "y", hollow=True)])
    again = unpack(*pack(Panels(((chart,),), title="Heads")))
    assert again.title == "Heads"
    assert again.panels[0].marks == chart.marks


# Color limits


def heat(values: Any, **settings: Any) -> Chart:
    cells = pd.DataFrame({"x": np.arange(len(values)), "y": "a", "v": values})
    return Chart(cells, [Heat("x", "y", "v", "norm", **settings)])


def test_one_outlier_does_not_take_the_color_scale() -> None:
    values = [*np.linspace(1, 2, 39), 100.0]
    (ramp,) = plan(heat(values)).ramps
    assert ramp.limits == (1.0, 2.0)
    assert ramp.beyond == "max"
    assert ramp.label == "norm (values up to 100)"
    (low,) = plan(heat([-v for v in values])).ramps
    assert (low.limits, low.beyond, low.label) == ((-2.0, -1.0), "min", "norm (values down to −100)")
    (both,) = plan(heat([-1.5, *values], limits=(0, 2))).ramps
    assert (both.beyond, both.label) == ("both", "norm (−1.5 to 100)")
    drawn = heat(values).mpl()
    bar = drawn.axes[-1]._colorbar
    assert bar.extend == "max"
    assert bar.ax.get_ylabel().replace("\n", " ") == "norm (values up to 100)"


@pytest.mark.parametrize(
    "values",
    [
        np.linspace(0, 1, 40),
        [*np.zeros(30), *np.full(10, 9.0)],  # a quarter is not a few
        [*np.zeros(39), 1.0],  # without a spread, nothing is an outlier
        np.random.default_rng(0).normal(size=400),
        [1.0, 2.0, 50.0],
    ],
)
def test_values_that_share_the_scale_are_within_it(values: Any) -> None:
    (ramp,) = plan(heat(values)).ramps
    assert ramp.limits == (min(values), max(values))
    assert (ramp.beyond, ramp.label) == ("neither", "norm")


def test_diverging_limits_ignore_an_outlier_and_stay_centered() -> None:
    values = [*np.linspace(-1, 1, 39), -50.0]
    (ramp,) = plan(heat(values, scale="diverging")).ramps
    assert ramp.limits == (-1.0, 1.0)
    assert ramp.beyond == "min"


def test_one_end_of_the_scale_can_be_given() -> None:
    (ramp,) = plan(heat(np.linspace(1, 2, 40), limits=(0, None))).ramps
    assert ramp.limits == (0.0, 2.0)
    (given,) = plan(heat([0.0, 0.5, 3.0], limits=(0, 1))).ramps
    assert (given.limits, given.beyond) == ((0.0, 1.0), "max")


# Numbers


@pytest.mark.parametrize(
    ("number", "spec", "text"),
    [(-0.001, ".2f", "0.00"), (-0.0, ".1f", "0.0"), (-0.004, "+.2f", "+0.00"), (-0.06, ".1f", "-0.1"), (3, ".4g", "3")],
)
def test_numbers_that_round_to_zero_have_no_minus_sign(number: float, spec: str, text: str) -> None:
    assert number_text(number, spec) == text


def test_cells_print_the_minus_sign_of_the_ticks() -> None:
    chart = heat([-1.0, 0.5], text=".1f", scale="diverging")
    (cells,) = plan(chart).panels[0].shapes()
    assert list(cells.texts.values()) == ["−1.0", "0.5"]
    bar = chart.mpl().axes[-1]
    assert "−1.0" in [label.get_text() for label in bar.get_yticklabels()]


def test_cells_print_no_negative_zero() -> None:
    chart = heat([-0.001, 0.5], text=".2f")
    (cells,) = plan(chart).panels[0].shapes()
    assert list(cells.texts.values()) == ["0.00", "0.50"]
    assert "0.00" in {text.get_text() for text in chart.mpl().axes[0].texts}
    assert "−0.00" not in str(chart.plotly().data[0].text)


# Titles


def test_panels_have_the_title_of_their_quantity_above_those_of_recipes(write: Any) -> None:
    runs = {"one": write("a", profile(1, 3, 4)), "two": write("b", profile(2, 6, 4))}
    panels = plots.update_norm_heat(runs)
    # The sums over blocks are 10.5 and 15.
    assert panels.title == "Update by block and role: largest with two, 1.4 times that with one"
    assert [chart.title for chart in panels.panels] == ["one", "two"]
    assert panels.panels[0].caption.startswith("m on t")
    drawn = panels.mpl()
    assert drawn.get_suptitle() == panels.title
    assert [ax.get_title("left") for ax in drawn.axes[:2]] == ["one", "two"]
    assert panels.plotly().layout.title.text == panels.title
    assert panels.mpl(title="Mine").get_suptitle() == "Mine"
    for same in (runs["one"], {"one": runs["one"], "copy": write("c", profile(1, 3, 4))}):
        chart = plots.update_norm_heat(same)
        assert (chart.title or chart.panels[0].title).startswith("Update by block and role")
        assert "largest" not in chart.title
    assert wrap([Chart(panels.panels[0].data, [])], 1, "Quantity").title == "Quantity"


def test_legend_shows_bands_as_faint_as_they_are() -> None:
    cells = pd.DataFrame({"x": [0, 1] * 2, "low": 0.0, "high": 1.0, "phase": ["a", "a", "b", "b"]})
    chart = Chart(cells, [Band("x", "low", "high", "phase")])
    figure = chart.mpl()
    drawn, sample = figure.axes[0].collections[0], figure.legends[0].legend_handles[0]
    assert tuple(sample.get_facecolor()) == tuple(drawn.get_facecolor()[0])
    band, *_, in_legend, _ = chart.plotly().data
    assert in_legend.marker.color == band.fillcolor


# Accuracies


def scored(tmp_path: Any, scores: dict[str, list[float]]) -> dict[str, list[Run]]:
    runs = {}
    for label, of_label in scores.items():
        runs[label] = [
            plant(tmp_path, f"{label}{seed}", {("test_metric", ""): {9: score}}, label, seed)
            for seed, score in enumerate(of_label)
        ]
    return runs


def test_ablations_are_sorted_dots_with_paired_differences(tmp_path: Any) -> None:
    runs = scored(
        tmp_path, {"full method": [0.90, 0.92, 0.91], "without": [0.93, 0.96, 0.93], "same": [0.9, 0.92, 0.91]}
    )
    metric, paired = plots.ablations(runs).panels
    for chart in (metric, paired):
        assert not chart.marks_of(Bar)
        assert chart.y.order == ("without", "full method", "same")
    assert metric.x.limits is None
    low, high = plan(metric).panels[0].x.limits
    assert low > 0.8
    assert high < 1.05
    assert isinstance(paired.marks[0], Rule)
    difference = paired.data.set_index("recipe")
    values = np.array([0.03, 0.04, 0.02])
    assert difference.loc["without", "value"] == pytest.approx(0.03)
    interval = stats.t.interval(0.95, 2, 0.03, stats.sem(values))
    assert difference.loc["without", ["low", "high"]].tolist() == pytest.approx(interval)
    assert difference.loc["same", ["value", "low", "high"]].tolist() == pytest.approx([0, 0, 0])
    assert "full method" not in difference.index
    assert paired.x.label.endswith("− full method")


def test_ablations_by_perplexity_have_the_lowest_on_top_and_state_it(tmp_path: Any) -> None:
    runs = []
    for label, score in {"worst": 30.0, "best": 10.0, "middle": 20.0}.items():
        test = {"name": "perplexity", "metric": score, "loss": score}
        runs.append(plant(tmp_path, label, {("test_metric", ""): {9: score}}, label, test=test))
    drawn: Any = plots.ablations(runs)
    assert drawn.panels[0].y.order == ("best", "middle", "worst")
    assert drawn.title == "Test perplexity (lower is better)"


def test_recipes_of_other_seeds_have_no_paired_difference(tmp_path: Any) -> None:
    runs = scored(tmp_path, {"method": [0.9, 0.8], "one seed": [0.7]})
    chart = plots.ablations(runs)
    assert isinstance(chart, Chart)
    assert chart.data["recipe"].tolist() == ["method", "one seed"]


def test_training_curves_show_the_spread_of_seeds_at_the_last_step_only(write: Any) -> None:
    def runs(count: int) -> list[Run]:
        losses = {step: 1.0 / step for step in range(1, 9)}
        return [
            write(f"{count}{seed}", {("loss", ""): {step: seed + loss for step, loss in losses.items()}}, seed=seed)
            for seed in range(count)
        ]

    for count in (2, 3):
        chart = plots.training_curves(runs(count))
        assert not chart.marks_of(Band)
        assert {step for point in chart.marks_of(Point) for step in chart.table(point)["step"]} == {8}
        assert [point.low for point in chart.marks_of(Point)] == ([None, None, None] if count == 2 else ["low"])


def test_names_of_words_are_turned_before_one_is_left_out() -> None:
    places = ["embed", "pos_embed", *map(str, range(6)), "norm", "pooler", "head"]
    cells = pd.DataFrame({"place": places, "value": range(11)})
    drawn = Chart(cells, [Point("place", "value")], x=Axis(order=places)).mpl(width="column")
    labels = drawn.axes[0].get_xticklabels()
    assert [label.get_text() for label in labels] == places


def test_numbers_without_room_for_their_names_keep_their_ticks() -> None:
    places = ["embed", *map(str, range(30)), "head"]
    cells = pd.DataFrame({"place": places, "value": range(32)})
    (ax,) = Chart(cells, [Point("place", "value")], x=Axis(order=places)).mpl(width="column").axes
    named = list(ax.get_xticks())
    assert {0, 31} < {*named}
    assert len(named) < 32
    assert sorted([*named, *ax.get_xticks(minor=True)]) == list(range(32))
