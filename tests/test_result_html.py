"""HTML of measured results: the lines of a terminal above the table, with all text escaped."""

from __future__ import annotations

import html
from html.parser import HTMLParser

import pandas as pd

from lorascope.analysis.result_html import lines_above_table


class Texts(HTMLParser):
    """Parser that collects the text in ``pre`` and the cells of the table."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.lines, self.cells = "", []
        self._tag = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._tag = tag

    def handle_data(self, data: str) -> None:
        if self._tag == "pre":
            self.lines += data
        elif self._tag in ("td", "th") and data.strip():
            self.cells.append(data)


def test_lines_and_columns_are_complete() -> None:
    table = pd.DataFrame({"step": [10, 20], "cosine": [0.5, 0.25]})
    page = Texts(lines_above_table("Turns of x\n  turning point at step 20", table))
    assert page.lines.rstrip("\n") == "Turns of x\n  turning point at step 20"
    assert page.cells == ["step", "cosine", "10", "0.50", "20", "0.25"]


def test_names_are_escaped() -> None:
    table = pd.DataFrame({"part": ["<script>alert(1)</script>", "a & b"], "learn": [1.0, float("nan")]})
    page = lines_above_table("Dial of <b>x</b>\n  learn \x1b[31m1", table)
    assert "<script>" not in page
    assert "<b>" not in page
    assert "\x1b" not in page
    texts = Texts(page)
    assert texts.lines.startswith("Dial of <b>x</b>\n  learn \\x1b[31m1")
    assert html.unescape(" ".join(texts.cells)) == "part learn <script>alert(1)</script> 1.0 a & b"
