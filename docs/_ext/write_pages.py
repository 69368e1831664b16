"""Write the tables of README and docs from the kept runs: ``python docs/_ext/write_pages.py [--check]``."""

from __future__ import annotations

import sys
from pathlib import Path

import measured_numbers
import page_blocks
from verdict_tables import all_blocks

from lorascope.papers.judging import kept_runs, registration
from lorascope.papers.registry import PAIRS

ROOT = Path(__file__).parents[2]


def pages() -> list[Path]:
    """Return the pages that may have blocks."""
    return [
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "docs" / "papers").glob("*.md")),
    ]


def main(arguments: list[str]) -> int:
    """Write or compare the blocks of all pages, and return 1 if one differs or a text repeats a measured number."""
    data = ROOT / "data"
    claims, evidence = registration.read(data / "registered.toml"), kept_runs.read_kept(data / "evidence")
    derived = measured_numbers.derive_all(evidence, claims, PAIRS, data)
    blocks = all_blocks(claims, data, evidence, derived)
    if "--check" not in arguments:
        for page in pages():
            page_blocks.write(page, blocks)
    measured = kept_runs.text_table(derived.files[measured_numbers.FILE])
    found = [*page_blocks.differences(pages(), blocks)]
    found += [line for page in pages() for line in measured_numbers.repeated(page, measured)]
    print("\n".join(found) or "No differences.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
