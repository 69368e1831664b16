"""The wheel: its files, and what it does in an installation with the dependencies of the base or of one extra."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import installation
import pytest
from test_inspect import llama, plant

import lorascope
from lorascope.files.data_folder import DATA
from lorascope.papers.judging.study_summary import read_summary, summary_lines

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("hatchling") is None, reason="hatchling, which builds the wheel, is not installed"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(out)]
    subprocess.run([*pip, str(ROOT)], check=True)
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the files of the wheel."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", str(folder)]
    subprocess.run([*pip, str(wheel)], check=True)
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return plant(tmp_path / "adapter", llama(2, [1.0, 0.5, 0.2, 0.1]))


def call(site: Path, cwd: Path, arguments: Sequence[str], extra: str = "") -> subprocess.CompletedProcess[str]:
    """Run Python on the wheel where only the dependencies of the base, or of an extra, can be imported."""
    (info,) = site.glob("*.dist-info")
    requirements = metadata.PathDistribution(info).requires or []
    installed = installation.importable(installation.distributions(requirements, [extra] if extra else []))
    hidden = metadata.packages_distributions().keys() - installed - {"lorascope"} - sys.stdlib_module_names
    folder = cwd / "hidden"
    folder.mkdir()
    # Python imports this module when it starts.
    (folder / "sitecustomize.py").write_text(installation.hide(hidden), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (folder, site)))}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def test_wheel_has_package_types_templates_and_evidence_but_no_tests(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lorascope").rglob("*.py")}
    own = {
        "py.typed",
        "plots/explore.css",
        "plots/explore.js",
        "pages/page.html",
        "formats/transformers_names.json",
        "pages/parts.html",
    }
    own |= {f"experiments/recipes/{path.name}" for path in (ROOT / "lorascope/experiments/recipes").glob("*.toml")}
    files = [*(ROOT / "data").glob("*.toml"), ROOT / "data" / "paper-figures.csv"]
    for folder in ("edition-1", "evidence-2", "examples", "instruments", "published"):
        files += (ROOT / "data" / folder).rglob("*")
    data = {path.relative_to(ROOT).as_posix() for path in files if path.is_file()}
    expected = package | {f"lorascope/{name}" for name in own | data}
    info = f"lorascope-{lorascope.__version__}.dist-info"
    assert {name for name in names if not name.startswith(info)} == expected
    assert {f"{info}/METADATA", f"{info}/licenses/LICENSE", f"{info}/entry_points.txt"} <= names


def test_examples_take_less_than_3_mb_of_the_wheel(wheel: Path) -> None:
    files = [file for file in zipfile.ZipFile(wheel).infolist() if "/data/examples/" in file.filename]
    assert 0 < sum(file.compress_size for file in files) < 3e6


def test_metadata_states_version_license_python_and_extras(site: Path) -> None:
    (info,) = site.glob("*.dist-info")
    about, requirements = metadata.PathDistribution(info).metadata, metadata.PathDistribution(info).requires or []
    assert about["Version"] == lorascope.__version__
    assert about["License-Expression"] == "Apache-2.0"
    assert about["Requires-Python"] == ">=3.11"
    assert {"runs", "train", "notebook", "trainer", "cluster", "hub", "peft", "dev"} <= set(
        about.get_all("Provides-Extra") or []
    )
    assert {each.partition(";")[0] for each in requirements if each.startswith("torch")} == {"torch>=2.6"}


@pytest.mark.parametrize(
    "words",
    [["inspect"], ["doctor"], ["plot", "spectrum"], ["export", "--peft", "exported"], ["survey"]],
    ids=lambda words: words[0],
)
def test_commands_on_an_adapter_need_only_the_base(site: Path, adapter: Path, tmp_path: Path, words: list[str]) -> None:
    done = call(site, tmp_path, ["-m", "lorascope.cli", *words, str(adapter)])
    assert (done.returncode, done.stderr) == (0, "")


def test_example_adapters_need_only_the_base(site: Path, tmp_path: Path) -> None:
    code = "import lorascope as ls; ls.plots.spectrum(ls.example('adapter')).save('spectrum.pdf'); print(ls.examples())"
    done = call(site, tmp_path, ["-c", code])
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "spectrum.pdf").exists()


def test_inspect_prints_the_same_with_the_base_as_with_everything(site: Path, adapter: Path, tmp_path: Path) -> None:
    words = ["-m", "lorascope.cli", "inspect", str(adapter)]
    found = call(site, tmp_path, words).stdout
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    everything = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found == everything.stdout


def test_verify_needs_only_the_extra_runs(site: Path, tmp_path: Path) -> None:
    done = call(site, tmp_path, ["-m", "lorascope.cli", "verify"], "runs")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("No differences.")


def test_verify_and_reproduce_name_the_clone_that_they_need(site: Path, tmp_path: Path) -> None:
    done = call(site, tmp_path, ["-m", "lorascope.cli", "verify", "--write"], "runs")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--write requires a clone of the repository" in done.stderr
    shutil.rmtree(tmp_path / "hidden")
    done = call(site, tmp_path, ["-m", "lorascope.cli", "reproduce", "--evidence", "kept"], "train")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--evidence and --instruments require a clone of the repository" in done.stderr


def test_installed_package_has_the_kept_results(site: Path, tmp_path: Path) -> None:
    code = (
        "from lorascope.files import data_folder; print(data_folder.DATA); "
        "from lorascope.papers.judging import study_summary; "
        "print('\\n'.join(study_summary.summary_lines(study_summary.read_summary(data_folder.DATA))))"
    )
    done = call(site, tmp_path, ["-c", code], "train")
    folder, _, lines = done.stdout.partition("\n")
    assert Path(folder) == site / "lorascope" / "data"
    assert lines.splitlines() == list(summary_lines(read_summary(DATA)))
