"""Contract of every figure: the example in its documentation is drawn by both renderers."""

from __future__ import annotations

import ast
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from drawn_figures import faults
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh

import lorascope as ls
from lorascope import plots
from lorascope.charts.chart import Drawable
from lorascope.inputs import tasks
from lorascope.methods import LISA, Adapprox, FourierFT

pytestmark = pytest.mark.slow
FIGURES = [name for name, entry in plots.FIGURES.items() if entry.draw.__module__.startswith("lorascope.")]


TRACES = {
    "line": "scatter",
    "band": "scatter",
    "point": "scatter",
    "text": "scatter",
    "bar": "bar",
    "heat": "heatmap",
}  # by the kind of a mark


def adjust(method: ls.Method) -> ls.Method:
    """Fit a method of the gallery to a model of two blocks and width 32."""
    if isinstance(method, FourierFT) and method.center:
        return replace(method, center=10.0, width=20.0)
    if isinstance(method, LISA):
        return replace(method, n_active=min(method.n_active or 1, 2))
    return replace(method, min_dim=8) if isinstance(method, Adapprox) else method


@pytest.fixture(scope="module")
def runs(bert, task, tmp_path_factory) -> dict[str, Any]:
    """Runs by the names that the examples use, of a tiny model."""
    folder = str(Path(__file__).parents[2] / "docs" / "_ext")
    sys.path.insert(0, folder)
    try:
        from gallery_runs import STUDENT, train_gallery_runs
    finally:
        sys.path.remove(folder)

    def load_task(name: str) -> tasks.Task:
        rows = task.table[["text", "label", "group"]].iloc[zlib.crc32(name.encode()) % 40 :]  # for another data hash
        return tasks.from_frame(rows, name.replace("/", "-"))

    STUDENT.update(steps=10, eval_every=10, test_size=32)  # layouts do not depend on what the students have learned
    return train_gallery_runs(tmp_path_factory.mktemp("gallery"), bert, load_task, adjust)


def test_every_figure_has_an_example() -> None:
    assert [name for name in FIGURES if not plots.FIGURES[name].example] == []


def draw_example(name: str, runs: dict[str, Any]) -> Drawable:
    *statements, last = ast.parse(plots.FIGURES[name].example).body
    assert isinstance(last, ast.Expr)
    scope = {"ls": ls, **runs}
    exec(compile(ast.Module(statements, []), name, "exec"), scope)
    chart: Drawable = eval(compile(ast.Expression(last.value), name, "eval"), scope)
    return chart


@pytest.mark.parametrize(("width", "theme"), [("page", "light"), ("column", "paper"), ("page", "dark")])
@pytest.mark.parametrize("name", FIGURES)
def test_example_is_readable(name: str, width: str, theme: str, runs: dict[str, Any]) -> None:
    assert faults(name, draw_example(name, runs), width=width, theme=theme) == []


@pytest.mark.parametrize("name", FIGURES)
def test_example_has_the_title_of_its_quantity_and_panels_have_their_own(name: str, runs: dict[str, Any]) -> None:
    drawn: Any = draw_example(name, runs)
    titles = [drawn.title, *(chart.title for chart in drawn.panels)]
    assert all(titles)
    literals = (
        node.value for node in ast.walk(ast.parse(plots.FIGURES[name].example)) if isinstance(node, ast.Constant)
    )
    assert drawn.title not in set(literals)  # the label of a recipe


def _has_cells(ax: Axes) -> bool:
    """Return whether axes have a heat map, as an image or as vectors."""
    return bool(ax.images) or any(isinstance(collection, QuadMesh) for collection in ax.collections)


@pytest.mark.parametrize("name", FIGURES)
def test_example_is_drawn_by_both_renderers(name: str, runs: dict[str, Any], tmp_path: Path) -> None:
    drawn = draw_example(name, runs)
    panels = [chart for row in drawn.rows() for chart in row]
    assert all(len(chart.data) for chart in panels)
    figure = drawn.mpl()
    assert len(figure.axes) >= len(panels)
    plt.close(figure)
    kinds = {mark.kind for chart in panels for mark in chart.marks}
    panels_of_cells = [ax for ax in figure.axes if ax.get_label() != "<colorbar>" and _has_cells(ax)]
    assert bool(panels_of_cells) == ("heat" in kinds)
    traces = {trace.type for trace in drawn.plotly().data if trace.showlegend is False}
    assert {TRACES[kind] for kind in kinds & TRACES.keys()} <= traces
    for kind in ("png", "html"):
        assert drawn.save(tmp_path / f"figure.{kind}").stat().st_size > 1000
