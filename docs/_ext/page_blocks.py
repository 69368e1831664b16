"""Blocks of README and docs that are written from the evidence, between ``<!-- evidence NAME -->`` and its end."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
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
    names: set[str] = set()
    for page in pages:
        content, markers = read_text(page), set()
        for match in _BLOCK.finditer(content):
            _, name, text, _ = match.groups()
            markers |= {match.start(), match.start(4)}
            first = content.count("\n", 0, match.start(3)) + 1
            if name not in blocks:
                yield f"{printable(page)}:{first - 1}: unknown block {name!r}"
            elif text != blocks[name]:
                lines = zip_longest(text.splitlines(), blocks[name].splitlines(), fillvalue="no more lines")
                number, (line, expected) = next(
                    (number, pair) for number, pair in enumerate(lines, start=first) if pair[0] != pair[1]
                )
                yield f"{printable(page)}:{number}: block {name}: kept {line!r}, recomputed {expected!r}"
            if name in names:
                yield f"{printable(page)}:{first - 1}: block {name!r} occurs twice"
            names.add(name)
        for comment in _COMMENT.finditer(content):
            if comment.start() not in markers:
                line = content.count("\n", 0, comment.start()) + 1
                yield f"{printable(page)}:{line}: {printable(comment[0])} has no counterpart"
                names.update(_START.findall(content, comment.start(), comment.end() + 1))
    for name in blocks.keys() - names:
        yield f"README.md or docs: block {name!r} is missing"


def write(page: Path, blocks: Mapping[str, str]) -> None:
    """Write the blocks of a page from the evidence; blocks that it does not know stay as they are."""
    old = read_text(page)
    new = _BLOCK.sub(lambda match: f"{match[1]}{blocks.get(match[2], match[3])}{match[4]}", old)
    if new != old:
        page.write_text(new, encoding="utf-8")


def format_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table as Markdown, without its empty columns."""
    texts = [list(map(str, row)) for row in rows]
    columns = [number for number in range(len(header)) if not texts or any(row[number] for row in texts)]
    lines = [f"| {' | '.join(line[number] for number in columns)} |" for line in (header, *texts)]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])
