"""Foreign text in printable form: names and values from files that other people wrote.

Names of modules, folders, dtypes, tasks, labels and base models come from files. A control character in one of them is
an instruction to the terminal that shows it, and a right-to-left override reorders the line around it.
"""

from __future__ import annotations

# Joiners change the shape of the letters next to them and nothing else; Persian and Indic scripts need them.
_JOINERS = "\u200c\u200d"
# Longer ones leave no room for the data on a page.
LONGEST_NAME = 52


def printable(text: object) -> str:
    r"""Escape every character that does not print, such as ESC, a line break or a right-to-left override.

    Parameters
    ----------
    text : object
        Shown by its ``str``.

    Returns
    -------
    str
        Printable text is returned unchanged; other characters become Python's escapes, such as ``\x1b``.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter in _JOINERS else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )


def short_name(text: object) -> str:
    """Escape like `printable`, and leave out the middle of a name that has more than 52 characters."""
    name = printable(text)
    return name if len(name) <= LONGEST_NAME else f"{name[:25]}…{name[-26:]}"


def printable_lines(text: object) -> str:
    """Escape like `printable`, but retain line breaks."""
    return "\n".join(map(printable, str(text).split("\n")))
