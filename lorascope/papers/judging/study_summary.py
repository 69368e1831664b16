"""Summary of the results of the second edition: nine papers, and how many claims have each word."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from lorascope.files.printable import count_phrase, printable
from lorascope.papers.judging import beliefs, first_edition, kept_study, registered_study
from lorascope.papers.judging.data_folder import STUDY_RUNS
from lorascope.papers.judging.words import NO_HEADROOM

LINE = 100
"""Columns of a line."""
COLUMNS = {"paper": "paper", "printed": "printed", "text": "on text [95%]", "truths": "for / against"}
"""Columns of the table of nine rows with their headings; the last one has the effects at both truths."""
SENTENCE = "what we now believe"
_MAX_LINES = 20  # of the nine rows and their heading
_CUT = " ..."


class Summary(NamedTuple):
    """Summary of the results.

    Parameters
    ----------
    table : DataFrame
        Nine rows; see ``beliefs.headline_table``. Without results, it is empty.
    words : mapping word -> int
        Number of claims with each word, the most frequent first.
    minutes : float
        CPU-minutes of all kept runs.
    note : str
        What is missing, or "".
    """

    table: pd.DataFrame
    words: Mapping[str, int]
    minutes: float
    note: str = ""


def read_summary(data: Path) -> Summary:
    """Read the summary from a folder ``data``.

    Raises
    ------
    FileNotFoundError
        There is no registration.
    ValueError
        A file is damaged.
    """
    file, folder = data / "registered-2.toml", data / STUDY_RUNS
    if not file.exists():
        raise FileNotFoundError(f"cannot read the study: {printable(file)} is missing, install lorascope again")
    registration = registered_study.read(file)
    try:
        results = beliefs.read_results(folder)
        sentences = beliefs.read_beliefs(folder)
    except FileNotFoundError as error:
        return Summary(pd.DataFrame(), {}, 0.0, f"No results yet: {printable(error.filename)} is missing.")
    table = beliefs.headline_table(sentences, registration, results, first_edition.text_estimates(data / "edition-1"))
    rows: list[Any] = results.to_dict("records")
    words = Counter(map(beliefs.shown_word, rows))
    runs = kept_study.read(folder).runs.drop_duplicates("run")
    return Summary(table, dict(words.most_common()), float(runs["cpu_seconds"].sum() / 60))


def summary_lines(summary: Summary) -> Iterator[str]:
    """Yield the lines to print: nine rows, then the counts of words."""
    if summary.note:
        yield summary.note
        return
    left = "lorascope: nine methods, and what holds on small models"
    claims, minutes = sum(summary.words.values()), round(summary.minutes)
    yield left + f"{claims} claims, {count_phrase(minutes, 'CPU-minute')}".rjust(LINE - len(left))
    yield from _rows(summary.table)
    yield textwrap.shorten(format_words(summary), LINE, placeholder=_CUT)


def _rows(table: pd.DataFrame) -> list[str]:
    """Return the lines of the table of nine rows: a sentence begins next to the cells and continues below them."""
    # The number that a word replaces is in the report.
    text = table["text"].where(~table["text"].str.contains(NO_HEADROOM), f"{NO_HEADROOM} (1)")
    cells = table.assign(text=text)[list(COLUMNS)].rename(columns=COLUMNS)
    rows = [tuple(cells), *cells.itertuples(index=False, name=None)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    paragraphs = []
    for row, sentence in zip(rows, [SENTENCE, *table["belief"]], strict=True):
        left = "".join(cell.ljust(width + 2) for cell, width in zip(row, widths, strict=True))
        paragraphs.append((left, sentence))
    wrapped = [_wrap(left, sentence) for left, sentence in paragraphs]
    if sum(map(len, wrapped)) > _MAX_LINES:
        wrapped = [_wrap(left, sentence, max_lines=2) for left, sentence in paragraphs]
    return list(chain.from_iterable(wrapped))


def _wrap(left: str, sentence: str, max_lines: int | None = None) -> list[str]:
    return textwrap.wrap(
        sentence,
        LINE,
        initial_indent=left,
        subsequent_indent="  ",
        break_on_hyphens=False,
        max_lines=max_lines,
        placeholder=_CUT,
    ) or [left]


def format_words(summary: Summary) -> str:
    """Return how many claims have each word, and what the mark of edition 1 means."""
    counts = ", ".join(f"{count} {word}" for word, count in summary.words.items())
    return f"{sum(summary.words.values())} claims: {counts}. (1) is an estimate of edition 1."
