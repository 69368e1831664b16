"""Write the tables of README and docs from the kept runs: ``python docs/_ext/write_pages.py [--check]``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import measured_numbers
import page_blocks
from verdict_tables import all_blocks

from lorascope.files.printable import printable
from lorascope.papers.judging import csv_tables, kept_runs, registration
from lorascope.papers.registry import PAIRS

ROOT = Path(__file__).parents[2]


def pages(root: Path) -> list[Path]:
    """Return the pages of a clone that may have blocks."""
    docs = root / "docs"
    return [*root.glob("README.md"), *sorted(docs.glob("*.md")), *sorted((docs / "papers").glob("*.md"))]


def main(arguments: Sequence[str], root: Path = ROOT) -> int:
    """Write or compare the blocks of all pages, and return 1 if one differs or a text repeats a measured number."""
    try:
        differences = list(find_differences(root, write="--check" not in arguments))
    except (OSError, ValueError) as error:  # a damaged or missing file
        differences = [printable(" ".join(str(error).split()))]
    for line in differences:
        print(line, file=sys.stderr)
    if not differences:
        print("No differences.")
    return 1 if differences else 0


def find_differences(root: Path, write: bool) -> Iterator[str]:
    """Yield one line per block that differs, and per measured number that a text repeats; write the blocks first."""
    data = root / "data"
    claims, evidence = registration.read(data / "registered.toml"), kept_runs.read_kept(data / "evidence")
    derived = measured_numbers.derive_all(evidence, claims, PAIRS, data)
    blocks = all_blocks(claims, data, evidence, derived)
    if write:
        for page in pages(root):
            page_blocks.write(page, blocks)
    yield from page_blocks.differences(pages(root), blocks)
    measured = csv_tables.text_table(derived.files[measured_numbers.FILE])
    for page in pages(root):
        yield from measured_numbers.repeated(page, measured)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
