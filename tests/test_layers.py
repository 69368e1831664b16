"""The plan of the house: which package may import which, and which of them may import torch."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lorascope

PACKAGE = Path(lorascope.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# A package imports only what stands above it, and of that what its row allows; torch is a row's word too.
CONTRACT = {
    "": "",
    "files": "",
    "updates": "",
    "schema": "files",
    "charts": "files",
    "inputs": "torch files schema",
    "adapters": "torch files updates schema",
    "runs": "files updates schema",
    "analysis": "files updates schema runs",
    "methods": "torch files updates schema inputs adapters runs analysis",
    "observe": "torch files updates schema adapters analysis methods",
    "training": "torch files schema inputs adapters runs methods observe",
    "plots": "files updates schema charts runs analysis",
    "diagnosis": "files updates schema runs analysis",
    "experiments": "torch files updates schema inputs adapters runs analysis methods observe training diagnosis",
    "probes": "torch files updates schema charts inputs adapters runs analysis methods observe plots experiments",
    "cli": "files runs analysis methods training plots diagnosis experiments probes",
}
LATE = {("runs/run.py", "training")}  # Run.restore, inside the function: the one door from a run to torch


def imports(path: Path) -> set[str]:
    """What a file imports, wherever in the file: packages of lorascope by their names, all others by their first."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] if name.startswith("lorascope.") else name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", FILES, ids=[path.relative_to(PACKAGE).as_posix() for path in FILES])
def test_a_file_imports_what_its_package_may(path):
    file = path.relative_to(PACKAGE).as_posix()
    here = file.rpartition("/")[0].partition("/")[0]
    found = {"torch" if name == "transformers" else name for name in imports(path)} & {*CONTRACT, "torch"}
    assert not {name for name in found - {here} if (file, name) not in LATE} - set(CONTRACT[here].split())


def test_the_contract_points_one_way_and_keeps_torch_out():
    for number, (name, row) in enumerate(CONTRACT.items()):
        below = set(row.split()) - {"torch"}
        assert below <= set(list(CONTRACT)[:number]), name
        assert "torch" in row or name == "cli" or not any("torch" in CONTRACT[each] for each in below), name


@pytest.mark.parametrize("file", [f for f in FILES if f.name == "__init__.py"], ids=lambda file: file.parent.name)
def test_no_module_is_named_like_a_public_name_of_its_package(file):
    modules = {path.stem for path in file.parent.iterdir()}
    package = ".".join(file.parent.relative_to(PACKAGE.parent).parts)
    found = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ImportFrom)]
    names = {alias.asname or alias.name for node in found if node.module != package for alias in node.names}
    assert not modules & (set(lorascope._PUBLIC) if file.parent == PACKAGE else names)


def test_every_public_name_is_there():
    for name in lorascope.__all__:
        assert getattr(lorascope, name) is not None
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        lorascope.nothing_of_the_kind  # noqa: B018
