"""Saved figures: file formats and the provenance stored in each.

Every saved figure contains its provenance as one JSON object: the chart's ``meta`` (run ids and similar), the version
of lorascope and the SHA-256 of the drawn data. It is stored in

- ``Keywords`` of a PDF,
- ``Description`` of an SVG,
- the text chunk ``lorascope`` of a PNG,
- the first line of a PGF,
- ``<meta name="lorascope">`` of an HTML page,
- ``x.csv-metadata.json`` next to ``x.csv``, the file name that "CSV on the Web" defines for metadata; a comment in the
  table itself would break every reader.

It also has a seal, see `files.seals`, by which ``lorascope plot`` replaces its own figures only.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from lorascope import __version__
from lorascope.charts.chart import Drawable
from lorascope.charts.figure_plan import join_captions
from lorascope.charts.figure_style import Palette, figure_theme
from lorascope.charts.theme import ON_LIGHT
from lorascope.files.printable import printable, printable_lines
from lorascope.files.safe_csv import csv_text
from lorascope.files.seals import seal, write_table
from lorascope.files.whole_files import write_bytes

_SCRIPTS: dict[str, str | bool] = {"inline": True, "file": "", "cdn": "cdn"}
_KINDS = ("pdf", "svg", "pgf", "png", "html", "csv")
# A page of notebooks shows one pixel per pixel: 495 for a single chart, 1035 for panels.
_PREVIEW_DPI = 150
# Files for print and for the screen.
_THEMES = {"pdf": "paper", "svg": "paper", "pgf": "paper", "png": "light", "html": "light"}


def save(
    drawable: Drawable,
    path: str | Path,
    *,
    theme: str | None = None,
    title: str | None = None,
    caption: bool | None = None,
    legend: bool = True,
    dpi: float = 300,
    palette: Palette | None = None,
    steps: Sequence[Any] | None = None,
    include_js: str = "inline",
    **size: Any,
) -> Path:
    """Save a chart or panels as a file; see :meth:`Drawable.save`."""
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in _KINDS:
        raise ValueError(f"cannot save {path.name!r}: the extension must be one of {', '.join(_KINDS)}")
    drawable = drawable.pick_frames(steps)
    titles = [title] if title else [chart.title for chart in drawable.panels if chart.title]
    name = " | ".join(dict.fromkeys(map(printable, titles)))
    source, program = provenance(drawable), f"lorascope {__version__}"
    if kind == "csv":
        about = {"@context": "http://www.w3.org/ns/csvw", "dc:title": name, "lorascope": json.loads(source)}
        write_table(path, csv_text(drawable.flat()).encode(), about)
    elif kind == "html":
        from lorascope.charts import plotly_backend

        div_id = hashlib.sha256(source.encode()).hexdigest()[:12]
        look, plotly_js = figure_theme(theme, _THEMES[kind], palette), _share_plotly(path.parent, include_js)
        plot = plotly_backend.fragment(drawable, div_id, look, plotly_js, title, caption is not False, legend)
        ground = look.background
        page = _PAGE.format(title=escape(name), source=escape(source), plot=plot, ground=ground)
        write_bytes(path, seal(page.encode(), kind))
    else:
        from lorascope.charts import matplotlib_backend

        # No dates, so that equal figures give equal bytes.
        text = printable_lines(join_captions(drawable.panels))
        metadata: dict[str, dict[str, Any]] = {
            "pdf": {"Title": name, "Creator": program, "Keywords": source, "Subject": text, "CreationDate": None},
            "svg": {"Title": name, "Creator": program, "Description": source, "Keywords": text, "Date": None},
            "pgf": {},
            "png": {"Title": name, "Software": program, "lorascope": source, "Description": text},
        }
        look = figure_theme(theme, _THEMES[kind], palette)
        has_caption = caption if caption is not None else _THEMES[kind] != "paper"
        layout: dict[str, Any] = {**size, "steps": steps, "title": title, "caption": has_caption, "legend": legend}
        content = matplotlib_backend.write(drawable, kind, look, metadata[kind], dpi, **layout)
        if kind == "pgf":
            content = f"% lorascope: {source}\n".encode() + content
        write_bytes(path, seal(content, kind))
        if text and not has_caption:
            write_bytes(path.with_name(f"{path.name}-caption.txt"), f"{text}\n".encode())
    return path


def _share_plotly(folder: Path, include_js: str) -> str | bool:
    """Return how a page includes plotly.js, for plotly; write its file if pages in ``folder`` share one."""
    from plotly.offline import get_plotlyjs, get_plotlyjs_version

    if include_js not in _SCRIPTS:
        raise ValueError(f"include_js must be one of {', '.join(map(repr, _SCRIPTS))}, got {include_js!r}")
    if include_js != "file":
        return _SCRIPTS[include_js]
    # Pages of another version of plotly need another file.
    file = folder / f"plotly-{get_plotlyjs_version()}.min.js"
    if not file.exists():
        write_bytes(file, get_plotlyjs().encode())
    return file.name


def save_small(drawable: Drawable, path: Path) -> Path:
    """Save a PNG of page width with 256 colors, which look the same and keep clones of a repository small.

    Of its provenance, it has the hash of the data only, so that the figure changes only with what it shows.
    """
    import matplotlib
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        save(drawable, path, width="page", theme="light", palette=ON_LIGHT)
    with Image.open(path) as image:
        title, small = image.info["Title"], _reduce_colors(image)
    text_chunks, buffer = PngInfo(), io.BytesIO()
    text_chunks.add_text("Title", title)  # quantizing drops it
    text_chunks.add_text("lorascope", json.dumps({"data_sha256": data_hash(drawable)}))
    small.save(buffer, "PNG", optimize=True, pnginfo=text_chunks)
    write_bytes(path, buffer.getvalue())
    return path


def png_preview(drawable: Drawable) -> bytes:
    """Return a small PNG of a chart, for programs that cannot show its interactive form."""
    from PIL import Image

    from lorascope.charts import matplotlib_backend

    content = matplotlib_backend.write(drawable, "png", figure_theme(None, "light"), {}, _PREVIEW_DPI)
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(content)) as image:
        _reduce_colors(image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _reduce_colors(image: Any) -> Any:
    """Return an image of Pillow with 256 colors, which look the same."""
    from PIL.Image import Quantize

    return image.convert("RGB").quantize(256, Quantize.MAXCOVERAGE)


def data_hash(drawable: Drawable) -> str:
    """Return the SHA-256 of the drawn data."""
    digest = hashlib.sha256()
    for chart in drawable.panels:
        for _, table in chart.tables():
            # Nine digits, because the last ones differ between machines.
            text = table.to_csv(index=False, float_format="%.9g")
            # Text from file names may contain lone surrogates, which UTF-8 cannot encode.
            digest.update(text.encode(errors="surrogatepass"))
    return digest.hexdigest()


def provenance(drawable: Drawable) -> str:
    """Return the provenance of a saved figure as canonical JSON: ``meta`` of the charts, version, and data hash."""
    metas = [dict(chart.meta) for chart in drawable.panels]
    meta = metas[0]
    if metas.count(meta) < len(metas):
        meta = {"panels": metas}
    content = {**meta, "lorascope": __version__, "data_sha256": data_hash(drawable)}
    return json.dumps(content, sort_keys=True, default=str)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
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
