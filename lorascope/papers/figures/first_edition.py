"""Figures of the first edition, which are stored as charts: its runs are not needed to draw them again.

``NAME.parquet`` has all tables of a figure side by side: the column ``2/step`` is the column ``step`` of its third
table, and shorter tables are followed by missing values. The entry ``lorascope`` of the metadata has the packed chart,
the number of rows of each table, heading and description, and the runs and the commit that drew it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from lorascope.charts.stored_chart import unpack
from lorascope.files.printable import printable
from lorascope.files.typed_json import parse_json, to_typed, unreadable
from lorascope.papers.figures.study_images import StudyFigure


class _Metadata(msgspec.Struct):
    heading: str
    alt: str
    runs: list[str]
    commit: str
    rows: list[int]
    chart: dict[str, Any]


def stored_figures(folder: Path) -> dict[str, StudyFigure]:
    """Read the stored figures of a folder by name.

    Raises
    ------
    ValueError
        A file is damaged or has no packed chart.
    """
    return {file.stem: _read_figure(file) for file in sorted(folder.glob("*.parquet"))}


def _read_figure(file: Path) -> StudyFigure:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        columns = pq.read_table(file)
    except pa.ArrowException as error:
        raise unreadable(file, printable(error)) from error
    text = (columns.schema.metadata or {}).get(b"lorascope", b"{}").decode()
    stored = to_typed(parse_json(text, file), _Metadata, file)
    tables = []
    for number, rows in enumerate(stored.rows):
        # Sliced before the conversion, because integers with missing values would become floats.
        names = [name for name in columns.column_names if name.startswith(f"{number}/")]
        table = columns.select(names).slice(0, rows).to_pandas()
        tables.append(table.set_axis([name.partition("/")[2] for name in names], axis=1))
    try:
        return StudyFigure(stored.heading, stored.alt, unpack(stored.chart, tables))
    except (LookupError, TypeError, ValueError) as error:
        raise unreadable(file, f"its chart cannot be drawn: {printable(error)}") from error
