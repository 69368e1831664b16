"""Outputs of the notebooks: ``python docs/_ext/notebook_outputs.py [NUMBER ...]`` runs notebooks and stores them.

``make docs`` runs the notebooks again and compares the structure of their outputs with the stored one. Numbers are not
compared, because those of a training depend on the processor.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parents[2]
MAX_BYTES = 1_000_000  # of each of eight notebooks; GitHub does not render much larger ones
# What GitHub and nbconvert show. The interactive form of one figure is larger than all of these together.
STORED = ("image/png", "text/html", "text/markdown", "text/plain")
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
PATH = re.compile(r"(?<![\w.:~/<-])(?:/(?:home|root|tmp|usr|work|opt|var|mnt|private|Users)/[\w./-]+|[A-Z]:\\\w+)")
IMAGE = re.compile(r'<img src="data:image/png;base64,([^"]+)"[^>]*>')
ADDRESS = re.compile(r"\b0x[0-9a-f]{6,}\b")


def notebooks() -> list[Path]:
    """Return the paths of the notebooks."""
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


def run(notebook: NotebookNode) -> None:
    """Run a notebook in an empty folder, and keep what a page without scripts can show."""
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=900,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            record_timing=False,
            coalesce_streams=True,
        )
        client.execute()
        clean(notebook, Path(folder))


def clean(notebook: NotebookNode, folder: Path) -> None:
    """Remove from the outputs what depends on the machine, and paths below the folder in which the notebook ran."""
    notebook.metadata = nbformat.from_dict({**KERNEL, "language_info": {"name": "python"}})
    for cell in code_cells(notebook):
        cell.metadata.pop("execution", None)
        cell.outputs = [output for output in cell.outputs if not is_noise(output)]
        for output in cell.outputs:
            if "data" not in output:
                continue
            output.metadata = NotebookNode()
            if image := IMAGE.fullmatch(output.data.get("text/html", "")):
                del output.data["text/html"]
                output.data["image/png"] = image[1]
            for form in set(output.data) - set(STORED):
                del output.data[form]
            for form, content in output.data.items():
                if form != "image/png":
                    output.data[form] = content.replace(f"{folder.resolve()}/", "").replace(f"{ROOT}/", "")


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Return the cells that have outputs."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def is_noise(output: NotebookNode) -> bool:
    """Return whether an output is a warning of a library or a progress bar, which is displayed as a widget."""
    if output.output_type == "stream":
        return output.name == "stderr"
    return output.output_type == "display_data" and "application/vnd.jupyter.widget-view+json" in output.data


def describe_output(output: NotebookNode) -> str:
    """Return the structure of an output: its kind, and the titles and marks of a figure or the columns of a table."""
    if output.output_type == "error":
        return f"error {output.ename}"
    if output.output_type == "stream":
        return f"output {output.name}"
    html = output.data.get("text/html", "")
    # Pages of the documentation show the interactive form. Numbers in titles come from training.
    if "image/png" in output.data or "plotly-graph-div" in html or IMAGE.fullmatch(html):
        return f"figure {re.sub(r'[0-9.]+', '#', output.data['text/plain'])}"
    if "<th" in html:
        head = html.partition("</thead>")[0]
        return f"table of {', '.join(re.findall('<th[^>]*>(.*?)</th>', head))}"
    return ", ".join(form for form in STORED if form in output.data)


def compare(stored: NotebookNode, executed: NotebookNode) -> list[str]:
    """Return the differences in structure between the stored outputs of a notebook and those of another run."""
    pairs = list(zip(code_cells(stored), code_cells(executed), strict=False))
    sources = [[(cell.id, cell.source) for cell in code_cells(notebook)] for notebook in (stored, executed)]
    if sources[0] != sources[1]:
        return ["the notebooks have different code"]
    differences = []
    for before, after in pairs:
        structures = [
            [describe_output(output) for output in cell.outputs if not is_noise(output)] for cell in (before, after)
        ]
        if structures[0] != structures[1]:
            differences.append(f"{before.id}: stored {structures[0]}, executed {structures[1]}")
    return differences


def compare_all(folder: Path) -> list[str]:
    """Return the differences of all stored notebooks from those of the same names in a folder, which were run again."""
    differences = []
    for path in notebooks():
        stored, executed = (nbformat.read(file, as_version=4) for file in (path, folder / path.name))
        differences += [f"{path.name}, {difference}" for difference in compare(stored, executed)]
    return differences


def find_faults(notebook: NotebookNode) -> list[str]:
    """Return what a stored notebook must not contain: errors, scripts, paths and addresses of a machine, many bytes."""
    faults = []
    outputs = [(cell.id, output) for cell in code_cells(notebook) for output in cell.outputs]
    if not outputs:
        faults.append("no outputs")
    for name, output in outputs:
        if output.output_type == "error" or is_noise(output):
            faults.append(f"{name}: {describe_output(output)}")
        data = output.get("data", {"text/plain": output.get("text", "")})
        faults += [f"{name}: {form}" for form in set(data) - set(STORED)]
        if "<script" in data.get("text/html", ""):
            faults.append(f"{name}: a script")
        text = " ".join(content for form, content in data.items() if form.startswith("text/"))
        if path := PATH.search(text):
            faults.append(f"{name}: absolute path {path[0]}")
        if address := ADDRESS.search(text):
            faults.append(f"{name}: address {address[0]}")
    if (size := len(to_text(notebook).encode())) > MAX_BYTES:
        faults.append(f"{size:,} bytes, at most {MAX_BYTES:,}")
    return faults


def to_text(notebook: NotebookNode) -> str:
    """Return the text of a notebook's file."""
    return f"{nbformat.writes(notebook).rstrip()}\n"


def main(numbers: list[str]) -> int:
    """Run the notebooks whose names begin with one of the numbers, or all, and return 1 if one has a fault."""
    # The threads of `make`: sums of several threads have other last digits.
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    faults = 0
    for path in notebooks():
        if numbers and not path.name.startswith(tuple(numbers)):
            continue
        notebook = nbformat.read(path, as_version=4)
        run(notebook)
        path.write_text(to_text(notebook), encoding="utf-8")
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")
        for fault in find_faults(notebook):
            print(f"  {fault}")
            faults += 1
    return min(faults, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
