"""Folder ``data`` of a clone of the repository, or of the installed package."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parents[2]
# A wheel contains the folder data, and a clone has it next to the package.
DATA = _PACKAGE / "data"
if not DATA.exists():
    DATA = _PACKAGE.parent / "data"
STUDY_RUNS = "evidence-2"
"""Name of the folder of kept runs of the second edition."""
PAPERS = {
    "LoRA": "2106.09685",
    "LISA": "2403.17919",
    "AdaLoRA": "2303.10512",
    "AutoLoRA": "2403.09113",
    "ALoRA": "2403.16187",
    "HydraLoRA": "2404.19245",
    "FourierFT": "2405.03003",
    "NeFT": "2403.11621",
    "Adapprox": "2403.14958",
}
"""arXiv ids of the papers by method, in the order of the tables."""


def clone_root(data: Path = DATA) -> Path | None:
    """Return the root of the clone that has this folder ``data``; None for that of a wheel."""
    root = data.parent
    # The package in a wheel has neither of them next to its folder data.
    if (root / "README.md").exists() or (root / "docs").exists():
        return root
    return None
