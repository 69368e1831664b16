"""Strips of an inspection screen: one cell per role and layer, as a glyph of a scale or as a text if there is room."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from rich.console import Console, RenderableType
from rich.text import Text

from lorascope.diagnosis.inspection import InspectionReport
from lorascope.files.text_layout import LABEL_WIDTH, Block, TableColumn, aligned_table, block_grid, format_norm
from lorascope.runs.module_summary import Row, column

Modules = list[Row]
_STRIP_WIDTH = 32  # what a label and four numbers leave of 80 columns
_STACKS = {"": "", "encoder": "enc ", "decoder": "dec "}
# Characters for zero and for values, smallest first.
DIGITS, BLOCKS = ".123456789", "·▁▂▃▄▅▆▇█"
_Cell = tuple[str, str, int]
"""Stack, role and column."""


class Strip(NamedTuple):
    """Strip of an inspection screen: a quantity to show along the layers.

    Parameters
    ----------
    title : str
    pool : callable
        Value of the modules of one stack, role and column.
    caption : str
        Description of the largest value, with ``{}`` for the value.
    form : callable
        Format of a value.
    pooled : str
        Remark about columns of several layers.
    text : callable, optional
        Text of the modules of one stack, role and layer, shown instead of glyphs if all layers have room.
    text_caption : str
        Description of such a text.
    largest : float, optional
        Value of the last glyph; by default the largest one that occurs.
    low : float, optional
        Values up to this one are highlighted.
    """

    title: str
    pool: Callable[[Modules], float]
    caption: str
    form: Callable[[float], str] = format_norm
    pooled: str = ""
    text: Callable[[Modules], str] | None = None
    text_caption: str = ""
    largest: float | None = None
    low: float | None = None

    def layer_texts(self, modules: Modules) -> dict[_Cell, str]:
        """Return the texts of the cells; none if the strip has no texts, or no room for them."""
        if self.text is None:
            return {}
        texts = {key: self.text(cell) for key, cell in _group_cells(modules, 1).items()}
        depth = 1 + max((layer for _, _, layer in texts), default=0)
        widest = max(map(len, texts.values()), default=0)
        # The last text needs no gap after it.
        if depth * (widest + 1) > _STRIP_WIDTH + 1:
            return {}
        return texts


class _Columns(NamedTuple):
    """Columns of a strip: number of layers, layers per column, and characters per column."""

    depth: int
    step: int
    width: int

    @property
    def number(self) -> int:
        return math.ceil(self.depth / self.step)


def layer_strip(
    report: InspectionReport, target: Console, strips: Sequence[Strip], columns: Sequence[TableColumn] = ()
) -> Iterator[RenderableType]:
    """Yield a table of one or two strips and of numbers with one row per role, and the scales of the strips."""
    modules = [module for module in report.module_rows() if module["layer"] is not None]
    has_stacks = len(set(column(modules, "stack"))) > 1
    rows: list[Row] = []
    legends: list[str] = []
    for row in report.role_rows():
        name = row["role"]
        if has_stacks:
            name = _STACKS.get(row["stack"], f"{row['stack']} ") + name
        rows.append(row | {"name": name})
    heads = [TableColumn(strips[0].title, LABEL_WIDTH - 1, "name")]
    for strip in strips:
        layout, cells, legend = _draw_cells(modules, strip, target)
        legends.append(f"right: {legend}" if legends else legend)
        for row in rows:
            row[strip.title] = Text()
            for index in range(layout.number):
                row[strip.title] += cells.get((row["stack"], row["role"], index), Text(" " * layout.width))
        heads.append(TableColumn(_layer_axis(layout), _STRIP_WIDTH, strip.title))
    yield aligned_table([*heads, *columns], rows)
    if any(legends):
        yield block_grid([Block("", legends)])


def _draw_cells(modules: Modules, strip: Strip, target: Console) -> tuple[_Columns, dict[_Cell, Text], str]:
    """Return the columns of a strip, the text of every cell, and the legend, which is "" if all values are zero."""
    depth = 1 + max(column(modules, "layer"), default=-1)
    # A deep model has several layers per column, and up to ten layers have three characters each.
    layout = _Columns(depth, max(1, math.ceil(depth / _STRIP_WIDTH)), max(1, _STRIP_WIDTH // max(depth, 10)))
    texts, legend = strip.layer_texts(modules), strip.text_caption
    if texts:
        layout = _Columns(depth, 1, 1 + max(map(len, texts.values())))
    values = {key: strip.pool(cell) for key, cell in _group_cells(modules, layout.step).items()}
    if not texts:
        texts, legend = _glyph_texts(values, strip, target, layout)
    cells = {}
    for key, text in texts.items():
        is_low = strip.low is not None and values[key] <= strip.low
        cells[key] = Text(text.ljust(layout.width), "yellow" if is_low else "")
    return layout, cells, legend


def _group_cells(modules: Modules, step: int) -> dict[_Cell, Modules]:
    """Return the modules of every cell of a strip."""
    cells: dict[_Cell, Modules] = {}
    for module in modules:
        cells.setdefault((module["stack"], module["role"], module["layer"] // step), []).append(module)
    return cells


def _glyph_texts(
    values: Mapping[_Cell, float], strip: Strip, target: Console, layout: _Columns
) -> tuple[dict[_Cell, str], str]:
    """Return the glyphs of a strip's cells and their legend, which is "" if all values are zero."""
    # A file or a pipe may be read by programs that expect ASCII.
    scale = BLOCKS if target.is_terminal and not target.options.ascii_only else DIGITS
    top = strip.largest or max(filter(math.isfinite, values.values()), default=0.0)
    glyphs = {key: _glyph(value, top, scale) * layout.width for key, value in values.items()}
    if not top:
        return glyphs, ""
    legend = f"{scale[-1]} is {strip.caption.format(strip.form(top))}, {scale[0]} is zero"
    if layout.step > 1:
        legend += f", {layout.step} layers per column{strip.pooled}"
    return glyphs, legend


def _glyph(value: float, largest: float, scale: str) -> str:
    """Return one character for a value, ! for NaN and infinity."""
    if not math.isfinite(value):
        return "!"
    if value == 0:
        return scale[0]
    steps = len(scale) - 1
    # The largest value would be one step above the scale.
    return scale[min(steps, 1 + int(steps * (value / largest)))]


def _layer_axis(layout: _Columns) -> str:
    """Return the layer numbers above their columns, with the last one if there is room."""
    line = ""
    # A layer number needs up to three characters and a gap.
    for index in range(0, layout.number, {1: 8, 2: 2}.get(layout.width, 1)):
        line = line.ljust(index * layout.width) + str(index * layout.step)
    last = str(layout.depth - 1)
    start = min((layout.number - 1) * layout.width, _STRIP_WIDTH - len(last))
    if start > len(line):
        line = line.ljust(start) + last
    return line
