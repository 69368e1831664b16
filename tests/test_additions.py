"""Additions other than methods: a copy of the package finds one new file of each kind, without an edit of a list."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from temporary_package import build

ADDITIONS = {
    "plots/sizes.py": '''"""Figure of the number of modules."""
from lorascope.charts.chart import Chart
from lorascope.plots.figure_registry import figure, gather_runs
from lorascope.plots.run_groups import Runs

@figure(topic="updates", needs=("update_norm",), reads="r", misleads="m")
def module_counts(runs: Runs, control: Runs | None = None) -> Chart:
    """Plot the number of modules."""
    return gather_runs("module_counts", runs, control).complete(None)
''',
    "observe/step_count.py": '''"""Observer of the number of steps."""
from dataclasses import dataclass

from lorascope.observe.observer import Observer

@dataclass(kw_only=True)
class step_count(Observer):
    """Number of steps."""
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
CLAIM = '\nJUDGED["lora.yours"] = Comparison(Accuracy("LoRA 8") - Accuracy("full"))\n'
SCRIPT = """
import lorascope as ls
from lorascope.diagnosis.kinds import KINDS
from lorascope.formats import find_reader
from lorascope.observe import OBSERVERS
from lorascope.papers.registry import COMPARISONS, module_of

assert "module_counts" in ls.plots.FIGURES and ls.plots.module_counts is ls.plots.FIGURES["module_counts"].draw
assert "step_count" in OBSERVERS
assert KINDS["LS099"].name == "even-norms"
assert find_reader({"peft_type": "DOUBLED"}, ()).format == "DOUBLED (PEFT)"
assert COMPARISONS["lora.yours"].arms() == {"LoRA 8", "full"} and module_of("lora.yours") == "lorascope.papers.lora"
print(ls.__file__)
"""


def test_one_file_adds_a_figure_an_observer_a_cause_and_a_format_and_one_line_a_claim(tmp_path: Path) -> None:
    package = build(tmp_path, {}) / "lorascope"
    for path, text in ADDITIONS.items():
        (package / path).write_text(text, encoding="utf-8")
    paper = package / "papers" / "lora.py"
    source = paper.read_text(encoding="utf-8")
    paper.unlink()  # a link to the file of the package
    paper.write_text(source + CLAIM, encoding="utf-8")
    result = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.stdout == f"{package / '__init__.py'}\n", result.stderr
