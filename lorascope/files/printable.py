"""Escaping of names and values from untrusted files.

Names of modules, folders, dtypes, tasks, labels and base models come from files. A control character in a name can
change the terminal that prints it, and a right-to-left override reorders the line around it.
"""

from __future__ import annotations

from collections.abc import Iterable

# Joiners only change the shape of adjacent letters, and Persian and Indic scripts require them.
_JOINERS = "\u200c\u200d"
# Longer names leave no space for the data in a figure.
LONGEST_NAME = 52


def printable(text: object) -> str:
    r"""Make a text printable: escape characters such as ESC or a line break as in Python, ``\x1b``. Joiners stay."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(map(_escape, text))


def _escape(letter: str) -> str:
    if letter.isprintable() or letter in _JOINERS:
        return letter
    return letter.encode("unicode_escape").decode("ascii")


def utf8_text(path: object) -> str:
    r"""Return a path, or text from the operating system, as UTF-8, with all other bytes escaped to be printable.

    Bytes that are not in the encoding of the locale are surrogates there. They are decoded as UTF-8, or escaped if they
    are not UTF-8: ``\xff``.
    """
    return str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def short_name(text: object) -> str:
    """Escape like `printable`, and elide the middle of a name of more than 52 characters."""
    name = printable(text)
    return name if len(name) <= LONGEST_NAME else f"{name[:25]}…{name[-26:]}"


def first_of(names: Iterable[object], count: int = 1) -> str:
    """Return the first names, escaped like `printable`, and the number of the others."""
    texts = list(map(printable, names))
    listing = ", ".join(texts[:count])
    return f"{listing} and {len(texts) - count} more" if len(texts) > count else listing


def number_text(number: float, spec: str) -> str:
    """Format a number to be printed, without a minus sign if it rounds to zero: 0.00 for -0.001."""
    sign = "+" * spec.startswith("+")
    return format(float(number), f"{sign}z{spec.removeprefix('+')}")


def count_phrase(number: int, noun: str) -> str:
    """Return a printable number with its noun, such as ``1 run`` or ``1,200 runs``."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def count_or_no(number: int, noun: str) -> str:
    """Return a printable number with its noun as `count_phrase` does, but ``no runs`` for 0."""
    return count_phrase(number, noun) if number else f"no {noun}s"


def printable_lines(text: object) -> str:
    """Escape like `printable`, but keep line breaks."""
    return "\n".join(map(printable, str(text).split("\n")))


def first_line(error: BaseException) -> str:
    """Return the first line of an error without its final punctuation, to be printed in another error.

    For an error without text, it is the type. A line that ends in a colon is followed by the next one, which has the
    reason.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(map(str.strip, lines[: 1 + lines[0].endswith(":")])).rstrip(".:")
