"""Texts of a run as plain files for scorers outside lorascope, in the layout that e2e-metrics reads."""

from __future__ import annotations

from pathlib import Path

from lorascope.files.whole_files import write_bytes
from lorascope.runs.folders import new_folder
from lorascope.runs.run import Run

PROMPTS, TEXTS, REFERENCES = "prompts.txt", "texts.txt", "references.txt"
"""Names of the files that ``to_texts`` writes."""


def to_texts(run: Run, out: str | Path) -> Path:
    """Write the generated texts of a run, their prompts and their references as files with one line per text.

    Parameters
    ----------
    run : Run
        Finished run that was trained with ``generation``.
    out : path
        New folder for ``prompts.txt`` and ``texts.txt``, with line n for prompt n, and ``references.txt``, with one
        line per reference and an empty line between those of two prompts. White space within a text becomes one space.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    FileNotFoundError
        The run is unfinished, or was trained without ``generation``.
    FileExistsError
        The folder exists.

    Examples
    --------
    >>> ls.export.to_texts(run, "scored")  # doctest: +SKIP
    """
    table, out = run.texts, Path(out)
    blocks = ["".join(map(_line, references)) for references in table["references"]]
    contents = {
        PROMPTS: "".join(map(_line, table["prompt"])),
        TEXTS: "".join(map(_line, table["text"])),
        REFERENCES: "\n".join(blocks),
    }
    with new_folder(out) as draft:
        for name, content in contents.items():
            write_bytes(draft / name, content.encode())
    return out


def _line(text: str) -> str:
    """Return a text as one line; readers also break lines at separators other than a line feed."""
    return f"{' '.join(text.split())}\n"
