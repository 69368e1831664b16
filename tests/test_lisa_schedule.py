"""Figures of LISA's block schedule and the tables they use, compared with planted draws."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from planted import lookup, plant
from scipy import stats

from lorascope import plots
from lorascope.analysis import lisa_schedule
from lorascope.charts.marks import Band
from lorascope.methods import LISA

BLOCKS = ["enc.layer.0", "enc.layer.1", "enc.layer.2"]
PLACES = [{"module": name, "stack": "", "layer": layer, "role": "block"} for layer, name in enumerate(BLOCKS)]


def draws(*chosen: int, every: int = 4, last: int = 9) -> dict:
    """Return records in which one of three blocks trains in each interval of four steps."""
    steps = [1 + every * number for number in range(len(chosen))]
    active = {
        ("active", name): {step: float(block == number) for step, block in zip(steps, chosen, strict=True)}
        for number, name in enumerate(BLOCKS)
    }
    chances = {("draw_probability", name): {0: chance} for name, chance in zip(BLOCKS, (0.5, 0.25, 0.25), strict=True)}
    return active | chances | {("loss", ""): {1: 1.0, last: 0.5}}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Return ``plant`` for the folder of the test, with three blocks."""
    return partial(plant, tmp_path, modules=PLACES, label=LISA(n_active=1).label())


def test_intervals_end_before_the_next_one_or_with_the_run(write):
    table = write("a", draws(2, 0, 2)).table
    rows = lisa_schedule.list_intervals(table)
    assert rows.groupby("interval")[["start", "stop"]].first().to_numpy().tolist() == [[1, 4], [5, 8], [9, 9]]
    assert rows.query("active")["module"].tolist() == [BLOCKS[2], BLOCKS[0], BLOCKS[2]]
    assert len(rows) == 9


def test_visits_count_draws_and_steps(write):
    rows = lisa_schedule.count_visits(write("a", draws(2, 0, 2)).table).set_index("module")
    assert rows.loc[BLOCKS, "intervals"].tolist() == [1, 0, 2]
    assert set(rows["draws"]) == {3}
    assert rows.loc[BLOCKS, "steps"].tolist() == [4, 0, 5]
    assert rows.loc[BLOCKS, "first"].tolist() == [5, pd.NA, 1]
    assert rows.loc[BLOCKS, "frequency"].tolist() == pytest.approx([1 / 3, 0, 2 / 3])
    assert rows.loc[BLOCKS, "expected"].tolist() == [0.5, 0.25, 0.25]


def test_coverage_includes_its_expectation(write):
    rows = lisa_schedule.block_coverage(write("a", draws(2, 0, 2), seed=None).table)
    assert rows["step"].tolist() == [1, 5, 9]
    assert rows["value"].tolist() == [1, 2, 2]
    assert rows["expected"].tolist() == pytest.approx([1, 0.75 + 2 * 0.4375, 0.875 + 2 * (1 - 0.75**3)])
    once = lisa_schedule.block_coverage(write("b", draws(1)).table)
    assert once[["step", "value", "expected"]].to_numpy().tolist() == [[1, 1, 1], [9, 1, 1]]


def test_active_layers_shows_the_fraction_of_runs_and_the_coverage(write):
    runs = [write(f"s{seed}", draws(2, seed, 2), seed=seed) for seed in range(2)]
    (trained, reached), *rest = plots.active_layers(runs).rows()
    assert not rest
    found = lookup(trained, "start", "place")
    assert found["1", "2"] == found["9", "2"] == 1
    assert found["5", "0"] == found["5", "1"] == 0.5
    assert sum(found.values()) == 3
    assert min(found.values()) > 0  # a block that did not train has no dot
    assert trained.marks[0].size == "value"
    assert (trained.x.order, trained.y.order) == (("1", "5", "9"), ("2", "1", "0"))
    assert "2 seeds (0, 1)" in trained.caption
    lines = lookup(reached, "recipe", "step")
    assert [lines["LISA, n_active 1", step] for step in (1, 5, 9)] == [1, 2, 2]
    assert lines["LISA, n_active 1, expected from random draws", 5] == pytest.approx(1.625)


def test_active_layers_with_a_control_has_a_second_row(write, tmp_path):
    panels = plots.active_layers(write("a", draws(2, 0, 2)), control=write("b", draws(1), label="one draw"))
    (top, _), (below, flat) = panels.rows()
    assert (top.title, below.title) == ("LISA, n_active 1: in each interval", "control: one draw: in each interval")
    assert lookup(flat, "recipe", "step")["control: one draw", 9] == 1
    assert panels.save(tmp_path / "figure.png").stat().st_size > 0
    assert panels.plotly().data


def test_active_layers_without_draws_raises(write):
    with pytest.raises(ValueError, match="active_layers needs records of active: train LISA"):
        plots.active_layers(write("a", {("loss", ""): {0: 1.0, 1: 1.0}}))


def test_draw_frequency_includes_the_expected_frequency(write):
    runs = [write(f"s{seed}", draws(2, seed, 2), seed=seed) for seed in range(2)]
    chart = plots.draw_frequency(runs)
    assert lookup(chart, "place") == pytest.approx({"0": 1 / 6, "1": 1 / 6, "2": 2 / 3})
    assert lookup(chart, "place", value="expected") == {"0": 0.5, "1": 0.25, "2": 0.25}
    band = chart.table(chart.marks_of(Band)[0]).set_index("place")
    for place, chance in {"0": 0.5, "1": 0.25, "2": 0.25}.items():
        interval = stats.binom.interval(0.95, 6, chance)  # two runs of three draws
        assert band.loc[place, ["low", "high"]].tolist() == pytest.approx([end / 6 for end in interval])
    panels = plots.draw_frequency(runs, control=write("b", draws(1), label="one draw"))
    assert [chart.title for row in panels.rows() for chart in row] == ["LISA, n_active 1", "control: one draw"]


def test_draw_grid_shows_the_metric_by_blocks_and_steps(write):
    """Blocks and steps come from the draws instead of the settings, because settings can be left at their defaults."""

    def reached(metric: float, values: dict) -> dict:
        return values | {("test_metric", ""): {9: metric}}

    two = {("active", BLOCKS[0]): {1: 1.0, 5: 1.0, 9: 1.0}}
    runs = {
        "4 steps": [write(f"a{seed}", reached(0.7 + 0.1 * seed, draws(2, 0, 2)), seed=seed) for seed in range(3)],
        "once": write("b", reached(0.6, draws(1))),
        "two blocks": write("c", reached(0.9, draws(1, 2, 1) | two)),
    }
    chart = plots.draw_grid(runs)
    assert lookup(chart, "blocks", "steps") == pytest.approx({("1", "4"): 0.8, ("1", "9"): 0.6, ("2", "4"): 0.9})
    assert (chart.x.order, chart.y.order) == (("4", "9"), ("2", "1"))
    words = lookup(chart, "blocks", "steps", value="words")
    assert words == {("1", "4"): "0.800 ± 0.248", ("1", "9"): "0.600", ("2", "4"): "0.900"}
    with pytest.raises(ValueError, match=r"draw_grid.*got once and again for n_active 1 and interval 9"):
        plots.draw_grid({"once": runs["once"], "again": write("d", reached(0.5, draws(0)))})
    given = {"steps": 9, "lr": 1e-4, "batch_size": 16}
    first = write("e", reached(0.6, draws(1)), settings=given)
    for key, value in {"steps": 30, "lr": 1e-3, "batch_size": 4}.items():
        other = write(key, reached(0.7, draws(2, 0, 2)), settings=given | {key: value})
        line = f"n_active and interval, got {key} {given[key]} "
        with pytest.raises(ValueError, match=rf"{line}\(run e\) and {value} \(run {key}\)$"):
            plots.draw_grid({"once": first, "other": other})
    recipes = [{"name": "lisa", "n_active": 1, "interval": interval} for interval in (9, 4)]
    free = [write(f"g{i}", reached(0.6, draws(*(1, 2)[: i + 1])), recipe=recipe) for i, recipe in enumerate(recipes)]
    assert len(plots.draw_grid({"once": free[0], "twice": free[1]}).data) == 2
