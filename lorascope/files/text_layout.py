"""Layout of printed text: labeled blocks, tables and numbers, with untrusted text escaped.

All commands print with it, and sweeps as well. It requires only rich and `printable`, so it is in the lowest package.
Screens that know reports, and their strip of layers, are in ``diagnosis.inspection_screen``.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Column, Table
from rich.text import Text

from lorascope.files.lazy_pandas import pandas as pd
from lorascope.files.printable import printable

# 80 columns fit every terminal, an issue and a README.
WIDTH, LABEL_WIDTH = 80, 15
TEXT_WIDTH = WIDTH - LABEL_WIDTH
UNLIMITED = 1 << 14
"""Width of a console whose lines are not cut, because a terminal wraps them."""
# Width of data frames without a terminal, and the smallest width of their last column.
_FRAME_WIDTH, _LAST_WIDTH = 120, 12


def make_console(stream: Any, width: int = WIDTH) -> Console:
    """Return a console that lays out text for a stream: colors on a terminal, plain text in a file or a pipe."""
    options: dict[str, Any] = dict.fromkeys(("markup", "emoji", "highlight", "legacy_windows", "force_jupyter"), False)
    # rich keeps bold under NO_COLOR.
    options["color_system"] = None if "NO_COLOR" in os.environ else "auto"
    return Console(file=stream, force_terminal=stream.isatty(), width=width, **options)


def render_text(target: Console, *renderables: RenderableType) -> str:
    """Lay out renderables as text for a console, without blanks at the ends of lines."""
    with target.capture() as captured:
        for renderable in renderables:
            target.print(renderable)
    return "\n".join(line.rstrip() for line in captured.get().removesuffix("\n").split("\n"))


def elide(text: str, width: int) -> str:
    """Cut text in its middle to the width of its layout, since the end of a module's name is more specific."""
    text = printable(text)
    if cell_len(text) <= width:
        return text
    if width < 5:
        return set_cell_size(text, max(width, 0))
    tail = (2 * width) // 3 - 1  # with the two points, a third is left for the start
    return f"{set_cell_size(text, width - tail - 2)}..{set_cell_size(text[::-1], tail)[::-1]}"


@dataclass
class Elided:
    """Text that is cut in its middle to the width of its cell in a layout, between two texts that are not."""

    text: str
    start: str = ""
    end: str = ""

    def __rich_console__(self, target: Console, options: ConsoleOptions) -> Iterator[str]:
        yield self.start + elide(self.text, options.max_width - cell_len(self.start + self.end)) + self.end


def wrap_paragraph(text: str, style: str = "", width: int = TEXT_WIDTH, hang: str = "") -> Text:
    """Lay out a text as a paragraph, escaped and wrapped; ``hang`` begins all of its lines but the first."""
    # rich wraps without a hanging indent.
    return Text(textwrap.fill(printable(text), width, subsequent_indent=hang), style)


class Block(NamedTuple):
    """Block of lines of text in a layout, the first of them with a label."""

    label: str
    lines: Sequence[RenderableType]
    label_style: str = ""


def text_block(label: str, *texts: str, style: str = "", label_style: str = "") -> Block:
    """Lay out a block of wrapped texts, the first in a style; a label wider than its column continues in that text."""
    label = printable(label)
    if len(label) < LABEL_WIDTH:
        first = wrap_paragraph(texts[0], style)
    else:
        label_end = label[LABEL_WIDTH:]
        first = wrap_paragraph(f"{label_end} {texts[0]}")
        first.stylize(label_style, 0, len(label_end))
        first.stylize(style, len(label_end))
    return Block(label[:LABEL_WIDTH], [first, *map(wrap_paragraph, texts[1:])], label_style)


def block_grid(blocks: Iterable[Block]) -> Table:
    """Lay out blocks of text with their labels in the first column."""
    grid = Table.grid(Column(width=LABEL_WIDTH, no_wrap=True), Column(width=TEXT_WIDTH))
    for block in blocks:
        label = Text(block.label, block.label_style)
        for line in block.lines:
            grid.add_row(label, line)
            label = Text()
    return grid


class TableColumn(NamedTuple):
    """Column of a table in a text layout, whose rows are mappings.

    Parameters
    ----------
    head : str
    width : int, optional
        Smallest width of a number, width of a text; None for a text that is not cut.
    name : str
        Key of the value.
    form : callable, optional
        Format of a number, which is aligned to the right; None for a text.
    second : str, optional
        Key of a second value to format, such as the end of a range.
    """

    head: str
    width: int | None
    name: str
    form: Callable[..., str] | None = None
    second: str | None = None

    def cell(self, row: Mapping[str, Any]) -> RenderableType:
        """Return the formatted value of a row."""
        if isinstance(row.get(self.name), Text):
            return row[self.name]
        if self.form is None:
            text = str(row[self.name])
            return printable(text) if self.width is None else Elided(text)
        if self.second is None:
            return self.form(row.get(self.name))
        return self.form(row.get(self.name), row.get(self.second))


def aligned_table(
    columns: Sequence[TableColumn], rows: Iterable[Mapping[str, Any]], gap: int = 1, head: bool = True
) -> Table:
    """Lay out a text table with a bold head; its widest text gives way to numbers wider than their columns."""
    widths = [column.width for column in columns if column.width is not None]
    fixed = len(widths) == len(columns)
    total = sum(widths) + gap * (len(widths) - 1) if fixed else None
    layout = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="bold", width=total, show_header=head)
    for column in columns:
        # A number that is cut would be another number.
        if column.form is not None:
            layout.add_column(column.head, min_width=column.width, justify="right", no_wrap=True)
        elif fixed and column.width == max(widths):
            layout.add_column(column.head, ratio=1, no_wrap=True)
        else:
            layout.add_column(column.head, width=column.width, no_wrap=True)
    for row in rows:
        layout.add_row(*(column.cell(row) for column in columns))
    return layout


def format_frame(frame: pd.DataFrame) -> str:
    """Lay out a data frame for stdout as a text table, with its last column cut to the width of the terminal."""
    if frame.empty:
        return ""
    gap, terminal_width = 2, shutil.get_terminal_size((_FRAME_WIDTH, 24)).columns
    texts = {str(name): list(map(_format_cell, values)) for name, values in frame.items()}
    widths = [max(map(cell_len, [head, *cells])) for head, cells in texts.items()]
    before_last = sum(widths[:-1]) + gap * len(widths[:-1])
    widths[-1] = min(widths[-1], max(terminal_width - 1 - before_last, _LAST_WIDTH))
    columns = []
    for head, width, dtype in zip(texts, widths, frame.dtypes, strict=True):
        form = str if pd.api.types.is_numeric_dtype(dtype) else None
        columns.append(TableColumn(head, width, head, form))
    rows = (dict(zip(texts, cells, strict=True)) for cells in zip(*texts.values(), strict=True))
    return render_text(make_console(sys.stdout, UNLIMITED), aligned_table(columns, rows, gap))


def _format_cell(value: object) -> str:
    return printable(f"{value:.4g}" if isinstance(value, float) else value)


def format_span(low: Any, high: Any) -> str:
    """Format a range of ranks for a text layout."""
    if low is None:
        return "-"
    return str(low) if low == high else f"{low}-{high}"


def format_count(count: int | None, total: int | None) -> str:
    """Format a number of components for a text layout, with the number of all."""
    if count is None:
        return "-"
    return f"{count}/{total}"


def format_norm(value: float) -> str:
    """Format a norm for a text layout, with three digits in at most seven characters."""
    if math.isnan(value):
        return "NaN"
    # With three digits, these would have an exponent.
    if 999.5 <= value < 999999.5:
        return f"{value:.0f}"
    if value == 0 or 1e-3 <= value < 999.5:
        return f"{value:#.3g}".rstrip(".")
    return f"{value:.1e}"


def format_percent(fraction: float) -> str:
    """Format a fraction for a text layout, in percent."""
    if math.isnan(fraction):
        return "-"
    if fraction >= 1000:
        return f"{100 * fraction:.0e}%"
    return f"{100 * fraction:.1f}%" if fraction < 10 else f"{100 * fraction:.0f}%"


def format_number(value: float, digits: int = 1) -> str:
    """Format a number for a text layout, with a fixed number of digits after the point."""
    if math.isnan(value):
        return "-"
    return f"{value:.{digits}f}" if abs(value) < 1e5 else format_norm(value)


format_whole_number = partial(format_number, digits=0)


def format_ratio(value: float) -> str:
    """Format a ratio for a text layout, in at most five characters."""
    if math.isnan(value):
        return "-"
    return f"{value:.3g}" if 0.1 <= value < 1000 or value == 0 else f"{value:.0e}"
