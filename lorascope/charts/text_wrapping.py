"""Wrapping of text in figures, from an estimate of its width that needs no renderer."""

from __future__ import annotations

import re
import textwrap

from lorascope.charts.math_text import MATH
from lorascope.files.printable import printable_lines

_NO_BREAK = "\2"  # a space at which no line ends
GLYPH = 0.58  # mean width of a character of DejaVu Sans, in font sizes


def wrap_text(text: str, room: float, size: float) -> str:
    """Wrap text of a figure into lines that fit ``room`` at the font size ``size``, both in the same unit."""
    columns = max(8, int(room / (GLYPH * size)))
    formulas: list[str] = []

    def hide(formula: re.Match[str]) -> str:
        """Return as many characters as a formula has symbols, which lines do not break."""
        formulas.append(formula[0])
        return "\0" * len(re.sub(r"\\[A-Za-z]+|[^\\{}^_$]", "x", formula[0]).replace("\\", "")) + "\1"

    lines = []
    for paragraph in printable_lines(text).splitlines():
        whole = paragraph.replace(" − ", f"{_NO_BREAK}−{_NO_BREAK}")  # as in W − W₀
        lines.append(textwrap.fill(MATH.sub(hide, whole), columns, break_long_words=not formulas))
    return re.sub("\0*\1", lambda _: formulas.pop(0), "\n".join(lines).replace(_NO_BREAK, " "))


def cut_name(name: str, room: float, size: float) -> str:
    """Cut a name in its middle if it is longer than ``room`` at the font size ``size``."""
    length = max(8, int(room / (GLYPH * size))) - 1
    if len(name) <= length:
        return name
    return f"{name[: length - length // 2]}…{name[-(length // 2) :]}"


def count_lines(text: str) -> int:
    """Return the number of lines of a wrapped text, 0 if it is empty."""
    if not text:
        return 0
    return text.count("\n") + 1
