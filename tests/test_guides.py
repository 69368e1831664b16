"""Guides: each begins with a run or an adapter of the package, in lines that train nothing and build no model."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import lorascope as ls

DOCS = Path(__file__).parents[1] / "docs"
CODE = re.compile(r"^```(?:\{code-cell\} ipython3|python)\n((?:(?!^```$).*\n)*)", re.MULTILINE)
GUIDES = {
    page.stem: CODE.findall(page.read_text(encoding="utf-8"))
    for page in sorted(DOCS.glob("*.md"))
    if page.stem != "cheat-sheet"  # which make docs writes, if it has run
}


@pytest.mark.parametrize("name", [name for name, blocks in GUIDES.items() if blocks])
def test_guide_begins_with_an_example_of_the_package(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = GUIDES[name][0]
    loaded = re.findall(r"ls\.example\(\"(\w+)\"\)", code)
    assert loaded or "map(ls.example" in code
    assert set(loaded) <= set(ls.examples().index)
    imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom)]
    roots = {(node.module if isinstance(node, ast.ImportFrom) else node.names[0].name) or "" for node in imports}
    assert {root.partition(".")[0] for root in roots} <= {"IPython", "lorascope", "pandas", "shutil"}
    exec(code, {})


def test_all_guides_but_three_have_code():
    listed = re.findall(r"\]\(([\w-]+)\.md\)", (DOCS / "guides.md").read_text(encoding="utf-8"))
    without_code = {name for name in listed if not GUIDES[name]}
    assert without_code == {"installation", "memory", "instrument-questions"}
