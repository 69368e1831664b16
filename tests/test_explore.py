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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
from planted import MODULES, plant, profile
from playwright.sync_api import Locator, TimeoutError, expect, sync_playwright
from test_cli import modules_after

import lorascope as ls
from lorascope.plots.explore import ALL, MOST_DRAWN, WHOLE, Explorer
from lorascope.runs.run import Run

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


def numbers(sent: Any) -> list[Any]:
    """Return an array as a list; plotly sends it as a list or as bytes in base64."""
    return np.frombuffer(base64.b64decode(sent["bdata"]), sent["dtype"]).tolist() if "bdata" in sent else list(sent)


def sent(explorer: Explorer) -> dict[str, Any]:
    """Return the figure sent to the browser."""
    return dict(json.loads(explorer.canvas.figure))


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
    assert explorer.quantity.value == "update_norm"
    assert (explorer.step.label, explorer.layers.value, explorer.roles.value) == ("9", (ALL,), (ALL,))
    found = table[(table["quantity"] == "update_norm") & (table["step"] == 9)]
    pd.testing.assert_frame_equal(explorer.rows, found, check_categorical=False)
    explorer.step.value = 4
    explorer.layers.value = ["1", "embed"]
    found = table.query("quantity == 'update_norm' and step == 4 and (layer == 1 or role == 'embed')")
    pd.testing.assert_frame_equal(explorer.rows, found, check_categorical=False)
    explorer.roles.value = ["q"]
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
    explorer.step.value = 4
    explorer.layers.value = ["1"]
    assert drawn(explorer) == {"q": [("1", 0.25)], "ffn_in": [("1", 0.5)]}
    assert sorted(explorer.chart.data["value"]) == sorted(explorer.rows["value"])


def test_explorer_vertical_axis_is_the_same_at_every_step(run: Run) -> None:
    explorer = ls.explore(run)
    ends = sent(explorer)["layout"]["yaxis"]["range"]
    explorer.step.value = 0
    assert sent(explorer)["layout"]["yaxis"]["range"] == ends
    assert ends[0] < 0 < 3 < ends[1]


def test_explorer_draws_quantities_of_the_whole_run_over_the_steps(run: Run) -> None:
    explorer = ls.explore(run)
    explorer.quantity.value = "loss"
    assert drawn(explorer) == {run.label: [(step, 1 / step) for step in range(1, 10)]}
    explorer.step.value = 4
    assert list(explorer.rows["value"]) == [0.25]
    assert [shape["x0"] for shape in sent(explorer)["layout"]["shapes"]] == [4]
    assert explorer.layers.options == (ALL, WHOLE)
    assert explorer.layers.disabled


def test_explorer_draws_components_of_one_module_by_index(run: Run) -> None:
    explorer = ls.explore(run)
    explorer.quantity.value = "importance"
    assert drawn(explorer) == {run.label: [("0", 4.0), ("0", 6.0), ("1", 3.0), ("1", 1.0)]}
    explorer.layers.value = ["1"]
    assert drawn(explorer) == {run.label: [(0, 3.0), (1, 1.0)]}
    assert explorer.chart.x.label == "rank id"


def test_explorer_offers_only_options_with_rows(run: Run) -> None:
    explorer = ls.explore(run)
    assert [name for _, name in explorer.quantity.options] == [
        "loss",
        "update_norm",
        "step_norm",
        "importance",
    ]  # no weight_norm
    assert explorer.quantity.options[1][0] == "update_norm: ‖W − W₀‖"
    assert explorer.layers.options == (ALL, "embed", "0", "1")
    explorer.layers.value = ["embed"]
    assert explorer.roles.options == (ALL, "embed")
    explorer.quantity.value = "step_norm"
    explorer.layers.value = ["1"]  # its value is NaN there
    assert explorer.rows["value"].isna().all()
    assert "unknown" in explorer.listing.value
    explorer.layers.value = ["0"]
    explorer.quantity.value = "update_norm"
    explorer.layers.value = ["embed"]
    explorer.quantity.value = "importance"  # not recorded for the embedding
    assert explorer.layers.value == (ALL,)
    assert explorer.roles.options == (ALL, "q")
    explorer.step.value = 0
    explorer.layers.value = ["1"]  # not recorded at step 0
    assert explorer.step.options == (("9", 9),)
    assert len(explorer.rows) == 2


def test_explorer_keeps_layers_and_nearest_step_for_another_quantity(run: Run) -> None:
    explorer = ls.explore(run)
    explorer.layers.value = ["1"]
    explorer.step.value = 4
    explorer.quantity.value = "importance"
    assert (explorer.layers.value, explorer.step.value) == (("1",), 9)
    explorer.quantity.value = "loss"
    explorer.step.value = 5
    explorer.quantity.value = "update_norm"
    assert explorer.step.value == 4


def test_explorer_draws_no_line_for_two_modules_of_one_role_in_one_layer(tmp_path: Path) -> None:
    values = {("update_norm", module): {9: 1.0} for module in ("h.0", "h.0.q", "h.1.q")}
    double = {"module": "h.0.q2", "stack": "", "layer": 0, "role": "q"}
    up = {("update_norm", module): {9: 2.0} for module in ("h.0.q2", "h.0.up", "h.1.up")}
    chart = ls.explore(plant(tmp_path, "double", values | up, modules=[*MODULES, double])).chart
    assert len(chart.data) == 6
    assert set(chart.table(chart.marks[0])["role"]) == {"ffn_in", "block"}


def test_explorer_draws_the_mean_of_seeds_and_lists_each_seed(tmp_path: Path) -> None:
    runs = [plant(tmp_path, f"seed{seed}", profile(1.0 + seed, 1.0, 2.0), seed=seed) for seed in (0, 1)]
    explorer = ls.explore({"ours": runs})
    explorer.layers.value = ["embed"]
    assert list(explorer.rows["value"]) == [1.0, 2.0]
    assert drawn(explorer) == {"ours": [("embed", 1.5)]}
    assert "ours, seed 1" in explorer.listing.value
    two = ls.explore({"one": runs[0], "other": runs[1]})
    assert len(two.chart.data) == len(two.rows) == 10


def test_explorer_caption_names_the_gates_of_input_dependent_updates(tmp_path: Path) -> None:
    factors = {"h.0.q": (np.ones((4, 1)), np.ones((1, 4)))}
    mixed = plant(tmp_path, "mixed", {("update_norm", "h.0.q"): {9: 4.0}}, factors=factors, exact=False)
    assert ls.explore(mixed).chart.caption.endswith("Updates of LoRA rank 2 at mean gates.")


def test_explorer_of_an_adapter_without_history_has_one_step(tmp_path: Path) -> None:
    stored = plant(tmp_path, "stored", {("update_norm", "h.0.q"): {-1: 2.0}})
    explorer = ls.explore(stored)
    assert explorer.step.label == "as stored"
    assert drawn(explorer) == {stored.label: [("0", 2.0)]}


def test_explorer_with_too_many_values_lists_some_and_draws_none(tmp_path: Path) -> None:
    number = MOST_DRAWN // 2 + 1
    values = {("sensitivity_out", module): {9: np.arange(number)} for module in ("h.0.q", "h.1.q")}
    explorer = ls.explore(plant(tmp_path, "wide", values))
    assert "4,002 values" in explorer.note.value
    assert explorer.canvas.layout.display == "none"
    assert "First 500 of 4,002 rows" in explorer.listing.value
    explorer.layers.value = ["0"]
    assert explorer.note.value == ""
    assert explorer.canvas.layout.display is None
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
    explorer.canvas.dark = True  # set by the page
    assert sent(explorer)["layout"]["paper_bgcolor"] == "#16181d"
    explorer.quantity.value = "loss"
    assert sent(explorer)["layout"]["paper_bgcolor"] == "#16181d"


PATIENCE = 180_000  # milliseconds; long, because other processes may slow down the machine
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
NOTEBOOK = """import lorascope as ls
ls.explore(ls.load({folder!r}))"""


@pytest.fixture
def lab(run: Run, tmp_path: Path) -> Iterator[str]:
    """Start a JupyterLab with a dark theme and a notebook that explores the tiny run, and yield its address."""
    cell = nbformat.v4.new_code_cell(NOTEBOOK.format(folder=str(run.path)))
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), tmp_path / "tiny.ipynb")
    settings = tmp_path / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "themes.jupyterlab-settings").write_text('{"theme": "JupyterLab Dark"}')
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    own = {"JUPYTERLAB_SETTINGS_DIR": settings.parents[1], "JUPYTERLAB_WORKSPACES_DIR": tmp_path / "workspaces"}
    own |= {f"JUPYTER_{name}_DIR": tmp_path / name for name in ("CONFIG", "DATA", "RUNTIME")}
    own |= {"IPYTHONDIR": tmp_path / "ipython"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [f"--ServerApp.port={port}", "--IdentityProvider.token=t", f"--ServerApp.root_dir={tmp_path}"]
    options.append("--LabApp.expose_app_in_browser=True")  # lets the test change the theme
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", *options]
    with (tmp_path / "lab.log").open("w") as log:
        server = subprocess.Popen(command, env=os.environ | {k: str(v) for k, v in own.items()}, stdout=log, stderr=log)
    try:
        for _ in range(PATIENCE // 100):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/doc/tree/tiny.ipynb?token=t"
    finally:
        server.terminate()  # also ends its kernel
        server.wait(30)


ATTEMPTS = 4
KERNEL_IS_IDLE = """() => typeof jupyterapp !== "undefined"
    && jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"""
DARK, LIGHT = "rgb(22, 24, 29)", "rgb(255, 255, 255)"
DOTS = """plot => plot.calcdata.filter(dots => dots[0].trace.hovertemplate && dots[0].trace.mode == "markers")
    .map(dots => dots.map(dot => dot.y))"""


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH: apt-get install chromium")
def test_page_shows_the_selected_rows(lab: str) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])  # required for root
        page = browser.new_page()
        page.set_default_timeout(PATIENCE)
        expect.set_options(timeout=PATIENCE)
        page.goto(lab)

        def check(title: str, listed: list[str], drawn: list[list[float]], column: int = 4) -> Locator:
            plot = page.get_by_role("img", name=title, exact=True)
            plot.locator("path.point").first.wait_for()
            # The page receives the table after the chart.
            expect(page.locator(f"tbody td:nth-child({column})")).to_have_text(listed)
            assert plot.evaluate(DOTS) == drawn
            return plot

        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        # anywidget gives a page two seconds to start a widget. A busy machine may miss that, with the same error as a
        # widget that never starts, so run the cell several times and fail only if it never starts.
        for _ in range(ATTEMPTS):
            errors.clear()
            page.locator(".jp-CodeCell .cm-content").first.click()
            page.evaluate("jupyterapp.commands.execute('notebook:run-cell')")
            try:
                page.locator("tbody").wait_for(timeout=PATIENCE / ATTEMPTS)
            except TimeoutError:
                errors.append(page.locator("body").inner_text())
                continue
            page.wait_for_timeout(2500)
            if not errors:
                break
        assert not errors
        plot = check("update norm, after step 9", ["3", "1", "2", "0.5", "1"], [[1.0, 0.5], [2.0, 1.0], [3.0]])
        for ground, other in ((DARK, "JupyterLab Light"), (LIGHT, None)):  # the chart follows the theme of the page
            expect(plot.locator(".main-svg").first).to_have_css("background", re.compile(re.escape(ground)))
            if other:
                page.evaluate("theme => jupyterapp.commands.execute('apputils:change-theme', {theme})", other)
        page.get_by_role("slider").press("ArrowLeft")
        check("update norm, after step 4", ["1.5", "0.5", "1", "0.25", "0.5"], [[0.5, 0.25], [1.0, 0.5], [1.5]])
        page.get_by_label("Layers").get_by_role("option", name="1").click()
        check("update norm, after step 4", ["0.25", "0.5"], [[0.25], [0.5]])
        page.get_by_label("Quantity").press("ArrowUp")  # the keyboard works too
        check("loss", ["0.25"], [[1 / step for step in range(1, 10)]], column=2)
        browser.close()
