"""Blocks of README and docs that are written from the evidence, between ``<!-- evidence NAME -->`` and its end."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from lorascope.files.printable import printable

_START = re.compile(r"<!-- evidence ([\w-]+) -->\n")
_BLOCK = re.compile(rf"({_START.pattern})((?:(?!<!-- evidence ).)*?)(<!-- /evidence -->)", re.DOTALL)


def differences(page: Path, blocks: Mapping[str, str]) -> Iterator[str]:
    """Return one line for every block of a page that differs from the evidence, or that the evidence does not have."""
    content, closed = page.read_text(encoding="utf-8"), set()
    for found in _BLOCK.finditer(content):
        _, name, text, _ = found.groups()
        closed.add(found.start())
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
    for start in _START.finditer(content):
        if start.start() not in closed:
            line = content.count("\n", 0, start.start()) + 1
            yield f"{printable(page)}:{line}: block {start[1]!r} has no end"


def write(page: Path, blocks: Mapping[str, str]) -> None:
    """Write the blocks of a page from the evidence; blocks that it does not know stay as they are."""
    old = page.read_text(encoding="utf-8")
    new = _BLOCK.sub(lambda found: f"{found[1]}{blocks.get(found[2], found[3])}{found[4]}", old)
    if new != old:
        page.write_text(new, encoding="utf-8")


def without_blocks(text: str) -> str:
    """Return the text of a page with an empty line for each line of a block."""
    return _BLOCK.sub(lambda found: "\n" * found[0].count("\n"), text)
