"""Wrapping of text in figures, from an estimate of its width that needs no renderer."""

from __future__ import annotations

import textwrap

from lorascope.files.printable import printable_lines

GLYPH = 0.58  # mean width of a character of DejaVu Sans, in font sizes


def wrap_text(text: str, room: float, size: float) -> str:
    """Wrap text of a figure into lines that fit ``room`` at the font size ``size``, both in the same unit."""
    columns = max(8, int(room / (GLYPH * size)))
    return "\n".join(textwrap.fill(paragraph, columns) for paragraph in printable_lines(text).splitlines())


def count_lines(text: str) -> int:
    """Return the number of lines of a wrapped text, 0 if it is empty."""
    if not text:
        return 0
    return text.count("\n") + 1
