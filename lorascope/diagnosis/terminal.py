"""Inspections as text of 80 columns, on one screen for models of any size."""

from __future__ import annotations

import math
import os
import shlex
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import pandas as pd

from lorascope.analysis.adapter_similarity import DIRECTIONS
from lorascope.diagnosis.comparison import Comparison
from lorascope.diagnosis.inspection import Inspection
from lorascope.diagnosis.neuron_inspection import NeuronInspection
from lorascope.files.printable import printable
from lorascope.runs.adapter import Adapter

WIDTH = 80
_LABEL = 15
_CHART = 32
_STACKS = {"encoder": "enc ", "decoder": "dec "}
_LABELS = {"holds": "size"}  # JSON output has the older key


@dataclass(frozen=True)
class Style:
    """Characters and colors that a terminal can show.

    Parameters
    ----------
    blocks : bool
        Block characters; otherwise digits.
    color : bool
        ANSI colors.
    """

    blocks: bool = False
    color: bool = False

    @classmethod
    def of(cls, stream: Any) -> Style:
        """Return the style of a stream: blocks and colors on a terminal, plain ASCII in a file or a pipe."""
        # A file or a pipe may be read by programs that expect ASCII.
        terminal = stream.isatty()
        blocks = terminal and (stream.encoding or "").lower().startswith("utf")
        return cls(blocks, terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb")

    def paint(self, text: str, code: str) -> str:
        """Return text in an ANSI color or weight."""
        return f"\033[{code}m{text}\033[0m" if self.color and text else text

    @property
    def scale(self) -> str:
        """Characters for norms, smallest first."""
        return "▁▂▃▄▅▆▇█" if self.blocks else "123456789"

    @property
    def zero(self) -> str:
        """Character for a zero update."""
        return "·" if self.blocks else "."

    def glyph(self, value: float | None, largest: float) -> str:
        """Return one character for a norm: blank for None (nothing is adapted), and ! for NaN and infinity."""
        if value is None:
            return " "
        if not math.isfinite(value):
            return "!"
        if value == 0:
            return self.zero
        return self.scale[min(len(self.scale) - 1, int(len(self.scale) * (value / largest)))]


def inspection_screen(inspection: Inspection, style: Style) -> str:
    """Format one adapter or run."""
    lines = [*_header(inspection, style), "", *_role_chart(inspection, style), "", *_largest(inspection, style)]
    lines += [
        *_finding_lines(inspection, style),
        _fact_line("next", style.paint(_next_command(inspection), "36"), style),
    ]
    return "\n".join(line.rstrip() for line in lines)


def modules_screen(inspection: Inspection, style: Style) -> str:
    """Format one adapter or run, with one line per module instead of the chart."""
    based = bool(inspection.modules["relative_update"].notna().any())
    columns = _EVERY_BASED if based else _EVERY
    width = WIDTH - len(columns) - 1
    shared = _shared_prefix(inspection.modules["module"], width)
    head = elide(f"module of {shared}" if shared else "module", width)
    lines = [*_header(inspection, style), "", style.paint(f"{head:<{width}} {columns}", "1")]
    for row in inspection.modules.to_dict("records"):
        name = row["module"].removeprefix(f"{shared}.")
        lines.append(f"{elide(name, width):<{width}} {_module_cells(row, based)}")
    return "\n".join([*lines, "", *_finding_lines(inspection, style)])


def _shared_prefix(names: pd.Series, width: int) -> str:
    """Return the common prefix of names that are too long; cut in the middle, they would lose their layer."""
    if len(names) == 1 or names.str.len().max() <= width:
        return ""
    columns = zip(*(name.split(".") for name in names), strict=False)
    return ".".join(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns))


_EVERY = "   |dW|  energy rank    eff stable  90% dead"
_EVERY_BASED = "   |dW|    dW/W rank    eff dead intr   1-cos"


def _module_cells(row: dict[Any, Any], based: bool) -> str:
    """Format the cells below ``_EVERY``, or with a base below ``_EVERY_BASED``."""
    share = _format_percent(row["relative_update" if based else "energy"])
    start = f"{norm(row['update_norm']):>7} {share:>7} {span(row['rank'], row['rank']):>4}"
    start += f" {_format_number(row['effective_rank']):>6}"
    dead = f"{_format_whole(row['dead']):>4}"
    if based:
        return f"{start} {dead} {_format_whole(row['intruders']):>4} {norm(row['neuron_median']):>7}"
    return f"{start} {_format_number(row['stable_rank']):>6} {_format_whole(row['energy_rank']):>4} {dead}"


def neurons_screen(inspection: NeuronInspection, style: Style) -> str:
    """Format a whole model and its base: the rotation of its neurons."""
    lines = [*_header(inspection, style), "", *_neuron_chart(inspection, style), ""]
    quantiles = inspection.quantiles()
    spread = "  ".join(f"{share:.0%} {norm(value)}" for share, value in quantiles.items())
    lines.append(_fact_line("1 - cos", spread, style))
    lines += [*_most_rotated(inspection, style), *_finding_lines(inspection, style)]
    names = (str(inspection.path), str(inspection.base)), ("MODEL", "DIR")
    commands = [f"lorascope inspect {_quote_word(a)} --base {_quote_word(b)} --csv > neurons.csv" for a, b in names]
    # Long paths are replaced by placeholders.
    command = next(command for command in commands if len(command) <= WIDTH - _LABEL or command is commands[-1])
    lines.append(_fact_line("next", style.paint(command, "36"), style))
    return "\n".join(line.rstrip() for line in lines)


def projections_screen(inspection: NeuronInspection, style: Style) -> str:
    """Format a whole model and its base, with one line per projection instead of the chart."""
    width = WIDTH - len(_NEURON_HEAD) - 10
    lines = [*_header(inspection, style), "", style.paint(f"{'projection':<{width}} {'role':<8} {_NEURON_HEAD}", "1")]
    for row in inspection.modules.to_dict("records"):
        lines.append(f"{elide(row['module'], width):<{width}} {elide(row['role'], 8):<8} {_neuron_numbers(row)}")
    return "\n".join([*lines, "", *_finding_lines(inspection, style)])


def elide(text: str, width: int) -> str:
    """Cut printable text in its middle to a width, since the end of a module's name is more specific."""
    text = printable(text)
    if len(text) <= width:
        return text
    if width < 5:
        return text[: max(width, 0)]
    tail = (2 * width) // 3 - 1
    return f"{text[: width - tail - 2]}..{text[-tail:]}"


def _header(inspection: Inspection | NeuronInspection, style: Style) -> Iterator[str]:
    for number, (key, text) in enumerate(inspection.facts):
        yield _fact_line(
            elide(_LABELS.get(key, key), _LABEL - 1), elide(text, WIDTH - _LABEL), style, strong=number == 0
        )


def _fact_line(key: str, text: str, style: Style, strong: bool = False) -> str:
    padded = f"{key:<{_LABEL}}"
    return (style.paint(padded, "1") if strong else padded) + text


def _role_chart(inspection: Inspection, style: Style) -> Iterator[str]:
    """Yield one row per role: |dW| along the layers, then its numbers."""
    modules, roles = inspection.modules, inspection.roles().to_dict("records")
    inside = modules[modules["layer"].notna()]
    depth = int(inside["layer"].max()) + 1 if len(inside) else 0
    step, repeat = _layer_columns(depth)
    cells = [_norm_profile(inside, row["stack"], row["role"], depth, step) for row in roles]
    largest = _largest_finite(cells)
    stacks = _STACKS if inside["stack"].nunique() > 1 else {}
    related = modules["relative_update"].notna().any()
    head = f"{'|dW| by layer':<{_LABEL}}{_layer_axis(depth, step, repeat):<{_CHART}}"
    yield style.paint(f"{head} {'|dW|':>7} {'dW/W' if related else 'energy':>7} {'rank':>6} {'effective':>9}", "1")
    for row, cell in zip(roles, cells, strict=True):
        drawn = "".join(style.glyph(value, largest) * repeat for value in cell)
        share = _format_percent(row["relative_update" if related else "energy"])
        ranks = f"{span(row['least_rank'], row['most_rank']):>6} {_format_number(row['effective_rank']):>9}"
        label = elide(f"{stacks.get(row['stack'], '')}{row['role']}", _LABEL - 1)
        yield f"{label:<{_LABEL}}{drawn:<{_CHART}} {norm(row['update_norm']):>7} {share:>7} {ranks}"
    if largest:
        bins = f", {step} layers per column (RMS)" if step > 1 else ""
        yield f"{'':<{_LABEL}}{style.scale[-1]} is {norm(largest)} per layer, {style.zero} is zero{bins}"


def _neuron_chart(inspection: NeuronInspection, style: Style) -> Iterator[str]:
    """Yield one row per role: the fraction of each layer's neurons in the top tenth, then its numbers."""
    modules, roles = inspection.modules, inspection.roles().to_dict("records")
    depth = int(modules["layer"].max()) + 1
    step, repeat = _layer_columns(depth)
    cells = [_share_profile(modules, row["stack"], row["role"], depth, step) for row in roles]
    largest = _largest_finite(cells)
    stacks = _STACKS if modules["stack"].nunique() > 1 else {}
    yield style.paint(f"{'in top 10%':<{_LABEL}}{_layer_axis(depth, step, repeat):<{_CHART}} {_NEURON_HEAD}", "1")
    for row, cell in zip(roles, cells, strict=True):
        drawn = "".join(style.glyph(value, largest) * repeat for value in cell)
        label = elide(f"{stacks.get(row['stack'], '')}{row['role']}", _LABEL - 1)
        yield f"{label:<{_LABEL}}{drawn:<{_CHART}} {_neuron_numbers(row)}"
    if largest:
        bins = f", {step} layers per column" if step > 1 else ""
        most = _format_percent(largest)
        yield f"{'':<{_LABEL}}{style.scale[-1]} is {most} of a layer's neurons, {style.zero} is zero{bins}"


_NEURON_HEAD = f"{'share':>7} {'median':>7} {'largest':>7} {'|dW|':>7}"


def _neuron_numbers(row: dict[Any, Any]) -> str:
    numbers = f"{norm(row['median']):>7} {norm(row['largest']):>7} {norm(row['delta_norm']):>7}"
    return f"{_format_percent(row['share']):>7} {numbers}"


def _share_profile(modules: pd.DataFrame, stack: str, role: str, depth: int, step: int) -> list[float | None]:
    """Return the fraction of neurons in the top tenth per layer or bin of layers; None if there are none."""
    chosen = modules[(modules["stack"] == stack) & (modules["role"] == role)]
    counts = chosen.groupby(chosen["layer"] // step)[["top", "neurons"]].sum()
    parts = (counts["top"] / counts["neurons"]).to_dict()
    return [parts.get(column) for column in range(math.ceil(depth / step))]


def _most_rotated(inspection: NeuronInspection, style: Style) -> Iterator[str]:
    for number, row in enumerate(inspection.largest(3).to_dict("records")):
        place = f"  neuron {row['neuron']}"
        distance = f"{norm(row['cosine_distance']):<8} "
        name = elide(row["module"], WIDTH - _LABEL - len(distance) - len(place))
        yield _fact_line("" if number else "largest", f"{distance}{name}{place}", style)


def _largest_finite(cells: list[list[float | None]]) -> float:
    """Return the largest finite value in the cells of a chart, or 0."""
    return max((value for cell in cells for value in cell if value and math.isfinite(value)), default=0.0)


def _layer_columns(depth: int) -> tuple[int, int]:
    """Return the layers per column, and the characters per column."""
    step = max(1, math.ceil(depth / _CHART))
    return step, max(1, min(3, _CHART // depth)) if depth else 1


def _norm_profile(modules: pd.DataFrame, stack: str, role: str, depth: int, step: int) -> list[float | None]:
    """Return |dW| per layer, or the root mean square over a bin of layers; None if nothing is adapted."""
    chosen = modules[(modules["stack"] == stack) & (modules["role"] == role)]
    squares = (chosen["update_norm"] ** 2).groupby(chosen["layer"]).sum(skipna=False)
    values = squares.groupby(squares.index // step).mean(skipna=False).to_dict()
    columns = range(math.ceil(depth / step)) if values else ()
    return [math.sqrt(values[column]) if column in values else None for column in columns]


def _layer_axis(depth: int, step: int, repeat: int) -> str:
    """Return the layer numbers above their columns, with the last one if there is room."""
    bins = math.ceil(depth / step)
    line = ""
    for column in range(0, bins, {1: 8, 2: 2, 3: 1}[repeat]):
        line = line.ljust(column * repeat) + str(column * step)
    end = str(depth - 1)
    start = min((bins - 1) * repeat, _CHART - len(end))
    return line.ljust(start) + end if start > len(line) else line


def _largest(inspection: Inspection, style: Style) -> Iterator[str]:
    for number, row in enumerate(inspection.largest(3).to_dict("records")):
        used = "" if math.isnan(row["effective_rank"]) else f"  rank {_format_number(row['effective_rank'])}"
        used += "" if pd.isna(row["rank"]) else f" of {row['rank']}"
        size = f"{norm(row['update_norm']):<6} "
        name = elide(row["module"], WIDTH - _LABEL - len(size) - len(used))
        yield _fact_line("" if number else "largest |dW|", f"{size}{name}{used}", style)


def _finding_lines(inspection: Inspection | NeuronInspection, style: Style) -> Iterator[str]:
    for finding in inspection.findings:
        color = color_of(finding)
        for number, text in enumerate(textwrap.wrap(printable(finding), WIDTH - _LABEL, subsequent_indent="  ")):
            key = "findings" if number == 0 and finding is inspection.findings[0] else ""
            yield _fact_line(key, style.paint(text, color), style)


def color_of(finding: str) -> str:
    """Return the ANSI color of a finding: red for NaN, yellow for others."""
    return "31" if "NaN" in finding else "33"


def _next_command(inspection: Inspection) -> str:
    run = inspection.run
    folders = [run.path]
    if isinstance(run, Adapter) and run.base is not None and run.needs_base:
        folders.append(run.base.folder)
    shown = [[_shorten_folder(folder) for folder in folders], ["ADAPTER", "BASE"][: len(folders)]]
    commands = [f"lorascope plot spectrum {' --base '.join(names)} -o spectrum.pdf" for names in shown]
    return commands[0] if len(commands[0]) <= WIDTH - _LABEL else commands[1]


def _shorten_folder(folder: Any) -> str:
    """Return a folder for the shell, relative or absolute, whichever is shorter."""
    return _quote_word(min(str(folder), os.path.relpath(folder, Path.cwd()), key=len))


def _quote_word(word: str) -> str:
    return printable(shlex.quote(word))


def span(low: Any, high: Any) -> str:
    if pd.isna(low):
        return "-"
    return str(low) if low == high else f"{low}-{high}"


def norm(value: float) -> str:
    """Format a norm with three digits in at most seven characters."""
    if math.isnan(value):
        return "NaN"
    if 1000 <= value < 1e6:
        return f"{value:.0f}"
    return f"{value:#.3g}".rstrip(".") if value == 0 or 1e-3 <= value < 1000 else f"{value:.1e}"


def _format_percent(share: float) -> str:
    if math.isnan(share):
        return "-"
    return f"{100 * share:.{1 if share < 10 else 0}f}%" if share < 1000 else f"{100 * share:.0e}%"


def _format_number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}" if abs(value) < 1e5 else norm(value)


def _format_whole(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.0f}" if abs(value) < 1e5 else norm(value)


_CELL = 6
_MOST = (WIDTH - 2) // _CELL
_HALF = WIDTH // 2


def comparison_screen(comparison: Comparison, style: Style) -> str:
    """Format a comparison of several adapters or runs, with one letter each."""
    lines = [*_list_inspections(comparison, style), ""]
    blocks = [list(_block(comparison, *question, style)) for question in _QUESTIONS]
    if 2 + _CELL * len(comparison.inspections) < _HALF:
        for left, right in zip(blocks[::2], blocks[1::2], strict=True):
            lines += [f"{one}{other}" for one, other in zip(_pad_lines(left, _HALF, style), right, strict=True)] + [""]
    else:
        for block in blocks:
            lines += [*block, ""]
    cautions = list(_caution_lines(comparison, style))
    return "\n".join(
        line.rstrip() for line in [*lines, *_explain_comparison(comparison), *([""] if cautions else []), *cautions]
    )


def _list_inspections(comparison: Comparison, style: Style) -> Iterator[str]:
    width = WIDTH - 52
    head = f"  {'':<{width}} {'method':<10} {'|dW|':>7} {'rank':>7} {'modules':>7} {'parameters':>13}"
    yield style.paint(head, "1")
    for letter, label, item in zip(_letters(comparison), comparison.labels, comparison.inspections, strict=True):
        ranks = span(item.modules["rank"].min(), item.modules["rank"].max())
        method = elide(item.facts[0][1].partition(",")[0], 10)
        row = f"{letter} {elide(label, width):<{width}} {method:<10} {norm(item.norm):>7} {ranks:>7}"
        yield f"{row} {len(item.modules):>7} {item.modules['parameters'].sum():>13,}"


def _block(
    comparison: Comparison, title: str, column: str, format_cell: Callable[[float], str], style: Style
) -> Iterator[str]:
    """Yield a matrix: its title, then one letter per row and column."""
    letters = _letters(comparison)
    cells = comparison.matrix.pivot(index="one", columns="other", values=column)
    yield style.paint(title, "1")
    yield "  " + "".join(f"{letter:>{_CELL}}" for letter in letters[:_MOST])
    for letter, label in zip(letters, comparison.labels, strict=True):
        values = cells.loc[[label], list(comparison.labels[:_MOST])].to_numpy(float)[0]
        yield f"{letter} " + "".join(f"{'-' if math.isnan(value) else format_cell(value):>{_CELL}}" for value in values)


def _format_ratio(value: float) -> str:
    """Format a ratio in at most five characters."""
    return f"{value:.3g}" if 0.1 <= value < 1000 or value == 0 else f"{value:.0e}"


_QUESTIONS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("|dW|, row over column", "norm_ratio", _format_ratio),
    ("cosine of dW", "cosine", lambda value: f"{round(value, 2) + 0.0:.2f}"),
    ("angle of subspaces, degrees", "angle", lambda value: f"{value:.0f}"),
    ("rank in other modules, %", "rank_moved", lambda value: f"{100 * value:.0f}"),
)


def _explain_comparison(comparison: Comparison) -> Iterator[str]:
    chance = comparison.matrix["chance"].dropna()
    yield "cosine     of all updates as one vector; modules that are not shared count as 0"
    if len(chance):
        low, high = f"{chance.min():.0f}", f"{chance.max():.0f}"
        level = low if low == high else f"{low} to {high}"
        yield f"angle      mean over shared modules, {DIRECTIONS} leading dimensions; random: {level}"
    yield "rank       fraction to move to other modules for the same allocation"
    if len(comparison.inspections) > _MOST:
        yield f"only the first {_MOST} columns are shown; use --csv or --json for all"


def _caution_lines(comparison: Comparison, style: Style) -> Iterator[str]:
    """Yield the cautions about each adapter or run, with its letter."""
    for letter, item in zip(_letters(comparison), comparison.inspections, strict=True):
        for caution in item.cautions:
            for line in textwrap.wrap(printable(caution), WIDTH, initial_indent=f"{letter} ", subsequent_indent="    "):
                yield style.paint(line, color_of(caution))


def _letters(comparison: Comparison) -> list[str]:
    return [chr(ord("a") + number) for number in range(len(comparison.inspections))]


def _pad_lines(lines: list[str], width: int, style: Style) -> Iterator[str]:
    """Pad lines to a width; color codes have no width."""
    for line in lines:
        yield line + " " * (width - len(line) + (len(line) - len(line.replace("\033[1m", "").replace("\033[0m", ""))))
