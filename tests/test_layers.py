"""The import contract: the packages that each package may import, and the packages that may import torch."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lorascope

PACKAGE = Path(lorascope.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# A package may import the packages in its row, all of which are listed above it, and torch only if its row has it.
CONTRACT = {
    "": "",
    "files": "",
    "updates": "",
    "schema": "files",
    "charts": "files",
    "inputs": "torch files schema",
    "adapters": "torch updates schema inputs",
    "runs": "files updates schema",
    "analysis": "files updates schema runs",
    "methods": "torch updates schema inputs adapters runs analysis",
    "diagnosis": "files updates schema runs analysis",
    "observe": "torch files updates schema adapters analysis methods diagnosis",
    "training": "torch files schema inputs adapters runs methods observe",
    "plots": "files updates schema charts runs analysis",
    "pages": "files charts runs plots diagnosis",
    "evidence": "files analysis",
    "gallery": "files updates schema charts runs analysis plots evidence",
    "experiments": "torch files updates schema inputs adapters runs analysis methods observe training diagnosis",
    "probes": "torch files updates schema charts inputs adapters runs analysis methods observe training plots pages "
    "evidence gallery experiments",
    "cli": "files schema runs analysis methods training plots diagnosis pages evidence gallery experiments probes",
}
LONGEST = 500  # lines of a file


def module_name(path: Path) -> str:
    return ".".join(["lorascope", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


MODULES = {module_name(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    """Return the full names of everything that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def packages(path: Path) -> set[str]:
    """Return the lorascope packages that a file imports, and torch if it imports torch or transformers."""
    firsts = {name.split(".")[1] if name.startswith("lorascope.") else name.partition(".")[0] for name in imports(path)}
    return {"torch" if name == "transformers" else name for name in firsts} & {*CONTRACT, "torch"}


@pytest.mark.parametrize("path", FILES, ids=[path.relative_to(PACKAGE).as_posix() for path in FILES])
def test_file_imports_only_allowed_packages(path):
    here = path.relative_to(PACKAGE).parent.parts[:1]
    here = here[0] if here else ""
    assert packages(path) - {here} <= set(CONTRACT[here].split())


def test_contract_has_no_cycle_and_torch_free_packages_import_no_torch():
    for number, (name, row) in enumerate(CONTRACT.items()):
        allowed = set(row.split()) - {"torch"}
        assert allowed <= set(list(CONTRACT)[:number]), name
        assert "torch" in row or name == "cli" or not any("torch" in CONTRACT[each] for each in allowed), name


def test_every_package_has_a_row():
    found = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert found == CONTRACT.keys() - {""}


def test_contract_allows_only_imports_that_are_used():
    used: dict[str, set[str]] = {name: set() for name in CONTRACT}
    for path in FILES:
        parts = path.relative_to(PACKAGE).parts
        used[parts[0] if len(parts) > 1 else ""] |= packages(path)
    assert {
        name: set(row.split()) - used[name] for name, row in CONTRACT.items() if set(row.split()) - used[name]
    } == {}


def test_modules_have_no_import_cycle():
    def target(name: str) -> str:
        """Return the module that an import of ``name`` runs."""
        while name not in MODULES:
            name = name.rpartition(".")[0]
        return name

    graph = {
        module: {target(name) for name in imports(path) if name.split(".")[0] == "lorascope"} - {module, "lorascope"}
        for module, path in MODULES.items()
    }
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("file", [f for f in FILES if f.name == "__init__.py"], ids=lambda file: file.parent.name)
def test_no_module_has_the_name_of_a_public_object_of_its_package(file):
    modules = {path.stem for path in file.parent.iterdir()}
    package = module_name(file)
    found = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom)]
    names = {alias.asname or alias.name for node in found if node.module != package for alias in node.names}
    assert not modules & (set(lorascope._PUBLIC) if file.parent == PACKAGE else names)


def test_every_public_name_resolves():
    for name in lorascope.__all__:
        assert getattr(lorascope, name) is not None
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        lorascope.nothing_of_the_kind  # noqa: B018


@pytest.mark.parametrize(
    "module",
    [name for name, path in MODULES.items() if path.name == "__init__.py" or "\n__all__ = " in path.read_text("utf-8")],
)
def test_star_import_defines_every_exported_name(module):
    found: dict[str, object] = {}
    exec(f"from {module} import *", found)
    assert set(getattr(importlib.import_module(module), "__all__", ())) <= found.keys()


def test_no_file_is_longer_than_500_lines():
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: number for name, number in lines.items() if number > LONGEST} == {}


def test_names_outside_of_shapes_are_defined() -> None:
    # The linter's own rule is off, because a shape such as "out" looks like an undefined name.
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--select",
        "F821",
        "--output-format",
        "json",
        "--exit-zero",
        PACKAGE,
    ]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    undefined = []
    for each in found:
        file, place = Path(each["filename"]), each["location"]
        line = file.read_text(encoding="utf-8").splitlines()[place["row"] - 1]
        if line[: place["column"] - 1].count('"') % 2 == 0:
            undefined.append(f"{file.relative_to(PACKAGE)}:{place['row']}: {each['message']}")
    assert undefined == []
