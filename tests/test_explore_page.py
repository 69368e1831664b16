"""The page of an explorer in a browser, without a Python process behind it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from planted import plant
from playwright.sync_api import Page
from plotly.offline import get_plotlyjs
from test_explore import BROWSER, page, run

import lorascope as ls
from lorascope.plots.explore import Explorer
from lorascope.runs.run import Run
from lorascope.schema.records import QUANTITIES

__all__ = ["page", "run"]  # fixtures

STATIC_PAGE = """<!doctype html><meta charset="utf-8"><style>{css}</style><div id="widget"></div>
<script>{plotly}</script><script type="module">
globalThis.lorascopePlotly = Promise.resolve();
globalThis.state = {state};
const listeners = [];
const set = (name, value) => {{
  const isNew = JSON.stringify(state[name]) !== JSON.stringify(value);
  state[name] = value;
  if (isNew) for (const listener of listeners) listener();
}};
const on = (event, listener) => event === "change" && listeners.push(listener);
const model = {{ get: (name) => state[name], set, on, save_changes() {{}}, off() {{}}, send() {{}} }};
const source = new Blob([{source}], {{ type: "text/javascript" }});
const widget = await import(URL.createObjectURL(source));
await widget.default.render({{ model, el: document.getElementById("widget") }});
globalThis.isReady = true;
</script>"""
OPACITIES = "plot => [...plot.querySelectorAll('path.point')].map(dot => +getComputedStyle(dot).opacity)"


def open_static(page: Page, explorer: Explorer, file: Path) -> None:
    """Open a page with a widget whose Python side does not answer."""
    names = ("quantity", "layers", "roles", "step", "selection", "options", "symbols", "figure", "listing", "config")
    state = json.dumps({name: explorer.get_state()[name] for name in names})
    texts = {"css": explorer._css, "plotly": get_plotlyjs(), "source": json.dumps(explorer._esm), "state": state}
    file.write_text(STATIC_PAGE.format(**texts), encoding="utf-8")
    page.route("**", lambda route: route.fulfill(path=file, content_type="text/html"))
    page.goto("http://127.0.0.1:1/")
    page.wait_for_function("globalThis.isReady")
    page.locator("path.point").first.wait_for()


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH: apt-get install chromium")
def test_click_before_the_pointer_has_moved_over_a_dot_dims_none(run: Run, tmp_path: Path, page: Page) -> None:
    explorer = ls.explore(run)
    for number in range(3):
        open_static(page, explorer, tmp_path / "page.html")
        plot = page.locator(".js-plotly-plot")
        page.wait_for_timeout(500)  # the chart moves while the page is laid out
        box = plot.locator("path.point").nth(number).bounding_box()
        assert box is not None
        page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.wait_for_timeout(500)
        selected = page.evaluate("state.selection")
        opacities = plot.evaluate(OPACITIES)
        assert opacities.count(1) == (len(selected) or len(opacities))


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH: apt-get install chromium")
def test_quantities_are_a_list_that_scrolls_to_the_chosen_one(tmp_path: Path, page: Page) -> None:
    names = [name for name, quantity in QUANTITIES.items() if quantity.index == "none"]
    explorer = ls.explore(plant(tmp_path, "tiny", {(name, ""): {9: 1.0} for name in names}))
    explorer.quantity = names[-1]
    open_static(page, explorer, tmp_path / "page.html")
    control = page.get_by_label("Quantity")
    assert control.locator("option").count() == len(names) > 20
    assert control.evaluate("it => it.size") == 7
    assert control.evaluate("it => it.scrollHeight > 2 * it.clientHeight && it.scrollTop > 0")
    assert control.evaluate("it => getComputedStyle(it, '::-webkit-scrollbar').width") == "9px"
