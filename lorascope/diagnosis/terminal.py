"""Inspections as text of 80 columns, on one screen for models of any size."""

from __future__ import annotations

import math
import os
import shlex
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from lorascope.analysis.adapter_similarity import DIRECTIONS
from lorascope.diagnosis.causes.base import Finding
from lorascope.diagnosis.comparison import Comparison
from lorascope.diagnosis.evidence import largest
from lorascope.diagnosis.inspection import Inspection, Report
from lorascope.diagnosis.neuron_inspection import NeuronInspection
from lorascope.diagnosis.null import below_null, outliers
from lorascope.files.printable import printable
from lorascope.runs.adapter import Adapter
from lorascope.updates.linalg import root_of_squares

WIDTH = 80
_LABEL, _CHART = 15, 32
_STACKS = {"": "", "encoder": "enc ", "decoder": "dec "}
_LABELS = {"holds": "size"}  # JSON output has the older key
# Characters for zero and for norms, smallest first.
DIGITS, BLOCKS = ".123456789", "·▁▂▃▄▅▆▇█"
# Matrices of a comparison: width of a cell, and the number of columns that fit.
_CELL = 6
_MOST = (WIDTH - 2) // _CELL


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
class _Name:
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
    if 1000 <= value < 1e6:
        return f"{value:.0f}"
    return f"{value:#.3g}".rstrip(".") if value == 0 or 1e-3 <= value < 1000 else f"{value:.1e}"


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
_Numbers = tuple[Any, ...]
# A label and lines of text.
_Fact = tuple[RenderableType, Sequence[RenderableType]]
_SHARE = {False: ("energy", 7, percent, "energy"), True: ("dW/W", 7, percent, "relative_update")}
_NEURONS: tuple[_Numbers, ...] = (
    ("share", 7, percent, "share"),
    ("median", 7, norm, "median"),
    ("largest", 7, norm, "largest"),
    ("|dW|", 7, norm, "delta_norm"),
)
_MATRICES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("|dW|, row over column", "norm_ratio", ratio),
    ("cosine of dW", "cosine", lambda value: f"{round(value, 2) + 0.0:.2f}"),
    ("angle of subspaces, degrees", "angle", lambda value: f"{value:.0f}"),
    ("rank in other modules, %", "rank_moved", lambda value: f"{100 * value:.0f}"),
)


def inspection_screen(inspection: Inspection, target: Console, null: pd.DataFrame | None = None) -> str:
    """Format one adapter or run, with the table of ``null_table`` if there is one."""
    ranks = ("rank", 6, span, "least_rank", "most_rank"), ("effective", 9, number, "effective_rank")
    columns = (("|dW|", 7, norm, "update_norm"), _SHARE[inspection.has_base], *ranks)
    chart = _chart(inspection, target, "|dW| by layer", _pool_layers, columns, "{} per layer", " (RMS)")
    listed = []
    for each in largest(inspection.measured, "update_norm", 3):
        used = "" if math.isnan(each.effective_rank) else f"  rank {number(each.effective_rank)}"
        used += "" if each.rank is None else f" of {each.rank}"
        listed.append(_Name(each.module, f"{norm(each.update_norm):<6} ", used))
    run, folders = inspection.run, [Path(inspection.path or "")]
    if isinstance(run, Adapter) and run.base is not None and run.files.needs_base:
        folders.append(run.base.folder)
    # Relative or absolute, whichever is shorter.
    paths = [min(str(folder), os.path.relpath(folder), key=len) for folder in folders]
    names = paths, ["ADAPTER", "BASE"][: len(paths)]
    commands = [f"lorascope plot spectrum {_join_paths(*each)} -o spectrum.pdf" for each in names]
    facts = [("largest |dW|", listed), *([] if null is None else _null_facts(null))]
    return _screen(inspection, target, *chart, facts=facts, commands=commands)


def _null_facts(table: pd.DataFrame) -> Iterator[_Fact]:
    """Yield the ranks next to those of random factors, and the modules whose norm is an outlier."""
    compared, lines = table.dropna(subset=["effective_rank_p"]), []
    for name, words in (("effective_rank", "effective"), ("stable_rank", "stable")):
        if len(compared):
            count = int(below_null(table, name).sum())
            mean = f"{words} rank of random factors: {number(compared[f'{name}_null'].mean())}"
            lines.append(Text(f"{mean}; lower in {count} of {len(compared)} modules"))
    yield "null", lines or [Text("no product of two factors of rank >= 2")]
    far = outliers(table)
    named = [_Name(row["module"], f"z {row['norm_z']:<6.1f} ") for row in far.head(3).to_dict("records")]
    more = [Text(f"and {len(far) - 3} more")] if len(far) > 3 else []
    known = int(table["norm_z"].notna().sum())
    text = f"norms of {known} modules with a role in five layers or more: none" if known else "needs five layers"
    yield "outliers", [*named, *more] or [Text(text)]


def modules_screen(inspection: Inspection, target: Console) -> str:
    """Format one adapter or run, with one line per module instead of the chart."""
    dead = ("dead", 4, whole, "dead")
    after: tuple[_Numbers, ...] = (("stable", 6, number, "stable_rank"), ("90%", 4, whole, "energy_rank"), dead)
    if inspection.has_base:
        after = (dead, ("intr", 4, whole, "intruders"), ("1-cos", 7, norm, "neuron_median"))
    ranks = ("rank", 4, span, "rank", "rank"), ("eff", 6, number, "effective_rank")
    columns = (("|dW|", 7, norm, "update_norm"), _SHARE[inspection.has_base], *ranks, *after)
    rows, width = inspection.module_rows(), WIDTH - sum(width + 1 for _, width, *_ in columns)
    modules = [row["module"] for row in rows]
    # Names that are too long lose their common prefix: cut in the middle, they would lose their layer.
    cut = len(modules) > 1 and max(map(len, modules)) > width
    parts = zip(*(name.split(".") for name in modules), strict=False)
    same = takewhile(lambda part: len(set(part)) == 1, parts) if cut else ()
    shared = ".".join(part[0] for part in same)
    names = [[_Name(name.removeprefix(f"{shared}."))] for name in modules]
    head = elide(f"module of {shared}" if shared else "module", width)
    return _screen(inspection, target, _table([(head, width)], names, columns, rows))


def neurons_screen(inspection: NeuronInspection, target: Console) -> str:
    """Format a whole model and its base: the rotation of its neurons."""
    chart = _chart(
        inspection,
        target,
        "in top 10%",
        lambda cell: sum(row["top"] for row in cell) / sum(row["neurons"] for row in cell),
        _NEURONS,
        "{} of a layer's neurons",
        form=percent,
    )
    spread = "  ".join(f"{share:.0%} {norm(value)}" for share, value in inspection.quantiles().items())
    listed = [
        _Name(row["module"], f"{norm(row['cosine_distance']):<8} ", f"  neuron {row['neuron']}")
        for row in inspection.largest(3).to_dict("records")
    ]
    names = (inspection.path, inspection.base), ("MODEL", "DIR")
    commands = [f"lorascope inspect {_join_paths(*each)} --csv > neurons.csv" for each in names]
    facts: list[_Fact] = [("1 - cos", [spread]), ("largest", listed)]
    return _screen(inspection, target, *chart, facts=facts, commands=commands)


def projections_screen(inspection: NeuronInspection, target: Console) -> str:
    """Format a whole model and its base, with one line per projection instead of the chart."""
    rows = inspection.module_rows()
    names = [(_Name(row["module"]), _Name(row["role"])) for row in rows]
    return _screen(inspection, target, _table([("projection", 39), ("role", 8)], names, _NEURONS, rows))


def comparison_screen(comparison: Comparison, target: Console) -> str:
    """Format a comparison of several adapters or runs, with one letter each."""
    items, width = comparison.inspections, WIDTH - 52
    letters = [chr(ord("a") + place) for place in range(len(items))]
    methods = [item.facts[0][1].partition(",")[0] for item in items]
    names = zip(letters, map(_Name, comparison.labels), map(_Name, methods), strict=True)
    sizes = []
    for item in items:
        held = [each.rank for each in item.measured if each.rank is not None]
        total = sum(each.parameters for each in item.measured)
        row = {"norm": item.norm, "least": min(held, default=None), "most": max(held, default=None)}
        sizes.append(row | {"modules": len(item.measured), "total": f"{total:,}"})
    ranks = ("rank", 7, span, "least", "most"), ("modules", 7, str, "modules")
    columns = (("|dW|", 7, norm, "norm"), *ranks, ("parameters", 13, str, "total"))
    listed = _table([("", 1), ("", width), ("method", 10)], names, columns, sizes)
    blocks = [_matrix(comparison, letters, *each) for each in _MATRICES]
    several = 2 if 2 + _CELL * len(items) < WIDTH // 2 else 1
    matrices = Table.grid(*(Column(width=WIDTH // several) for _ in range(several)))
    for place in range(0, len(blocks), several):
        matrices.add_row(*blocks[place : place + several])
        matrices.add_row("")
    lines = ["cosine     of all updates as one vector; modules that are not shared count as 0"]
    chance = comparison.matrix["chance"].dropna()
    if len(chance):
        level = " to ".join(dict.fromkeys((f"{chance.min():.0f}", f"{chance.max():.0f}")))
        lines.append(f"angle      mean over shared modules, {DIRECTIONS} leading dimensions; random: {level}")
    lines.append("rank       fraction to move to other modules for the same allocation")
    if len(items) > _MOST:
        lines.append(f"only the first {_MOST} columns are shown; use --csv or --json for all")
    cautions = [
        _wrapped(finding, WIDTH, initial_indent=f"{letter} ", subsequent_indent="    ")
        for letter, item in zip(letters, items, strict=True)
        for finding in item.found
        if finding.severity != "note"
    ]
    return _to_text(target, listed, "", matrices, *lines, *([""] if cautions else []), *cautions)


def _screen(
    report: Report, target: Console, *body: RenderableType, facts: Sequence[_Fact] = (), commands: Sequence[str] = ()
) -> str:
    """Format header, body, facts, findings, and the first command that fits in a line, else the last."""
    room = WIDTH - _LABEL
    header = [(elide(_LABELS.get(key, key), _LABEL - 1), [_Name(text)]) for key, text in report.facts]
    findings = ("findings", [_wrapped(finding, room, subsequent_indent="  ") for finding in report.found])
    fitting = [command for command in commands if len(command) <= room] or commands[-1:]
    following = ("next", [Text(command, "cyan") for command in fitting[:1]])
    top = _facts([(Text(header[0][0], "bold"), header[0][1]), *header[1:]])
    return _to_text(target, top, "", *body, "", _facts([*facts, findings, following]))


def _to_text(target: Console, *parts: RenderableType) -> str:
    with target.capture() as caught:
        for part in parts:
            target.print(part)
    return "\n".join(line.rstrip() for line in caught.get().removesuffix("\n").split("\n"))


def _facts(facts: Iterable[_Fact]) -> Table:
    """Return lines of text, the first of each fact with its label."""
    table = Table.grid(Column(width=_LABEL), Column(width=WIDTH - _LABEL))
    for label, texts in facts:
        for place, text in enumerate(texts):
            table.add_row("" if place else label, text)
    return table


def _table(
    first: Sequence[tuple[str, int]],
    names: Iterable[Iterable[RenderableType]],
    columns: Sequence[_Numbers],
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


def _chart(
    report: Report,
    target: Console,
    title: str,
    profile: Callable[[list[dict[str, Any]]], float],
    columns: Sequence[_Numbers],
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
        names.append((_Name(f"{_STACKS.get(stack, f'{stack} ') if several else ''}{role}"), drawn))
    yield _table([(title, _LABEL - 1), (_layer_axis(depth, step, repeat), _CHART)], names, columns, roles)
    if largest:
        bins = f", {step} layers per column{pooled}" if step > 1 else ""
        yield _facts([("", [f"{scale[-1]} is {caption.format(form(largest))}, {scale[0]} is zero{bins}"])])


def glyph(value: float | None, largest: float, scale: str) -> str:
    """Return one character for a value: blank for None (nothing is adapted), and ! for NaN and infinity."""
    if value is None:
        return " "
    if not math.isfinite(value):
        return "!"
    steps = len(scale) - 1
    return scale[min(steps, 1 + int(steps * (value / largest))) if value else 0]


def _pool_layers(cell: list[dict[str, Any]]) -> float:
    """Return the root mean square of |dW| over the layers of a cell."""
    norm = root_of_squares(np.array([row["update_norm"] for row in cell]))
    return norm / len({row["layer"] for row in cell}) ** 0.5


def _layer_axis(depth: int, step: int, repeat: int) -> str:
    """Return the layer numbers above their columns, with the last one if there is room."""
    bins = math.ceil(depth / step)
    line = ""
    for column in range(0, bins, {1: 8, 2: 2, 3: 1}[repeat]):
        line = line.ljust(column * repeat) + str(column * step)
    end = str(depth - 1)
    start = min((bins - 1) * repeat, _CHART - len(end))
    return line.ljust(start) + end if start > len(line) else line


def _matrix(
    comparison: Comparison, letters: Sequence[str], title: str, column: str, form: Callable[[float], str]
) -> Group:
    """Return a matrix: its title, then one letter per row and column."""
    heads = [Column(letter, width=_CELL, justify="right") for letter in letters[:_MOST]]
    table = Table(Column(width=2), *heads, box=None, padding=0, header_style="")
    cells = comparison.matrix.pivot(index="one", columns="other", values=column)
    cells = cells.loc[comparison.labels, comparison.labels[:_MOST]]
    for letter, values in zip(letters, cells.to_numpy(float), strict=True):
        table.add_row(letter, *("-" if math.isnan(value) else form(value) for value in values))
    return Group(Text(title, "bold"), table)


def _wrapped(finding: Finding, width: int, **indents: str) -> Text:
    text = textwrap.fill(printable(finding.message), width, **indents)  # type: ignore[arg-type]
    return Text(text, "red" if finding.severity == "error" else "yellow")


def _join_paths(*words: Any) -> str:
    """Join words of a command by ``--base``."""
    return " --base ".join(printable(shlex.quote(str(word))) for word in words)
