"""HTML by function calls. Text is escaped unless it is :class:`Html`, so that no label of a run becomes a tag."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import pandas as pd
from pandas.api.types import is_bool_dtype, is_float, is_numeric_dtype, is_scalar

from lorascope.files.printable import printable_lines

LONG = 20  # rows of a table, from which on it scrolls inside its box


class Html(str):
    """Text that is HTML already."""


def element(name: str, *parts: str, **attributes: str | None) -> Html:
    """One element around its parts.

    Parameters
    ----------
    name : str
        Its tag.
    parts : str or Html
        Escaped unless they are Html.
    attributes : str or None
        Underscores become hyphens, one at the end is dropped (``class_``, ``aria_label``); None leaves one out.
    """
    told = "".join(
        f' {key.removesuffix("_").replace("_", "-")}="{_escape_part(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{told}>{join(*parts)}</{name}>")


def join(*parts: str) -> Html:
    """Parts one after the other, escaped unless they are Html."""
    return Html("".join(part if isinstance(part, Html) else _escape_part(part) for part in parts))


def _escape_part(text: str) -> str:
    return escape(printable_lines(text))


def json_data(content: Any) -> Html:
    """JSON inside a page, for its scripts to read."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return element("script", Html(text), type="application/json")


def pairs(terms: Mapping[str, str], class_: str) -> Html:
    """Terms and what there is to say of each."""
    entries = (element("div", element("dt", term), element("dd", text)) for term, text in terms.items())
    return element("dl", *entries, class_=class_)


def bullets(items: Sequence[str]) -> Html:
    """A list."""
    return element("ul", *(element("li", item) for item in items))


def table(caption: str, heads: Mapping[str, bool], rows: Sequence[Html], class_: str = "") -> Html:
    """A table in a box of its own, which scrolls where the screen is narrow, by keyboard too.

    Parameters
    ----------
    caption : str
    heads : mapping name -> bool
        The columns, and whether they hold numbers.
    rows : sequence of Html
        Elements ``tr``.
    class_ : str
        Class of the box.
    """
    cells = (element("th", name, scope="col", class_="n" if number else None) for name, number in heads.items())
    head = element("thead", element("tr", *cells))
    inner = element("table", element("caption", caption), head, element("tbody", *rows))
    classes = " ".join(filter(None, ["table", "long" if len(rows) > LONG else "", class_]))
    return element("div", inner, class_=classes, role="region", aria_label=caption, tabindex="0")


def frame_table(caption: str, frame: pd.DataFrame) -> Html:
    """A table of data: an index with a meaning becomes columns, and words in the first column head their rows."""
    if not isinstance(frame.index, pd.RangeIndex):
        frame = frame.reset_index()
    numeric = [is_numeric_dtype(kind) and not is_bool_dtype(kind) for kind in frame.dtypes]
    heads = dict(zip(map(str, frame.columns), numeric, strict=True))
    rows = [_html_row(values, numeric) for values in frame.itertuples(index=False, name=None)]
    return table(caption, heads, rows)


def _html_row(values: tuple[Any, ...], numeric: Sequence[bool]) -> Html:
    cells = []
    for place, (value, number) in enumerate(zip(values, numeric, strict=True)):
        if number:
            cells.append(element("td", format_value(value), class_="n"))
        else:
            cells.append(
                element("th", format_value(value), scope="row") if place == 0 else element("td", format_value(value))
            )
    return element("tr", *cells)


def format_value(value: Any) -> str:
    """A value as tables show it: four digits of a number, a dash for what is missing."""
    if is_scalar(value) and pd.isna(value):
        return "–"
    return f"{value:.4g}" if is_float(value) else str(value)


def join_distinct(values: Iterable[Any]) -> str:
    """Different values in the order met."""
    return ", ".join(text for text in dict.fromkeys(map(str, values)) if text)


def count(number: int, thing: str) -> str:
    """A number of things."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
