"""Signatures of all figures for type checkers, from the registry: ``python tests/figure_stubs.py`` writes them."""

from __future__ import annotations

import inspect
import re
import subprocess
from pathlib import Path
from typing import get_type_hints

from lorascope import plots
from lorascope.plots.figure_registry import DRAWN
from lorascope.plots.run_groups import Runs

FILE = Path(plots.__file__).with_suffix(".pyi")
HEAD = '''"""Signatures of the figures. Written by ``python tests/figure_stubs.py``: do not edit."""

from collections.abc import Sequence
from typing import Literal

from pandas import DataFrame

from lorascope.charts.chart import Chart, Drawable, Panels
from lorascope.plots.figure_registry import FIGURES as FIGURES
from lorascope.plots.figure_registry import OLD_FIGURES as OLD_FIGURES
from lorascope.plots.figure_registry import Figure as Figure
from lorascope.plots.figure_registry import available as available
from lorascope.plots.run_groups import Runs
from lorascope.runs.result import Result

'''


def stub() -> str:
    """Return the content of the stub file, unformatted."""
    lines = []
    for name, draw in sorted(DRAWN.items()):
        if not draw.__module__.startswith("lorascope."):
            continue
        signature, hints = inspect.signature(draw), get_type_hints(draw)
        parameters = [each.replace(annotation=hints[each.name]) for each in signature.parameters.values()]
        typed = signature.replace(parameters=parameters, return_annotation=hints["return"])
        lines.append(f"def {name}{typed}: ...")
    text = "\n".join(lines).replace(inspect.formatannotation(Runs), "Runs")
    return HEAD + re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Z])", "", text) + "\n"


if __name__ == "__main__":
    FILE.write_text(stub(), encoding="utf-8")
    subprocess.run(["ruff", "format", str(FILE)], check=True)
