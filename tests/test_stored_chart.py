"""Charts survive JSON and Parquet: the charts that come back draw the same figures and have the same data."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from planted import low_rank, plant, profile

from lorascope import plots
from lorascope.charts import plotly_backend
from lorascope.charts.chart import Chart, Drawable, Panels, set_side_by_side
from lorascope.charts.marks import Axis, Band, Bar, Heat, Line, Point, Rule, Text
from lorascope.charts.stored_chart import pack, unpack


def through_files(drawable: Drawable) -> Drawable:
    packed, tables = pack(drawable)
    stored = [io.BytesIO() for _ in tables]
    for table, file in zip(tables, stored, strict=True):
        table.to_parquet(file)
    return unpack(json.loads(json.dumps(packed)), [pd.read_parquet(file) for file in stored])


def lines() -> Chart:
    steps = np.arange(1, 9, dtype=np.int32)
    data = pd.DataFrame({"step": steps, "y": 10.0**steps, "low": 0.5, "high": 2.0, "who": list("abababab")})
    data["y"] = data["y"].where(data["step"] != 4)
    return Chart(
        data,
        [
            Band("step", "low", "high", "who"),
            Line("step", "y", "who", dash="who"),
            Rule(y=np.float32(0.25), label="start"),
            Text("step", "y", "who", data=pd.DataFrame({"step": [np.int64(2)], "y": [3.0], "who": ["here"]})),
        ],
        title="Lines",
        x=Axis(label="step", ticks={1: "one", np.int64(8): "eight"}),
        y=Axis(label="y", log=True, limits=(0.1, None)),
        caption="One seed.",
        color_label="who",
        colors=["b", "a"],
        meta={"runs": ("one",), "count": np.int64(2)},
    )


def heat() -> Chart:
    data = pd.DataFrame(
        {"layer": ["0", "1"], "role": pd.Categorical(["q", "v"]), "value": [1.0, np.nan], "w": ["", "x"]}
    )
    marks = [Heat("layer", "role", "value", "norm", ".2f", "diverging", (-1, 1), "w")]
    return Chart(data, marks, x=Axis(order=["1", "0", "2"]), y=Axis(order=("v", "q")))


def frames() -> Chart:
    data = pd.DataFrame({"role": list("qvqv"), "norm": [1.0, 2, 3, 4], "low": 0.5, "high": 5, "step": [0, 0, 9, 9]})
    return Chart(
        data, [Bar("role", "norm", "role", "stack", "low", "high"), Point("role", "norm", size="low")], frame="step"
    )


PANELS = [lambda: set_side_by_side(lines(), heat()), lambda: Panels(((lines(), heat()), (heat(),)), columns=2)]


@pytest.mark.parametrize("make", [lines, heat, frames, *PANELS])
def test_chart_from_files_draws_the_same_figure(make):
    before, after = make(), through_files(make())
    assert type(after) is type(before)
    if isinstance(before, Panels):
        assert after.columns == max(before.columns, 1)
    assert plotly_backend.to_plotly(after).to_json() == plotly_backend.to_plotly(before).to_json()
    for one, other in zip(before.panels, after.panels, strict=True):
        assert one.caption == other.caption
        for (kind, table), (other_kind, found) in zip(one.tables(), other.tables(), strict=True):
            assert kind == other_kind
            pd.testing.assert_frame_equal(table, found)


@pytest.mark.parametrize("name", ["norm_over_steps", "spectrum", "update_norm_heat"])
def test_figure_of_a_run_from_files_is_the_same(name: str, tmp_path: Path):
    runs = [
        plant(tmp_path, f"r{seed}", profile(1.0 + seed, 3, 4), "LoRA", seed, {"h.0.q": low_rank(3.0, 1.0)})
        for seed in range(2)
    ]
    drawn = getattr(plots, name)(runs)
    assert plotly_backend.to_plotly(through_files(drawn)).to_json() == plotly_backend.to_plotly(drawn).to_json()
