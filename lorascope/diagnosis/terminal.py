"""Inspections as text of 80 columns, on one screen for models of any size."""

from __future__ import annotations

import math
import os
import shlex
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Column, Table
from rich.text import Text

from lorascope.diagnosis.causes.finding import Finding
from lorascope.diagnosis.inspection import InspectionReport
from lorascope.files.printable import printable

WIDTH = 80
_LABEL, _CHART = 15, 32
_STACKS = {"": "", "encoder": "enc ", "decoder": "dec "}
# Characters for zero and for norms, smallest first.
DIGITS, BLOCKS = ".123456789", "·▁▂▃▄▅▆▇█"


def console(stream: Any) -> Console:
    """Return a console for a stream: colors on a terminal, plain text in a file or a pipe."""
    options: dict[str, Any] = dict.fromkeys(("markup", "emoji", "highlight", "legacy_windows", "force_jupyter"), False)
    options["color_system"] = None if "NO_COLOR" in os.environ else "auto"
    return Console(file=stream, force_terminal=stream.isatty(), width=WIDTH, **options)


def elide(text: str, width: int) -> str:
    """Cut printable text in its middle to a width, since the end of a module's name is more specific."""
    text = printable(text)
    if cell_len(text) <= width:
        return text
    if width < 5:
        return set_cell_size(text, max(width, 0))
    tail = (2 * width) // 3 - 1
    return f"{set_cell_size(text, width - tail - 2)}..{set_cell_size(text[::-1], tail)[::-1]}"


@dataclass
class Elided:
    """Text that is cut in its middle to the width of its cell, between two texts that are not."""

    text: str
    start: str = ""
    end: str = ""

    def __rich_console__(self, target: Console, options: ConsoleOptions) -> Iterator[str]:
        yield self.start + elide(self.text, options.max_width - cell_len(self.start + self.end)) + self.end


def span(low: Any, high: Any) -> str:
    """Format a range of ranks."""
    if low is None:
        return "-"
    return str(low) if low == high else f"{low}-{high}"


def norm(value: float) -> str:
    """Format a norm with three digits in at most seven characters."""
    if math.isnan(value):
        return "NaN"
    if 999.5 <= value < 999999.5:
        return f"{value:.0f}"
    return f"{value:#.3g}".rstrip(".") if value == 0 or 1e-3 <= value < 999.5 else f"{value:.1e}"


def percent(share: float) -> str:
    """Format a fraction in percent."""
    if math.isnan(share):
        return "-"
    return f"{100 * share:.{1 if share < 10 else 0}f}%" if share < 1000 else f"{100 * share:.0e}%"


def number(value: float, digits: int = 1) -> str:
    """Format a number with a fixed number of digits after the point."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}" if abs(value) < 1e5 else norm(value)


def ratio(value: float) -> str:
    """Format a ratio in at most five characters."""
    return f"{value:.3g}" if 0.1 <= value < 1000 or value == 0 else f"{value:.0e}"


whole = partial(number, digits=0)

# Columns of numbers: head, width, format, and the names of the values to format.
NumberColumn = tuple[Any, ...]
# A label and lines of text.
Fact = tuple[RenderableType, Sequence[RenderableType]]


def report_screen(
    report: InspectionReport,
    target: Console,
    *body: RenderableType,
    facts: Sequence[Fact] = (),
    commands: Sequence[str] = (),
) -> str:
    """Format header, body, facts, findings, and the first command that fits in a line, else the last."""
    room = WIDTH - _LABEL
    header = [(elide(key, _LABEL - 1), [Elided(text)]) for key, text in report.facts]
    findings = ("findings", [wrapped(finding, room, subsequent_indent="  ") for finding in report.found])
    fitting = [command for command in commands if len(command) <= room] or commands[-1:]
    following = ("next", [Text(command, "cyan") for command in fitting[:1]])
    top = facts_table([(Text(header[0][0], "bold"), header[0][1]), *header[1:]])
    return to_text(target, top, "", *body, "", facts_table([*facts, findings, following]))


def to_text(target: Console, *parts: RenderableType) -> str:
    with target.capture() as caught:
        for part in parts:
            target.print(part)
    return "\n".join(line.rstrip() for line in caught.get().removesuffix("\n").split("\n"))


def facts_table(facts: Iterable[Fact]) -> Table:
    """Return lines of text, the first of each fact with its label."""
    table = Table.grid(Column(width=_LABEL), Column(width=WIDTH - _LABEL))
    for label, texts in facts:
        for place, text in enumerate(texts):
            table.add_row("" if place else label, text)
    return table


def numbers_table(
    first: Sequence[tuple[str, int]],
    names: Iterable[Iterable[RenderableType]],
    columns: Sequence[NumberColumn],
    rows: Iterable[Mapping[str, Any]],
) -> Table:
    """Return a table with a bold head, of text columns followed by columns of numbers.

    The widest column of text gives way to numbers that are wider than their column.
    """
    widths = [width for _, width, *_ in (*first, *columns)]
    table = Table(
        box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold", width=sum(widths) + len(widths) - 1
    )
    for head, width in first:
        flexible = width == max(widths)
        table.add_column(head, width=None if flexible else width, ratio=1 if flexible else None, no_wrap=True)
    for head, width, *_ in columns:
        table.add_column(head, min_width=width, justify="right", no_wrap=True)
    for texts, row in zip(names, rows, strict=True):
        table.add_row(*texts, *(form(*map(row.get, read)) for _, _, form, *read in columns))
    return table


def layer_chart(
    report: InspectionReport,
    target: Console,
    title: str,
    profile: Callable[[list[dict[str, Any]]], float],
    columns: Sequence[NumberColumn],
    caption: str,
    pooled: str = "",
    form: Callable[[float], str] = norm,
) -> Iterator[RenderableType]:
    """Yield one row per role: its profile along the layers, then its numbers; and the scale.

    ``profile`` maps the modules of a stack, role and column to a value.
    """
    # A file or a pipe may be read by programs that expect ASCII.
    scale = BLOCKS if target.is_terminal and not target.options.ascii_only else DIGITS
    inside, roles = [row for row in report.module_rows() if row["layer"] is not None], report.role_rows()
    depth = max((row["layer"] + 1 for row in inside), default=0)
    step = max(1, math.ceil(depth / _CHART))
    repeat = max(1, min(3, _CHART // depth)) if depth else 1
    several = len({row["stack"] for row in inside}) > 1
    cells: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in inside:
        cells.setdefault((row["stack"], row["role"], row["layer"] // step), []).append(row)
    values = {place: profile(cell) for place, cell in cells.items()}
    largest = max((value for value in values.values() if math.isfinite(value)), default=0.0)
    names = []
    for stack, role in ((row["stack"], row["role"]) for row in roles):
        along = (values.get((stack, role, column)) for column in range(math.ceil(depth / step)))
        drawn = "".join(glyph(value, largest, scale) * repeat for value in along)
        names.append((Elided(f"{_STACKS.get(stack, f'{stack} ') if several else ''}{role}"), drawn))
    yield numbers_table([(title, _LABEL - 1), (_layer_axis(depth, step, repeat), _CHART)], names, columns, roles)
    if largest:
        bins = f", {step} layers per column{pooled}" if step > 1 else ""
        yield facts_table([("", [f"{scale[-1]} is {caption.format(form(largest))}, {scale[0]} is zero{bins}"])])


def glyph(value: float | None, largest: float, scale: str) -> str:
    """Return one character for a value: blank for None (nothing is adapted), and ! for NaN and infinity."""
    if value is None:
        return " "
    if not math.isfinite(value):
        return "!"
    steps = len(scale) - 1
    return scale[min(steps, 1 + int(steps * (value / largest))) if value else 0]


def _layer_axis(depth: int, step: int, repeat: int) -> str:
    """Return the layer numbers above their columns, with the last one if there is room."""
    bins = math.ceil(depth / step)
    line = ""
    for column in range(0, bins, {1: 8, 2: 2, 3: 1}[repeat]):
        line = line.ljust(column * repeat) + str(column * step)
    end = str(depth - 1)
    start = min((bins - 1) * repeat, _CHART - len(end))
    return line.ljust(start) + end if start > len(line) else line


def wrapped(finding: Finding, width: int, **indents: str) -> Text:
    text = textwrap.fill(printable(finding.message), width, **indents)  # type: ignore[arg-type]
    return Text(text, "red" if finding.severity == "error" else "yellow")


def join_paths(*words: Any) -> str:
    """Join words of a command by ``--base``."""
    return " --base ".join(printable(shlex.quote(str(word))) for word in words)
