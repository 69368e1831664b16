"""Writer of pages: sections with tables and charts, in one HTML file that works offline.

The templates in this folder contain the markup. Every text is escaped, so a label of a run cannot become a tag.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from lorascope.charts.math_text import math_to_unicode
from lorascope.charts.plotly_backend import CONFIG
from lorascope.charts.theme import THEMES
from lorascope.files.printable import printable_lines
from lorascope.files.seals import write_own
from lorascope.pages import table_cells
from lorascope.pages.embedded_charts import embed
from lorascope.pages.report_figure import ReportFigure


@dataclass(frozen=True)
class Section:
    """A section of a page.

    Parameters
    ----------
    name : str
        Anchor of the section.
    title, lead, source : str
        Heading, first paragraph and reference; the last two may be "".
    tables : mapping title -> DataFrame
        Tables.
    figures : sequence of ReportFigure
        Figures below the tables and rows.
    notes : sequence of str
        Notes at the end.
    findings : sequence of dict
        Findings in JSON form, each with the ``adapter`` that it is about, or "".
    filter : str
        Column of the tables by whose values, up to the first comma, a reader can filter the rows. Default none.
    folded : bool
        Whether the section is folded at first. Default False.
    passages : Markup
        Rows of text as HTML, below the tables. Default none.
    """

    name: str
    title: str
    lead: str = ""
    source: str = ""
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    figures: Sequence[ReportFigure] = ()
    notes: Sequence[str] = ()
    findings: Sequence[Mapping[str, Any]] = ()
    filter: str = ""
    folded: bool = False
    passages: Markup = Markup("")  # noqa: RUF009


def _printable(value: Any) -> Any:
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return printable_lines(value)


TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("lorascope.pages", ""),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,  # a misspelled name raises an error instead of an empty text
    finalize=_printable,
)
# ``tojson`` escapes "<", so that a label with "</script>" cannot end the element.
TEMPLATES.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
TEMPLATES.filters |= {"embed": embed, "table": table_cells.frame_cells, "value": table_cells.format_value}
TEMPLATES.filters |= {"unicode": math_to_unicode}
TEMPLATES.globals |= {"LONG": table_cells.LONG}


def write(
    path: str | Path, title: str, lead: str, sections: Sequence[Section], facts: Mapping[str, str] | None = None
) -> Path:
    """Write a page as one HTML file, atomically; see ``render``.

    Raises
    ------
    FileExistsError
        ``path`` exists, and lorascope did not write it, or it has changed since.
    """
    path = Path(path)
    # A label may contain a lone surrogate, which UTF-8 cannot encode.
    write_own(path, render(title, lead, sections, facts or {}).encode("utf-8", "backslashreplace"), "html")
    return path


def render(title: str, lead: str, sections: Sequence[Section], facts: Mapping[str, str], carried: Any = None) -> str:
    """Render a page, which adapts to light and dark, wide and narrow screens, and makes no network requests.

    Parameters
    ----------
    title, lead : str
        Heading of the page, and the paragraph below it.
    sections : sequence of Section
        Sections, in order.
    facts : mapping
        Terms and texts of the header.
    carried : JSON value, optional
        Data for programs, which the page does not show.
    """
    return TEMPLATES.get_template("page.html").render(
        title=title,
        lead=lead,
        sections=sections,
        facts=facts,
        carried=carried,
        next_number=count(1).__next__,  # figures are numbered through all sections
        themes=THEMES,
        plotly=Markup(get_plotlyjs()),
        config=CONFIG,
    )
