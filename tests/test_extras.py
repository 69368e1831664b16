"""Extras: every import is installed by the base or has a row, and a missing package gives one line."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import installation
import pytest

from lorascope import extras
from lorascope.cli.main import main

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OPTIONAL = PROJECT["optional-dependencies"]
REQUIREMENTS = [
    *PROJECT["dependencies"],
    *(f'{each} ; extra == "{extra}"' for extra, listed in OPTIONAL.items() for each in listed),
]


def imported() -> set[str]:
    names = set()
    for file in (ROOT / "lorascope").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names.add(str(node.module))
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"lorascope"}


def test_every_imported_package_is_in_the_base_or_has_an_extra_that_brings_it() -> None:
    base = installation.importable(installation.distributions(REQUIREMENTS))
    # Only checked annotations need jaxtyping, and a user of the recorder for Lightning has lightning.
    lacking = imported() - base - {"jaxtyping", "lightning"}
    brought = {extra: installation.importable(installation.distributions(REQUIREMENTS, [extra])) for extra in OPTIONAL}
    known = metadata.packages_distributions()
    for name in sorted(lacking & known.keys()):
        assert name in brought[extras._EXTRAS[name]], name
    assert lacking <= extras._EXTRAS.keys()


def test_base_brings_no_large_package() -> None:
    large = {"torch", "transformers", "scipy", "pyarrow", "scikit-learn", "plotly", "peft", "jupyterlab", "ray"}
    assert not installation.distributions(REQUIREMENTS) & large


def test_dev_brings_every_extra_that_tests_need() -> None:
    dev = installation.distributions(REQUIREMENTS, ["dev"])
    # No test needs a dataset from the Hugging Face Hub, and those of Lightning, captions, lm-eval and bitsandbytes are
    # skipped without them.
    for extra in OPTIONAL.keys() - {"hub", "harness", "lightning", "e2e", "quantized"}:
        assert installation.distributions(REQUIREMENTS, [extra]) <= dev


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("torch", "requires torch: pip install 'lorascope[train]'"),
        ("sklearn", "requires scikit-learn: pip install 'lorascope[runs]'"),
        ("anywidget", "requires anywidget: pip install 'lorascope[notebook]'"),
        ("torch.absent", None),
        ("lorascope.absent", None),
        (None, None),
    ],
)
def test_only_a_package_of_an_extra_has_a_requirement(package: str | None, line: str | None) -> None:
    assert extras.requirement(ModuleNotFoundError(name=package)) == line


@pytest.mark.parametrize(
    ("words", "package"), [(["train", "lora"], "torch"), (["reproduce"], "torch"), (["verify"], "scipy")]
)
def test_command_without_its_extra_prints_one_line(words: list[str], package: str) -> None:
    code = f"{installation.hide([package])}\nfrom lorascope.cli.main import main\nsys.exit(main({words!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    extra = extras._EXTRAS[package]
    assert done.stderr == f"lorascope {words[0]} requires {package}: pip install 'lorascope[{extra}]'\n"
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize(("name", "call"), [("train", ""), ("papers.lora.run", "()")])
def test_public_name_without_its_extra_raises_an_import_error(name: str, call: str) -> None:
    code = f"{installation.hide(['torch'])}\nimport lorascope as ls\nls.{name}{call}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = f"ImportError: lorascope.{name} requires torch: pip install 'lorascope[train]'"
    assert done.stderr.splitlines()[-1] == last


def test_run_without_pyarrow_names_the_extra_that_reads_its_records() -> None:
    code = f"{installation.hide(['pyarrow'])}\nimport lorascope as ls\nprint(ls.example('lora'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = "ModuleNotFoundError: a Parquet table requires pyarrow: pip install 'lorascope[runs]'"
    assert done.stderr.splitlines()[-1] == last


def test_missing_module_of_no_extra_is_an_error_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lorascope.cli.survey", None)
    with pytest.raises(ModuleNotFoundError, match="survey"):
        main(["survey"])
