"""``explore`` with a dial: the numbers at every stop of the slider, its curve, and its page without Python."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from planted import plant
from playwright.sync_api import Page, expect
from test_explore import BROWSER, VALUES, page, run
from test_explore_page import open_static
from traitlets import TraitError

import lorascope as ls
from lorascope.analysis.dial import Dial, MeasuredRows, RowValues, dial_of_rows
from lorascope.plots.dial_slider import DialSlider
from lorascope.plots.explore import Explorer
from lorascope.runs.receipt import Receipt
from lorascope.runs.run import Run

__all__ = ["page", "run"]  # fixtures

SCALES = (0.0, 0.3, 0.5, 1.0, 1.25)  # 0.3 is a multiple of 0.05 only after rounding
# Task loss and distance from the base; the distance of part a falls at the end.
CURVES = {"whole": ((1.3, 1.1, 1.02, 1.0, 1.01), (0.0, 0.1, 0.2, 0.5, 0.8))}
CURVES["a"] = ((1.2, 1.0, 0.97, 1.0, 1.2), (0.1, 0.15, 0.2, 0.5, 0.45))


def plant_dial(id: str = "tiny", scales: tuple[float, ...] = SCALES) -> Dial:
    """Dial of the whole update and a part, with rows around planted curves."""
    noise = 1 + np.random.default_rng(3).normal(0, 1e-2, 50)
    measured = []
    for part, (task, keep) in CURVES.items():
        for scale, learn, forget in zip(SCALES, task, keep, strict=True):
            if scale in scales:
                measured.append(RowValues(part, scale, "task", learn * noise))
                measured.append(RowValues(part, scale, "keep", forget * noise[::-1]))
    rows = {axis: MeasuredRows("nats", np.ones(50), np.arange(50)) for axis in ("task", "keep")}
    parts = pd.DataFrame({"part": [*CURVES], "module": None, "layer": None, "role": None, "component": None})
    parts = parts.assign(energy=1.0, control=False, learn_share=0.0, forget_share=0.0, learn_slope=0.0)
    receipt = Receipt(run=id, base="b", rows={})
    return dial_of_rows("planted", measured, rows, parts.assign(forget_slope=0.0), 0.05, receipt)


def numbers_at(explorer: Explorer, part: str) -> dict[float, list[list[str]]]:
    """Return the cells that the page shows, by scale."""
    return {stop["scale"]: stop["cells"] for stop in explorer.curves[part]["stops"]}


@pytest.mark.parametrize("part", list(CURVES))
def test_numbers_at_measured_scales_equal_the_table(run: Run, part: str) -> None:
    measured = plant_dial()
    shown = numbers_at(ls.explore(run, dial=measured), part)
    curve = measured.curve(part).set_index(["scale", "axis"])
    for scale in SCALES:
        expected = []
        for axis, name in (("task", "task loss (nats)"), ("keep", "distance from the base (nats)")):
            row = curve.loc[scale, axis]
            interval = f"{row['low']:.6g} to {row['high']:.6g}"
            expected.append([name, f"{row['value']:.6g}", f"{row['change']:.6g}", interval])
        assert shown[scale] == expected
    exact = DialSlider(measured).numbers(part)
    exact = exact[exact["scale"].isin(SCALES)].set_index(["scale", "axis"])
    pd.testing.assert_frame_equal(exact, curve.loc[exact.index, list(exact)], check_exact=True)


@pytest.mark.parametrize("part", list(CURVES))
def test_numbers_between_measured_scales_are_interpolated_without_interval(run: Run, part: str) -> None:
    measured = plant_dial()
    explorer = ls.explore(run, dial=measured)
    curve = measured.curve(part)
    stops = explorer.options["scale"]
    assert stops == sorted({*SCALES, *np.round(np.arange(0, 1.25, 0.05), 2).tolist()})
    for number, axis in enumerate(("task", "keep")):
        rows = curve[curve["axis"] == axis]
        values, changes = (np.interp(stops, rows["scale"], rows[name]) for name in ("value", "change"))
        shown = [cells[number] for cells in numbers_at(explorer, part).values()]
        assert [cells[1:3] for cells in shown] == [
            [f"{value:.6g}", f"{change:.6g}"] for value, change in zip(values, changes, strict=True)
        ]
        assert [cells[3] == "interpolated" for cells in shown] == [stop not in SCALES for stop in stops]
        positions = [stop["xy"[axis == "task"]] for stop in explorer.curves[part]["stops"]]
        np.testing.assert_array_equal(positions, values)


def test_ticks_are_the_measured_scales_with_the_best_of_the_summary(run: Run) -> None:
    measured = plant_dial()
    stops = ls.explore(run, dial=measured).curves["a"]["stops"]
    best = measured.summary().set_index("part").loc["a", "best_scale"]
    assert best == 0.3
    assert [stop["tick"] for stop in stops if stop["tick"]] == ["0", "0.3\nbest", "0.5", "1", "1.25"]
    assert [stop["name"] for stop in stops if stop["scale"] in (0.3, 0.4)] == [
        "0.3, measured, best",
        "0.4, interpolated between 0.3 and 0.5",
    ]


def test_slider_ends_at_the_last_scale_of_all_curves(run: Run) -> None:
    measured = plant_dial()
    table = measured.table[(measured.table["part"] != "a") | (measured.table["scale"] <= 1)]
    measured = Dial(measured.label, table, measured.parts, 0.1, 0.1, measured.receipt)
    assert ls.explore(run, dial=measured).options["scale"][-1] == 1


def test_view_of_the_dial_draws_the_curve_in_order_of_the_scale(run: Run, tmp_path: Path) -> None:
    measured = plant_dial()
    explorer = ls.explore(run, dial=measured)
    rows = explorer.rows
    explorer.view, explorer.part, explorer.scale = "dial", "a", 0.35
    line = explorer.chart.panels[0].marks[0].data
    assert line is not None
    curve = measured.curve("a").pivot(index="scale", columns="axis", values="value")
    for number, (_, segment) in enumerate(line.groupby("segment")):
        np.testing.assert_array_equal(segment[["keep", "task"]], curve[["keep", "task"]].iloc[number : number + 2])
    assert explorer.chart.save(tmp_path / "dial.pdf").stat().st_size > 1000
    explorer.view = "chart"
    pd.testing.assert_frame_equal(explorer.rows, rows)
    assert explorer.chart.title.startswith("update norm")


def test_dial_of_another_run_raises_one_line(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^dial must be of run tiny, got one of run other$"):
        ls.explore(run, dial=plant_dial("other"))
    second = plant(tmp_path, "second", VALUES, seed=1)
    assert ls.explore([run, second], dial=plant_dial("second")).options["part"] == ["whole", "a"]


def test_dial_without_curve_raises_one_line(run: Run) -> None:
    with pytest.raises(ValueError, match=r"^dial must have a curve, got scales 0, 1: measure it with scales="):
        ls.explore(run, dial=plant_dial(scales=(0.0, 1.0)))


def test_explorer_without_dial_offers_none(run: Run) -> None:
    explorer = ls.explore(run)
    with pytest.raises(TraitError, match=r"^view must be one of 'chart', 'multiples', got 'dial'$"):
        explorer.view = "dial"
    with pytest.raises(TraitError, match=r"^scale requires a dial: explore\(run, dial=ls.dial\(run, \.\.\.\)\)$"):
        explorer.scale = 0.5
    assert explorer.curves == {}


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH: apt-get install chromium")
def test_slider_moves_the_marker_without_an_answer_of_python(run: Run, tmp_path: Path, page: Page) -> None:
    explorer = ls.explore(run, dial=plant_dial())
    open_static(page, explorer, tmp_path / "page.html")
    page.evaluate("isSlow = true")
    page.get_by_role("tab", name="Dial").click()
    expect(page.get_by_role("tab", name="Dial")).to_have_attribute("aria-selected", "true")
    slider = page.get_by_role("slider", name="Scale", exact=True)
    expect(slider).to_have_attribute("aria-valuetext", re.compile("^1, measured"))
    page.get_by_label("Part").select_option("a")
    for key in ("Home", *["ArrowRight"] * 7):
        slider.press(key)
    name = "0.35, interpolated between 0.3 and 0.5"
    expect(slider).to_have_attribute("aria-valuetext", name)
    plot = page.get_by_role("img", name=f"Task loss against distance from the base: a, scale {name}", exact=True)
    stop = next(stop for stop in explorer.curves["a"]["stops"] if stop["scale"] == 0.35)
    marked = plot.evaluate("it => [it.data.at(-1).x[0], it.data.at(-1).y[0]]")
    assert marked == [stop["x"], stop["y"]]
    rows = page.get_by_role("table", name=f"a, scale {name}").locator("tbody tr")
    assert [row.locator("th, td").all_inner_texts() for row in rows.all()] == stop["cells"]
    page.set_viewport_size({"width": 390, "height": 900})
    expect(plot.locator(".main-svg").first).to_have_attribute("width", re.compile(r"^3\d\d\b"))
    assert page.locator(".lorascope-explorer").evaluate("it => it.scrollWidth <= it.clientWidth")
    assert page.evaluate("[state.part, state.scale]") == ["a", 0.35]
    page.get_by_role("tab", name="One chart").click()
    expect(page.get_by_label("Quantity")).to_be_visible()
    expect(page.get_by_label("Part")).to_be_hidden()
