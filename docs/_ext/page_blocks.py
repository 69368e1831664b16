"""Blocks of README and docs that are written from the evidence, between ``<!-- evidence NAME -->`` and its end."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from lorascope.files.printable import printable
from lorascope.files.typed_json import read_text

_START = re.compile(r"<!-- evidence ([\w-]+) -->\n")
_BLOCK = re.compile(rf"({_START.pattern})((?:(?!<!-- evidence ).)*?)(<!-- /evidence -->)", re.DOTALL)
_COMMENT = re.compile(r"<!--\s*/?\s*evidence\b[^>]*-->", re.IGNORECASE)


def differences(pages: Iterable[Path], blocks: Mapping[str, str]) -> Iterator[str]:
    """Return one line for every block that differs from the evidence, is unknown, damaged or missing, or occurs twice.

    Parameters
    ----------
    pages : iterable of path
        All pages that have blocks.
    blocks : mapping name -> str
        Text of every block. Each must be on one page.
    """
    named: set[str] = set()
    for page in pages:
        content, markers = read_text(page), set()
        for found in _BLOCK.finditer(content):
            _, name, text, _ = found.groups()
            markers |= {found.start(), found.start(4)}
            first = content.count("\n", 0, found.start(3)) + 1
            if name not in blocks:
                expected = ", ".join(sorted(blocks))
                yield f"{printable(page)}:{first - 1}: unknown block {name!r}, expected one of {expected}"
            elif text != blocks[name]:
                kept, wanted = text.splitlines(), blocks[name].splitlines()
                at = next((i for i, (one, two) in enumerate(zip(kept, wanted, strict=False)) if one != two), None)
                at = min(len(kept), len(wanted)) if at is None else at
                has, needs = (lines[at] if at < len(lines) else "no more lines" for lines in (kept, wanted))
                yield f"{printable(page)}:{first + at}: block {name}: kept {has!r}, recomputed {needs!r}"
            if name in named:
                yield f"{printable(page)}:{first - 1}: block {name!r} occurs twice"
            named.add(name)
        for comment in _COMMENT.finditer(content):
            if comment.start() in markers:
                continue
            place = f"{printable(page)}:{content.count(chr(10), 0, comment.start()) + 1}"
            if start := _START.match(content, comment.start()):
                named.add(start[1])
                yield f"{place}: block {start[1]!r} has no end"
            else:
                yield (
                    f"{place}: {printable(comment[0])} must be <!-- evidence NAME --> at the end of a line, "
                    "or <!-- /evidence --> after it"
                )
    for name in blocks:
        if name not in named:
            yield f"README.md or docs: block {name!r} is missing"


def write(page: Path, blocks: Mapping[str, str]) -> None:
    """Write the blocks of a page from the evidence; blocks that it does not know stay as they are."""
    old = read_text(page)
    new = _BLOCK.sub(lambda found: f"{found[1]}{blocks.get(found[2], found[3])}{found[4]}", old)
    if new != old:
        page.write_text(new, encoding="utf-8")


def without_blocks(text: str) -> str:
    """Return the text of a page with an empty line for each line of a block."""
    return _BLOCK.sub(lambda found: "\n" * found[0].count("\n"), text)
