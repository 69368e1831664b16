"""The README against the code: methods, figures, commands and paths that it names."""

from __future__ import annotations

import inspect
import re
import runpy
from pathlib import Path

import pytest

from lorascope import plots
from lorascope.cli.main import COMMANDS
from lorascope.methods import METHODS
from lorascope.plots import FIGURES
from lorascope.probes import PROBES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_methods_is_the_registry():
    rows = dict(re.findall(r"^\| `(\w+)` \| `ls\.(\w+)` \|", README, re.MULTILINE))
    assert rows == {
        name: method.__name__ for name, method in METHODS.items() if method.__module__.startswith("lorascope.")
    }


def test_every_figure_has_its_place_in_the_gallery():
    gallery = README.partition("## Gallery")[2].partition("\n## ")[0]
    headings = " ".join(re.findall(r"^### .*", gallery, re.MULTILINE))
    assert set(re.findall(r"`(\w+)`", headings)) == set(FIGURES)


def test_every_command_named_is_one():
    named = set(re.findall(r"lorascope (\w+) ", README.partition("## From the shell")[2].partition("\n## ")[0]))
    assert named == set(COMMANDS)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_every_path_leads_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists(), link


def test_every_picture_drawn_again_is_shown_by_its_probe_and_in_the_docs():
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")))
    for file, (probe, figure, width) in runpy.run_path(str(ROOT / "figures/draw.py"))["PICTURES"].items():
        shown = inspect.getsource(inspect.getmodule(PROBES[probe].judge))
        assert f'"{figure}"' in shown, (file, probe, figure)
        assert figure in plots.__all__
        assert width in ("column", "page")
        assert not (ROOT / f"figures/{file}.png").exists() or f"figures/{file}.png" in pages, file


def test_make_knows_every_target_named():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"`make (\w+)", README)) <= targets
