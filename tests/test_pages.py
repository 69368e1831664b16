"""Tests of the report: the page is parsed as a browser parses it, not searched for strings."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from parsed_pages import Node, Tree
from planted import low_rank, plant, profile
from playwright.sync_api import expect, sync_playwright
from test_explore import BROWSER, PATIENCE

from lorascope import plots
from lorascope.charts import plotly_backend
from lorascope.charts.chart import Chart, set_side_by_side
from lorascope.charts.figure_plan import plan_figure
from lorascope.charts.marks import Axis, Heat, Line, Point
from lorascope.charts.theme import THEMES, theme
from lorascope.pages import page as report
from lorascope.pages.embedded_charts import changes, embed
from lorascope.pages.report_figure import ReportFigure, draw
from lorascope.runs.run import Run

FACTS = {"Written": "2026-01-02 03:04 UTC", "Device": "cpu"}
EVIL = "</script><script>alert(1)</script><b onclick=x>&amp;"


def runs_of(folder: Path, label: str, seeds: int, size: float) -> list[Run]:
    return [
        plant(
            folder, f"{label[:3]}{seed}", profile(size + seed, 3, 4), label, seed, {"h.0.q": low_rank(3.0, 1.0)},
            versions={"lorascope": "0.1.0", "torch": "2.13.0"}, commit="0123456789abcdef", device="cpu",
        )
        for seed in range(seeds)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[Node, list[report.Section], Path]:
    """A report with three figures in two sections; its tree, its sections and its path."""
    folder = tmp_path_factory.mktemp("report")
    arms = {"slow arm": runs_of(folder / "runs", "slow", 3, 1.0), EVIL: runs_of(folder / "runs", "fast", 3, 5.0)}
    evil = Chart(
        pd.DataFrame({"x": [1, 2], "y": [0.5, 0.25], "who": [EVIL, "good"]}),
        [Point("x", "y", "who")],
        title=EVIL,
        x=Axis(label=EVIL),
        caption=EVIL,
    )
    sections = [
        report.Section(
            "first",
            "The first <section>",
            "Is it first?",
            "Someone et al.",
            {"Numbers": pd.DataFrame({"name": ["a", EVIL], "value": [1.0, np.nan], "whole": [3, 40000]})},
            [draw("norm_over_steps", arms), draw("spectrum", arms)],
            ["A note.", EVIL],
        ),
        report.Section("second", "The second", figures=[ReportFigure(evil, "Look.", f"Beware of {EVIL}.")]),
    ]
    path = report.write(folder / "report.html", EVIL, "It opens.", sections, FACTS)
    return Tree(path.read_text(encoding="utf-8")).root, sections, path


def cells(row: Node) -> list[str]:
    return [part.text for part in row.parts]


def figures(page: Node) -> list[dict[str, Any]]:
    """Return the JSON that follows each chart."""
    found = []
    for figure in page.all("figure"):
        place = next(n for n, part in enumerate(figure.parts) if part.attributes.get("class") == "chart")
        found.append(json.loads(figure.parts[place + 1].text))
    return found


def test_report_is_one_small_file_without_requests(three: Any) -> None:
    page, _, path = three
    assert path.stat().st_size < 8 * 2**20
    assert [file.name for file in path.parent.iterdir() if file.is_file()] == ["report.html"]
    assert sum("plotly.js v" in script.text[:200] for script in page.all("script")) == 1
    for node in page.walk():
        assert not {"src", "srcset", "data", "action", "background"} & node.attributes.keys()
        assert node.attributes.get("href", "#").startswith("#")
        assert not any(name.startswith("on") for name in node.attributes)
    assert not page.all("link") + page.all("img") + page.all("iframe")
    assert not any(word in style.text for style in page.all("style") for word in ("@import", "url("))
    policy = next(m.attributes["content"] for m in page.all("meta") if "http-equiv" in m.attributes)
    # The last two do not follow from default-src.
    assert {"default-src 'none'", "base-uri 'none'", "form-action 'none'"} <= set(policy.split("; "))
    assert "http" not in policy


def test_section_has_lead_source_tables_figures_and_notes_in_this_order(three: Any) -> None:
    page, _, _ = three
    first = next(s for s in page.all("section") if s.attributes["id"] == "first").parts[0]
    assert [part.attributes.get("class", part.tag) for part in first.parts] == [
        *("summary", "lead", "source", "table", "figure", "figure", "h3", "ul"),
    ]
    assert first.parts[0].text == "The first <section>"
    assert [n.text for n in first.all("dt")] == ["How to read", "Caveat"] * 2
    assert first.all("dd")[0].text == plots.FIGURES["norm_over_steps"].reads
    assert [cells(row) for row in first.parts[3].all("tr")[1:]] == [["a", "1", "3"], [EVIL, "–", "40000"]]
    body, links = page.all("main")[0], page.all("nav")[0].all("a")
    assert [part.tag for part in body.parts if isinstance(part, Node)] == ["header", "section", "section"]
    assert [(link.attributes["href"], link.text) for link in links] == [
        ("#first", "The first <section>"),
        ("#second", "The second"),
    ]


def test_header_has_lead_and_facts_of_the_runs(three: Any) -> None:
    header = three[0].all("header")[0]
    assert header.all("p")[0].text == "It opens."
    facts = dict(zip([n.text for n in header.all("dt")], [n.text for n in header.all("dd")], strict=True))
    assert facts == FACTS


def test_every_chart_has_data_caption_and_accessible_label(three: Any) -> None:
    page, sections, _ = three
    shown = [one.chart for section in sections for one in section.figures]
    assert len(page.all(class_="chart")) == len(shown) == 3
    for figure, chart, stored in zip(page.all("figure"), shown, figures(page), strict=True):
        assert figure.all("figcaption")[0].text == chart.caption != ""
        assert figure.all("h3")[0].text.endswith(f": {chart.title}")
        drawn = figure.all(class_="chart")[0].attributes
        assert drawn["role"] == "img"
        assert chart.caption in drawn["aria-label"]
        assert any("bdata" in str(trace.get("y")) or trace.get("y") for trace in stored["figure"]["data"])
        assert "title" not in stored["figure"]["layout"] or not stored["figure"]["layout"]["title"].get("text")
        assert set(stored["changes"]) == {"dark", "narrow", "narrow dark"}
    assert [n.text.split(":")[0] for n in page.all("h3") if "Figure" in n.text] == ["Figure 1", "Figure 2", "Figure 3"]
    assert len(figures(page)[0]["figure"]["frames"]) == 2  # not at step 0, where all updates are zero


def test_headings_and_captions_have_math_as_unicode() -> None:
    table = pd.DataFrame({"x": [0, 1], "y": [1.0, 2.0]})
    chart = Chart(table, [Line("x", "y")], title="$W_0$", caption="Norm of $W_0$.")
    both = set_side_by_side(chart, replace(chart, title="right"), title="Norm of $W_0$")
    figures = [ReportFigure(chart), ReportFigure(both), ReportFigure(chart, title="Mine: $r^2$")]
    page = Tree(report.render("", "", [report.Section("first", "First", figures=figures)], {})).root
    names = ["Figure 1: W₀", "Figure 2: Norm of W₀", "Figure 3: Mine: r²"]
    assert [node.text for node in page.all("h3")] == names
    assert {node.text for node in page.all("figcaption")} == {"Norm of W₀."}


def test_headings_links_ids_and_tables_are_valid(three: Any) -> None:
    page, _, _ = three
    levels = [int(node.tag[1]) for node in page.walk() if node.tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))
    ids = [node.attributes["id"] for node in page.walk() if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    targets = {node.attributes["href"][1:] for node in page.all("a")}
    targets |= {node.attributes["aria-labelledby"] for node in page.walk() if "aria-labelledby" in node.attributes}
    assert targets == {"contents", "first", "second", "first-title", "second-title"} == set(ids)
    assert all(head.attributes["scope"] in ("col", "row") for head in page.all("th"))
    for table in page.all("table"):
        assert table.parts[0].tag == "caption"
        assert len({len(row.parts) for row in table.all("tr")}) == 1
    assert any(meta.attributes.get("name") == "viewport" for meta in page.all("meta"))
    assert page.all("html")[0].attributes["lang"] == "en"


def test_hostile_labels_never_become_tags(three: Any) -> None:
    page, _, _ = three
    assert page.all("title")[0].text == page.all("h1")[0].text == EVIL
    assert len(page.all("script")) == 3 + 3  # plotly, its settings, the script of the page, and one per chart
    assert not page.all("b")
    assert page.all("figure")[2].all("h3")[0].text == f"Figure 3: {EVIL}"
    names = [trace.get("name") for trace in figures(page)[2]["figure"]["data"]]
    assert "&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;&lt;b onclick=x&gt;&amp;amp;" in names


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH: apt-get install chromium")
@pytest.mark.parametrize("width", [390, 820, 1280])
def test_page_filters_unfolds_and_fits_the_screen(width: int, tmp_path: Path) -> None:
    verdicts = pd.DataFrame({"claim": list("abc"), "outcome": ["supported, above 0", "inconclusive", "supported"]})
    drawn = ReportFigure(slider(), "Look.", "Beware.")
    sections = [
        report.Section("verdicts", "Verdicts", tables={"Verdicts": verdicts}, filter="outcome"),
        report.Section("paper", "A paper", figures=[drawn], folded=True),
    ]
    path = report.write(tmp_path / "page.html", "A page", "It opens.", sections)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])  # required for root
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.set_default_timeout(PATIENCE)
        expect.set_options(timeout=PATIENCE)
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(path.as_uri())
        shown = page.locator("tbody tr:visible th")
        expect(shown).to_have_text(["a", "b", "c"])
        page.get_by_label("supported (2)").check()
        expect(shown).to_have_text(["a", "c"])
        page.get_by_label("all (3)").focus()
        page.keyboard.press("Space")
        expect(shown).to_have_text(["a", "b", "c"])
        chart = page.locator(".chart")
        expect(chart).not_to_be_visible()
        if width < 600:  # the contents are folded on a phone
            page.get_by_text("Contents").click()
        page.get_by_role("link", name="A paper").click()
        chart.locator("path.point").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert errors == []


def test_report_without_figures_is_valid(tmp_path: Path) -> None:
    path = report.write(tmp_path / "new" / "r.html", "X", "", [report.Section("x", "X", notes=["No run."])])
    assert "No run." in Tree(path.read_text(encoding="utf-8")).root.text


def slider() -> Chart:
    """Build a chart with everything that a theme recolors: error bars, marker edges and several colors."""
    rows = [
        {"step": step, "x": x, "y": float(step * x), "low": step * x - 0.5, "high": step * x + 0.5, "who": str(x % 8)}
        for step in (0, 5, 9)
        for x in range(10)
    ]
    marks = [Line("x", "y", "who"), Point("x", "y", "who", low="low", high="high")]
    return Chart(pd.DataFrame(rows), marks, frame="step", y=Axis(label="up"), title="left", caption="Both.")


def panels() -> Any:
    grid = pd.DataFrame({"a": ["p", "p", "q"], "b": ["u", "v", "u"], "value": [1.0, 2.0, np.nan]})
    return set_side_by_side(
        slider(), Chart(grid, [Heat("a", "b", "value", "v", text=".1f")], title="right", caption="Both.")
    )


def apply_changes(figure: dict[str, Any], edits: list[list[Any]]) -> dict[str, Any]:
    """Apply changes to a figure as the script of the page does."""
    figure = copy.deepcopy(figure)
    for (*path, last), value in edits:
        inner: Any = figure
        for step in path:
            inner = inner[step]
        inner[last] = value
    return figure


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("make", [slider, panels])
@pytest.mark.parametrize("name", ["light", "dark"])
def test_embedded_figure_equals_rendered_figure(make: Any, name: str) -> None:
    embedded = embed(make())
    settled = plan_figure(make(), theme(name))
    drawn = json.loads(plotly_backend.draw(settled).to_json())
    figure = apply_changes(embedded.figure, embedded.changes.get(name, []))
    assert without_nulls(figure["data"]) == without_nulls(drawn["data"])
    assert len(figure["frames"]) == 3
    for slim, whole in zip(figure["frames"], drawn["frames"], strict=True):
        for number, small, full in zip(slim["traces"], slim["data"], whole["data"], strict=True):
            assert without_nulls(figure["data"][number] | small) == without_nulls(figure["data"][number] | full)
    slim, whole = (len(json.dumps(one["frames"])) for one in (figure, drawn))
    assert slim < whole / 2
    assert figure["layout"]["paper_bgcolor"] == THEMES[name].background
    assert embedded.caption == "Both."


def test_trace_that_frames_change_and_change_back_is_in_every_frame() -> None:
    rows = pd.DataFrame({"x": [1, 1, 1], "y": [2.0, 3.0, 2.0], "step": [0, 1, 2]})
    frames = embed(Chart(rows, [Point("x", "y")], frame="step")).figure["frames"]
    assert [("y" in frame["data"][0], "x" in frame["data"][0]) for frame in frames] == [(True, False)] * 3


def test_panels_on_narrow_screen_are_stacked() -> None:
    embedded = embed(panels())
    wide, narrow = embedded.figure, apply_changes(embedded.figure, embedded.changes["narrow"])
    assert wide["layout"]["xaxis"]["domain"][1] < wide["layout"]["xaxis2"]["domain"][0]
    assert narrow["layout"]["xaxis"]["domain"][0] == narrow["layout"]["xaxis2"]["domain"][0] == 0
    assert narrow["layout"]["yaxis2"]["domain"][1] < narrow["layout"]["yaxis"]["domain"][0]
    assert embedded.heights["narrow"] == narrow["layout"]["height"] > embedded.heights["wide"]
    assert narrow["data"] == wide["data"]
    both = apply_changes(embedded.figure, embedded.changes["narrow dark"])
    assert both["layout"]["height"] == narrow["layout"]["height"]
    assert both["layout"]["paper_bgcolor"] == THEMES["dark"].background


def test_changes_transform_old_json_into_new() -> None:
    old = {"a": [1, {"b": 2}], "c": "x", "gone": 1, "list": [1, 2]}
    new = {"a": [1, {"b": 3}], "c": "x", "new": {"d": 4}, "list": [1]}
    edits = list(changes(old, new))
    assert without_nulls(apply_changes(old, edits)) == new
    assert [path for path, _ in edits] == [["a", 1, "b"], ["gone"], ["list"], ["new"]]
