"""Saved figures: complete, byte-identical on every save, with provenance, and legible in one column of a page."""

from __future__ import annotations

import base64
import errno
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import matplotlib.axis
import numpy as np
import pandas as pd
import pypdf
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image
from playwright.sync_api import sync_playwright
from test_explore import BROWSER

import lorascope
from lorascope.charts.chart import Chart, set_side_by_side
from lorascope.charts.marks import Axis, Band, Bar, Heat, Line, Point, Rule
from lorascope.charts.save import save_small
from lorascope.charts.scales import Scale
from lorascope.charts.theme import WIDTHS
from lorascope.files.seals import require_own

SVG = "{http://www.w3.org/2000/svg}"
META = {"runs": ["0123456789ab", "ba9876543210"], "claim": 'norms grow <fast> & "far"'}


@pytest.fixture
def chart() -> Chart:
    steps = np.arange(0, 100, 10)
    parts = [
        pd.DataFrame({"step": steps, "norm": scale * steps**0.5, "role": role}) for role, scale in (("q", 1), ("v", 2))
    ]
    data = pd.concat(parts, ignore_index=True).assign(low=lambda t: t["norm"] * 0.9, high=lambda t: t["norm"] * 1.1)
    return Chart(
        data,
        [Band("step", "low", "high", "role"), Line("step", "norm", "role"), Rule(x=50, label="final phase")],
        title="Norm of the update, ‖ΔW‖ <b>",
        x=Axis(label="step"),
        y=Axis(label="‖ΔW‖"),
        caption="Mean over 3 seeds; the band is the 95% t-interval. " * 3,
        color_label="role",
        meta=META,
    )


@pytest.fixture
def heat() -> Chart:
    """A heat map of thirty layers between embedding and head, as in SmolLM2."""
    places = ["embed", *map(str, range(30)), "head"]
    roles = ["q", "k", "v", "o", "ffn_gate", "ffn_in", "ffn_out"]
    rows = [(place, role, float(len(place) * len(role))) for place in places[1:-1] for role in roles]
    data = pd.DataFrame(rows, columns=["layer", "role", "norm"])
    axes = {"x": Axis(label="layer", order=places), "y": Axis(label="role", order=roles)}
    return Chart(data, [Heat("layer", "role", "norm", "‖ΔW‖")], title="Where the update goes", **axes)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.metas: dict[str, str] = {}
        self.loads: list[str] = []
        self.title, self._tag = "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self._tag, named = tag, dict(attrs)
        if tag == "meta" and "name" in named:
            self.metas[named["name"]] = named["content"]
        self.loads += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        if self._tag == "title":
            self.title += data.strip()


def origin(path: Path) -> dict:
    """Return the provenance stored in a saved figure."""
    match path.suffix:
        case ".pdf":
            text = pypdf.PdfReader(path).metadata["/Keywords"]
        case ".png":
            with Image.open(path) as image:
                text = image.text["lorascope"]
        case ".svg":
            text = ElementTree.parse(path).find(".//{http://purl.org/dc/elements/1.1/}description").text
        case ".html":
            text = Page(path.read_text(encoding="utf-8")).metas["lorascope"]
        case _:
            return json.loads(path.with_name(f"{path.name}-metadata.json").read_text(encoding="utf-8"))["lorascope"]
    return json.loads(text)


KINDS = ["pdf", "png", "svg", "html", "csv"]


@pytest.mark.parametrize("kind", KINDS)
def test_saved_figure_contains_its_provenance(chart, tmp_path, kind) -> None:
    path = chart.save(tmp_path / "new" / "folder" / f"norms.{kind}")
    assert path.stat().st_size > 0
    digest = hashlib.sha256(chart.data.to_csv(index=False, float_format="%.9g").encode()).hexdigest()
    assert origin(path) == {**META, "lorascope": lorascope.__version__, "data_sha256": digest}
    extra = {f"{path.name}-metadata.json", f"{path.name}-caption.txt"}
    assert {entry.name for entry in path.parent.iterdir()} <= {path.name} | extra


@pytest.mark.parametrize("kind", KINDS)
def test_save_twice_gives_equal_bytes(chart, tmp_path, kind) -> None:
    first, second = (chart.save(tmp_path / name / f"norms.{kind}").read_bytes() for name in ("one", "two"))
    assert first == second


def test_different_data_has_a_different_hash(chart, tmp_path) -> None:
    changed = Chart(chart.data.assign(norm=0.0), chart.marks, meta=META)
    marked = Chart(chart.data, [*chart.marks, Point("a", "b", data=pd.DataFrame({"a": [0.0], "b": [1.0]}))], meta=META)
    origins = [origin(one.save(tmp_path / f"{n}.csv")) for n, one in enumerate((chart, changed, marked))]
    assert len({one["data_sha256"] for one in origins}) == 3


def test_panels_store_the_provenance_of_each(chart, heat, tmp_path) -> None:
    assert origin(set_side_by_side(chart, chart).save(tmp_path / "same.png"))["runs"] == META["runs"]
    assert origin(set_side_by_side(chart, heat).save(tmp_path / "mixed.png"))["panels"] == [META, {}]


def test_pdf_has_the_requested_width_and_embedded_truetype(chart, heat, tmp_path) -> None:
    for width, inches in (("column", 3.3), ("page", 6.9)):
        page = pypdf.PdfReader(chart.save(tmp_path / f"{width}.pdf", width=width)).pages[0]
        assert float(page.mediabox.width) == pytest.approx(72 * inches, abs=0.5)
        assert "final phase" in page.extract_text()
    font = next(iter(page["/Resources"]["/Font"].values())).get_object()
    descendant = font["/DescendantFonts"][0].get_object()
    assert descendant["/Subtype"] == "/CIDFontType2"
    assert "/FontFile2" in descendant["/FontDescriptor"].get_object()
    panels = pypdf.PdfReader(set_side_by_side(chart, heat).save(tmp_path / "panels.pdf")).pages[0]
    assert float(panels.mediabox.width) == pytest.approx(72 * 6.9, abs=0.5)


@pytest.mark.parametrize("width", [3.25, "3.25", 3.03, "neurips", "ICML", "acl", "acl-page", "nature", "nature-page"])
@pytest.mark.parametrize("dpi", [100, 300])
def test_png_has_the_requested_size_to_a_pixel(chart, tmp_path, width, dpi) -> None:
    inches = WIDTHS.get(str(width).lower()) or float(width)
    with Image.open(chart.save(tmp_path / "norms.png", width=width, height=3.0, dpi=dpi)) as image:
        assert image.size == (pytest.approx(inches * dpi, abs=1), 3 * dpi)
        assert image.info["dpi"] == pytest.approx((dpi, dpi), abs=0.01)


@pytest.mark.parametrize("kind", ["pdf", "svg"])
def test_vector_file_has_the_requested_size(chart, heat, tmp_path, kind) -> None:
    for number, one in enumerate((chart, heat, set_side_by_side(chart, heat))):
        path = one.save(tmp_path / f"{number}.{kind}", width=5.5, height=2.5)
        if kind == "pdf":
            size = list(map(float, pypdf.PdfReader(path).pages[0].mediabox[2:]))
        else:
            root = ElementTree.parse(path).getroot()
            size = [float(root.get(side).removesuffix("pt")) for side in ("width", "height")]
        assert size == pytest.approx([72 * 5.5, 72 * 2.5], abs=0.01)


def test_svg_has_text_elements(chart, heat, tmp_path) -> None:
    figure = set_side_by_side(chart, heat)
    root = ElementTree.parse(figure.save(tmp_path / "norms.svg")).getroot()
    texts = ["".join(element.itertext()).strip() for element in root.iter(f"{SVG}text")]
    drawn = figure.mpl(theme="paper", caption=False)
    expected = ["final phase", "step", "‖ΔW‖", "role", "q", "v", chart.title, heat.title, "embed"]
    expected += [label.get_text() for label in drawn.axes[1].get_yticklabels()]
    assert set(expected) <= set(texts)


def test_fixed_height_is_tidy_or_rejected(chart, heat) -> None:
    for one in (chart, heat, set_side_by_side(chart, heat)):
        assert_tidy(one.mpl(theme="paper", width="neurips", height=2.2, caption=False))
    with pytest.raises(ValueError, match=r"height must be >= \d\.\d inches for this figure, got 0.4"):
        chart.mpl(height=0.4)


@pytest.mark.parametrize(("kind", "default"), [("pdf", False), ("svg", False), ("png", True), ("html", True)])
def test_caption_is_drawn_as_requested_and_else_next_to_a_figure_for_print(chart, tmp_path, kind, default) -> None:
    beside = tmp_path / f"norms.{kind}-caption.txt"
    plain = chart.save(tmp_path / f"norms.{kind}").read_bytes()
    assert beside.exists() == (not default)
    if not default:
        assert beside.read_text() == f"{chart.caption}\n"
    assert chart.save(tmp_path / f"with.{kind}", caption=True).read_bytes() == plain or not default
    assert (chart.save(tmp_path / f"without.{kind}", caption=False).read_bytes() == plain) == (not default)
    if kind == "pdf":
        reader = pypdf.PdfReader(tmp_path / "norms.pdf")
        assert reader.metadata["/Subject"] == chart.caption
        assert "t-interval" not in reader.pages[0].extract_text()
        assert "t-interval" in pypdf.PdfReader(tmp_path / "with.pdf").pages[0].extract_text()


def test_title_is_replaced_or_omitted(chart, tmp_path) -> None:
    assert chart.mpl(title="Mine").get_suptitle() == chart.mpl(Figure().subplots(), title="Mine").get_title() == "Mine"
    assert chart.mpl(title="").get_suptitle() == ""
    assert chart.mpl(title="").get_figheight() < chart.mpl().get_figheight()
    assert set_side_by_side(chart, chart).mpl(title="Mine").get_suptitle() == "Mine"
    assert pypdf.PdfReader(chart.save(tmp_path / "a.pdf", title="Mine")).metadata["/Title"] == "Mine"
    assert Page(chart.save(tmp_path / "a.html", title="Mine").read_text(encoding="utf-8")).title == "Mine"


def test_image_as_pgf_is_rejected(tmp_path) -> None:
    with pytest.raises(ValueError, match="cannot save a heat map of more than 1000 cells as pgf"):
        square(32).save(tmp_path / "heat.pgf")
    assert list(tmp_path.iterdir()) == []


def square(side: int) -> Chart:
    """Build a heat map with one missing cell."""
    cells = [(x, y, float(x * y)) for x in range(side) for y in range(side)]
    return Chart(pd.DataFrame(cells[1:], columns=["x", "y", "v"]), [Heat("x", "y", "v", "value")])


@pytest.mark.parametrize(("side", "images"), [(4, 0), (31, 0), (32, 1)])
def test_cells_of_a_moderate_heat_map_are_vectors(side, images, tmp_path) -> None:
    path = square(side).save(tmp_path / "heat.svg")
    root = ElementTree.parse(path).getroot()
    assert len(list(root.iter(f"{SVG}image"))) == images
    assert (len(pypdf.PdfReader(square(side).save(tmp_path / "heat.pdf")).pages[0].images) > 0) == bool(images)
    if not images:
        (mesh,) = [group for group in root.iter(f"{SVG}g") if group.get("id") == "QuadMesh_1"]
        filled = [path for path in mesh.iter(f"{SVG}path") if "fill: #" in path.get("style", "")]
        assert len(filled) == side**2 - 1
        assert path.stat().st_size < 400_000


@pytest.mark.skipif(shutil.which("xelatex") is not None, reason="LaTeX is installed")
def test_pgf_without_latex_names_the_program(chart, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="cannot save as pgf: xelatex is not installed"):
        chart.save(tmp_path / "norms.pgf")
    assert list(tmp_path.iterdir()) == []


def test_pgf_has_text_provenance_and_a_seal(chart, heat, tmp_path, monkeypatch) -> None:
    class Latex:
        def get_width_height_descent(self, text, font):
            return 0.5 * len(text) * font.get_size(), font.get_size(), 0.0

    monkeypatch.setattr("matplotlib.backends.backend_pgf.LatexManager._get_cached_or_new", Latex)
    monkeypatch.setattr(shutil, "which", lambda program: program)
    path = chart.save(tmp_path / "norms.pgf", width="icml", height=2.0)
    text = path.read_text(encoding="utf-8")
    assert json.loads(text.splitlines()[0].removeprefix("% lorascope: "))["runs"] == META["runs"]
    assert "3.250000in}{2.000000in}" in text
    assert "final phase" in text
    assert "t-interval" not in text
    require_own(path)
    assert "pgfimage" not in heat.save(tmp_path / "heat.pgf").read_text(encoding="utf-8")


def test_html_page_is_self_contained(chart, tmp_path) -> None:
    text = chart.save(tmp_path / "norms.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.loads == []
    assert page.title == chart.title
    assert "plotly.js v" in text
    assert '"showSendToCloud": false' in text or '"showSendToCloud":false' in text
    assert "Plotly.animate(" not in text.split("Plotly.newPlot(")[-1]  # none starts automatically


def test_csv_contains_only_the_data(chart, tmp_path) -> None:
    pd.testing.assert_frame_equal(pd.read_csv(chart.save(tmp_path / "norms.csv")), chart.data)


def test_unknown_extension_raises_before_writing(chart, tmp_path) -> None:
    with pytest.raises(
        ValueError, match=r"cannot save 'norms.jpeg': the extension must be one of pdf, svg, pgf, png, html, csv"
    ):
        chart.save(tmp_path / "deep" / "norms.jpeg")
    assert list(tmp_path.iterdir()) == []


def test_failed_save_leaves_the_old_file(chart, tmp_path, monkeypatch) -> None:
    path = chart.save(tmp_path / "norms.png")
    before = path.read_bytes()

    def fail(file):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        chart.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_themes_and_widths_are_applied_or_rejected(chart, tmp_path) -> None:
    dark = chart.mpl(theme="dark")
    assert mpl.colors.to_hex(dark.get_facecolor()) == mpl.colors.to_hex(dark.axes[0].get_facecolor()) == "#16181d"
    assert mpl.colors.to_hex(dark.axes[0].xaxis.label.get_color()) == "#e6e6e6"
    assert chart.plotly(theme="dark").layout.paper_bgcolor == "#16181d"
    assert "background: #16181d" in chart.save(tmp_path / "dark.html", theme="dark").read_text(encoding="utf-8")
    assert 7 <= chart.mpl(theme="paper").axes[0].xaxis.label.get_fontsize() <= 8
    for draw in (chart.mpl, chart.plotly):
        with pytest.raises(ValueError, match="theme must be one of 'light', 'dark', 'paper', got 'neon'"):
            draw(theme="neon")
    for one in (chart, replace(chart, frame=chart.data.columns[0])):
        with pytest.raises(ValueError, match=r"width must be .* got 'wide'"):
            one.mpl(width="wide")


def test_svg_uses_the_paper_theme_by_default(chart, tmp_path) -> None:
    assert b"#222222" not in chart.save(tmp_path / "paper.svg").read_bytes()
    assert b"#222222" in chart.save(tmp_path / "light.svg", theme="light").read_bytes()


def test_drawing_leaves_the_caller_settings_unchanged(chart, tmp_path) -> None:
    mpl.rcParams["lines.linewidth"] = 7.0
    before = dict(mpl.rcParams)
    chart.mpl()
    chart.save(tmp_path / "norms.svg")
    assert dict(mpl.rcParams) == before
    mpl.rcdefaults()


def test_caller_settings_are_found_in_the_artists_and_files(chart, tmp_path) -> None:
    plain = chart.save(tmp_path / "plain.png", height=3).read_bytes()
    settings = {"lines.linewidth": 3.5, "font.family": "serif", "font.size": 11.0, "savefig.bbox": "tight"}
    settings |= {"axes.prop_cycle": mpl.cycler(color=["#111111", "#999999"]), "xtick.labelsize": 6.0}
    with mpl.rc_context(settings):
        figure = chart.mpl()
        path = chart.save(tmp_path / "set.png", height=3)
    ax = figure.axes[0]
    assert [(line.get_linewidth(), line.get_color()) for line in ax.lines[:2]] == [(3.5, "#111111"), (3.5, "#999999")]
    assert (ax.xaxis.label.get_fontsize(), ax.xaxis.label.get_family()) == (11.0, ["serif"])
    assert ax.get_xticklabels()[0].get_fontsize() == 6.0
    assert path.read_bytes() != plain
    with Image.open(path) as image:
        assert image.size == (990, 900)
    with mpl.style.context("dark_background"):
        dark = chart.mpl()
    assert mpl.colors.to_hex(dark.axes[0].get_facecolor()) == "#000000"
    assert dark.axes[0].xaxis.label.get_color() == "white"


def test_images_of_the_study_do_not_depend_on_settings(chart, tmp_path) -> None:
    plain = save_small(chart, tmp_path / "plain.png").read_bytes()
    with mpl.rc_context({"lines.linewidth": 9.0}), lorascope.set_style("dark", ["#111111"]):
        assert save_small(chart, tmp_path / "set.png").read_bytes() == plain


def test_frame_grid_and_sizes_of_the_caller_are_found_in_the_artists(chart) -> None:
    plain = chart.mpl().axes[0]
    assert {side for side, spine in plain.spines.items() if spine.get_visible()} == {"left", "bottom"}
    settings = {"axes.spines.left": False, "axes.titlesize": 13.0, "lines.markersize": 9.0}
    settings |= {"grid.linestyle": ":", "grid.linewidth": 1.5, "grid.color": "#123456"}
    dots = Chart(chart.data, [Point("step", "norm", "role")], title="norms")
    with mpl.rc_context(settings):
        ax = dots.mpl().axes[0]
        own_axes = Figure().add_subplot()
        dots.mpl(ax=own_axes)
    assert not ax.spines["left"].get_visible()
    assert {*ax.collections[0].get_sizes()} == {81.0}
    line = ax.yaxis.get_gridlines()[0]
    assert (line.get_linestyle(), line.get_linewidth(), line.get_color()) == (":", 1.5, "#123456")
    # On the caller's axes, frame and title are theirs.
    assert [own_axes.spines[side].get_visible() for side in ("left", "top")] == [False, True]
    assert own_axes.title.get_fontsize() == 13.0


def test_set_style_applies_at_once_and_is_reset_without_arguments(chart) -> None:
    try:
        lorascope.set_style("dark")
        lorascope.set_style(palette={"q": "#123456"})
        assert chart.plotly().layout.paper_bgcolor == "#16181d"
        assert "#123456" in chart.plotly().to_json()
    finally:
        lorascope.set_style()
    assert chart.plotly().layout.paper_bgcolor == "#ffffff"
    assert "#123456" not in chart.plotly().to_json()


def test_set_style_applies_in_its_block_to_both_renderers(chart, tmp_path) -> None:
    with lorascope.set_style("dark", {"v": "#123456"}):
        assert [line.get_color() for line in chart.mpl().axes[0].lines[:2]] == ["#56b4e9", "#123456"]
        assert "#123456" in chart.plotly().to_json()
        assert chart.plotly().layout.paper_bgcolor == "#16181d"
        assert b"#123456" in chart.save(tmp_path / "a.svg").read_bytes()
        with lorascope.set_style(palette=["#aaaaaa", "#bbbbbb"]):
            assert [line.get_color() for line in chart.mpl().axes[0].lines[:2]] == ["#aaaaaa", "#bbbbbb"]
            assert chart.mpl(palette={"q": "#cccccc"}).axes[0].lines[0].get_color() == "#cccccc"
    assert chart.plotly().layout.paper_bgcolor == "#ffffff"
    assert b"#654321" in chart.save(tmp_path / "b.svg", palette={"q": "#654321"}).read_bytes()
    for palette, value in ((["red"], "'red'"), ({"q": "#12345g"}, "'#12345g'"), ([], "none")):
        with pytest.raises(ValueError, match=rf"palette must .* got {value}"), lorascope.set_style(palette=palette):
            pass
    with pytest.raises(ValueError, match=r"theme must be one of .* got 'neon'"), lorascope.set_style("neon"):
        pass


def test_pyplot_is_never_imported(tmp_path) -> None:
    code = (
        "import sys, pandas as pd\n"
        "from lorascope.charts.chart import Chart\n"
        "from lorascope.charts.marks import Line\n"
        "chart = Chart(pd.DataFrame({'x': [0, 1], 'y': [1, 2]}), [Line('x', 'y')])\n"
        f"chart.save({str(tmp_path / 'a.pdf')!r}); chart.save({str(tmp_path / 'a.png')!r})\n"
        "print([name for name in ('matplotlib.pyplot', 'plotly', 'torch') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_drawing_on_caller_axes(chart, heat) -> None:
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert chart.mpl(left) is left
    assert len(left.lines) == 3
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["q", "v"]
    assert left.get_title() == chart.title
    assert left.xaxis.label.get_fontsize() == mpl.rcParams["font.size"]
    heat.mpl(right)
    assert len(figure.axes) == 3


def test_jupyter_shows_plotly(chart, monkeypatch) -> None:
    import plotly.io

    for name in ("plotly_mimetype", "browser"):
        monkeypatch.setattr(plotly.io.renderers, "default", name)
        shown = chart._repr_mimebundle_()
        figure = shown["application/vnd.plotly.v1+json"]
        assert len(figure["data"]) == 6
        assert figure["config"]["showSendToCloud"] is False
        assert shown["text/plain"] == repr(chart)
        assert "image/png" not in shown  # which JupyterLab would show in place of the interactive form
        (image,) = re.findall(r'<img src="data:image/png;base64,([^"]+)" style="max-width: 100%">', shown["text/html"])
        assert base64.b64decode(image).startswith(b"\x89PNG")
    plotly.io.renderers.default = "plotly_mimetype+notebook"
    shown = set_side_by_side(chart, chart)._repr_mimebundle_()
    assert "Plotly.newPlot" in shown["text/html"]
    assert "image/png" not in shown


NOTEBOOK = """import pandas as pd
from lorascope.charts.chart import Chart
from lorascope.charts.marks import Line
Chart(pd.DataFrame({"x": [0, 1, 2], "y": [1.0, 3.0, 2.0]}), [Line("x", "y")])"""


@pytest.fixture(scope="module")
def exported_notebook(tmp_path_factory) -> Path:
    """Return the HTML that nbconvert writes of an executed notebook with one chart."""
    nbconvert, nbformat = pytest.importorskip("nbconvert"), pytest.importorskip("nbformat")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(NOTEBOOK)])
    nbconvert.preprocessors.ExecutePreprocessor(timeout=300).preprocess(notebook, {})
    ((output,),) = (cell["outputs"] for cell in notebook.cells)
    assert "application/vnd.plotly.v1+json" in output["data"]  # JupyterLab shows the interactive form
    body, _ = nbconvert.HTMLExporter().from_notebook_node(notebook)
    path = tmp_path_factory.mktemp("notebook") / "notebook.html"
    path.write_text(body)
    return path


@pytest.mark.slow
def test_nbconvert_shows_a_chart_as_an_image(exported_notebook):
    (content,) = re.findall(r'<img [^>]*src="data:image/png;base64,([^"]+)"', exported_notebook.read_text())
    with Image.open(io.BytesIO(base64.b64decode(content))) as drawn:
        assert drawn.width == 495
        assert len(drawn.convert("RGB").getcolors()) > 2
    assert len(content) < 20_000


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH: apt-get install chromium")
def test_browser_draws_the_image_of_an_exported_notebook(exported_notebook):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])  # required for root
        page = browser.new_page()
        page.goto(exported_notebook.as_uri(), wait_until="commit")  # its other scripts come from a network
        assert page.locator("img").evaluate("image => image.decode().then(() => image.naturalWidth)") == 495
        browser.close()


def boxes(figure: Figure) -> dict[str, list[Bbox]]:
    """Return the boxes of the text on a figure, by kind."""
    drawer = figure.canvas.get_renderer()
    figure.draw_without_rendering()
    axes = [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]
    return {
        "x": [label.get_window_extent(drawer) for ax in axes for label in shown(ax.xaxis)],
        "y": [label.get_window_extent(drawer) for ax in axes for label in shown(ax.yaxis)],
        "axes": [ax.get_tightbbox(drawer) for ax in figure.axes],
        "foot": [item.get_window_extent(drawer) for item in [*figure.legends, *figure.texts]],
    }


def shown(axis: matplotlib.axis.Axis) -> list[Text]:
    """Return the labels of the ticks between the ends of an axis."""
    low, high = sorted(axis.get_view_interval())
    return [
        tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high and tick.label1.get_visible()
    ]


def overlap(one: Bbox, other: Bbox) -> bool:
    common = Bbox.intersection(one, other)
    return common is not None and common.width > 1 and common.height > 1


def assert_tidy(figure: Figure) -> None:
    found = boxes(figure)
    for letter in "xy":
        assert not any(map(overlap, found[letter], found[letter][1:])), f"names on {letter} overlap"
    parts = found["axes"] + found["foot"]
    assert not any(overlap(one, other) for n, one in enumerate(parts) for other in parts[:n]), "parts overlap"
    whole = figure.bbox.padded(1)
    assert all(whole.x0 <= box.x0 and box.x1 <= whole.x1 for box in parts), "cut off at the side"
    assert all(whole.y0 <= box.y0 and box.y1 <= whole.y1 for box in parts), "cut off above or below"


@pytest.mark.parametrize("width", ["column", "page"])
def test_thirty_layers_are_legible(heat, width) -> None:
    figure = heat.mpl(theme="paper", width=width)
    assert_tidy(figure)
    names = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert {"embed", "head", "10", "20"} <= set(names)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(heat.y.order)
    assert heat.plotly().layout.xaxis.ticktext[0] == "embed"
    assert 8 < len(heat.plotly().layout.xaxis.ticktext) < 32


@pytest.mark.parametrize("width", ["column", "page"])
def test_no_text_overlaps_or_is_cut_off(chart, heat, width) -> None:
    assert_tidy(chart.mpl(theme="paper", width=width))
    assert_tidy(set_side_by_side(chart, heat).mpl(theme="paper", width=width))


def test_long_names_are_vertical_and_have_room() -> None:
    names = [f"model.layers.{n}.self_attn.q_proj" for n in range(10)]
    chart = Chart(pd.DataFrame({"module": names, "norm": range(10)}), [Bar("module", "norm")])
    figure = chart.mpl()
    assert_tidy(figure)
    assert {label.get_rotation() for label in figure.axes[0].get_xticklabels()} == {90}
    assert figure.axes[0].get_window_extent().height / figure.dpi > 1.2
    axis = chart.plotly().layout
    assert axis.xaxis.tickangle == -90
    assert axis.margin.b > 0.5 * 12 * len(names[0])


def test_small_multiples_are_tidy(heat) -> None:
    frames = [heat.data.assign(step=step) for step in range(0, 200, 10)]
    framed = Chart(pd.concat(frames), heat.marks, x=heat.x, y=heat.y, frame="step", title=heat.title)
    assert_tidy(framed.mpl(theme="paper"))


def test_panel_titles_are_below_the_buttons(chart) -> None:
    assert set_side_by_side(chart, chart).plotly().layout.margin.t >= 22 + 18  # pixels: the buttons, and a line of text


def test_slider_is_between_axis_and_caption(chart) -> None:
    framed = Chart(chart.data, [Line("step", "norm")], frame="role", caption="Below.", x=Axis(label="step"))
    layout = framed.plotly().layout
    (slider,), (caption,) = layout.sliders, [note for note in layout.annotations if note.text == "Below."]
    label = 40  # pixels for tick labels and the label of the axis
    assert label < slider.pad.t < -caption.yshift - 60
    assert -caption.yshift + 15 < layout.margin.b


def test_long_label_stays_inside_the_figure(tmp_path):
    label = "a recipe whose name says every hyper-parameter, one after the other, " * 2
    data = pd.DataFrame({"x": [0, 1] * 2, "y": [0.0, 1, 2, 3], "who": [label] * 2 + ["short"] * 2})
    chart = Chart(data, [Line("x", "y", "who")])
    figure = chart.mpl()
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
    chart.save(tmp_path / "long.png", width="column")


def test_heat_with_names_on_both_axes_shows_them_all():
    names = [f"a rather long score {letter}" for letter in "abcdefghijkl"]
    data = pd.DataFrame([(one, two, 0.5) for one in names for two in names], columns=["one", "two", "value"])
    axes = Chart(data, [Heat("two", "one", "value")]).mpl().axes[0]
    for axis in (axes.xaxis, axes.yaxis):
        assert [label.get_text() for label in axis.get_ticklabels()] == names


def test_saving_to_a_symbolic_link_writes_the_file_it_points_to(chart: Chart, tmp_path: Path) -> None:
    target, link = tmp_path / "figure.svg", tmp_path / "link.svg"
    target.touch()
    link.symlink_to(target)
    chart.save(link)
    assert link.is_symlink()
    assert target.read_bytes().startswith(b"<?xml")
    assert {file.name for file in tmp_path.iterdir()} == {"figure.svg", "link.svg", "link.svg-caption.txt"}


@pytest.mark.parametrize(
    ("names", "room", "kept"),
    [
        (["LoRA", "full fine-tuning", "AdaLoRA"], 150, ["LoRA", "full fine-tuning", "AdaLoRA"]),
        (["a", "b", "c"], 4, ["a"]),
    ],
    ids=["a long name between short ones", "no room"],
)
def test_every_name_that_fits_is_written(names: list[str], room: float, kept: list[str]) -> None:
    ticks = Scale(Axis(label="x"), tuple(names)).ticks(room, size=6, across=False)
    assert ticks.names == kept
