"""A comparison as text: a line for each adapter or run, then a small matrix for each question, in 80 columns."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator

from lorascope.analysis.adapter_similarity import DIRECTIONS
from lorascope.diagnosis.comparison import Comparison
from lorascope.diagnosis.terminal import WIDTH, Style, colour_of, elide, norm, span
from lorascope.files.printable import printable

_CELL = 6
_MOST = (WIDTH - 2) // _CELL
_HALF = WIDTH // 2


def compared(comparison: Comparison, style: Style) -> str:
    """The screen for several adapters or runs, a letter each."""
    lines = [*_listed(comparison, style), ""]
    blocks = [list(_block(comparison, *question, style)) for question in _QUESTIONS]
    if 2 + _CELL * len(comparison.inspections) < _HALF:
        for left, right in zip(blocks[::2], blocks[1::2], strict=True):
            lines += [f"{one}{other}" for one, other in zip(_padded(left, _HALF, style), right, strict=True)] + [""]
    else:
        for block in blocks:
            lines += [*block, ""]
    told = list(_cautions(comparison, style))
    return "\n".join(line.rstrip() for line in [*lines, *_explained(comparison), *([""] if told else []), *told])


def _listed(comparison: Comparison, style: Style) -> Iterator[str]:
    width = WIDTH - 52
    head = f"  {'':<{width}} {'method':<10} {'|dW|':>7} {'rank':>7} {'modules':>7} {'parameters':>13}"
    yield style.paint(head, "1")
    for letter, label, item in zip(_letters(comparison), comparison.labels, comparison.inspections, strict=True):
        ranks = span(item.modules["rank"].min(), item.modules["rank"].max())
        method = elide(item.facts[0][1].partition(",")[0], 10)
        row = f"{letter} {elide(label, width):<{width}} {method:<10} {norm(item.norm):>7} {ranks:>7}"
        yield f"{row} {len(item.modules):>7} {item.modules['parameters'].sum():>13,}"


def _block(
    comparison: Comparison, title: str, column: str, tell: Callable[[float], str], style: Style
) -> Iterator[str]:
    """A matrix: its title above, a letter for each row and column."""
    letters = _letters(comparison)
    cells = comparison.matrix.pivot(index="one", columns="other", values=column)
    yield style.paint(title, "1")
    yield "  " + "".join(f"{letter:>{_CELL}}" for letter in letters[:_MOST])
    for letter, label in zip(letters, comparison.labels, strict=True):
        values = cells.loc[[label], list(comparison.labels[:_MOST])].to_numpy(float)[0]
        yield f"{letter} " + "".join(f"{'-' if math.isnan(value) else tell(value):>{_CELL}}" for value in values)


def _factor(value: float) -> str:
    """A ratio in five characters."""
    return f"{value:.3g}" if 0.1 <= value < 1000 or value == 0 else f"{value:.0e}"


_QUESTIONS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("|dW|, row over column", "norm_ratio", _factor),
    ("cosine of dW", "cosine", lambda value: f"{round(value, 2) + 0.0:.2f}"),
    ("angle of directions, degrees", "angle", lambda value: f"{value:.0f}"),
    ("ranks elsewhere, %", "rank_moved", lambda value: f"{100 * value:.0f}"),
)


def _explained(comparison: Comparison) -> Iterator[str]:
    chance = comparison.matrix["chance"].dropna()
    yield "cosine     of the whole updates as one vector; 0 where modules are not shared"
    if len(chance):
        low, high = f"{chance.min():.0f}", f"{chance.max():.0f}"
        by_chance = low if low == high else f"{low} to {high}"
        yield f"angle      mean over {DIRECTIONS} leading directions of shared modules; by chance {by_chance}"
    yield "elsewhere  ranks that would have to move to other modules to be allotted alike"
    if len(comparison.inspections) > _MOST:
        yield f"the first {_MOST} columns; --csv and --json have all"


def _cautions(comparison: Comparison, style: Style) -> Iterator[str]:
    """What of an adapter or run changes how its numbers are read, by its letter."""
    for letter, item in zip(_letters(comparison), comparison.inspections, strict=True):
        for caution in item.cautions:
            for line in textwrap.wrap(printable(caution), WIDTH, initial_indent=f"{letter} ", subsequent_indent="    "):
                yield style.paint(line, colour_of(caution))


def _letters(comparison: Comparison) -> list[str]:
    return [chr(ord("a") + number) for number in range(len(comparison.inspections))]


def _padded(lines: list[str], width: int, style: Style) -> Iterator[str]:
    """Lines filled up to a width; colour takes none."""
    for line in lines:
        yield line + " " * (width - len(line) + (len(line) - len(line.replace("\033[1m", "").replace("\033[0m", ""))))
