"""Write the tables of README and docs from the kept runs: ``python docs/_ext/write_pages.py [--check]``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import edition_1
import page_blocks
import question_pages
import study_pages

from lorascope.files.printable import printable

ROOT = Path(__file__).parents[2]


def pages(root: Path) -> list[Path]:
    """Return the pages of a clone that may have blocks."""
    docs = root / "docs"
    return [*root.glob("README.md"), *sorted(docs.glob("*.md")), *sorted((docs / "papers").glob("*.md"))]


def main(arguments: Sequence[str], root: Path = ROOT) -> int:
    """Write or compare the blocks of all pages, and return 1 if one differs."""
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
    """Yield one line per block that differs; write the blocks first."""
    blocks = edition_1.blocks(root / "data") | study_pages.study_blocks(root) | question_pages.question_blocks(root)
    blocks = {name: f"\n{text}\n\n" for name, text in blocks.items()}
    # The installed package reads the states of the papers' figures without the images.
    states, file = study_pages.find_states(root), root / "data" / study_pages.PAPER_FIGURES
    text = states.to_csv(index=False, lineterminator="\n")
    if write:
        file.write_text(text, encoding="utf-8")
        for page in pages(root):
            page_blocks.write(page, blocks)
    if file.read_text(encoding="utf-8") != text:
        yield f"data/{file.name}: states differ from the images in figures"
    yield from page_blocks.differences(pages(root), blocks)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
