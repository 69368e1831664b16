"""Figures saved as web pages: the script that they share, and their layout on a phone."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
from playwright.sync_api import sync_playwright
from plotly.offline import get_plotlyjs, get_plotlyjs_version
from test_explore import BROWSER, PATIENCE

from lorascope.charts.chart import Chart, Drawable, set_side_by_side
from lorascope.charts.marks import Axis, Bar, Heat, Line

SCRIPT = f"plotly-{get_plotlyjs_version()}.min.js"
LONG = "a recipe whose name has many settings, rank 8"


def lines() -> Chart:
    names = [f"{LONG}, seed {seed}" for seed in range(6)]
    data = pd.DataFrame([(x, seed + x**0.5, name) for seed, name in enumerate(names) for x in range(20)])
    data.columns = ["step", "norm", "recipe"]
    axes = {"x": Axis(label="step"), "y": Axis(label="norm of the update ‖ΔW‖")}
    return Chart(data, [Line("step", "norm", "recipe")], title=f"A long title: {LONG}", caption=LONG * 5, **axes)


def framed() -> Chart:
    data = pd.DataFrame([(x, step * x, step) for step in range(5) for x in range(4)], columns=["x", "y", "step"])
    return Chart(data, [Bar("x", "y")], frame="step", title="Bars", caption="Made up.")


def panels() -> Drawable:
    data = pd.DataFrame({"x": list("abcdef"), "y": [f"model.layers.{n}.q_proj" for n in range(6)], "v": range(6)})
    heat = Chart(data, [Heat("x", "y", "v", "rank", text=".0f")], title="cells")
    return set_side_by_side(lines(), heat, framed())


CHARTS = {"lines": lines, "frames": framed, "panels": panels}


@pytest.mark.parametrize(("include_js", "source"), [("inline", None), ("file", SCRIPT), ("cdn", "https://cdn.plot.ly")])
def test_pages_contain_share_or_load_the_script(include_js: str, source: str | None, tmp_path: Path) -> None:
    first, second = (lines().save(tmp_path / f"{name}.html", include_js=include_js) for name in "ab")
    text = first.read_text(encoding="utf-8")
    sources = re.findall(r'<script[^>]* src="([^"]+)"', text)
    assert [found.startswith(source) for found in sources] == [True] * (source is not None)
    assert (first.stat().st_size > 4e6) == (include_js == "inline")
    assert {file.name for file in tmp_path.iterdir()} == {"a.html", "b.html", *[SCRIPT] * (include_js == "file")}
    assert second.read_bytes() == first.read_bytes()
    if include_js == "file":
        assert (tmp_path / SCRIPT).read_text(encoding="utf-8") == get_plotlyjs()


def test_unknown_way_to_include_the_script_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="include_js must be one of 'inline', 'file', 'cdn', got 'network'"):
        lines().save(tmp_path / "a.html", include_js="network")
    assert not list(tmp_path.iterdir())


# Legend, titles, caption, tick labels, and the slider with its buttons.
TEXTS = ".legend, .gtitle, .annotation, .xtitle, .ytitle, .xtick, .ytick, .slider-container, .updatemenu-button"
BOXES = """selector => [...document.querySelectorAll(selector)].map(item => {
  const {left, top, right, bottom} = item.getBoundingClientRect();
  return [left, top, right, bottom];
})"""


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH: apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_saved_page_fits_the_screen(width: int, tmp_path: Path) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])  # required for root
        page = browser.new_page(viewport={"width": width, "height": 844}, is_mobile=width == 390)
        page.set_default_timeout(PATIENCE)
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        for name, make in CHARTS.items():
            page.goto(make().save(tmp_path / f"{name}.html", include_js="file").as_uri())
            page.locator(".nsewdrag").first.wait_for()
            page.wait_for_timeout(500)
            page.screenshot(path=tmp_path / f"{name}-{width}.png", full_page=True)
            assert page.evaluate("document.documentElement.scrollWidth") == width
            plots = page.evaluate(BOXES, ".nsewdrag")
            assert len(plots) == len(make().panels)
            texts = page.evaluate(BOXES, TEXTS)
            for left, top, right, bottom in texts:
                assert left >= -1
                assert right <= width + 1
                for x0, y0, x1, y1 in plots:
                    is_beside = right <= x0 + 1 or x1 <= left + 1
                    assert is_beside or bottom <= y0 + 1 or y1 <= top + 1
            is_stacked = len({round(x0) for x0, *_ in plots}) == 1
            assert is_stacked or width > 390
        assert errors == []
        browser.close()
