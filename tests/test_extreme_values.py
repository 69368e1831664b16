"""Values near the limits of float64 in table cells and figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hostile import LORA, Q, factors, outcome, sign, trained, write

from lorascope import plots
from lorascope.charts.chart import Chart
from lorascope.charts.marks import Axis, Bar, Heat, Line
from lorascope.charts.scales import to_floats
from lorascope.diagnosis.layer_strips import BLOCKS, DIGITS, _glyph
from lorascope.files import text_layout
from lorascope.pages.table_cells import format_value
from lorascope.runs.loading import load

VALUES = (1e308, np.inf, -0.0, 5e-324, np.nan, 1.7e308)
COLUMNS = {
    "ends": [-1.7e308, 1.7e308, 1e300, 5e-324],
    "same": [1e308] * 4,
    "infinite": [np.inf, -np.inf, np.inf, np.inf],
    "wide": [1e-200, 1e200, 1.0, 5e-324],
    "tiny": [5e-324, -0.0, 0.0, 1e-320],
}


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize(
    "cell",
    [
        text_layout.format_norm,
        text_layout.format_percent,
        text_layout.format_number,
        text_layout.format_whole_number,
        text_layout.format_ratio,
        format_value,
    ],
)
def test_cells_of_extreme_values_are_short(cell, value) -> None:
    assert 1 <= len(cell(float(value))) <= 10


@pytest.mark.parametrize("largest", [5e-324, 1.0, 1e308])
def test_glyph_of_a_norm_is_one_character(largest: float) -> None:
    for scale in (DIGITS, BLOCKS):
        assert _glyph(largest, largest, scale) == scale[-1]
        assert {_glyph(float(value), largest, scale) for value in (np.inf, np.nan)} == {"!"}
        assert _glyph(0.0, largest, scale) == scale[0]


def test_to_floats_replaces_values_that_cannot_be_drawn() -> None:
    found = to_floats(pd.Series([1e308, -1e308, np.inf, 1e200, 1e-200, 5e-324, -5e-324, -2.0]))
    np.testing.assert_array_equal(found, [np.nan, np.nan, np.nan, 1e200, 1e-200, 0.0, 0.0, -2.0])


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", COLUMNS.values(), ids=COLUMNS)
def test_both_renderers_draw_extreme_values(values: list[float], log: bool) -> None:
    data = pd.DataFrame({"x": range(4), "v": values, "c": list("aabb"), "r": list("pqpq")})
    lines = Chart(data, [Line("x", "v", "c"), Bar("x", "v")], y=Axis(label="y", log=log))
    for chart in (lines, Chart(data, [Heat("r", "c", "v", label="l", text=".2g")])):
        chart.mpl().draw_without_rendering()
        assert "Infinity" not in chart.plotly().to_json()


def extreme_adapter(root: Path, value: float) -> Path:
    """Write a float64 LoRA adapter of which one entry of one factor is a value."""
    tensors = {name: array.astype("f8") for name, array in factors("A", "B").items()}
    tensors[f"{Q}.lora_B.weight"][0, 0] = value
    return write(root / "adapter", LORA, tensors)


def extreme_run(root: Path, value: float) -> Path:
    """Write a run of which every second recorded value is a value."""
    folder = trained(root / "run")
    table = pd.read_parquet(folder / "records.parquet")
    table.loc[::2, "value"] = value
    table.to_parquet(folder / "records.parquet", index=False)
    sign(folder)
    return folder


@pytest.mark.parametrize(
    "value", [1e308, *(pytest.param(value, marks=pytest.mark.slow) for value in (-1e308, 1e-308, np.inf, np.nan))]
)
@pytest.mark.parametrize("made", [extreme_adapter, extreme_run])
def test_every_figure_draws_extreme_values_or_names_what_it_needs(made, value: float, tmp_path: Path) -> None:
    run = load(made(tmp_path, value))
    names = plots.available(run).query("drawable and runs == 1")["figure"]
    assert "update_norm_heat" in set(names)

    def draw(name: str) -> None:
        chart = getattr(plots, name)(run)
        chart.mpl().draw_without_rendering()
        assert "Infinity" not in chart.plotly().to_json()

    reasons = {name: outcome(lambda name=name: draw(name), seconds=30) for name in names}
    # The run has no ranks, and no update is known where every recorded norm is NaN.
    reasons.pop("importance", None)
    assert {name: reason for name, reason in reasons.items() if reason and f"{name} needs" not in reason} == {}


LONG = "layers.0." + "module." * 700 + "q"


def test_charts_with_long_names_leave_room_for_the_data(tmp_path) -> None:
    data = pd.DataFrame({"v": [1.0, 2.0], "c": [LONG, "b" * 80], "r": ["a" * 80, LONG]})
    for number, mark in enumerate([Bar("r", "v"), Heat("v", "c", "v", label="l"), Line("v", "v", "c")]):
        chart = Chart(data, [mark])
        chart.save(tmp_path / f"{number}.html")
        figure = chart.mpl(width="page")
        figure.draw_without_rendering()
        ax = figure.axes[0].get_window_extent().transformed(figure.transFigure.inverted())
        assert min(ax.width, ax.height) > 0.15
