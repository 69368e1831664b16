"""The page of an explorer in a browser, without a Python process behind it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from planted import plant
from playwright.sync_api import Page, expect
from plotly.offline import get_plotlyjs
from test_explore import BROWSER, page, run

import lorascope as ls
from lorascope.plots.explore import Explorer
from lorascope.runs.run import Run
from lorascope.schema.records import QUANTITIES

__all__ = ["page", "run"]  # fixtures

STATIC_PAGE = """<!doctype html><meta charset="utf-8"><style>body {{ {look} }} {css}</style><div id="widget"></div>
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
globalThis.receive = (changes) => {{ for (const name in changes) set(name, changes[name]); }};
globalThis.isSlow = false; // whether Python has not answered yet
const save_changes = () => isSlow || set("answered", state.asked);
const model = {{ get: (name) => state[name], set, on, save_changes, off() {{}}, send() {{}} }};
const source = new Blob([{source}], {{ type: "text/javascript" }});
const widget = await import(URL.createObjectURL(source));
await widget.default.render({{ model, el: document.getElementById("widget") }});
globalThis.isReady = true;
</script>"""
OPACITIES = "plot => [...plot.querySelectorAll('path.point')].map(dot => +getComputedStyle(dot).opacity)"


def open_static(page: Page, explorer: Explorer, file: Path, look: str = "") -> None:
    """Open a page with a widget whose Python side does not answer."""
    names = ["quantity", "layers", "roles", "step", "view", "selection", "asked", "answered"]
    names += ["options", "symbols", "figure", "listing", "config", "part", "scale", "curves"]
    state = json.dumps({name: explorer.get_state()[name] for name in names})
    texts = {
        "css": explorer._css,
        "plotly": get_plotlyjs(),
        "source": json.dumps(explorer._esm),
        "state": state,
        "look": look,
    }
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


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH: apt-get install chromium")
def test_keys_pressed_before_an_answer_arrives_are_counted(run: Run, tmp_path: Path, page: Page) -> None:
    explorer = ls.explore(run)
    explorer.quantity = "loss"
    open_static(page, explorer, tmp_path / "page.html")
    slider = page.get_by_role("slider", name="Step")
    page.evaluate("isSlow = true")
    slider.press("ArrowLeft")
    slider.press("ArrowLeft")
    page.evaluate("receive({step: 8, answered: 1})")  # the answer to the first key
    slider.press("ArrowLeft")
    assert page.evaluate("[state.step, state.asked]") == [6, 3]
    page.evaluate("receive({step: 6, answered: 3})")
    assert slider.evaluate("it => it.value") == "5"
    assert page.locator(".lorascope-explorer output").inner_text() == "6"


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH: apt-get install chromium")
def test_click_during_an_update_is_not_lost(run: Run, tmp_path: Path, page: Page) -> None:
    explorer = ls.explore(run)
    open_static(page, explorer, tmp_path / "page.html")
    box = page.locator("tbody input").nth(1).bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 5, box["y"] + 5)
    page.mouse.down()
    page.evaluate("receive({listing: {...state.listing, title: 'update norm'}})")
    page.mouse.up()
    assert page.evaluate("state.selection") == [explorer.listing["labels"][1]]
    expect(page.locator("caption")).to_have_text("update norm")


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH: apt-get install chromium")
def test_tab_shows_small_multiples(run: Run, tmp_path: Path, page: Page) -> None:
    explorer = ls.explore(run)
    open_static(page, explorer, tmp_path / "page.html")
    tab = page.get_by_role("tab", name="Small multiples")
    assert tab.get_attribute("aria-selected") == "false"
    tab.press("Enter")
    assert page.evaluate("state.view") == "multiples"
    explorer.set_state({"view": "multiples"})
    page.evaluate("changes => receive(changes)", {"figure": explorer.figure, "view": "multiples"})
    expect(tab).to_have_attribute("aria-selected", "true")
    expect(page.locator(".js-plotly-plot .cartesianlayer .subplot")).to_have_count(3)


CONTRASTS = """([ground, selector, property]) => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
  const luminance = (...colors) => {
    for (const color of colors) { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); }
    const linear = (share) => (share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4);
    const [red, green, blue] = [...canvas.getImageData(0, 0, 1, 1).data].map((channel) => linear(channel / 255));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  return [...document.querySelectorAll(`.lorascope-explorer :is(${selector})`)].map((element) => {
    const color = getComputedStyle(element)[property];
    const [low, high] = [luminance(ground), luminance(ground, color)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  });
}"""


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH: apt-get install chromium")
@pytest.mark.parametrize(("ground", "ink"), [("#ffffff", "#212121"), ("#111111", "#e0e0e0")])
def test_page_has_contrast_in_both_themes(run: Run, tmp_path: Path, page: Page, ground: str, ink: str) -> None:
    explorer = ls.explore(run)
    explorer.dark = ground == "#111111"
    open_static(page, explorer, tmp_path / "page.html", f"background: {ground}; color: {ink}")
    texts = page.evaluate(CONTRASTS, [ground, "label span, select, button, output, th, td, caption, p", "color"])
    assert min(texts) >= 4.5
    assert min(page.evaluate(CONTRASTS, [ground, "select", "borderTopColor"])) >= 3
    paper = page.locator(".main-svg").first.evaluate("it => getComputedStyle(it).backgroundColor")
    assert min(page.evaluate(CONTRASTS, [paper, ".xtick text, .gtitle, .legendtext", "fill"])) >= 4.5
