"""Inspections as text: one screen of 80 columns, whatever the size of the model."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pandas as pd

from lorascope.inspection import Inspection

WIDTH = 80
_LABEL = 15
_CHART = 32
_STACKS = {"encoder": "enc ", "decoder": "dec "}


@dataclass(frozen=True)
class Style:
    """How much a terminal can show.

    Parameters
    ----------
    blocks : bool
        Block characters; digits otherwise.
    colour : bool
        ANSI colours.
    """

    blocks: bool = False
    colour: bool = False

    @classmethod
    def of(cls, stream: TextIO) -> Style:
        """What a stream can show: all of it on a terminal, plain ASCII in a file or a pipe."""
        terminal = stream.isatty()
        blocks = terminal and (stream.encoding or "").lower().startswith("utf")
        return cls(blocks, terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb")

    def paint(self, text: str, code: str) -> str:
        """Text in an ANSI colour or weight."""
        return f"\033[{code}m{text}\033[0m" if self.colour and text else text

    @property
    def scale(self) -> str:
        """Characters for norms, smallest first."""
        return "▁▂▃▄▅▆▇█" if self.blocks else "123456789"

    @property
    def zero(self) -> str:
        """The character for no update at all."""
        return "·" if self.blocks else "."

    def glyph(self, value: float | None, largest: float) -> str:
        """One character for a norm: a blank for None, where nothing is adapted, and ! for NaN."""
        if value is None:
            return " "
        if math.isnan(value):
            return "!"
        if value == 0:
            return self.zero
        return self.scale[min(len(self.scale) - 1, int(len(self.scale) * value / largest))]


def one(inspection: Inspection, style: Style) -> str:
    """The screen for one adapter or run."""
    lines = [*_header(inspection, style), "", *_chart(inspection, style), "", *_largest(inspection, style)]
    for number, finding in enumerate(inspection.findings):
        text = elide(finding, WIDTH - _LABEL)
        broken = "NaN" in finding
        lines.append(_line("" if number else "findings", style.paint(text, "31" if broken else "33"), style))
    lines.append(_line("next", style.paint(_next(inspection), "36"), style))
    return "\n".join(line.rstrip() for line in lines)


def every(inspection: Inspection, style: Style) -> str:
    """The screen of ``one`` with a line for every module in place of the chart."""
    head = f"{'module':<41} {'|dW|':>8} {'energy':>7} {'rank':>5} {'effective':>9} {'stable':>6}"
    lines = [*_header(inspection, style), "", style.paint(head, "1")]
    for row in inspection.modules.to_dict("records"):
        values = f"{_norm(row['update_norm']):>8} {_percent(row['energy']):>7} {_span(row['rank'], row['rank']):>5}"
        ranks = f"{_number(row['effective_rank']):>9} {_number(row['stable_rank']):>6}"
        lines.append(f"{elide(row['module'], 41):<41} {values} {ranks}")
    findings = [_line("" if number else "findings", text, style) for number, text in enumerate(inspection.findings)]
    return "\n".join([*lines, "", *findings])


def compared(inspections: Sequence[Inspection], style: Style) -> str:
    """A table of several adapters or runs, a letter each, and the ratio of their norms."""
    letters = [chr(ord("a") + number) for number in range(len(inspections))]
    against = letters if len(letters) <= 5 else letters[:1]
    width = WIDTH - 40 - 6 * len(against)
    head = f"  {'':<{width}} {'|dW|':>8} {'rank':>7} {'modules':>7} {'parameters':>13}"
    lines = [style.paint(head + "".join(f"{'/' + letter:>6}" for letter in against), "1")]
    for letter, item in zip(letters, inspections, strict=True):
        ranks = _span(item.modules["rank"].min(), item.modules["rank"].max())
        row = f"{letter} {elide(item.name, width):<{width}} {_norm(item.norm):>8} {ranks:>7} {len(item.modules):>7}"
        ratios = "".join(f"{_ratio(item.norm, other.norm):>6}" for other in inspections[: len(against)])
        lines.append(f"{row} {item.modules['parameters'].sum():>13,}{ratios}")
    lines += ["", f"/{letters[0]}: |dW| over that of {letters[0]}"]
    return "\n".join(line.rstrip() for line in lines)


def elide(text: str, width: int) -> str:
    """Text cut in its middle to a width; the end of a module's name says more than its beginning."""
    if len(text) <= width:
        return text
    tail = (2 * width) // 3 - 1
    return f"{text[: width - tail - 2]}..{text[-tail:]}"


def _header(inspection: Inspection, style: Style) -> Iterator[str]:
    for number, (key, text) in enumerate(inspection.facts):
        yield _line(elide(key, _LABEL - 1), elide(text, WIDTH - _LABEL), style, strong=number == 0)


def _line(key: str, text: str, style: Style, strong: bool = False) -> str:
    padded = f"{key:<{_LABEL}}"
    return (style.paint(padded, "1") if strong else padded) + text


def _chart(inspection: Inspection, style: Style) -> Iterator[str]:
    """A row for each role: pooled |dW| along the layers, then its numbers."""
    modules, roles = inspection.modules, inspection.roles().to_dict("records")
    inside = modules[modules["layer"].notna()]
    depth = int(inside["layer"].max()) + 1 if len(inside) else 0
    step = max(1, math.ceil(depth / _CHART))
    repeat = max(1, min(3, _CHART // depth)) if depth else 1
    cells = [_profile(inside, row["stack"], row["role"], depth, step) for row in roles]
    largest = max((value for cell in cells for value in cell if value), default=0.0)
    stacks = _STACKS if inside["stack"].nunique() > 1 else {}
    related = modules["relative_update"].notna().any()
    head = f"{'|dW| by layer':<{_LABEL}}{_axis(depth, step, repeat):<{_CHART}}"
    yield style.paint(f"{head} {'|dW|':>8} {'dW/W' if related else 'energy':>7} {'rank':>6} {'effective':>9}", "1")
    for row, cell in zip(roles, cells, strict=True):
        drawn = "".join(style.glyph(value, largest) * repeat for value in cell)
        share = _percent(row["relative_update" if related else "energy"])
        ranks = f"{_span(row['least_rank'], row['most_rank']):>6} {_number(row['effective_rank']):>9}"
        label = f"{stacks.get(row['stack'], '')}{row['role']}"
        yield f"{label:<{_LABEL}}{drawn:<{_CHART}} {_norm(row['update_norm']):>8} {share:>7} {ranks}"
    if largest:
        bins = f", {step} layers a column (root mean square)" if step > 1 else ""
        yield f"{'':<{_LABEL}}{style.scale[-1]} is {_norm(largest)} in one layer, {style.zero} is zero{bins}"


def _profile(modules: pd.DataFrame, stack: str, role: str, depth: int, step: int) -> list[float | None]:
    """Pooled |dW| of each layer, or the root mean square over a bin of layers; None where nothing is adapted."""
    chosen = modules[(modules["stack"] == stack) & (modules["role"] == role)]
    squares = (chosen["update_norm"] ** 2).groupby(chosen["layer"]).sum(skipna=False)
    values = squares.groupby(squares.index // step).mean(skipna=False).to_dict()
    columns = range(math.ceil(depth / step)) if values else ()
    return [math.sqrt(values[column]) if column in values else None for column in columns]


def _axis(depth: int, step: int, repeat: int) -> str:
    """Numbers of the layers above their columns, the last one flush right where there is room."""
    if not depth:
        return ""
    bins = math.ceil(depth / step)
    width, gap = bins * repeat, max(1, 8 // repeat)
    line = ""
    for column in range(0, bins, gap):
        text = str(column * step)
        if column * repeat >= len(line) + bool(line) and column * repeat + len(text) <= width:
            line = line.ljust(column * repeat) + text
    end = str(depth - 1)
    return line.ljust(width - len(end)) + end if width - len(end) > len(line) else line


def _largest(inspection: Inspection, style: Style) -> Iterator[str]:
    for number, row in enumerate(inspection.largest(3).to_dict("records")):
        rank = "" if pd.isna(row["rank"]) else f" of {row['rank']}"
        told = f"|dW| {_norm(row['update_norm'])}  effective {_number(row['effective_rank'])}{rank}"
        name = elide(row["module"], WIDTH - _LABEL - len(told) - 2)
        yield _line("" if number else "largest", f"{name}  {told}", style)


def _next(inspection: Inspection) -> str:
    path = str(inspection.run.path)
    shown = min(path, os.path.relpath(path, Path.cwd()), key=len)
    command = f"lorascope plot spectrum {shlex.quote(shown)} -o spectrum.pdf"
    return command if len(command) <= WIDTH - _LABEL else f"lorascope plot spectrum {inspection.name} -o spectrum.pdf"


def _span(low: Any, high: Any) -> str:
    if pd.isna(low):
        return "-"
    return str(low) if low == high else f"{low}-{high}"


def _norm(value: float) -> str:
    return "NaN" if math.isnan(value) else f"{value:#.3g}".rstrip(".")


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f} %"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"


def _ratio(value: float, other: float) -> str:
    return f"{value / other:.2f}" if other else "-"
