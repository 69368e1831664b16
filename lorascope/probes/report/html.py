"""Functions that build HTML. Text is escaped unless it is :class:`Html`, so a label of a run cannot become a tag."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import pandas as pd
from pandas.api.types import is_bool_dtype, is_float, is_numeric_dtype, is_scalar

from lorascope.files.printable import printable_lines

LONG = 20  # rows; a longer table scrolls inside its box


class Html(str):
    """Text that is already HTML."""


def element(name: str, *parts: str, **attributes: str | None) -> Html:
    """Build one element around its parts.

    Parameters
    ----------
    name : str
        Name of the tag.
    parts : str or Html
        Content; text is escaped unless it is Html.
    attributes : str or None
        Attributes of the tag. Underscores become hyphens, and one at the end is dropped (``class_``, ``aria_label``).
        Attributes that are None are omitted.
    """
    written = "".join(
        f' {key.removesuffix("_").replace("_", "-")}="{_escape_part(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{written}>{join(*parts)}</{name}>")


def join(*parts: str) -> Html:
    """Concatenate parts; text is escaped unless it is Html."""
    return Html("".join(part if isinstance(part, Html) else _escape_part(part) for part in parts))


def _escape_part(text: str) -> str:
    return escape(printable_lines(text))


def json_data(content: Any) -> Html:
    """Embed JSON in a page for its scripts.

    "<" is escaped, so that a label with "</script>" cannot end the element.
    """
    text = json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return element("script", Html(text), type="application/json")


def pairs(terms: Mapping[str, str], class_: str) -> Html:
    """Build a description list from terms and their descriptions."""
    entries = (element("div", element("dt", term), element("dd", text)) for term, text in terms.items())
    return element("dl", *entries, class_=class_)


def bullets(items: Sequence[str]) -> Html:
    """Build a bulleted list."""
    return element("ul", *(element("li", item) for item in items))


def table(caption: str, heads: Mapping[str, bool], rows: Sequence[Html], class_: str = "") -> Html:
    """Build a table in its own box, which scrolls on narrow screens, with the keyboard as well.

    Parameters
    ----------
    caption : str
        Caption of the table.
    heads : mapping name -> bool
        Columns, and whether they contain numbers.
    rows : sequence of Html
        ``tr`` elements. Tables of more than ``LONG`` rows scroll vertically.
    class_ : str
        CSS class of the box. Default "".
    """
    cells = (element("th", name, scope="col", class_="n" if number else None) for name, number in heads.items())
    head = element("thead", element("tr", *cells))
    inner = element("table", element("caption", caption), head, element("tbody", *rows))
    classes = " ".join(filter(None, ["table", "long" if len(rows) > LONG else "", class_]))
    return element("div", inner, class_=classes, role="region", aria_label=caption, tabindex="0")


def frame_table(caption: str, frame: pd.DataFrame) -> Html:
    """Build a table from a DataFrame; a named index becomes columns, and text in the first column is a row header."""
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
    """Format a table cell: four significant digits for a float, a dash for a missing value."""
    if is_scalar(value) and pd.isna(value):
        return "–"
    return f"{value:.4g}" if is_float(value) else str(value)


def join_distinct(values: Iterable[Any]) -> str:
    """Join the distinct, nonempty values in order of appearance."""
    return ", ".join(text for text in dict.fromkeys(map(str, values)) if text)


def count(number: int, thing: str) -> str:
    """Format a number of things, such as "1 run" or "3 runs"."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
