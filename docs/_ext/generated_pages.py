"""Pages written at build from the code: methods, gallery, reference, quantities, findings, commands; and notebooks."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import gallery
import myst_nb.core.render
import notebook_outputs
import plotly
from nbformat import NotebookNode
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.errors import SphinxError

import lorascope
from lorascope.cli.main import COMMANDS, main
from lorascope.diagnosis.causes.finding import DoctorRule, Kind
from lorascope.diagnosis.kinds import KINDS
from lorascope.export.exporters import EXPORTERS, RunExporter, layer_exporters
from lorascope.formats.readers import READERS, SENTENCES, find_reader
from lorascope.methods import METHODS
from lorascope.methods.method import Method
from lorascope.schema.records import QUANTITIES

ROOT = Path(__file__).parents[2]
PLOTLY_JS = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"


def own_methods() -> dict[str, type[Method]]:
    """Return the registered methods of this package by name, full fine-tuning first."""
    own = {name: method for name, method in METHODS.items() if method.__module__.startswith("lorascope.")}
    return dict(sorted(own.items(), key=lambda item: (item[0] != "full", item[0])))


def first_sentence(documented: Any) -> str:
    """Return the first sentence of a docstring, without its period."""
    paragraph = " ".join(inspect.cleandoc(documented.__doc__ or "").partition("\n\n")[0].split())
    return re.split(r"(?<!Fig)(?<!Figs)(?<!Eq)\.(?:\s|$)", paragraph)[0]


def paper_of(method: type[Method]) -> str:
    """Return the arXiv number that the module docstring of a method gives as its source, "" if none."""
    source = (inspect.getmodule(method).__doc__ or "").partition("Source:")[2]
    found = re.search(r"arXiv (\d{4}\.\d{5})", source)
    return found[1] if found else ""


def methods_table() -> str:
    """Return the Markdown table of the methods: name, class, what they train, paper."""
    rows = ["| name | class | method | paper |", "|---|---|---|---|"]
    for name, method in own_methods().items():
        paper = paper_of(method)
        link = f"[arXiv {paper}](https://arxiv.org/abs/{paper})" if paper else ""
        rows.append(f"| `{name}` | `ls.{method.__name__}` | {first_sentence(method).replace('``', '`')} | {link} |")
    return "\n".join(rows)


def method_pages() -> dict[str, str]:
    """Return a page per method from its module and class docstrings, and their index."""
    listed = "\n".join(own_methods())
    pages = {
        "methods/index.md": f"# Methods\n\nEach method is one file in `lorascope/methods/`, and its page below is the "
        "documentation of that file: update rule, symbols of the paper, and every departure from it.\n\n"
        f"{methods_table()}\n\n```{{toctree}}\n:hidden:\n\n{listed}\n```\n"
    }
    for name, method in own_methods().items():
        module = method.__module__
        pages[f"methods/{name}.rst"] = (
            f"{title(method.__name__)}\n.. automodule:: {module}\n   :no-members:\n\n"
            f".. autoclass:: {module}.{method.__name__}\n   :no-members:\n"
        )
    return pages


def title(text: str) -> str:
    """Return a page title in reStructuredText."""
    return f"{text}\n{'=' * len(text)}\n"


def public_members(module: ModuleType) -> list[str]:
    """Return the public functions and classes that a module lists, or else defines."""
    listed = getattr(module, "__all__", None)
    if "__dir__" in vars(module):
        listed = dir(module)
    if listed is None:
        listed = [
            name
            for name, member in vars(module).items()
            if not name.startswith("_")
            and (inspect.isfunction(member) or inspect.isclass(member))
            and member.__module__ == module.__name__
        ]
    return [name for name in listed if callable(getattr(module, name))]


def reference_pages() -> dict[str, str]:
    """Return the API reference: the names of ``lorascope``, and the members of its public modules."""
    own = [name for name in lorascope._PUBLIC if callable(getattr(lorascope, name))]
    parts = [title("API reference"), "``import lorascope as ls``\n", autosummary("lorascope", own)]
    for name, path in sorted(lorascope._MODULES.items()):
        module = importlib.import_module(path)
        members = public_members(module)
        parts.append(f"ls.{name}\n{'-' * (len(name) + 3)}\n\n{first_sentence(module)}.\n")
        if name == "papers":  # its modules are studies, each of which has the same function
            parts.append(autosummary("lorascope.papers.paper_study", ["PaperStudy"]))
        elif members:
            parts.append(autosummary(path, members))
        elif hasattr(module, "__path__"):
            parts += package_reference(path, module)
    return {"reference/index.rst": "\n".join(parts)}


def package_reference(path: str, package: ModuleType) -> Iterable[str]:
    """Yield the members of each module of a package under a separate heading."""
    for file in sorted(Path(package.__path__[0]).glob("*.py")):
        if file.stem.startswith("_"):
            continue
        module = importlib.import_module(f"{path}.{file.stem}")
        heading = f"{path.rpartition('.')[2]}.{file.stem}"
        yield f"{heading}\n{'~' * len(heading)}\n\n{first_sentence(module)}.\n"
        yield autosummary(module.__name__, public_members(module))


def autosummary(module: str, names: Iterable[str]) -> str:
    """Return an autosummary table of members of a module."""
    listed = "\n".join(f"   {name}" for name in names)
    return f".. currentmodule:: {module}\n\n.. autosummary::\n   :toctree: generated\n   :nosignatures:\n\n{listed}\n"


def quantities_page() -> str:
    """Return the table of everything that a run can record."""
    rows = ["| quantity | label | unit | index | definition | source | to record it |", "|---|---|---|---|---|---|---|"]
    for name, quantity in sorted(QUANTITIES.items()):
        cells = (quantity.label, quantity.unit, quantity.index, quantity.definition, quantity.source)
        cells += (f"`{quantity.recorded_by}`",)
        rows.append(f"| `{name}` | {' | '.join(map(escape_cell, cells))} |")
    return (
        "# Quantities\n\nA row of `run.table` holds one value of one of these quantities. `index` names what the "
        "column of the same name counts.\n\n" + "\n".join(rows) + "\n"
    )


def escape_cell(text: str) -> str:
    """Return a text for a cell of a Markdown table."""
    return text.replace("|", r"\|").replace("<", "&lt;").replace("*", r"\*")


READ_AS = {
    "files": "read from its files",
    "direction": "read from its files, the whole update with the base",
    "base": "read with the base",
    "peft": "merged by PEFT, with the base: `pip install lorascope[peft]`",
}


def written_by() -> dict[str, str]:
    """Return the options of ``lorascope export`` that write a format, by the name of its reader."""
    kinds = {f"{exporter.kind} (PEFT)" for exporter in EXPORTERS if isinstance(exporter, RunExporter)}
    options = {name: "`--peft`, from runs" for name, reader in READERS.items() if reader.format in kinds}
    for format, exporter in layer_exporters().items():
        options |= dict.fromkeys(exporter.readers, f"`--{format}`")
    return options


def formats_page() -> str:
    """Return the page of the formats of adapters, by what their updates follow from."""
    find_reader({}, ())
    own = [reader for reader in READERS.values() if reader.read.__module__.startswith("lorascope.")]
    options = written_by()
    rows = [(READ_AS[reader.needs], reader.format, options.get(reader.read.__name__, "")) for reader in own]
    rows += [("described: it changes no weights, or none by itself", format, "") for _, _, format in SENTENCES]
    order = [*READ_AS.values(), rows[-1][0]]
    rows.sort(key=lambda row: (order.index(row[0]), row[1].lower()))
    lines = [f"| {format} | {how} | {option} |" for how, format, option in rows]
    return (
        "# Formats of adapters\n\nA format is recognized by its configuration, or by the header and the tensor names "
        "of its file. Pickles are never loaded. `--base` names the base model: a folder, or a name on the Hugging Face "
        "Hub that is in the cache.\n\n`lorascope export` writes LoRA and DoRA in some of the formats, "
        "see [other formats](to-peft.md#other-formats).\n\n| format | read | written |\n|---|---|---|\n"
        + "\n".join(lines)
        + "\n"
    )


KIND_GROUPS = {
    "0": (
        "Faults of adapters and trainings",
        "Reported by `lorascope doctor`, and some by alarms in training.",
    ),
    "1": ("Observations", "Shown by `lorascope inspect`."),
    "2": ("Treatment by a runtime", "Reported by `lorascope doctor` with `--base` or `--runtime`."),
    "3": ("Mistakes of a merge", "Reported by `lorascope doctor --merged`."),
    "4": ("Neurons of a whole model", "Shown by `lorascope inspect --base` for a model that was fine-tuned."),
}
EVIDENCE_NEEDED = {
    "factors": "an adapter or a run",
    "config": "an adapter",
    "weights": "weight norms: a run, or an adapter with `--base`",
    "base": "a run, or an adapter with `--base`",
    "history": "a run",
    "dial": "a run with `dial.csv` in its folder (`lorascope dial RUN -o RUN/dial.csv`)",
    "training": "a training in progress",
    "merged model": "adapter, base and merged model",
    "tuned model": "a whole model and its base",
}


def kind_pages() -> dict[str, str]:
    """Return a page per kind of finding, and their index."""
    pages = {f"kinds/{id}.md": kind_page(kind) for id, kind in KINDS.items()}
    return {"kinds.md": kinds_index()} | pages


def kinds_index() -> str:
    """Return the index of the kinds of findings, with a table per group."""
    parts = [
        "# Kinds of findings\n\nAn id keeps its meaning in later releases; names and messages may improve. "
        "`lorascope doctor --list` prints this list, and see [the guide](doctor.md) for how to read it.\n"
    ]
    for digit, (heading, intro) in KIND_GROUPS.items():
        rows = "\n".join(
            f"| [{kind.id}](kinds/{kind.id}.md) | `{kind.name}` | {kind.severity} | {escape_cell(kind.problem)} |"
            for kind in KINDS.values()
            if kind.id[2] == digit
        )
        parts.append(f"## {heading}\n\n{intro}\n\n| id | name | severity | cause |\n|---|---|---|---|\n{rows}\n")
    listed = "\n".join(f"kinds/{id}" for id in KINDS)
    return "\n".join([*parts, f"```{{toctree}}\n:hidden:\n\n{listed}\n```\n"])


def kind_page(kind: Kind) -> str:
    """Return the page of one kind: cause, evidence, fix."""
    if not (kind.problem and kind.evidence):
        raise ValueError(f"kind {kind.id} must have a problem and its evidence")
    fix = f"**Fix.** {sentence(kind.fix)}" if kind.fix else "An observation, not a fault."
    live = isinstance(kind, DoctorRule) and kind.live_from is not None
    checked = " Alarms check it in training." if live else ""
    of_runtime = kind.needs == "base" and kind.id[2] == "2"  # these checks take no runs
    needed = "an adapter with `--base`" if of_runtime else EVIDENCE_NEEDED[kind.needs]
    return (
        f"({kind.id})=\n# {kind.id}: `{kind.name}`\n\n**Cause.** {kind.problem} Severity: {kind.severity}.\n\n"
        f"**Evidence.** {sentence(kind.evidence)} Needs {needed}.{checked}\n\n{fix}\n"
    )


def sentence(text: str) -> str:
    """Return a text as a sentence."""
    return f"{text[0].upper()}{text[1:]}."


def commands_page() -> str:
    """Return the help of every command, as the terminal prints it."""
    parts = ["# Command line\n\n```text\n" + help_of([]) + "```\n"]
    for name in COMMANDS:
        parts.append(f"## `lorascope {name}`\n\n```text\n{help_of([name])}```\n")
    return "\n".join(parts)


def help_of(words: list[str]) -> str:
    """Return what ``lorascope WORDS --help`` prints, in plain text."""
    with (
        mock.patch.dict(os.environ, COLUMNS="100"),
        contextlib.redirect_stdout(io.StringIO()) as printed,
        contextlib.suppress(SystemExit),
    ):
        main([*words, "--help"])
    return re.sub(r"\x1b\[[0-9;]*m", "", printed.getvalue()).rstrip() + "\n"


def write_if_changed(path: Path, text: str) -> None:
    """Write a page unless the file holds it already: Sphinx reads changed files again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def write_pages(app: Sphinx, config: Config) -> None:
    """Write all generated pages into the source folder, before Sphinx looks for sources."""
    source = Path(app.srcdir)
    pages = method_pages() | reference_pages() | kind_pages() | gallery.draw_pages(source)
    pages |= {"quantities.md": quantities_page(), "formats.md": formats_page(), "cli.md": commands_page()}
    for notebook in notebook_outputs.notebooks():
        pages[f"tutorials/{notebook.name}"] = notebook.read_text(encoding="utf-8")
    for name, text in pages.items():
        write_if_changed(source / name, text)


def use_local_plotly(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Let the interactive figures of a page load plotly.js from the site instead of a network."""
    body = context.get("body", "")
    if "plotly-graph-div" in body:
        local = f'<script src="{context["pathto"](f"_static/{PLOTLY_JS.name}", 1)}"></script>'
        context["body"] = local + re.sub(r'<script[^>]* src="https://[^>]*></script>', "", body)


def copy_plotly(app: Sphinx, error: Exception | None) -> None:
    """Copy plotly.js next to the other static files of the site."""
    if error is None and app.builder.format == "html":
        shutil.copyfile(PLOTLY_JS, Path(app.outdir) / "_static" / PLOTLY_JS.name)


def compare_notebooks(app: Sphinx, error: Exception | None) -> None:
    """Fail if a notebook that the build ran has outputs of another structure than the stored ones."""
    if error is None and app.builder.format == "html":
        # myst-nb writes each notebook that it has run to this folder.
        differences = notebook_outputs.compare_all(Path(app.outdir).parent / "jupyter_execute" / "tutorials")
        if differences:
            raise SphinxError("\n".join(["outputs of notebooks differ: run `make notebooks`", *differences]))


def join_streams(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Merge the stream outputs of a cell that have one name.

    It replaces the function of myst-nb, which starts a new line wherever the kernel flushed its output.
    """
    joined: list[NotebookNode] = []
    streams: dict[str, NotebookNode] = {}
    for output in outputs:
        if output["output_type"] == "stream" and output["name"] in streams:
            streams[output["name"]]["text"] += output["text"]
            continue
        joined.append(output)
        if output["output_type"] == "stream":
            streams[output["name"]] = output
    return joined


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the generator with Sphinx."""
    myst_nb.core.render.coalesce_streams = join_streams
    app.connect("config-inited", write_pages)
    app.connect("html-page-context", use_local_plotly)
    app.connect("build-finished", copy_plotly)
    app.connect("build-finished", compare_notebooks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
