"""README and documentation: tables generated from the code, links that exist, blocks that print what is shown."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

import lorascope
from lorascope.charts.save import data_hash
from lorascope.cli.main import COMMANDS, main
from lorascope.methods import METHODS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
WRITTEN_BY_MAKE_DOCS = (
    "cheat-sheet.md",
    "gallery",
    "methods",
    "reference",
    "tutorials",
    "cli.md",
    "quantities.md",
    "kinds",
    "kinds.md",
)


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that writes pages from the code."""
    pytest.importorskip("sphinx")
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_ext"))
    import generated_pages

    return generated_pages


def hand_written(page: Path) -> bool:
    parts = page.relative_to(ROOT).parts
    return parts[0] != "docs" or not (parts[1] in WRITTEN_BY_MAKE_DOCS or "_build" in parts)


def test_readme_has_at_most_150_lines():
    assert len(README.splitlines()) <= 150


def test_table_of_methods_has_class_docstring_and_source_of_every_method():
    """``make docs`` writes the table."""
    rows = re.findall(r"^\| `(\w+)` \| `ls\.(\w+)` \| (.+?) \|(.*)\|$", README, re.MULTILINE)
    assert {name for name, *_ in rows} == {
        name for name, cls in METHODS.items() if cls.__module__.startswith("lorascope.")
    }
    for name, class_name, sentence, link in rows:
        method = METHODS[name]
        source = (sys.modules[method.__module__].__doc__ or "").partition("Source:")[2]
        paper = re.findall(r"arXiv (\d+\.\d+)", source)[:1]
        assert (method.__name__, paper) == (class_name, re.findall(r"\[arXiv (\d+\.\d+)\]", link))
        assert " ".join((method.__doc__ or "").split()).replace("``", "`").startswith(f"{sentence}.")


def test_commands_of_the_readme_exist():
    assert set(re.findall(r"`lorascope (\w+)", README)) <= set(COMMANDS)


def test_make_targets_of_the_readme_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"`make ([\w-]+)", README)) <= targets


@pytest.mark.parametrize("page", list(filter(hand_written, PAGES)), ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_files(page: Path):
    for link in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        target = (page.parent / link).resolve()
        inside = target.relative_to(ROOT / "docs").parts[0] if target.is_relative_to(ROOT / "docs") else ""
        assert target.exists() or inside in WRITTEN_BY_MAKE_DOCS, link


def blocks(language: str) -> list[str]:
    """Return the fenced blocks of the README in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def strip_lines(text: str) -> str:
    """Return the text without blanks at the ends of lines."""
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def fits(printed: str, shown: str) -> bool:
    """Return whether the output is what is shown, decimals to one unit of their last digit.

    Decimals come from arithmetic that rounds differently on another processor.
    """
    number = re.compile(r"\d+\.\d+")
    pairs = zip(number.findall(printed), number.findall(shown), strict=False)  # their counts are compared below
    return strip_lines(number.sub("#", printed)) == strip_lines(number.sub("#", shown)) and all(
        len(one) == len(other) and abs(Decimal(one) - Decimal(other)) <= Decimal(1).scaleb(-len(other.split(".")[1]))
        for one, other in pairs
    )


def test_outputs_fit_to_one_unit_of_the_last_digit():
    assert fits("q 9.95 8\n", "q 9.96 8\n")
    assert not fits("q 9.95 8\n", "q 9.97 8\n")
    assert not fits("q 9.95 8\n", "q 9.95 9\n")
    assert not fits("q 9.95\n", "k 9.95\n")
    assert not fits("q 9.95\nk 1.0\n", "q 9.95\n")


def test_first_screen_has_one_figure_the_lines_that_draw_it_the_uses_and_then_the_sizes():
    opening, _, study = README.partition("<!-- evidence headline -->")
    parts = ("![", "```python", "| what it does |", "## Install", " MB |")
    positions = [opening.index(part) for part in parts]
    assert positions == sorted(positions)
    assert opening.count("![") == 1
    rows = study.partition("<!-- /evidence -->")[0]
    assert (opening + rows).count("\n") < 60


def test_first_figure_of_the_readme_is_what_its_three_lines_draw():
    """``make docs`` draws it."""
    code = blocks("python")[0]
    assert len(list(filter(None, code.splitlines()))) == 3
    *lines, last = code.splitlines()
    names: dict = {}
    exec("\n".join(lines), names)
    with Image.open(ROOT / re.findall(r"!\[.*?\]\((.+?)\)", README)[0]) as image:
        assert json.loads(image.info["lorascope"]) == {"data_sha256": data_hash(eval(last, names))}


@pytest.mark.slow
@pytest.mark.real
def test_blocks_of_the_readme_print_what_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (console,) = blocks("console")
    names: dict = {}
    for code in blocks("python"):
        exec(code, names)
    assert main(["export", str(names["run"].path), "--peft", "my-adapter"]) == 0
    capsys.readouterr()
    command, _, shown = console.partition("\n")
    assert main(shlex.split(command)[2:]) == 0
    printed, start = capsys.readouterr().out.rstrip().splitlines(), 0
    for passage in shown.rstrip().split("\n...\n"):  # lines of three points stand for omitted ones
        lines = passage.splitlines()
        first = lines[0].split()[0]
        start = next(index for index in range(start, len(printed)) if printed[index].split()[:1] == [first])
        assert fits("\n".join(printed[start : start + len(lines)]), passage)
    assert start + len(lines) == len(printed)


@pytest.fixture
def public_calls(generated: ModuleType) -> dict[str, Any]:
    """Every public function and class by the name that a user types."""
    calls = {f"ls.{name}": getattr(lorascope, name) for name in lorascope._PUBLIC}
    for name in lorascope._MODULES:
        module = getattr(lorascope, name)
        calls |= {f"ls.{name}.{member}": getattr(module, member) for member in dir(module)}
    for file in sorted((ROOT / "lorascope" / "analysis").glob("[!_]*.py")):
        module = importlib.import_module(f"lorascope.analysis.{file.stem}")
        for member in generated.public_members(module):
            calls[f"ls.analysis.{file.stem}.{member}"] = getattr(module, member)
    return {name: value for name, value in calls.items() if callable(value)}


def test_llms_text_names_every_public_function_with_its_summary(generated: ModuleType, public_calls: dict[str, Any]):
    import function_lists

    text = function_lists.llms_text()
    assert text.startswith("# lorascope\n\n> See where low-rank fine-tuning changes a model")
    entries = dict(re.findall(r"^- \[(ls\.[\w.]+)\]\([\w./-]+\): (.+)$", text, re.MULTILINE))
    assert entries.keys() == public_calls.keys()
    for name, value in public_calls.items():
        words = " ".join((value.__doc__ or "").split())
        assert re.sub(r":\w+:`|``", "`", words).startswith(f"{entries[name]}.")
    for name, summary in COMMANDS.items():
        assert f"- `lorascope {name}`: {summary}" in text


def test_cheat_sheet_is_one_page_of_the_functions_that_users_call(generated: ModuleType, public_calls: dict[str, Any]):
    import function_lists

    sheet = function_lists.cheat_sheet()
    shown = re.findall(r"^- `(ls\.[\w.]+)` \w", sheet, re.MULTILINE)
    low_level = ("analysis", "baseline_ranks", "component_importance", "module_table", "updates")
    assert set(shown) == {name for name in public_calls if name.split(".")[1] not in low_level}
    assert set(re.findall(r"^- `lorascope (\w+)` \w", sheet, re.MULTILINE)) == set(COMMANDS)
    assert blocks("python")[0] in sheet


def test_every_kind_of_finding_has_a_page_with_an_anchor_and_a_row_of_the_index(generated: ModuleType):
    pages = generated.kind_pages()
    index = pages.pop("kinds.md")
    assert pages.keys() == {f"kinds/{id}.md" for id in generated.KINDS}
    rows = [line.strip("| ").split(" | ") for line in index.splitlines() if line.startswith("| [")]
    kinds = generated.KINDS.values()
    assert [row[:3] for row in rows] == [[f"[{k.id}](kinds/{k.id}.md)", f"`{k.name}`", k.severity] for k in kinds]
    assert [row[3].replace("\\|", "|") for row in rows] == [kind.problem for kind in kinds]
    for id, kind in generated.KINDS.items():
        page = pages[f"kinds/{id}.md"]
        assert page.startswith(f"({id})=\n# {id}: `{kind.name}`\n")
        assert index.count(f"\nkinds/{id}\n") == 1  # in the table of contents
        assert all(generated.sentence(text) in page for text in (kind.evidence, kind.fix) if text)
    with pytest.raises(ValueError, match="LS001 must have"):
        generated.kind_page(replace(generated.KINDS["LS001"], evidence=""))
