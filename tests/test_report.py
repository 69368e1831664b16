"""Tests of the report: the page is parsed as a browser parses it, not searched for strings."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from planted import low_rank, plant, profile

from lorascope import plots
from lorascope.charts import plotly_backend
from lorascope.charts.chart import Chart, set_side_by_side
from lorascope.charts.figure_plan import plan
from lorascope.charts.marks import Axis, Heat, Line, Point
from lorascope.charts.theme import THEMES, theme
from lorascope.probes.base import PROBES, Findings, Probe, ReportFigure, draw
from lorascope.probes.claims import Claim, Verdict
from lorascope.probes.report import page as report
from lorascope.probes.report.figures import changes, embed
from lorascope.probes.report.verdicts import too_few
from lorascope.runs.run import Run

EVIL = "</script><script>alert(1)</script><b onclick=x>&amp;"
LONE = {"meta", "br", "link", "img", "input", "hr"}


class Node:
    """Element with its parts: nodes and text."""

    def __init__(self, tag: str, attributes: dict[str, str]) -> None:
        self.tag, self.attributes, self.parts = tag, attributes, []

    def all(self, tag: str = "", class_: str = "") -> list[Node]:
        """Return all descendants with this tag and class, in the order of the page."""
        return [
            node
            for node in self.walk()
            if tag in ("", node.tag) and (not class_ or class_ in node.attributes.get("class", "").split())
        ]

    def walk(self) -> Iterator[Node]:
        for part in self.parts:
            if isinstance(part, Node):
                yield part
                yield from part.walk()

    @property
    def text(self) -> str:
        return "".join(part.text if isinstance(part, Node) else part for part in self.parts)


class Tree(HTMLParser):
    """Page as a tree; tags that are not nested correctly fail an assertion."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.root = Node("", {})
        self.open = [self.root]
        self.feed(page)
        self.close()
        assert self.open == [self.root], "an element is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {name: value or "" for name, value in attrs})
        self.open[-1].parts.append(node)
        if tag not in LONE:
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if data.strip():  # white space between elements is not content
            self.open[-1].parts.append(data)


def judge(sentence: str, effects: list[float], margin: float = 0.25) -> Verdict:
    claim = Claim(sentence=sentence, margin=margin, statistic="gain", control="chance", source="p. 3")
    base = [0.125 * seed for seed in range(len(effects))]
    statistic = {seed: start + effect for seed, (start, effect) in enumerate(zip(base, effects, strict=True))}
    return claim.judge(statistic, dict(enumerate(base)))


def runs_of(folder: Path, label: str, seeds: int, size: float) -> list[Run]:
    meta = {
        "versions": {"lorascope": "0.1.0", "torch": "2.13.0"},
        "commit": "0123456789abcdef",
        "device": "cpu",
        "total_seconds": 90.0,
        "test": {"name": "accuracy", "metric": 0.875, "loss": 0.3, "groups": {}},
        "recipe": {"name": "lora", "rank": 2},
        "settings": {"steps": 9, "batch_size": 16, "lr": 1e-3, "head_lr": 2e-3, "warmup": 0.06},
    }
    return [
        plant(
            folder, f"{label[:3]}{seed}", profile(size + seed, 3, 4), label, seed, {"h.0.q": low_rank(3.0, 1.0)}, **meta
        )
        for seed in range(seeds)
    ]


def reported(folder: Path, seeds: int, monkeypatch: pytest.MonkeyPatch, quick: bool = False) -> tuple[Any, ...]:
    """Write a report on two probes that share an arm; return its tree, its findings and its path."""
    for name in ("first", "second"):
        texts = {"title": f"The {name} <probe>", "source": f"{name} et al.", "question": f"Is it {name}?"}
        probe = Probe(name=name, **texts, quick_budget=1, arms=lambda quick: [], figures=lambda runs: [])
        monkeypatch.setitem(PROBES, name, probe)
    slow, fast = runs_of(folder / "runs", "slow", seeds, 1.0), runs_of(folder / "runs", "fast", seeds, 5.0)
    arms = {"slow arm": slow, EVIL: fast}
    evil = Chart(
        pd.DataFrame({"x": [1, 2], "y": [0.5, 0.25], "who": [EVIL, "good"]}),
        [Point("x", "y", "who")],
        title=EVIL,
        x=Axis(label=EVIL),
        caption=EVIL,
    )
    findings = {
        "first": Findings(
            [judge("It grows & <grows>.", [0.5, 0.625, 0.5625][:seeds]), judge(EVIL, [0.0, 0.125, 0.0625][:seeds])],
            [
                draw("norm_over_steps", arms),
                draw("spectrum", arms),
            ],
            {"Numbers": pd.DataFrame({"name": ["a", EVIL], "value": [1.0, np.nan], "whole": [3, 40000]})},
            ["A note.", EVIL],
        ),
        "second": Findings(
            [judge("It wavers.", [-1.0, 0.0, 2.0][:seeds], 0.5)], [ReportFigure(evil, "Look.", f"Beware of {EVIL}.")]
        ),
    }
    path = report.write(
        folder / "report.html", findings, {"first": arms, "second": {"slow arm": slow}}, quick=quick, title=EVIL
    )
    return Tree(path.read_text(encoding="utf-8")).root, findings, path


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, ...]]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield reported(tmp_path_factory.mktemp("report"), 3, monkeypatch)


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
    assert "default-src 'none'" in policy
    assert "http" not in policy


def test_claims_come_first_and_show_the_numbers_of_their_verdicts(three: Any) -> None:
    page, findings, _ = three
    body = page.all("main")[0]
    assert [part.tag for part in body.parts if isinstance(part, Node)][:2] == ["header", "section"]
    table = body.all("table")[0]
    heads = cells(table.all("thead")[0].all("tr")[0])
    assert heads == ["Claim", "Outcome", "Effect", "Margin", "Statistic", "Control", "Seeds", "Source"]
    verdicts = [verdict for found in findings.values() for verdict in found.verdicts]
    assert [verdict.outcome for verdict in verdicts] == ["supported", "not supported", "inconclusive"]
    for verdict, row, sign in zip(verdicts, table.all("tbody")[0].all("tr"), "✓✗?", strict=True):
        values = verdict.values
        assert cells(row) == [
            verdict.claim.sentence,
            f"{sign} {verdict.outcome}",
            f"{verdict.effect:.3g}[{verdict.low:.3g}, {verdict.high:.3g}]",
            f"{verdict.claim.margin:.3g}",
            f"{values['statistic'].mean():.3g} gain",
            f"{values['control'].mean():.3g} chance",
            "3",
            "p. 3",
        ]
    assert "2 probes, 3 claims: 1 supported, 1 not supported, 1 inconclusive." in body.all("header")[0].text


def test_section_has_question_figures_tables_notes_and_settings_in_this_order(three: Any) -> None:
    page, _, _ = three
    first = next(s for s in page.all("section") if s.attributes["aria-labelledby"] == "probe-first")
    assert [part.attributes.get("class", part.tag) for part in first.parts] == [
        *("h2", "question", "source", "figure", "figure", "table", "table", "h3", "ul", "details"),
    ]
    assert first.parts[0].text == "The first <probe>"
    assert [n.text for n in first.all("dt")] == ["How to read", "Caveat"] * 2
    assert first.all("dd")[0].text == plots.FIGURES["norm_over_steps"].reads
    by_seed, numbers = first.parts[5], first.parts[6]
    assert cells(by_seed.all("tr")[1]) == ["It grows & <grows>.", "0", "0.5", "0", "0.5"]
    assert cells(by_seed.all("tr")[2]) == ["1", "0.75", "0.125", "0.625"]
    assert [cells(row) for row in numbers.all("tr")[1:]] == [["a", "1", "3"], [EVIL, "–", "40000"]]


def test_settings_list_every_arm_and_every_run_with_its_folder(three: Any) -> None:
    page, _, path = three
    details = page.all("details")[0]
    arms, runs = (node.all("tbody")[0].all("tr") for node in details.all("table"))
    assert cells(arms[0]) == ["slow arm", "slow", "m", "t", "9", "16", "0.001", "0.002", "0, 1, 2"]
    assert cells(runs[1]) == ["slow arm", "1", "slo1", "done", "runs/slo1", "accuracy 0.875", "1.5"]
    assert len(runs) == 6
    assert (path.parent / "runs/slo1/run.json").exists()
    assert json.loads(details.all("pre")[0].text)["settings"]["warmup"] == 0.06
    facts = dict(zip([n.text for n in page.all("dt")], [n.text for n in page.all("dd")], strict=True))
    assert facts["Runs"] == "6 runs, 9 min of training"  # the runs of the shared arm count once
    assert facts["Seeds"] == "0, 1, 2"
    assert facts["Versions"] == "lorascope 0.1.0, torch 2.13.0"
    assert facts["Commit"] == "0123456789ab"


def test_every_chart_has_data_caption_and_accessible_label(three: Any) -> None:
    page, findings, _ = three
    shown = [one.chart for found in findings.values() for one in found.figures]
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
    assert len(figures(page)[0]["figure"]["frames"]) == 3


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
    assert targets == {"claims", "probes", "probe-first", "probe-second"} == set(ids)
    assert all(head.attributes["scope"] in ("col", "row", "rowgroup") for head in page.all("th"))
    for table in page.all("table"):
        assert table.parts[0].tag == "caption"
        assert {len(cells(row)) for row in table.all("tr") if not row.all("th")} <= {
            4
        }  # rows below a claim that spans several rows
    assert any(meta.attributes.get("name") == "viewport" for meta in page.all("meta"))
    assert page.all("html")[0].attributes["lang"] == "en"


def test_hostile_labels_never_become_tags(three: Any) -> None:
    page, _, _ = three
    assert page.all("title")[0].text == page.all("h1")[0].text == EVIL
    assert len(page.all("script")) == 3 + 3  # plotly, its settings, the script of the page, and one per chart
    assert not page.all("b") or all(node.text.replace(".", "").lstrip("-").isdigit() for node in page.all("b"))
    assert page.all("figure")[2].all("h3")[0].text == f"Figure 3: {EVIL}"
    names = [trace.get("name") for trace in figures(page)[2]["figure"]["data"]]
    assert "&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;&lt;b onclick=x&gt;&amp;amp;" in names


def test_report_with_single_seed_explains_inconclusive_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, findings, _ = reported(tmp_path, 1, monkeypatch, quick=True)
    for row, verdict in zip(
        page.all("tbody")[0].all("tr"), [*findings["first"].verdicts, *findings["second"].verdicts], strict=True
    ):
        assert cells(row)[1:3] == ["? inconclusive", f"{verdict.effect:.3g}no interval"]
    few = [node.text for node in page.all("p", "few")]
    assert len(few) == 2
    assert few[0].startswith("Every claim here is inconclusive")
    assert "because 1 seed cannot" in few[0]
    assert few[0].count(".") == 1
    assert "quick settings" in page.all("header")[0].text


def test_too_few_counts_claims_without_enough_seeds() -> None:
    enough, two, one = judge("a", [1.0, 1.0, 1.5]), judge("b", [1.0, 2.0]), judge("c", [1.0])
    assert too_few([enough]) == ""
    assert too_few([enough, two, one]).startswith("2 of the 3 claims here are inconclusive")
    assert "because 1 seed or 2 seeds cannot" in too_few([enough, two, one])


def test_report_with_three_seeds_and_full_settings_has_no_warning(three: Any) -> None:
    page, _, _ = three
    assert not page.all("p", "few")
    assert page.all("header")[0].all("p")[0].text.endswith("full settings.")


def test_report_of_probe_without_claims_or_runs_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = Probe(
        name="x", title="X", source="s", question="q", quick_budget=1, arms=lambda q: [], figures=lambda r: []
    )
    monkeypatch.setitem(PROBES, "x", probe)
    path = report.write(tmp_path / "new" / "r.html", {"x": Findings([], [], notes=["No run."])}, {"x": {}}, quick=True)
    page = Tree(path.read_text(encoding="utf-8")).root
    assert "No claim was judged." in page.text
    assert not page.all("table", "claims")
    assert "1 probe, no claims." in page.all("header")[0].text


def test_write_with_unknown_probe_or_missing_runs_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown probe 'nonesuch'"):
        report.write(tmp_path / "r.html", {"nonesuch": Findings([], [])}, {}, quick=True)
    known = next(iter(PROBES))
    with pytest.raises(ValueError, match=f"runs must have an entry for probe '{known}'"):
        report.write(tmp_path / "r.html", {known: Findings([], [])}, {}, quick=True)
    assert not list(tmp_path.iterdir())


def drawing(verdict: Verdict) -> Node:
    return Tree(report.TEMPLATES.get_template("parts.html").module.strip(verdict)).root


def place(node: Node, class_: str) -> list[float]:
    """Return the numbers in the path of a class, in the order x, y, x."""
    (path,) = node.all("path", class_)
    return [float(word) for word in path.attributes["d"].replace("M", "").replace("V", " ").replace("H", " ").split()]


def test_strip_positions_match_effect_and_margin() -> None:
    node = drawing(judge("a", [0.125, 0.125 + 1 / 64, 0.125 - 1 / 64]))
    zero, margin = place(node, "zero")[0], place(node, "margin")[0]
    (dot,) = node.all("circle")
    assert float(dot.attributes["cx"]) == pytest.approx((zero + margin) / 2, abs=0.1)
    left, _, right = place(node, "reach")
    verdict = judge("a", [0.125, 0.125 + 1 / 64, 0.125 - 1 / 64])
    for x, value in ((left, verdict.low), (right, verdict.high)):
        assert (x - zero) / (margin - zero) == pytest.approx(value / 0.25, abs=0.02)
    far = drawing(judge("a", [2.0, 2.0, 2.5]))
    assert not far.all("circle")
    assert place(far, "zero")[0] < float(far.all("path", "beyond")[0].attributes["d"][1:].split()[0])
    assert not drawing(judge("a", [0.125])).all("path", "reach")


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
    settled = plan(make(), theme(name))
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
