"""Names in the folder ``data`` that the study reads, and the clone that the folder is of."""

from __future__ import annotations

from pathlib import Path

from lorascope.files.data_folder import DATA

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
