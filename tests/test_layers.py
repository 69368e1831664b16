"""The package's layers, read from its syntax trees: who may import whom, and who may import torch."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import lorascope

PACKAGE = Path(lorascope.__file__).parent

# Lowest first. A module may import only what stands before it; those of one line know nothing of each other.
LAYERS = [
    ["lorascope"],
    ["printable"],
    ["json_files", "csv_files", "labels", "matching"],
    ["parquet_files"],
    ["algebra", "roles", "tensors", "marks", "settings", "card", "layout"],
    ["turning", "names", "chart"],
    ["update", "folders"],
    ["fourier"],
    ["records", "forms", "render", "allocation", "hosts", "assets", "encoding", "summary", "transforms"],
    ["run_schema"],
    ["images", "run", "sources", "evaluation", "foreign", "replay", "hidden"],
    ["writer", "adapter_parts", "pretrained", "tasks", "progress", "gated"],
    ["adapter_files"],
    ["adalora_files", "dora_files", "fourier_files", "hydra_files", "loralib_files", "analysis", "models"],
    ["checkpoints"],
    ["scoring", "adapter_inspection", "against_base"],
    ["causes"],
    ["plots", "claims", "inspection", "export", "delta", "doctor"],
    ["neuron_inspection", "pairwise", "widgets"],
    ["screen", "ablation", "gating"],
    ["pairwise_screen"],
    ["heads", "method"],
    ["methods", "trained", "observer"],
    ["moments", "sensed", "utilised"],
    ["state", "observe", "mixing", "stepping"],
    ["removal"],
    ["worth"],
    ["resume"],
    ["plan"],
    ["session", "driving", "recording"],
    ["loop", "training"],
    ["hf"],
    ["values", "board", "backends"],
    ["grid"],
    ["sweeps", "alone"],
    ["memory", "pace"],
    ["probe"],
    ["report"],
    ["probes"],
    ["commands"],
    ["cli"],
]
TORCH_FREE = {
    *(
        "printable",
        "folders",
        "json_files",
        "csv_files",
        "matching",
        "parquet_files",
        "run_schema",
        "labels",
        "algebra",
        "roles",
        "tensors",
        "marks",
        "settings",
        "card",
        "layout",
        "turning",
        "update",
        "names",
        "allocation",
        "chart",
        "records",
        "forms",
        "summary",
        "render",
        "run",
        "export",
        "fourier",
    ),
    *("adapter_parts", "adapter_inspection", "against_base", "adalora_files", "dora_files", "loralib_files"),
    *("writer", "adapter_files", "pretrained", "checkpoints", "analysis", "plots", "claims", "inspection", "screen"),
    "fourier_files",
    "hydra_files",
    "neuron_inspection",
    "pairwise",
    "pairwise_screen",
    "scoring",
    "gated",
    "causes",
    "doctor",
    "widgets",
}
# Imports inside a function: a run's way to torch, and a chart's way to its picture.
LATE = {("run", "state"), ("chart", "render")}
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def part(path: Path) -> str:
    """The layer a file belongs to: its module, or the folder it lies in."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "lorascope" if first == "__init__" else first


def imports(path: Path) -> set[str]:
    """Full names of all that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_imports_point_one_way(path):
    here = part(path)
    assert here in LEVEL, f"{here} has no place among the layers yet"
    for name in imports(path):
        head, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if head != "lorascope" or other not in LEVEL or other == here or (here, other) in LATE:
            continue
        assert LEVEL[other] < LEVEL[here], f"{here} imports {other}, which stands no lower"


@pytest.mark.parametrize("path", [path for path in FILES if part(path) in TORCH_FREE], ids=lambda path: path.name)
def test_torch_stays_out_of_what_reads_and_draws(path):
    assert not {name.partition(".")[0] for name in imports(path)} & {"torch", "transformers"}


def test_torch_free_layers_import_torch_free_layers_alone():
    for path in FILES:
        here = part(path)
        if here not in TORCH_FREE:
            continue
        used = {name.split(".")[1] for name in imports(path) if name.startswith("lorascope.")} & LEVEL.keys()
        assert used - {other for late, other in LATE if late == here} <= TORCH_FREE, path


def test_no_module_is_named_like_a_public_function():
    functions = {name for name in lorascope.__all__ if name[0].islower()} - set(lorascope._MODULES)
    assert not functions & {part(path) for path in FILES}


def test_every_public_name_is_there():
    for name in lorascope.__all__:
        assert getattr(lorascope, name) is not None
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        lorascope.nothing_of_the_kind  # noqa: B018


def modules_with_exports() -> list[str]:
    """Every package, and every module that lists its names."""
    return [
        ".".join(["lorascope", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
        for path in FILES
        if path.name == "__init__.py" or "\n__all__ = " in path.read_text()
    ]


@pytest.mark.parametrize("module", modules_with_exports())
def test_star_import_gives_every_exported_name(module):
    found: dict[str, object] = {}
    exec(f"from {module} import *", found)
    assert set(getattr(importlib.import_module(module), "__all__", ())) <= found.keys()


def test_no_file_has_outgrown_its_idea():
    long = {path.name: n for path in FILES if (n := len(path.read_text(encoding="utf-8").splitlines())) > 500}
    assert not long
