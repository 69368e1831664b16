"""``explore``: the selected rows match the table of the run, the chart and the page."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
from planted import MODULES, Values, plant, profile
from playwright.sync_api import Locator, Page, TimeoutError, expect, sync_playwright
from test_cli import modules_after
from traitlets import TraitError

import lorascope as ls
from lorascope.charts.marks import Point
from lorascope.plots.explore import ALL, MOST_DRAWN, MOST_NAMED, WHOLE_RUN, Explorer
from lorascope.runs.run import Run
from lorascope.schema.records import QUANTITIES

VALUES = profile(words=3.0, q=1.0, up=2.0) | {
    ("loss", ""): {step: 1 / step for step in range(1, 10)},
    ("importance", "h.0.q"): {0: [0.5, 0.25], 9: [4.0, 6.0]},
    ("importance", "h.1.q"): {9: [3.0, 1.0]},
    ("weight_norm", "words"): {9: float("nan")},
    ("step_norm", "h.0.q"): {9: 0.5},
    ("step_norm", "h.1.q"): {9: float("nan")},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return plant(tmp_path_factory.mktemp("runs"), "tiny", VALUES)


def scale(values: Values, factor: float) -> Values:
    """Return planted values times a factor."""
    return {name: {step: np.multiply(value, factor) for step, value in steps.items()} for name, steps in values.items()}


def numbers(sent: Any) -> list[Any]:
    """Return an array as a list; plotly sends it as a list or as bytes in base64."""
    return np.frombuffer(base64.b64decode(sent["bdata"]), sent["dtype"]).tolist() if "bdata" in sent else list(sent)


def sent(explorer: Explorer) -> dict[str, Any]:
    """Return the figure sent to the browser."""
    return dict(json.loads(explorer.figure))


def drawn(explorer: Explorer) -> dict[str, list[tuple[Any, float]]]:
    """Return the dots of this figure: name when hovering -> (position, height), with layers by name."""
    found: dict[str, list[tuple[Any, float]]] = {}
    for trace in sent(explorer)["data"]:
        if trace["mode"] == "markers" and "hovertemplate" in trace:
            name = re.findall(r"<extra>\w+=(.*)</extra>", trace["hovertemplate"])[0]
            x = [name for (name,) in trace["customdata"]] if "customdata" in trace else numbers(trace["x"])
            found[name] = list(zip(x, numbers(trace["y"]), strict=True))
    return found


def test_explorer_selects_the_rows_that_pandas_selects(run: Run) -> None:
    explorer, table = ls.explore(run), run.table
    assert explorer.quantity == "update_norm"
    assert (explorer.step, explorer.layers, explorer.roles) == (9, [ALL], [ALL])
    found = table[(table["quantity"] == "update_norm") & (table["step"] == 9)]
    pd.testing.assert_frame_equal(explorer.rows, found, check_categorical=False)
    explorer.step = 4
    explorer.layers = ["1", "embed"]
    found = table.query("quantity == 'update_norm' and step == 4 and (layer == 1 or role == 'embed')")
    pd.testing.assert_frame_equal(explorer.rows, found, check_categorical=False)
    explorer.roles = ["q"]
    found = table.query("quantity == 'update_norm' and step == 4 and layer == 1 and role == 'q'")
    pd.testing.assert_frame_equal(explorer.rows, found, check_categorical=False)
    assert list(explorer.rows["value"]) == [0.25]


def test_explorer_chart_draws_the_selected_rows(run: Run) -> None:
    explorer = ls.explore(run)
    assert drawn(explorer) == {
        "q": [("0", 1.0), ("1", 0.5)],
        "ffn_in": [("0", 2.0), ("1", 1.0)],
        "embed": [("embed", 3.0)],
    }
    explorer.step = 4
    explorer.layers = ["1"]
    assert drawn(explorer) == {"q": [("1", 0.25)], "ffn_in": [("1", 0.5)]}
    assert sorted(explorer.chart.data["value"]) == sorted(explorer.rows["value"])


def test_explorer_vertical_axis_is_the_same_at_every_step(run: Run) -> None:
    explorer = ls.explore(run)
    ends = sent(explorer)["layout"]["yaxis"]["range"]
    explorer.step = 0
    assert sent(explorer)["layout"]["yaxis"]["range"] == ends
    assert ends[0] < 0 < 3 < ends[1]


def test_explorer_draws_quantities_of_the_whole_run_over_the_steps(run: Run) -> None:
    explorer = ls.explore(run)
    explorer.quantity = "loss"
    assert drawn(explorer) == {run.label: [(step, 1 / step) for step in range(1, 10)]}
    explorer.step = 4
    assert list(explorer.rows["value"]) == [0.25]
    assert [shape["x0"] for shape in sent(explorer)["layout"]["shapes"]] == [4]
    assert explorer.options["layers"] == [ALL, WHOLE_RUN]


def test_explorer_draws_the_sum_of_a_quantity_not_next_to_its_parts(tmp_path: Path) -> None:
    parts = {("grad_norm", module): {9: value} for module, value in (("h.0.q", 3.0), ("h.1.q", 4.0))}
    explorer = ls.explore(plant(tmp_path, "tiny", VALUES | parts | {("grad_norm", ""): {9: 5.0}}))
    explorer.quantity = "grad_norm"
    assert (explorer.layers, explorer.roles) == ([ALL], [ALL])
    assert explorer.rows["module"].tolist() == ["h.0.q", "h.1.q"]
    assert sorted(explorer.chart.data["value"]) == [3.0, 4.0]
    assert WHOLE_RUN not in explorer.options["roles"]
    explorer.layers = [WHOLE_RUN]
    assert explorer.rows["value"].tolist() == [5.0]
    assert explorer.chart.x.label == "step"


def test_explorer_draws_components_of_one_module_by_index(run: Run) -> None:
    explorer = ls.explore(run)
    explorer.quantity = "importance"
    assert drawn(explorer) == {run.label: [("0", 4.0), ("0", 6.0), ("1", 3.0), ("1", 1.0)]}
    explorer.layers = ["1"]
    assert drawn(explorer) == {run.label: [(0, 3.0), (1, 1.0)]}
    assert explorer.chart.x.label == "rank id"


def test_explorer_draws_the_largest_neurons_of_several_modules_by_name(tmp_path: Path) -> None:
    sizes = np.linspace(1, 2, 40)
    values = {
        ("sensitivity_out", "h.0.q"): {0: sizes, 9: sizes},
        ("sensitivity_out", "h.1.up"): {0: sizes, 9: 3 * sizes},
    }
    explorer = ls.explore(plant(tmp_path, "tiny", values))
    assert explorer.quantity == "sensitivity_out"
    names = [f"1 ffn_in {number}" for number in range(39, 39 - MOST_NAMED, -1)]
    assert explorer.chart.y.order == tuple(names)
    data = explorer.chart.data.set_index("neuron")["value"]
    assert list(data[names]) == pytest.approx(list(3 * sizes[::-1][:MOST_NAMED]))
    assert len(explorer.rows) == 80
    assert explorer.listing["cells"][0][-3:] == ["39", "6", "h.1.up"]
    explorer.step = 0  # both modules are equal, and the axis stays
    assert set(explorer.chart.data["role"]) == {"q", "ffn_in"}
    assert explorer.chart.x.limits[1] > 6
    label = int(explorer.chart.data["value"].idxmax())
    explorer.selection = [row for row, cell in explorer._cells.items() if cell == label]
    assert explorer.selected["value"].tolist() == [2.0]
    explorer.layers = ["1"]
    assert explorer.chart.x.label == "neuron"


def test_explorer_offers_only_options_with_rows(run: Run) -> None:
    explorer = ls.explore(run)
    assert explorer.options["quantity"] == ["loss", "update_norm", "step_norm", "importance"]  # no weight_norm
    assert explorer.symbols["update_norm"] == "‖W − W₀‖"
    assert explorer.options["layers"] == [ALL, "embed", "0", "1"]
    explorer.layers = ["embed"]
    assert explorer.options["roles"] == [ALL, "embed"]
    explorer.quantity = "step_norm"
    explorer.layers = ["1"]  # its value is NaN there
    assert explorer.rows["value"].isna().all()
    assert [row[-2] for row in explorer.listing["cells"]] == ["unknown"]
    explorer.layers = ["0"]
    explorer.quantity = "update_norm"
    explorer.layers = ["embed"]
    explorer.quantity = "importance"  # not recorded for the embedding
    assert explorer.layers == [ALL]
    assert explorer.options["roles"] == [ALL, "q"]
    explorer.step = 0
    explorer.layers = ["1"]  # not recorded at step 0
    assert explorer.options["step"] == [9]
    assert len(explorer.rows) == 2


def test_explorer_keeps_layers_and_nearest_step_for_another_quantity(run: Run) -> None:
    explorer = ls.explore(run)
    explorer.layers = ["1"]
    explorer.step = 4
    explorer.quantity = "importance"
    assert (explorer.layers, explorer.step) == (["1"], 9)
    explorer.quantity = "loss"
    explorer.step = 5
    explorer.quantity = "update_norm"
    assert explorer.step == 4


def test_explorer_draws_no_line_for_two_modules_of_one_role_in_one_layer(tmp_path: Path) -> None:
    values = {("update_norm", module): {9: 1.0} for module in ("h.0", "h.0.q", "h.1.q")}
    double = {"module": "h.0.q2", "stack": "", "layer": 0, "role": "q"}
    up = {("update_norm", module): {9: 2.0} for module in ("h.0.q2", "h.0.up", "h.1.up")}
    chart = ls.explore(plant(tmp_path, "double", values | up, modules=[*MODULES, double])).chart
    assert len(chart.data) == 5
    assert set(chart.table(chart.marks[0])["role"]) == {"ffn_in"}


def test_explorer_joins_blocks_and_nothing_else() -> None:
    explorer = ls.explore(ls.example("full"))
    explorer.quantity = "update_norm"
    (line,) = [mark for mark in explorer.chart.marks if isinstance(mark, ls.Line)]
    joined = explorer.chart.table(line).astype({"place": "str"}).groupby("stretch")["place"].unique()
    assert {len(places) for stretch, places in joined.items() if not stretch.startswith("blocks")} == {1}
    assert any(len(places) > 1 for places in joined)


def test_explorer_draws_a_block_not_next_to_its_modules(tmp_path: Path) -> None:
    values = {("update_norm", module): {9: 1.0} for module in ("words", "h.0", "h.0.q", "h.1.q")}
    explorer = ls.explore(plant(tmp_path, "block", values))
    assert set(explorer.rows["role"]) == {"embed", "q"}
    assert explorer.options["roles"] == [ALL, "q", "embed", "block"]
    explorer.roles = ["block"]
    assert explorer.rows["module"].tolist() == ["h.0"]


def test_explorer_reaches_every_recorded_quantity(tmp_path: Path) -> None:
    values = {(name, "" if name == "loss" else "h.0.q"): {9: 1.0} for name in QUANTITIES}
    explorer = ls.explore(plant(tmp_path, "all", values))
    assert explorer.options["quantity"] == list(QUANTITIES)
    for name in QUANTITIES:
        explorer.quantity = name
        assert explorer.rows["value"].tolist() == [1.0]


def test_explorer_role_has_one_color_at_every_step_and_for_every_choice(tmp_path: Path) -> None:
    values = {("update_norm", "h.0.q"): {4: 1.0, 9: 1.0}, ("update_norm", "h.0.up"): {9: 2.0}}
    explorer = ls.explore(plant(tmp_path, "late", values | {("update_norm", "words"): {4: 3.0, 9: 3.0}}))

    def colors() -> dict[str, Any]:
        traces = [trace for trace in sent(explorer)["data"] if "meta" in trace]
        return {trace["legendgroup"]: trace["marker"]["color"][0] for trace in traces}

    last = colors()
    assert len(set(last.values())) == 3
    explorer.step = 4
    assert colors() == {name: last[name] for name in ("role=q", "role=embed")}
    explorer.layers = ["0", "embed"]
    assert colors()["role=q"] == last["role=q"]


def test_multiples_have_a_panel_per_role_on_one_axis(run: Run, tmp_path: Path) -> None:
    explorer = ls.explore(run)
    explorer.view = "multiples"
    charts = explorer.chart.panels
    assert [chart.title for chart in charts] == ["embed", "q", "ffn_in"]
    assert len({chart.y.limits for chart in charts}) == 1
    assert [list(chart.data["value"]) for chart in charts] == [[3.0], [1.0, 0.5], [2.0, 1.0]]
    assert explorer.listing["title"] == "update norm, after step 9"
    assert explorer.chart.save(tmp_path / "roles.pdf").stat().st_size > 1000
    heights = dict(dots(explorer))
    assert set(heights) == {3.0, 1.0, 0.5, 2.0}
    explorer.selection = heights[0.5]
    assert explorer.selected[["layer", "role", "value"]].to_numpy().tolist() == [[1, "q", 0.5]]
    explorer.width = 300.0  # set by the page
    assert [len(row) for row in explorer.chart.rows()] == [2, 1]
    explorer.quantity = "loss"
    assert explorer.chart.x.label == "step"


def test_multiples_of_components_have_a_panel_per_module(run: Run) -> None:
    explorer = ls.explore(run)
    explorer.quantity = "importance"
    explorer.view = "multiples"
    charts = explorer.chart.panels
    assert [(chart.title, chart.x.label) for chart in charts] == [("0 q", "rank id"), ("1 q", "rank id")]
    assert [list(chart.data["value"]) for chart in charts] == [[4.0, 6.0], [3.0, 1.0]]


def test_choices_of_a_page_with_old_options_are_taken_over_as_far_as_they_have_rows(run: Run) -> None:
    explorer = ls.explore(run)
    old = list(explorer.rows.index)
    explorer.set_state({"quantity": "importance", "asked": 1})
    explorer.set_state({"layers": ["embed", "1"], "selection": old, "asked": 2})  # clicked before the answer arrived
    assert (explorer.quantity, explorer.layers, explorer.selection) == ("importance", ["1"], [])
    explorer.set_state({"step": 4, "roles": ["up"], "asked": 3})
    assert (explorer.step, explorer.roles) == (9, [ALL])
    assert explorer.answered == 3


def test_explorer_draws_the_mean_of_seeds_and_lists_each_seed(tmp_path: Path) -> None:
    runs = [plant(tmp_path, f"seed{seed}", profile(1.0 + seed, 1.0, 2.0), seed=seed) for seed in (0, 1)]
    explorer = ls.explore({"ours": runs})
    explorer.layers = ["embed"]
    assert list(explorer.rows["value"]) == [1.0, 2.0]
    assert drawn(explorer) == {"ours": [("embed", 1.5)]}
    assert [row[0] for row in explorer.listing["cells"]] == ["ours, seed 0", "ours, seed 1"]
    two = ls.explore({"one": runs[0], "other": runs[1]})
    assert len(two.chart.data) == len(two.rows) == 10


def test_explorer_draws_two_seeds_as_hollow_dots_that_select_their_rows(tmp_path: Path) -> None:
    sizes = {3: 7.0, 4: 1.0}
    runs = [plant(tmp_path, f"seed{seed}", profile(size, size, 2.0), seed=seed) for seed, size in sizes.items()]
    explorer = ls.explore({"ours": runs})
    explorer.layers = ["embed"]
    assert "hollow dots: both seeds" in explorer.chart.caption
    dots = [trace for trace in sent(explorer)["data"] if trace.get("meta")]
    of_seed = dict(zip(explorer.rows["value"], explorer.rows.index, strict=True))
    seen = [(trace["marker"]["symbol"], numbers(trace["y"]), trace["meta"]) for trace in dots]
    assert seen == [
        ("circle-open", [1.0], [[of_seed[1.0]]]),
        ("circle-open", [7.0], [[of_seed[7.0]]]),
        ("circle", [4.0], [list(of_seed.values())]),
    ]
    low, high = sent(explorer)["layout"]["yaxis"]["range"]
    assert low < 1 < 7 < high
    three = ls.explore({"ours": [*runs, plant(tmp_path, "seed5", profile(3.0, 3.0, 2.0), seed=5)]})
    assert not [point for point in three.chart.marks_of(Point) if point.hollow]


def test_explorer_caption_names_the_gates_of_input_dependent_updates(tmp_path: Path) -> None:
    factors = {"h.0.q": (np.ones((4, 1)), np.ones((1, 4)))}
    mixed = plant(tmp_path, "mixed", {("update_norm", "h.0.q"): {9: 4.0}}, factors=factors, exact=False)
    assert ls.explore(mixed).chart.caption.endswith("Updates of LoRA rank 2 at mean gates.")


def test_explorer_of_an_adapter_without_history_has_one_step(tmp_path: Path) -> None:
    stored = plant(tmp_path, "stored", {("update_norm", "h.0.q"): {-1: 2.0}})
    explorer = ls.explore(stored)
    assert explorer.step == -1
    assert "step as stored" in repr(explorer)
    assert drawn(explorer) == {stored.label: [("0", 2.0)]}


def test_explorer_with_too_many_values_lists_some_and_draws_none(tmp_path: Path) -> None:
    number = MOST_DRAWN // 2 + 1
    values = {("importance", module): {9: np.arange(number)} for module in ("h.0.q", "h.1.q")}
    explorer = ls.explore(plant(tmp_path, "wide", values))
    assert "4,002 values" in explorer.listing["note"]
    assert explorer.figure == ""
    assert explorer.listing["count"] == "First 500 of 4,002 rows"
    assert len(explorer.listing["cells"]) == 500
    explorer.layers = ["0"]
    assert explorer.listing["note"] == ""
    assert len(drawn(explorer)["LoRA rank 2"]) == number


def test_explore_run_without_records_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"recorded values.*run empty"):
        ls.explore(plant(tmp_path, "empty", {}))


@pytest.mark.parametrize("code", ["import lorascope.plots.explore", "import lorascope as ls; ls.explore"])
def test_importing_explore_does_not_import_matplotlib(code: str) -> None:
    loaded = modules_after(code)
    assert {"anywidget", "plotly"} <= loaded
    assert "matplotlib" not in loaded


def test_explorer_chart_is_dark_on_a_dark_page(run: Run) -> None:
    explorer = ls.explore(run)
    explorer.dark = True  # set by the page
    assert sent(explorer)["layout"]["paper_bgcolor"] == "#16181d"
    explorer.quantity = "loss"
    assert sent(explorer)["layout"]["paper_bgcolor"] == "#16181d"


def dots(explorer: Explorer) -> list[tuple[float, list[int]]]:
    """Return the height of every mean sent to the browser with the labels of its rows, and check those of each seed."""
    values = explorer._table["value"]
    traces = []
    for trace in sent(explorer)["data"]:
        if "meta" in trace and trace["marker"]["symbol"].endswith("-open"):
            for height, labels in zip(numbers(trace["y"]), trace["meta"], strict=True):
                expected = set() if np.isnan(height) else {height}  # a single seed has no hollow dots
                assert {values[label] for label in labels} == expected
        elif "meta" in trace:
            traces.append(trace)
    return [pair for trace in traces for pair in zip(numbers(trace["y"]), trace["meta"], strict=True)]


def test_dots_of_every_quantity_are_the_mean_of_their_rows(tmp_path: Path) -> None:
    runs = [plant(tmp_path, f"seed{seed}", scale(VALUES, 1.0 + seed), seed=seed) for seed in (0, 1)]
    other = plant(tmp_path, "other", scale(VALUES, 5.0), label="other")
    explorer = ls.explore({"ours": runs, "theirs": other})
    table = pd.concat([run.table for run in (*runs, other)], ignore_index=True)
    assert set(explorer.options["quantity"]) == {quantity for quantity, _ in VALUES} - {"weight_norm"}  # only NaN
    for quantity in explorer.options["quantity"]:
        explorer.quantity = quantity
        assert explorer.options["step"]
        for step in explorer.options["step"]:
            explorer.step = step
            found = dots(explorer)
            at = table["quantity"] == quantity
            at &= True if quantity == "loss" else table["step"] == step
            assert sorted(label for _, labels in found for label in labels) == list(table.index[at])
            for height, labels in found:
                rows = table.loc[labels]
                assert len(rows.drop_duplicates(["module", "step", "index"])) == 1
                np.testing.assert_allclose(height, rows["value"].mean())
                explorer.selection = labels
                pd.testing.assert_frame_equal(explorer.selected.astype(table.dtypes), rows)


def test_selected_rows_are_those_that_pandas_selects(run: Run) -> None:
    explorer, table = ls.explore(run), run.table
    assert explorer.selected.empty
    assert list(explorer.selected) == list(table)
    explorer.set_state({"selection": dots(explorer)[3][1] + dots(explorer)[1][1]})  # as the browser does
    found = table.query("quantity == 'update_norm' and step == 9 and layer == 1")
    pd.testing.assert_frame_equal(explorer.selected, found, check_categorical=False)


def test_selection_keeps_the_rows_that_are_still_drawn(run: Run) -> None:
    explorer = ls.explore(run)
    explorer.selection = list(explorer.rows.index)
    explorer.layers = ["1"]
    assert list(explorer.selected["value"]) == [0.5, 1.0]
    explorer.step = 4
    assert explorer.selection == []
    explorer.quantity = "loss"  # drawn at all steps
    explorer.selection = [label for height, labels in dots(explorer) if height > 0.4 for label in labels]
    explorer.step = 9
    assert list(explorer.selected["step"]) == [1, 2]
    explorer.quantity = "update_norm"
    assert explorer.selected.empty


def test_lines_without_dots_are_selectable(tmp_path: Path) -> None:
    steps = {step: 1 / step for step in range(1, 200)}
    explorer = ls.explore(plant(tmp_path, "long", {("loss", ""): steps}))
    assert [height for height, _ in dots(explorer)] == list(steps.values())
    (trace,) = [trace for trace in sent(explorer)["data"] if "meta" in trace]
    assert (trace["marker"]["opacity"], trace["selected"]["marker"]["opacity"]) == (0, 1)
    assert [mark.kind for mark in explorer.chart.marks] == ["line", "rule"]


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("quantity", "los", "quantity must be one of 'loss', 'update_norm', 'step_norm', 'importance', got 'los'"),
        ("layers", ["1", "2"], "layers must be one of 'all', 'embed', '0', '1', got '2'"),
        ("roles", ["v"], "roles must be one of 'all', 'q', 'ffn_in', 'embed', got 'v'"),
        ("step", 5, "step must be one of 0, 4, 9, got 5"),
        ("selection", [10**6], "selection must contain index labels of drawn rows, got 1000000"),
    ],
)
def test_assigning_what_is_not_offered_raises_one_line_and_changes_nothing(
    run: Run, name: str, value: Any, line: str
) -> None:
    explorer = ls.explore(run)
    before = repr(explorer)
    with pytest.raises(TraitError) as caught:
        setattr(explorer, name, value)
    assert str(caught.value) == line
    assert repr(explorer) == before


def test_page_that_chooses_from_outdated_options_gets_the_state_back(run: Run) -> None:
    explorer = ls.explore(run)
    answers: list[Any] = []
    explorer.send_state = answers.append
    for stale in ({"layers": ["7"]}, {"selection": [10**6]}):
        explorer.set_state(stale)
        assert answers.pop() == list(stale)
    assert (explorer.layers, explorer.selection) == ([ALL], [])


def test_error_for_one_of_many_steps_names_the_first_and_the_last(tmp_path: Path) -> None:
    explorer = ls.explore(plant(tmp_path, "long", {("loss", ""): dict.fromkeys(range(1, 200), 1.0)}))
    with pytest.raises(TraitError, match=r"^step must be one of 1, 2, .*10, \.\.\., 199, got 200$"):
        explorer.step = 200


PATIENCE = 180_000  # milliseconds; long, because other processes may slow down the machine
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
CELLS = [
    """import lorascope as ls
explorer = ls.explore(ls.load({folder!r}))
explorer""",
    """print("selected:", explorer.selected["value"].tolist())""",
]
APP = """import marimo

app = marimo.App()


@app.cell
def _():
    import marimo as mo
    import lorascope as ls
    explorer = mo.ui.anywidget(ls.explore(ls.load({folder!r})))
    explorer
    return explorer, mo


@app.cell
def _(explorer, mo):
    mo.md("selected: " + str(explorer.selected["value"].tolist()))
    return


if __name__ == "__main__":
    app.run()
"""


@contextmanager
def serve(log: Path, *command: str, **environment: Path) -> Iterator[int]:
    """Start a server of a Python package on a free port, and yield the port when it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    words = [sys.executable, "-m", *(word.format(port=port) for word in command)]
    variables = os.environ | {name: str(value) for name, value in environment.items()}
    with log.open("w", encoding="utf-8") as output:
        server = subprocess.Popen(words, env=variables, cwd=log.parent, stdout=output, stderr=output)
    try:
        for _ in range(PATIENCE // 100):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield port
    finally:
        server.terminate()  # also ends its kernel
        server.wait(30)


@pytest.fixture
def lab(run: Run, tmp_path: Path) -> Iterator[str]:
    """Start a JupyterLab with a dark theme and a notebook that explores the tiny run, and yield its address."""
    cells = [nbformat.v4.new_code_cell(cell.format(folder=str(run.path))) for cell in CELLS]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "tiny.ipynb")
    settings = tmp_path / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "themes.jupyterlab-settings").write_text('{"theme": "JupyterLab Dark"}')
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    own = {"JUPYTERLAB_SETTINGS_DIR": settings.parents[1], "JUPYTERLAB_WORKSPACES_DIR": tmp_path / "workspaces"}
    own |= {f"JUPYTER_{name}_DIR": tmp_path / name for name in ("CONFIG", "DATA", "RUNTIME")}
    own |= {"IPYTHONDIR": tmp_path / "ipython"}
    options = ["--ServerApp.port={port}", "--IdentityProvider.token=t", f"--ServerApp.root_dir={tmp_path}"]
    options.append("--LabApp.expose_app_in_browser=True")  # lets the test change the theme
    command = ["jupyterlab", "--no-browser", "--allow-root", *options]
    with serve(tmp_path / "lab.log", *command, **own) as port:
        yield f"http://127.0.0.1:{port}/doc/tree/tiny.ipynb?token=t"


@pytest.fixture
def marimo(run: Run, tmp_path: Path) -> Iterator[str]:
    """Start a marimo app that explores the tiny run, and yield its address."""
    (tmp_path / "tiny.py").write_text(APP.format(folder=str(run.path)), encoding="utf-8")
    command = ["marimo", "run", "tiny.py", "--headless", "--no-token", "--port={port}"]
    own = {f"XDG_{name}_HOME": tmp_path / name for name in ("CONFIG", "CACHE", "STATE", "DATA")}
    with serve(tmp_path / "marimo.log", *command, **own) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def page() -> Iterator[Page]:
    """Open a browser page, and check at the end that it requested nothing from another machine."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])  # required for root
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(PATIENCE)
        expect.set_options(timeout=PATIENCE)
        requested: list[str] = []
        page.on("request", lambda request: requested.append(request.url))
        yield page
        assert [url for url in requested if not url.startswith(("http://127.0.0.1:", "blob:", "data:"))] == []
        browser.close()


ATTEMPTS = 4
KERNEL_IS_IDLE = """() => typeof jupyterapp !== "undefined"
    && jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"""
DARK, LIGHT = "rgb(22, 24, 29)", "rgb(255, 255, 255)"
DOTS = """plot => plot.calcdata.filter(dots => dots[0].trace.meta).map(dots => dots.map(dot => dot.y))"""
HIGHLIGHTED = """plot => plot.calcdata.filter(dots => dots[0].trace.meta)
    .flatMap(dots => dots.filter((_, number) => dots[0].trace.selectedpoints?.includes(number)).map(dot => dot.y))"""


def check(page: Page, title: str, listed: list[str], drawn: list[list[float]], column: int = 5) -> Locator:
    """Check heights of the dots and values of the table, and return the plot."""
    plot = page.get_by_role("img", name=title, exact=True)
    plot.locator("path.point").first.wait_for()
    expect(page.locator(f".lorascope-explorer tbody td:nth-child({column})")).to_have_text(listed)
    wait_until(page, lambda: plot.evaluate(DOTS), drawn)
    return plot


def wait_until(page: Page, read: Callable[[], Any], expected: Any) -> None:
    """Wait until the page has drawn what is expected, which it does after it has listed the rows."""
    for _ in range(PATIENCE // 200):
        if read() == expected:
            return
        page.wait_for_timeout(200)
    assert read() == expected


def select_by_mouse(page: Page, plot: Locator, numbers: list[int]) -> None:
    """Drag a rectangle around some dots, again if the chart moved meanwhile, as it does when the page is laid out."""
    status = page.locator(".lorascope-explorer [role=status]")
    for _ in range(ATTEMPTS):
        plot.scroll_into_view_if_needed()
        boxes = [plot.locator("path.point").nth(number).bounding_box() for number in numbers]
        left, top = (min(box[name] for box in boxes if box) - 4 for name in "xy")
        right = max(box["x"] + box["width"] for box in boxes if box) + 4
        bottom = max(box["y"] + box["height"] for box in boxes if box) + 4
        page.mouse.move(left, top)
        page.mouse.down()
        page.mouse.move((left + right) / 2, (top + bottom) / 2)
        page.mouse.move(right, bottom)
        page.mouse.up()
        try:
            expect(status).to_have_text(re.compile(f", {len(numbers)} selected$"), timeout=PATIENCE / 10)
        except AssertionError:
            continue
        return


def drive(page: Page, read: Callable[[], None]) -> None:
    """Choose and select by mouse and keyboard; ``read`` lets the second cell print the selected rows."""

    def selected(*values: float) -> None:
        number = f", {len(values)} selected" if values else ""
        expect(page.locator(".lorascope-explorer [role=status]")).to_have_text(re.compile(rf"rows?{number}$"))
        read()
        page.get_by_text(f"selected: {list(values)}", exact=True).wait_for()

    plot = check(page, "update norm, after step 9", ["3", "1", "2", "0.5", "1"], [[1.0, 0.5], [2.0, 1.0], [3.0]])
    selected()
    table = page.get_by_role("table", name="update norm, after step 9")
    assert table.get_by_role("columnheader").all_inner_texts() == ["", "step", "layer", "role", "value", "module"]
    select_by_mouse(page, plot, [0, 2])  # q and ffn_in of layer 0
    selected(1.0, 2.0)
    wait_until(page, lambda: plot.evaluate(HIGHLIGHTED), [1.0, 2.0])
    expect(page.locator("tbody").get_by_role("checkbox", checked=True)).to_have_count(2)
    page.get_by_role("checkbox", name="Select step 9, layer 1, role q").focus()
    page.keyboard.press("Space")
    selected(1.0, 2.0, 0.5)
    page.get_by_role("slider", name="Step").press("ArrowLeft")
    check(page, "update norm, after step 4", ["1.5", "0.5", "1", "0.25", "0.5"], [[0.5, 0.25], [1.0, 0.5], [1.5]])
    selected()
    page.get_by_label("Layers").get_by_role("option", name="1").click()
    check(page, "update norm, after step 4", ["0.25", "0.5"], [[0.25], [0.5]])
    page.get_by_role("checkbox", name="Select all listed rows").press("Space")
    selected(0.25, 0.5)
    page.get_by_label("Quantity").press("ArrowUp")
    plot = check(page, "loss", ["0.25"], [[1 / step for step in range(1, 10)]], column=3)
    selected()
    select_by_mouse(page, plot, [0, 1])
    selected(1.0, 0.5)


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH: apt-get install chromium")
def test_jupyterlab_shows_and_selects_rows(lab: str, page: Page) -> None:
    page.goto(lab)
    page.wait_for_function(KERNEL_IS_IDLE)

    def run_cell(number: int) -> None:
        page.locator(".jp-CodeCell .cm-content").nth(number).click()
        page.evaluate("jupyterapp.commands.execute('notebook:run-cell')")

    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    # anywidget gives a page two seconds to start a widget. A busy machine may miss that, with the same error as a
    # widget that never starts, so run the cell several times and fail only if it never starts.
    for _ in range(ATTEMPTS):
        errors.clear()
        run_cell(0)
        try:
            page.locator("tbody").wait_for(timeout=PATIENCE / ATTEMPTS)
        except TimeoutError:
            errors.append(page.locator("body").inner_text())
            continue
        page.wait_for_timeout(2500)
        if not errors:
            break
    assert not errors
    plot = page.get_by_role("img", name="update norm")
    for ground, other in ((DARK, "JupyterLab Light"), (LIGHT, None)):  # the chart follows the theme of the page
        expect(plot.locator(".main-svg").first).to_have_css("background", re.compile(re.escape(ground)))
        if other:
            page.evaluate("theme => jupyterapp.commands.execute('apputils:change-theme', {theme})", other)
    drive(page, lambda: run_cell(1))
    assert not errors


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH: apt-get install chromium")
def test_marimo_shows_and_selects_rows(marimo: str, page: Page) -> None:
    for _ in range(ATTEMPTS):  # as in JupyterLab
        page.goto(marimo)
        try:
            page.locator(".lorascope-explorer tbody tr").first.wait_for(timeout=PATIENCE / ATTEMPTS)
        except TimeoutError:
            continue
        break
    drive(page, lambda: None)  # marimo runs the second cell after every change
    page.set_viewport_size({"width": 390, "height": 800})
    svg = page.get_by_role("img", name="loss").locator(".main-svg").first
    expect(svg).to_have_attribute("width", re.compile(r"^3\d\d\b"))
    assert page.locator(".lorascope-explorer").evaluate("it => it.scrollWidth <= it.clientWidth")
