"""Cheat sheet and llms.txt: public functions, classes and commands, with the first sentence of their documentation."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import gallery
import generated_pages
from sphinx.application import Sphinx
from sphinx.config import Config

import lorascope
from lorascope.cli.main import COMMANDS
from lorascope.methods.method import Method
from lorascope.plots.figure_registry import FIGURES

README = (generated_pages.ROOT / "README.md").read_text(encoding="utf-8")
# Modules for your own analyses, which a page for the first day has no room for.
_NOT_FIRST = ("baseline_ranks", "component_importance", "module_table", "updates")


class Entry(NamedTuple):
    """Function or class: the name that a user types, its page of the reference, and what it does."""

    name: str
    page: str
    summary: str


def summarize(documented: Any) -> str:
    """Return the first sentence of a docstring as Markdown."""
    return re.sub(r"(:\w+:`|``)", "`", generated_pages.first_sentence(documented))


def list_members(module: ModuleType, prefix: str, names: Iterable[str]) -> list[Entry]:
    """List members of a module, which a user calls by a prefix."""
    entries = []
    for name in names:
        page = f"reference/generated/{module.__name__}.{name}.html"
        entries.append(Entry(f"{prefix}.{name}", page, summarize(getattr(module, name))))
    return entries


def list_public() -> dict[str, list[Entry]]:
    """List all public functions and classes but those of ``ls.analysis``, by section."""
    by_kind: dict[str, list[str]] = {"Functions": [], "Classes": [], "Methods": []}
    for name in lorascope._PUBLIC:
        value: Any = getattr(lorascope, name)
        if not isinstance(value, type):
            if callable(value):
                by_kind["Functions"].append(name)
        elif issubclass(value, Method) and value is not Method:
            by_kind["Methods"].append(name)
        else:
            by_kind["Classes"].append(name)
    sections = {kind: list_members(lorascope, "ls", names) for kind, names in by_kind.items()}
    for name, path in sorted(lorascope._MODULES.items()):
        module = importlib.import_module(path)
        members = generated_pages.public_members(module)
        if name == "plots":
            sections |= list_figures(module, members)
        elif members:
            sections[f"ls.{name}"] = list_members(module, f"ls.{name}", members)
    return sections


def list_figures(plots: ModuleType, members: Iterable[str]) -> dict[str, list[Entry]]:
    """List the members of ``ls.plots`` by the topics of the gallery, other functions last."""
    topics: dict[str, list[str]] = {topic: [] for topic in (*gallery.TOPICS, "other")}
    for member in members:
        topic = "other"
        if member in FIGURES:
            topic = FIGURES[member].topic
        topics[topic].append(member)
    return {f"ls.plots: {topic}": list_members(plots, "ls.plots", names) for topic, names in topics.items()}


def list_analysis() -> dict[str, list[Entry]]:
    """List the functions of ``ls.analysis`` by module."""
    sections = {}
    for file in sorted((generated_pages.ROOT / "lorascope" / "analysis").glob("[!_]*.py")):
        module = importlib.import_module(f"lorascope.analysis.{file.stem}")
        prefix = f"ls.analysis.{file.stem}"
        sections[prefix] = list_members(module, prefix, generated_pages.public_members(module))
    return sections


def shorten(summary: str) -> str:
    """Return a summary up to its first semicolon, bracket or colon, but no title of one or two words."""
    text = re.split(r"[;(]", summary)[0].strip()
    start = text.partition(": ")[0]
    if start.count(" ") > 1:
        return start
    return text


def read_opening() -> tuple[str, str]:
    """Return the first sentence and the first lines of code of the README."""
    _, sentence, *_ = README.split("\n\n")
    return sentence, README.partition("```python\n")[2].partition("```")[0]


def cheat_sheet() -> str:
    """Return the page of all functions that a user calls first, in columns."""
    sentence, code = read_opening()
    sections = {}
    for title, entries in list_public().items():
        if title.removeprefix("ls.") not in _NOT_FIRST:
            sections[title] = [f"- `{entry.name}` {shorten(entry.summary)}" for entry in entries]
    sections["Commands"] = [f"- `lorascope {name}` {summary}" for name, summary in COMMANDS.items()]
    columns = "\n\n".join("\n".join([f"**{title}**\n", *lines]) for title, lines in sections.items())
    return (
        "---\nhtml_theme.sidebar_secondary.remove: true\n---\n\n"
        f"# Cheat sheet\n\n{sentence}\n\n```python\n{code}```\n\n"
        f":::{{container}} cheat-sheet\n\n{columns}\n:::\n\n"
        "The [reference](reference/index.rst) lists all names, and so does `llms.txt` at the root of the site.\n"
    )


def llms_text() -> str:
    """Return ``llms.txt``, the index of the documentation for language models, as llmstxt.org describes it."""
    sentence, code = read_opening()
    guides = (generated_pages.ROOT / "docs" / "guides.md").read_text(encoding="utf-8")
    sections = {
        "Guides": re.sub(r"\]\(([\w-]+)\.md\)", r"](\1.html)", "\n".join(re.findall(r"^- \[.*", guides, re.MULTILINE))),
        "Commands": "\n".join(f"- `lorascope {name}`: {summary}" for name, summary in COMMANDS.items()),
    }
    for title, entries in (list_public() | list_analysis()).items():
        sections[title] = "\n".join(f"- [{entry.name}]({entry.page}): {entry.summary}" for entry in entries)
    parts = "\n\n".join(f"## {title}\n\n{lines}" for title, lines in sections.items())
    return f"# lorascope\n\n> {sentence}\n\n```python\n{code}```\n\n{parts}\n"


def write_cheat_sheet(app: Sphinx, config: Config) -> None:
    """Write the cheat sheet into the source folder, before Sphinx looks for sources."""
    generated_pages.write_if_changed(Path(app.srcdir) / "cheat-sheet.md", cheat_sheet())


def write_llms_text(app: Sphinx, error: Exception | None) -> None:
    """Write ``llms.txt`` to the root of the site."""
    if error is None and app.builder.format == "html":
        (Path(app.outdir) / "llms.txt").write_text(llms_text(), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the lists with Sphinx."""
    app.connect("config-inited", write_cheat_sheet)
    app.connect("build-finished", write_llms_text)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
