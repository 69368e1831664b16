"""Stored outputs of the notebooks: without faults, and compared by structure with those of another run."""

from __future__ import annotations

import copy
from pathlib import Path

import nbformat
import notebook_outputs
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook, new_output
from notebook_outputs import code_cells

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TABLE = "<table><thead><tr><th></th><th>rank</th><th>{}</th></tr></thead><tbody><tr><th>0</th><td>8</td></tr></table>"
PLOTLY = '<div class="plotly-graph-div"></div><script>draw()</script>'
CHART = "Chart('Norm after {} steps': line; {} rows)"


def printed(text: str, name: str = "stdout") -> NotebookNode:
    return new_output("stream", name=name, text=text)


def displayed(data: dict[str, str]) -> NotebookNode:
    return new_output("execute_result", {"text/plain": "", **data}, execution_count=1)


@pytest.fixture
def notebook() -> NotebookNode:
    """A notebook that was run: a chart, a table, a text and a printed line."""
    chart = {"image/png": "iVBORw0KGgo=", "text/plain": CHART.format(60, 24)}
    outputs = [
        displayed(chart),
        displayed({"text/html": TABLE.format("norm")}),
        displayed({"text/plain": "0.5"}),
        printed("printed 3"),
    ]
    cells = [new_code_cell(f"show({n})", outputs=[output], id=f"cell-{n}") for n, output in enumerate(outputs)]
    return new_notebook(cells=cells)


def test_equal_structures_have_no_differences(notebook: NotebookNode) -> None:
    executed = copy.deepcopy(notebook)
    executed.cells[0].outputs[0].data = {"text/html": PLOTLY, "text/plain": CHART.format(60, 25)}
    executed.cells[1].outputs[0].data["text/html"] = TABLE.format("norm").replace(">8<", ">7.99<")
    executed.cells[2].outputs[0].data["text/plain"] = "0.25"
    executed.cells[3].outputs += [printed("a warning of a library", "stderr")]
    assert not notebook_outputs.compare(notebook, executed)


@pytest.mark.parametrize(
    ("cell", "data"),
    [
        (0, {"image/png": "", "text/plain": "Chart('Norm after 60 steps': line, point; 24 rows)"}),
        (0, {"image/png": "", "text/plain": "Chart('Rank': line; 24 rows)"}),
        (0, {"text/plain": CHART.format(60, 24)}),
        (1, {"text/plain": "rank norm", "text/html": TABLE.format("energy")}),
        (1, {"text/plain": "rank norm"}),
        (2, {"text/plain": "0.5", "text/html": TABLE.format("norm")}),
    ],
    ids=["marks", "title", "no figure", "column", "no table", "another kind"],
)
def test_another_structure_of_an_output_is_a_difference(
    notebook: NotebookNode, cell: int, data: dict[str, str]
) -> None:
    executed = copy.deepcopy(notebook)
    executed.cells[cell].outputs[0].data = data
    (difference,) = notebook_outputs.compare(notebook, executed)
    assert difference.startswith(f"cell-{cell}: ")


def test_missing_output_and_error_are_differences(notebook: NotebookNode) -> None:
    executed = copy.deepcopy(notebook)
    executed.cells[2].outputs = []
    executed.cells[3].outputs = [new_output("error", ename="ValueError", evalue="no", traceback=[])]
    assert [line.partition(":")[0] for line in notebook_outputs.compare(notebook, executed)] == ["cell-2", "cell-3"]


def test_other_cells_are_a_difference(notebook: NotebookNode) -> None:
    for change in (lambda cells: cells.pop(), lambda cells: cells[1].update(source="show(9)")):
        executed = copy.deepcopy(notebook)
        change(executed.cells)
        assert len(notebook_outputs.compare(notebook, executed)) == 1


IMAGE = '<img src="data:image/png;base64,iVBORw0KGgo=" style="max-width: 100%">'


def test_cleaned_outputs_are_free_of_paths_and_of_forms_that_need_scripts(tmp_path: Path) -> None:
    outputs = [
        printed("a warning", "stderr"),
        new_output("display_data", {"application/vnd.jupyter.widget-view+json": "{}", "text/plain": "a progress bar"}),
        new_output("display_data", {"application/vnd.plotly.v1+json": {}, "text/html": IMAGE, "text/plain": "Chart"}),
        displayed({"text/plain": f"{tmp_path}/runs/0a1b {ROOT}/data/examples/lora", "application/x+json": "{}"}),
    ]
    notebook = new_notebook(
        cells=[new_code_cell("show()", outputs=outputs, metadata={"execution": {"iopub.status.busy": "2026-01-02"}})]
    )
    notebook.metadata.language_info = {"name": "python", "version": "3.11.4"}
    notebook_outputs.clean(notebook, tmp_path)
    chart, text = notebook.cells[0].outputs
    assert dict(chart.data) == {"image/png": "iVBORw0KGgo=", "text/plain": "Chart"}
    assert dict(text.data) == {"text/plain": "runs/0a1b data/examples/lora"}
    assert not notebook.cells[0].metadata
    assert dict(notebook.metadata.language_info) == {"name": "python"}


def test_all_notebooks_of_a_build_are_compared(tmp_path: Path) -> None:
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        for cell in code_cells(notebook):
            if path == NOTEBOOKS[-1]:
                cell.outputs = []
        nbformat.write(notebook, tmp_path / path.name)
    differences = notebook_outputs.compare_all(tmp_path)
    assert differences
    assert all(line.startswith(f"{NOTEBOOKS[-1].name}, ") for line in differences)


@pytest.mark.parametrize(
    ("output", "fault"),
    [
        (displayed({"text/plain": "folder  /home/me/lorascope/runs/0a1b"}), "absolute path /home/me"),
        (displayed({"text/html": "<td>/tmp/x</td>"}), "absolute path /tmp/x"),
        (displayed({"text/plain": "saved in C:\\Users\\me"}), "absolute path C:\\Users"),
        (displayed({"text/plain": "<Model at 0x7f3a90b1c2d0>"}), "address 0x7f3a90b1c2d0"),
        (new_output("error", ename="ValueError", evalue="no", traceback=[]), "error ValueError"),
        (printed("epoch 1", "stderr"), "output stderr"),
        (displayed({"text/html": PLOTLY}), "a script"),
        (displayed({"application/vnd.plotly.v1+json": "{}"}), "application/vnd.plotly.v1+json"),
        (displayed({"image/png": "x" * notebook_outputs.MAX_BYTES}), "bytes"),
    ],
)
def test_faulty_output_is_found(notebook: NotebookNode, output: NotebookNode, fault: str) -> None:
    assert not notebook_outputs.find_faults(notebook)
    notebook.cells[2].outputs = [output]
    (found,) = notebook_outputs.find_faults(notebook)
    assert fault in found


def test_notebook_that_was_not_run_is_found(notebook: NotebookNode) -> None:
    for cell in notebook.cells:
        cell.outputs = []
    assert notebook_outputs.find_faults(notebook) == ["no outputs"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem[:2])
def test_stored_notebook_has_outputs_without_faults(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not notebook_outputs.find_faults(notebook)
    assert path.read_text(encoding="utf-8") == notebook_outputs.to_text(notebook)


def test_notebooks_are_small_together() -> None:
    assert len(NOTEBOOKS) == 8
    assert sum(path.stat().st_size for path in NOTEBOOKS) <= 6_000_000


def test_notebooks_show_results_before_they_train() -> None:
    for path in NOTEBOOKS:
        cells = code_cells(nbformat.read(path, as_version=4))
        until = next((number for number, cell in enumerate(cells) if cell.outputs), 0)
        assert not any("train(" in cell.source for cell in cells[: until + 1]), path.name
        # No example measures memory.
        assert path.name.startswith("06") or any("ls.example(" in cell.source for cell in cells), path.name
