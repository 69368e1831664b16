"""Charts as pictures: this file writes them, the two backends draw them.

Every saved figure says where it comes from: the chart's ``meta`` (run ids and the like), the version of lorascope and
the SHA-256 of the data drawn, as one JSON object. It stands in ``Keywords`` of a PDF, in ``Description`` of an SVG, in
the text chunk ``lorascope`` of a PNG, in ``<meta name="lorascope">`` of an HTML page, and beside a CSV in
``x.csv-metadata.json``, the name that "CSV on the Web" gives to metadata, since a comment in the table itself would
break every reader.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from lorascope import __version__
from lorascope.charts import theme as themes
from lorascope.charts.chart import Drawable
from lorascope.files.printable import printable
from lorascope.files.safe_csv import csv_text

Write = Callable[[Drawable, Path, str | None, str | None], None]


def save(drawable: Drawable, path: str | Path, width: str | None = None, theme: str | None = None) -> Path:
    """Write a chart or panels to a file.

    Parameters
    ----------
    drawable : Chart or Panels
        What to write.
    path : str or Path
        The ending says the kind: pdf, svg, png (matplotlib), html (plotly, complete in itself) or csv (the data).
        Folders are made as needed. The file appears whole or not at all, and equal charts give equal bytes.
    width : {"column", "page"}, optional
        3.3 or 6.9 inches; default column, and page for panels and frames.
    theme : {"light", "dark", "paper"}, optional
        Default paper for pdf and svg, else light.

    Returns
    -------
    Path of the file.

    Raises
    ------
    ValueError
        The ending is not one of those.
    """
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in _WRITERS:
        raise ValueError(f"cannot save {path.name!r}: the ending must be one of {', '.join(_WRITERS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    _WRITERS[kind](drawable, path, width, theme)
    return path


def provenance(drawable: Drawable) -> str:
    """Where a figure comes from, as canonical JSON: the ``meta`` of its charts, version, and hash of all data drawn."""
    charts = [chart for row in drawable.rows() for chart in row]
    digest = hashlib.sha256()
    for chart in charts:
        for _, table in chart.tables():
            digest.update(table.to_csv(index=False).encode(errors="surrogatepass"))
    metas = [dict(chart.meta) for chart in charts]
    meta = metas[0] if all(meta == metas[0] for meta in metas) else {"panels": metas}
    made = {**meta, "lorascope": __version__, "data_sha256": digest.hexdigest()}
    return json.dumps(made, sort_keys=True, default=str)


def _replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Write under a temporary name beside the file and rename, so that no reader meets half a file."""
    path = Path(os.path.realpath(path))  # a link stays a link
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _write_picture(drawable: Drawable, path: Path, width: str | None, theme: str | None) -> None:
    """PDF, SVG and PNG."""
    from lorascope.charts import matplotlib_backend

    kind = path.suffix.lower().removeprefix(".")
    source, title = provenance(drawable), _chart_title(drawable)
    program = f"lorascope {__version__}"
    notes: dict[str, dict[str, Any]] = {
        "pdf": {"Title": title, "Creator": program, "Keywords": source, "CreationDate": None},
        "svg": {"Title": title, "Creator": program, "Description": source, "Date": None},
        "png": {"Title": title, "Software": program, "lorascope": source},
    }
    look = theme or ("light" if kind == "png" else "paper")
    _replace_file(path, lambda draft: matplotlib_backend.write(drawable, draft, kind, look, width, notes[kind]))


def _write_page(drawable: Drawable, path: Path, width: str | None, theme: str | None) -> None:
    """An HTML page that needs no network."""
    from lorascope.charts import plotly_backend

    source = provenance(drawable)
    plot = plotly_backend.fragment(drawable, hashlib.sha256(source.encode()).hexdigest()[:12], theme)
    ground = themes.theme(theme or "light").background
    page = _PAGE.format(title=escape(_chart_title(drawable)), source=escape(source), plot=plot, ground=ground)
    _replace_file(path, lambda draft: draft.write_text(page, encoding="utf-8"))


def _write_chart_csv(drawable: Drawable, path: Path, width: str | None, theme: str | None) -> None:
    """The tidy data, and its metadata beside it."""
    notes = {"@context": "http://www.w3.org/ns/csvw", "url": path.name, "dc:title": _chart_title(drawable)}
    notes["lorascope"] = json.loads(provenance(drawable))
    beside = path.with_name(f"{path.name}-metadata.json")
    _replace_file(path, lambda draft: draft.write_text(csv_text(drawable.flat()), encoding="utf-8"))
    _replace_file(beside, lambda draft: draft.write_text(json.dumps(notes, indent=1), encoding="utf-8"))


def _chart_title(drawable: Drawable) -> str:
    titles = dict.fromkeys(printable(chart.title) for row in drawable.rows() for chart in row if chart.title)
    return " | ".join(titles)


_WRITERS: dict[str, Write] = {
    "pdf": _write_picture,
    "svg": _write_picture,
    "png": _write_picture,
    "html": _write_page,
    "csv": _write_chart_csv,
}

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<meta name="generator" content="lorascope">
<meta name="lorascope" content="{source}">
<style>body {{ margin: 0; background: {ground}; }}</style>
</head>
<body>
{plot}
</body>
</html>
"""
