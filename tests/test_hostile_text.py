"""Hostile names in every output: terminal, errors, CSV, Markdown, HTML and figures."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import warnings
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from planted import MODULES
from planted import plant as plant_run
from test_inspect import plant

from lorascope.charts import plotly_backend
from lorascope.charts.chart import Chart
from lorascope.charts.marks import Axis, Heat, Line, Rule, Text
from lorascope.charts.math_text import MATH
from lorascope.cli import sweep
from lorascope.cli.main import main
from lorascope.experiments.sweep_table import SweepTable, arrange_rows
from lorascope.files.safe_csv import csv_text
from lorascope.files.safetensors_io import write_tensors
from lorascope.files.whole_files import file_hash, write_json
from lorascope.pages import page as report
from lorascope.pages.report_figure import ReportFigure
from lorascope.runs.loading import load
from lorascope.runs.run import Run
from lorascope.training.checkpoints import Checkpoints
from lorascope.training.progress import progress_bar

EVIL = "\x1b]0;x\x07\x9b31m\u202e\r\n\0\b=cmd|' /C calc'!A0<script>$\\frac"
FOLDER = EVIL.replace("\0", "").replace("/", "")
MODULE = EVIL.replace("\n", "")
FORMULA = "=cmd|' /C calc'!A0"
SHOWN = r"\x1b]0;x\x07\x9b31m\u202e"  # escaped form of the first characters of EVIL


def untreated(text: str) -> set[str]:
    """Return the nonprintable characters of a text, except for line breaks."""
    return {letter for letter in text if not letter.isprintable()} - {"\n"}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose folder, modules, base and patterns are hostile."""
    names = [f"model.layers.{layer}.self_attn.{MODULE}" for layer in (0, 1)] + [
        FORMULA,
        f"model.layers.0.{MODULE}.q_proj",
    ]
    spectra = {name: [4.0, 2.0, 1.0, 0.0] for name in names}
    spectra[names[0]] = [0.0] * 4
    path = plant(
        tmp_path_factory.mktemp("adapters") / FOLDER,
        spectra,
        base_model_name_or_path=EVIL,
        alpha_pattern={"zzz\x1b": 8},
    )
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose label, model, task, modules, metric and quantity are hostile."""
    named = [dict(place) for place in MODULES]
    named += [{"module": f"h.1.{EVIL}", "stack": "", "layer": 1, "role": "other"}]
    named += [{"module": FORMULA, "stack": "", "layer": None, "role": "other"}]
    modules = [place | {"in_features": 6, "out_features": 5} for place in named]
    draw = np.random.default_rng(0)
    factors = {
        place["module"]: (draw.standard_normal((5, 4)), draw.standard_normal((4, 6)))
        for place in modules
        if place["role"] in ("q", "other")
    }
    values: dict[tuple[str, str], Any] = {("update_norm", name): {0: 0.0, 9: 2.0} for name in factors}
    values[("loss", "")] = {1: 2.0, 9: 1.0}
    planted = plant_run(
        tmp_path_factory.mktemp("runs"),
        "0123456789ab",
        values,
        label=EVIL,
        factors=factors,
        modules=modules,
        model=EVIL,
        task=EVIL,
        method={"name": "lora"},
        labels=[EVIL, "b"],
        hosts=dict.fromkeys(factors, "Linear"),
        settings={"steps": 9, "batch_size": 2, "lr": 1e-3},
        test={"name": EVIL, "metric": 0.5, "loss": 1.0},
        parameters={"trained": 10, "total": 20},
    )
    assert planted.path is not None
    state = planted.path / "state/last.safetensors"
    state.parent.mkdir()
    write_tensors(state, {"score.weight": np.ones((2, 6), "f4")}, {})
    planted.meta.checksums["state/last.safetensors"] = file_hash(state)
    write_json(planted.path / "run.json", planted.meta.to_json())
    return planted.path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A whole model and its base, in hostile folders."""
    found = []
    for number, name in enumerate(("base", "tuned")):
        folder = tmp_path_factory.mktemp(name) / FOLDER
        folder.mkdir()
        weights = np.random.default_rng(number).standard_normal((8, 4)).astype("f4")
        write_tensors(folder / "model.safetensors", {f"{MODULE}.layers.0.mlp.up_proj.weight": weights}, {})
        found.append(folder)
    return found[1], found[0]


def command_lines(adapter: Path, run: Path, whole: tuple[Path, Path]) -> Iterator[tuple[Any, ...]]:
    """Yield command lines that read a hostile folder and succeed."""
    twin = adapter.with_name("twin")
    if not twin.exists():
        shutil.copytree(adapter, twin)
    for path in (adapter, run):
        for options in ((), ("--all",), ("--json",), ("--csv",)):
            yield "inspect", path, *options
        yield "doctor", path
        yield "doctor", path, "--json"
        yield "export", path, "--rank-pattern"
        yield "export", path, "--rank-pattern", "--budget", "0.5"
        yield "export", path, "--rank-pattern", "--json"
    for options in ((), ("--all",), ("--json",), ("--csv",)):
        yield "inspect", adapter, twin, *options
        yield "inspect", whole[0], "--base", whole[1], *options
    yield "export", run, "--peft", f"out{FOLDER}"
    for ending in ("csv", "json", "parquet"):
        yield "export", run, "--table", f"records{FOLDER}.{ending}"
    yield "export", run, "--table", "summary.csv", "--summary"
    yield "plot", "spectrum", f"{EVIL.replace('=', '')}={adapter}", "-o", f"{FOLDER}.csv"


def test_commands_print_no_control_characters(
    adapter: Path, run: Path, whole: tuple[Path, Path], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = 0
    for line in command_lines(adapter, run, whole):
        code = main([str(word) for word in line])
        out, err = capsys.readouterr()
        assert (code, err) in ((0, ""), (1, "")), (line, err)
        assert untreated(out) == set(), line
        shown += SHOWN in out or "\\u001b" in out
        if "--csv" in line:
            check_csv(out)
        if "--json" in line:
            json.loads(out)
    assert shown > 20
    for file in here.glob("*.csv"):
        check_csv(file.read_text())
    for file in (*here.glob("*.json"), *here.glob("*/README.md")):
        assert untreated(file.read_text()) == set(), file.name


def check_csv(text: str) -> None:
    """Assert that no text cell starts a formula or contains a line break."""
    assert untreated(text) == set()
    rows = list(csv.reader(io.StringIO(text)))
    assert len({len(row) for row in rows}) == 1
    cells = [cell for row in rows for cell in row if not is_number(cell)]
    assert [cell for cell in cells if cell.startswith(tuple("=+-@\t\r"))] == []
    assert len(rows) == text.count("\n")


def is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    "line",
    [
        *(("inspect", EVIL), ("inspect", FOLDER, "--base", EVIL), ("doctor", EVIL), ("plot", EVIL, "x")),
        *(
            ("plot", "spectrum", EVIL),
            ("plot", "spectrum", "RUN", "-o", f"x.{FOLDER}"),
            ("export", EVIL, "--rank-pattern"),
        ),
        *(("export", "RUN", "--table", FOLDER), ("export", "RUN", "--rank-pattern", "--state", EVIL)),
        *(
            ("sweep", EVIL),
            ("train", EVIL),
            ("train", "lora", "--steps", "2", "--task", EVIL),
            (EVIL,),
        ),
        *(
            ("inspect", "RUN", f"--{EVIL}"),
            ("reproduce", "--claim", EVIL, "--seed", "1"),
            ("plot", "spectrum", "RUN", "--theme", EVIL),
        ),
        ("train", "lora", "--steps", "2", "--task", "sentiment", "--model", EVIL),
    ],
    ids=lambda line: " ".join(line[:2])[:24].encode("unicode_escape").decode() + str(len(line)),
)
def test_errors_are_one_printable_line(line: Any, run: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run) if word == "RUN" else word for word in line]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert untreated(err) == set()
    assert err.startswith("lorascope: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("dtype", ["\x1b[31m", "F32"])
def test_errors_on_a_hostile_header_are_printable(
    dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = plant(tmp_path / FOLDER, {"model.layers.0.self_attn.q_proj": [1.0, 1.0]}, r=EVIL)
    file = path / "adapter_model.safetensors"
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    for tensor in header.values():
        if "dtype" in tensor:
            tensor["dtype"] = dtype
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    for verb in (["inspect"], ["doctor"], ["export", "--rank-pattern"]):
        assert main([*verb, str(path)]) == 2
        err = capsys.readouterr().err
        assert untreated(err) == set()
        assert err.count("\n") == 1


def test_run_representations_are_printable(run: Path, adapter: Path) -> None:
    for found in (Run.read(run), load(adapter)):
        assert untreated(repr(found)) == set()
        assert SHOWN in repr(found)
        page = found._repr_html_()
        assert untreated(page) == set()
        assert "<script" not in page


def test_csv_text_escapes_formulas_and_keeps_numbers() -> None:
    rows = {
        "=name": ["=1+1", "+a", "-b", "@c", "\tx", "\ry", "plain", "-1.5", "a,\nb", None],
        "kind": pd.Categorical([EVIL, *["-x"] * 9]),
        "value": [-1.5, np.inf, -np.inf, np.nan, 0.1, 1e308, 5e-324, -0.0, 1.0, 2.0],
        "mixed": [-1, "=1", "＝1", 2.5, None, True, "", "1", "+1", "-"],
    }
    text = csv_text(pd.DataFrame(rows))
    head, *cells = csv.reader(io.StringIO(text))
    assert head == ["'=name", "kind", "value", "mixed"]
    names = ["'=1+1", "'+a", "'-b", "'@c", r"\tx", r"\ry", "plain", "-1.5", r"a,\nb", ""]
    assert [row[0] for row in cells] == names
    assert [row[1] for row in cells[1:]] == ["'-x"] * 9
    assert cells[0][1].startswith(SHOWN)
    assert [row[2] for row in cells] == ["-1.5", "inf", "-inf", "", "0.1", "1e+308", "5e-324", "-0.0", "1.0", "2.0"]
    assert [row[3] for row in cells] == ["-1", "'=1", "'＝1", "2.5", "", "True", "", "1", "+1", "'-"]


def chart(frame: bool = False) -> Chart:
    """Return a chart with hostile text in all its labels."""
    data = pd.DataFrame({"x": [0, 1, 0, 1], "y": [1.0, 2.0, 3.0, 4.0], "name": [EVIL, EVIL, "$a$", "$a$"]})
    data["at"] = ["a", EVIL, EVIL, "a"]
    data["told"] = [f"{EVIL}<b>", "<a href=javascript:x>", "%{x}", "$$"]
    marks = [Line("x", "y", "name", dash="name"), Text("x", "y", "told"), Rule(y=2.0, label=EVIL)]
    axes = {"x": Axis(label=EVIL), "y": Axis(label=f"%{{x}} {EVIL}")}
    return Chart(
        data,
        marks,
        title=EVIL,
        caption=EVIL,
        color_label=EVIL,
        **axes,
        frame="at" if frame else None,
        meta={EVIL: EVIL},
    )


def heat() -> Chart:
    data = pd.DataFrame(
        {"x": ["\x1b\r\0$x$", "$b$"], "y": ["\x1b\r\0$x$", "$y$"], "value": [1.0, 2.0], "told": [EVIL, "$c$"]}
    )
    return Chart(
        data, [Heat("x", "y", "value", label=EVIL, text=".2f", words="told")], title=EVIL, meta={"a": "\ud800"}
    )


CHARTS = {"lines": chart(), "frames": chart(frame=True), "heat": heat()}
both_charts = pytest.mark.parametrize("made", CHARTS.values(), ids=CHARTS)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("frames", "svg"), ("frames", "html"), *(("heat", kind) for kind in ("svg", "pdf", "png", "csv"))],
)
def test_saved_figures_contain_no_control_character(name: str, kind: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = CHARTS[name].save(tmp_path / f"figure.{kind}")
    if kind == "svg":
        ElementTree.parse(path)
        assert untreated(path.read_text()) == set()
    elif kind == "csv":
        check_csv(path.read_text())
        assert untreated(path.with_name("figure.csv-metadata.json").read_text()) == set()
    elif kind == "html":
        page = path.read_text()
        head, own = page[: page.index("<body>")], page[page.index("Plotly.newPlot(") :]
        assert untreated(head + own) - {"\xa0"} == set()
        assert "<script>$" not in head + own
    elif kind == "png":
        with Image.open(path) as image:
            assert untreated("".join(image.text.values())) == set()
    else:
        assert b"\x1b]0;x" not in path.read_bytes()


@both_charts
def test_both_renderers_escape_text(made: Chart) -> None:
    drawn = made.mpl()
    drawn.draw_without_rendering()
    texts = [text.get_text() for text in drawn.findobj(lambda artist: hasattr(artist, "get_text"))]
    assert untreated("".join(texts)) == set()
    assert any(SHOWN in text for text in texts)
    for text in texts:
        if "mathdefault" not in text:
            assert "$" not in MATH.sub("", text.replace(r"\$", "")), text
    shown = [text for _, text in strings(plotly_backend.to_plotly(made).to_plotly_json() | {"frames": []}, ())]
    assert any(SHOWN in text for text in shown)
    for text in shown:
        assert untreated(text) == set(), text
        assert not re.search(r"<(script|b>|a )", text), text
        assert "$" not in text


def strings(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], str]]:
    """Yield the texts of a plotly figure that plotly.js shows, with their paths."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key != "args":  # of the slider: names of frames, which are not shown
                yield from strings(inner, (*path, key))
    elif isinstance(value, list | tuple | np.ndarray):
        for number, inner in enumerate(value):
            yield from strings(inner, (*path, number))


def test_plotly_hover_template_ignores_hostile_placeholders() -> None:
    template = next(trace.hovertemplate for trace in chart().plotly().data if trace.hovertemplate)
    assert set(re.findall(r"%{([^}]*)}", template)) == {"x:.4~g", "y:.4~g"}


class Page(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.scripts, self.text, self.tag = 0, "", ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tag = tag
        self.scripts += tag == "script"
        self.text += "".join(value or "" for _, value in attrs)

    def handle_data(self, data: str) -> None:
        if self.tag != "script" or data.startswith('{"figure"'):
            self.text += data


def test_report_page_escapes_all_text(tmp_path: Path) -> None:
    section = report.Section(
        "p", EVIL, EVIL, EVIL, {EVIL: pd.DataFrame({EVIL: [EVIL]})}, [ReportFigure(chart(), EVIL, EVIL)], [EVIL]
    )
    page = report.write(tmp_path / "r.html", EVIL, EVIL, [section], {EVIL: EVIL}).read_text()
    seen = Page(page)
    assert untreated(seen.text) == set()
    assert seen.text.count(SHOWN) > 10
    assert seen.scripts == Page(report.write(tmp_path / "q.html", "", "", []).read_text()).scripts + 1


def test_export_readme_contains_no_hostile_markup(run: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--peft", "out"]) == 0, capsys.readouterr().err
    text = Path("out/README.md").read_text(encoding="utf-8")
    assert untreated(text) == set()
    _, front, body = text.split("---\n", 2)
    assert [line.partition(":")[0] for line in front.splitlines()] == ["base_model", "library_name"]
    assert not re.search(r"(?<!\\)[<\[*`]", body.split("```")[0])
    compile(body.split("```python\n")[1].split("```")[0], "readme", "exec")


def test_sweep_table_is_printable() -> None:
    stream = io.StringIO()
    board = SweepTable([EVIL, "b"], lambda number: Path("nowhere"), stream)
    board.end(0, "failed", EVIL)
    board._redraw()
    assert untreated(stream.getvalue()) == set()
    assert SHOWN in stream.getvalue()
    assert untreated("\n".join(arrange_rows(board.rows(), 80, 24))) == set()


def test_progress_bar_is_printable(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(EVIL, 3, 0, visible=True) as bar:
        bar.refresh()
    err = capsys.readouterr().err
    assert untreated(err) <= {"\r", "\xa0"}
    assert SHOWN in err


def test_sweep_standings_are_printable(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = dict.fromkeys(("model", "task", "metric"), EVIL)
    common |= {"recipe": EVIL, "run": EVIL, "lower_is_better": False}
    rows = [common | {"seed": seed, "value": float(seed)} for seed in range(3)]
    rows += [row | {"recipe": "b", "run": "b", "value": row["value"] + 1} for row in rows]
    monkeypatch.setattr(sweep.recipe_tests, "collect_scores", lambda runs: pd.DataFrame(rows))
    told = sweep._format_standings(SimpleNamespace(runs=list))
    assert untreated(told) == set()
    assert SHOWN in told


def test_warning_about_a_file_is_printable(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / FOLDER)
    checkpoints.folder.mkdir(parents=True)
    (checkpoints.folder / "step-00000001.safetensors").write_bytes(b"x")
    with pytest.warns(UserWarning, match="earlier step") as told:
        checkpoints.newest()
    assert untreated(str(told[0].message)) == set()
    assert SHOWN in str(told[0].message)
