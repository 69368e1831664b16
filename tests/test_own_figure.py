"""Figures as an author arranges them: panels on axes, chosen steps, rows that fit a width, and every tick."""

from __future__ import annotations

import html
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from numpydoc.docscrape import NumpyDocString
from readers import Mpl
from test_save import assert_tidy

import lorascope
from lorascope.charts.chart import Chart, Drawable, set_side_by_side, wrap
from lorascope.charts.marks import Axis, Bar, Heat, Line, Mark, Point, Rule, Text
from lorascope.charts.text_wrapping import wrap_text
from lorascope.pages.embedded_charts import embed


def lines(title: str = "", **settings) -> Chart:
    data = pd.DataFrame({"x": [0, 1, 0, 1], "y": [1.0, 2, 3, 4], "recipe": list("aabb")})
    return Chart(data, [Line("x", "y", "recipe")], title=title, y=Axis(label="norm"), **settings)


def cells(title: str = "") -> Chart:
    data = pd.DataFrame({"x": list("pq"), "y": list("uv"), "v": [1.0, 2.0]})
    return Chart(data, [Heat("x", "y", "v", "rank", text=".1f")], title=title)


def replay(steps: int = 10) -> Chart:
    data = pd.DataFrame(
        [(step, x, float(step + x)) for step in range(steps) for x in (0, 1)], columns=["step", "x", "y"]
    )
    return Chart(data, [Line("x", "y")], frame="step", title="replay")


def titles(figure: Figure) -> list[str]:
    return [ax.get_title(loc="left") for ax in figure.axes if ax.get_label() != "<colorbar>"]


def rows(figure: Figure) -> list[int]:
    """Return the number of panels in each row."""
    tops = [round(ax.get_subplotspec().get_position(figure).y1, 3) for ax in Mpl.panels_of(figure)]
    return [tops.count(top) for top in dict.fromkeys(tops)]


def test_panels_are_single_charts_in_order() -> None:
    joined = set_side_by_side(lines("left"), cells("right"))
    assert [chart.title for chart in joined.panels] == ["left", "right"]
    chart = lines()
    assert chart.panels == (chart,)
    assert joined.panels[1].mpl().axes


def test_panels_are_drawn_on_axes_of_the_caller() -> None:
    figure = Figure(figsize=(6, 2), layout="constrained")
    axes = figure.subplots(1, 2)
    joined = set_side_by_side(lines("left"), cells("right"))
    assert joined.mpl(axes=axes) is axes
    assert [line.get_ydata().tolist() for line in axes[0].lines] == [[1, 2], [3, 4]]
    assert [ax.get_title() for ax in axes] == ["left", "right"]
    assert [text.get_text() for text in axes[1].texts] == ["1.0", "2.0"]
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["a", "b"]
    assert axes[1].get_legend() is None
    assert len(figure.axes) == 3  # with the color bar


def test_steps_are_drawn_on_axes_of_the_caller() -> None:
    axes = Figure().subplots(2, 2)
    replay().mpl(axes=axes, steps=[0, 3, 7, 9])
    assert [ax.get_title() for ax in axes.flat] == [f"step {step}" for step in (0, 3, 7, 9)]
    assert [ax.lines[0].get_ydata().tolist() for ax in axes.flat] == [[0, 1], [3, 4], [7, 8], [9, 10]]
    (ax,) = Figure().subplots(1, 1, squeeze=False).flat
    replay().mpl(ax, steps=[3])
    assert ax.get_title() == "replay, step 3"
    axes = Figure().subplots(1, 3)
    set_side_by_side(lines("still"), replay()).mpl(axes=axes, steps=[0, 9], legend=False)
    assert [ax.get_title() for ax in axes] == ["still", "replay, step 0", "replay, step 9"]


def test_wrong_number_of_axes_is_one_clear_line() -> None:
    left, right = Figure().subplots(1, 2)
    with pytest.raises(ValueError, match=r"^cannot draw 2 panels on 1 axes: pass axes=\[...\] with one for each$"):
        set_side_by_side(lines(), lines()).mpl(left)
    with pytest.raises(ValueError, match=r"^cannot draw 1 panels on 2 axes"):
        lines().mpl(axes=[left, right])
    with pytest.raises(ValueError, match=r"^cannot draw 10 panels on 2 axes: choose as many steps=\[...\]$"):
        replay().mpl(axes=[left, right])


def test_steps_select_frames_in_every_renderer_and_file(tmp_path: Path) -> None:
    figure = replay(20).mpl(steps=range(10))
    assert titles(figure) == [f"step {step}" for step in range(10)]  # more than without steps
    assert [frame.name for frame in replay().plotly(steps=[2, 5]).frames] == ["2", "5"]
    assert replay().plotly(steps=[2, 5]).data[0].y.tolist() == [5, 6]
    table = pd.read_csv(replay().save(tmp_path / "a.csv", steps=[2]))
    assert table["step"].tolist() == [2, 2]
    assert replay().save(tmp_path / "a.svg", steps=[2, 5]).read_text().count("step ") == 2
    with pytest.raises(ValueError, match="step must be one of 0, 1, 2, got 7"):
        replay(3).mpl(steps=[0, 7])
    for still in (lines(), set_side_by_side(lines(), lines())):
        with pytest.raises(ValueError, match="cannot select frames"):
            still.mpl(steps=[0])


@pytest.mark.parametrize(
    ("count", "width", "expected"),
    [(4, "page", [4]), (4, "icml", [2, 2]), (5, "page", [5]), (5, "neurips", [3, 2]), (3, 1.5, [1, 1, 1])],
)
def test_rows_of_panels_fit_the_width(count: int, width: str | float, expected: list[int]) -> None:
    figure = wrap([lines(f"panel {number}") for number in range(count)], count).mpl(width=width)
    assert rows(figure) == expected
    assert_tidy(figure)


@pytest.mark.parametrize(("width", "expected"), [("page", [4, 4]), ("icml", [2, 2, 2, 2])])
def test_rows_of_small_multiples_fit_the_width(width: str, expected: list[int]) -> None:
    figure = replay(20).mpl(width=width)
    assert rows(figure) == expected
    assert_tidy(figure)


def joined_bars() -> Drawable:
    names = [f"module {number}" for number in "abcdefghijkl"]
    data = pd.DataFrame({"module": names, "norm": np.arange(12.0)})
    return wrap([Chart(data, [Bar("module", "norm")], title=f"seed {seed}") for seed in range(4)], 4)


@pytest.mark.parametrize("width", ["column", "neurips", "page"])
def test_every_drawn_mark_keeps_its_tick(width: str) -> None:
    for drawable in (joined_bars(), frames_of_ranks()):
        figure = drawable.mpl(width=width)
        assert_tidy(figure)
        for ax in Mpl.panels_of(figure):
            drawn = {round(bar.get_x() + bar.get_width() / 2, 6) for bar in ax.patches}
            drawn |= {float(x) for dots in ax.collections for x in dots.get_offsets()[:, 0]}
            assert drawn <= set(ax.get_xticks())


def frames_of_ranks() -> Chart:
    """Build dots at ranks that are not evenly spaced, so that none implies another."""
    ranks = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    data = pd.DataFrame([(rank, step, 1 / rank) for step in range(8) for rank in ranks], columns=["r", "step", "y"])
    return Chart(data, [Point("r", "y")], frame="step", x=Axis(label="rank", order=ranks))


PUBLIC_MARKS = ["Axis", "Band", "Bar", "Heat", "Line", "Point", "Rule", "Text"]


@pytest.mark.parametrize("name", PUBLIC_MARKS)
def test_public_mark_documents_all_its_settings(name: str) -> None:
    mark = getattr(lorascope, name)
    documented = [one for entry in NumpyDocString(mark.__doc__)["Parameters"] for one in entry.name.split(", ")]
    assert sorted(documented) == sorted(field.name for field in fields(mark))


def test_all_marks_are_public() -> None:
    assert {kind.__name__ for kind in Mark.__subclasses__() if kind.__module__ == Mark.__module__} | {"Axis"} == {
        *PUBLIC_MARKS
    }
    chart = lorascope.Chart(pd.DataFrame({"x": [0], "y": [1.0]}), [lorascope.Point("x", "y")])
    assert lorascope.stack_vertically(chart, lorascope.set_side_by_side(chart, chart)).panels == (chart,) * 3


@pytest.mark.parametrize(
    ("math", "tags"),
    [
        (r"\|\Delta W\|_F", "‖Δ<i>W</i>‖<sub><i>F</i></sub>"),
        (r"W - W_0", "<i>W</i>−<i>W</i><sub>0</sub>"),
        (r"s B A^\top", "<i>s</i><i>B</i><i>A</i><sup>⊤</sup>"),
        (r"\lambda_{i+1} \times 10^{-3}", "λ<sub><i>i</i>+1</sub>×10<sup>−3</sup>"),
        (r"\frac{\alpha}{\sqrt{r}} B A", "α/(√<i>r</i>)<i>B</i><i>A</i>"),
        (r"\sqrt{r_{k}+1}", "√(<i>r</i><sub><i>k</i></sub>+1)"),
        (r"\frac{W_0}{10}", "<i>W</i><sub>0</sub>/10"),
        (r"\mathcal{L} \in \mathbb{RA}", "ℒ∈ℝ<i>A</i>"),
        (r"\left( x \right)", "(<i>x</i>)"),
        (r"\hat{W}_\mathrm{max} < \mathbf{x}", "<i>Ŵ</i><sub>max</sub>&lt;<b>x</b>".replace("Ŵ", "W\u0302")),
    ],
)
def test_math_in_labels_of_the_author_is_drawn_by_both_renderers(math: str, tags: str) -> None:
    text = f"norm ${math}$ of a layer"
    chart = Chart(
        pd.DataFrame({"x": list("pq"), "y": list("uv"), "v": [1.0, 2.0]}),
        [Heat("x", "y", "v", text), Rule(x="p", label=text)],
        **{"title": text, "x": Axis(label=text), "y": Axis(label=text)},
    )
    figure = chart.mpl(width="page")
    figure.draw_without_rendering()
    ax, bar = figure.axes
    for label in (ax.get_xlabel(), ax.get_ylabel(), bar.get_ylabel(), figure.get_suptitle(), ax.texts[0].get_text()):
        assert " ".join(label.split()) == text
    layout = chart.plotly().layout
    drawn = [layout.xaxis.title.text, layout.yaxis.title.text, layout.title.text, layout.shapes[0].label.text]
    for label in (*drawn, layout.coloraxis.colorbar.title.text):
        assert label.replace("<br>", " ") == f"norm {tags} of a layer"


@pytest.mark.parametrize("text", ["$5 to $6", "a $ b $ c", r"$\frac$", r"$\input{x}$", "$}$", "$", r"$\frac{a$"])
def test_dollar_signs_without_math_are_drawn_as_they_are(text: str) -> None:
    chart = lines(text)
    figure = chart.mpl(width="page")
    figure.draw_without_rendering()
    assert figure.get_suptitle() == text.replace("$", r"\$")
    assert html.unescape(chart.plotly().layout.title.text) == text


def test_math_in_labels_is_drawn_and_texts_at_points_are_not_math() -> None:
    data = pd.DataFrame({"x": ["$r_8$", "$5"], "y": [1.0, 2.0], "recipe": ["$c$", "$d"], "words": ["$e$", "f"]})
    chart = Chart(data, [Bar("x", "y", "recipe"), Text("x", "y", "words")])
    figure = chart.mpl(caption=False)
    (ax,), (legend,) = figure.axes, figure.legends
    names = [text.get_text() for text in (*ax.get_xticklabels(), *legend.get_texts(), *ax.texts)]
    assert names == ["$r_8$", r"\$5", "$c$", r"\$d", r"\$e\$", "f"]
    assert set(ax.get_legend_handles_labels()[1]) == {"$c$", r"\$d"}
    drawn = chart.plotly()
    assert drawn.layout.xaxis.ticktext == ("<i>r</i><sub>8</sub>", "&#36;5")
    assert [trace.name for trace in drawn.data if trace.showlegend] == ["<i>c</i>", "&#36;d"]
    assert "&#36;e&#36;" in str(drawn.data)


@pytest.mark.parametrize(
    ("math", "plain"),
    [
        (r"\|W - W_0\|_F", "‖W−W₀‖_F"),
        (r"10^{-3} \times \sigma_{i+1}", "10⁻³×σᵢ₊₁"),
        (r"B A^\top < \hat{x}_\mathrm{max}", "BAᵀ<x\u0302ₘₐₓ"),
        (r"\frac{a}{b}", "a/b"),
        (r"\sqrt[3]{a}", r"$\sqrt[3]{a}$"),
        (r"\mathcal{D}", "D"),
    ],
)
def test_math_in_captions_is_unicode(math: str, plain: str) -> None:
    chart = replace(lines(), caption=f"The norm ${math}$, for $5.")
    shown = f"The norm {plain}, for $5."
    (caption,) = chart.mpl().texts
    assert caption.get_text().replace("\n", " ").replace(r"\$", "$") == shown
    assert html.unescape(chart.plotly().layout.annotations[-1].text.replace("<br>", " ")) == shown
    assert embed(chart).caption == shown


def test_lines_do_not_break_differences() -> None:
    assert wrap_text("Cosine of W − W₀", 80, 9) == "Cosine of\nW − W₀"
    assert wrap_text("all − 1/3, step 0, and some − 1/3 too", 100, 9) == "all − 1/3, step 0,\nand some − 1/3 too"


def test_lines_do_not_break_math() -> None:
    formula = r"$\mathrm{rank}(W - W_0) \le r + 1$"
    lines = wrap_text(f"The bound {formula} holds for each of the modules, and {formula} too", 150, 8).split("\n")
    assert len(lines) > 3
    assert sum(formula in line for line in lines) == 2
