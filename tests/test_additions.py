"""Additions: a copy of the package with one new file per kind of addition finds each without an edit of a list."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import lorascope

PACKAGE = Path(lorascope.__file__).parent
ADDITIONS = {
    "methods/halved.py": '''"""LoRA with half the scale."""
from dataclasses import dataclass
from lorascope.methods.lora import LoRA

@dataclass(kw_only=True)
class Halved(LoRA, name="halved"):
    """Low-rank adaptation with half the scale.

    Source: arXiv 2106.09685.
    """
''',
    "plots/sizes.py": '''"""Figure of the number of modules."""
from lorascope.charts.chart import Chart
from lorascope.plots.figure_registry import figure, gather_runs
from lorascope.plots.run_groups import Runs

@figure(topic="updates", needs=("update_norm",), reads="r", misleads="m")
def module_counts(runs: Runs, control: Runs | None = None) -> Chart:
    """Plot the number of modules."""
    return gather_runs("module_counts", runs, control).complete(None)
''',
    "diagnosis/causes/even_norms.py": '''"""Cause: norms that do not differ."""
from lorascope.diagnosis.causes.finding import DoctorRule, finding

@DoctorRule("LS099", "even-norms", "note", problem="Norms are equal.", evidence="they are equal", fix="train longer")
def even_norms(case):
    """Find equal norms."""
    yield finding("equal")
''',
    "formats/peft_doubled.py": '''"""Reader of a type of adapter with one factor."""
from lorascope.formats.peft_format import PeftFormat
from lorascope.updates import LowRank

class Doubled(PeftFormat, frozen=True):
    """Products of a factor with itself."""
    kind = "DOUBLED"
    tensors = {"doubled_u": "in r"}

    def update(self, arrays):
        return LowRank(arrays["doubled_u"], arrays["doubled_u"].T)
''',
}
CLAIM = '\nCLAIMS["lora.yours"] = (Accuracy("LoRA 8"), Accuracy("full"))\n'
SCRIPT = """
import lorascope as ls
from lorascope.diagnosis.kinds import KINDS
from lorascope.formats import find_reader
from lorascope.papers.registry import PAIRS, module_of

assert ls.Halved.name == "halved" and ls.METHODS["halved"] is ls.Halved and "Halved" in ls.__all__
assert "module_counts" in ls.plots.FIGURES and ls.plots.module_counts is ls.plots.FIGURES["module_counts"].draw
assert KINDS["LS099"].name == "even-norms"
assert find_reader({"peft_type": "DOUBLED"}, ()).format == "DOUBLED (PEFT)"
assert PAIRS["lora.yours"][0].arms() == {"LoRA 8"} and module_of("lora.yours") == "lorascope.papers.lora"
print(ls.__file__)
"""


def test_one_file_adds_a_method_figure_cause_and_format_and_a_line_a_claim(tmp_path: Path) -> None:
    copy = tmp_path / "lorascope"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for path, text in ADDITIONS.items():
        (copy / path).write_text(text, encoding="utf-8")
    with (copy / "papers" / "lora.py").open("a", encoding="utf-8") as paper:
        paper.write(CLAIM)
    result = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.stdout == f"{copy / '__init__.py'}\n", result.stderr
