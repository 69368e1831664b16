"""Screen of several adapters or runs: their sizes, and matrices of their pairwise comparison."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rich.console import Console, Group
from rich.table import Column, Table
from rich.text import Text

from lorascope.analysis.adapter_similarity import DIRECTIONS
from lorascope.diagnosis.pair_comparison import Comparison
from lorascope.diagnosis.terminal import WIDTH, Elided, norm, numbers_table, ratio, span, to_text, wrapped

# Matrices of a comparison: width of a cell, and the number of columns that fit.
_CELL = 6
_MOST = (WIDTH - 2) // _CELL
_MATRICES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("|dW|, row over column", "norm_ratio", ratio),
    ("cosine of dW", "cosine", lambda value: f"{round(value, 2) + 0.0:.2f}"),
    ("angle of subspaces, degrees", "angle", lambda value: f"{value:.0f}"),
    ("rank in other modules, %", "rank_moved", lambda value: f"{100 * value:.0f}"),
)


def comparison_screen(comparison: Comparison, target: Console) -> str:
    """Format a comparison of several adapters or runs, with one letter each, or more after z."""
    items, width = comparison.inspections, WIDTH - 52
    letters = [_letters(place) for place in range(len(items))]
    methods = [item.facts[0][1].partition(",")[0] for item in items]
    names = zip(letters, map(Elided, comparison.labels), map(Elided, methods), strict=True)
    sizes = []
    for item in items:
        held = [each.rank for each in item.measured if each.rank is not None]
        total = sum(each.parameters for each in item.measured)
        row = {"norm": item.norm, "least": min(held, default=None), "most": max(held, default=None)}
        sizes.append(row | {"modules": len(item.measured), "total": f"{total:,}"})
    ranks = ("rank", 7, span, "least", "most"), ("modules", 7, str, "modules")
    columns = (("|dW|", 7, norm, "norm"), *ranks, ("parameters", 13, str, "total"))
    listed = numbers_table([("", len(letters[-1])), ("", width), ("method", 10)], names, columns, sizes)
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
        wrapped(finding, WIDTH, initial_indent=f"{letter} ", subsequent_indent="    ")
        for letter, item in zip(letters, items, strict=True)
        for finding in item.found
        if finding.severity != "note"
    ]
    return to_text(target, listed, "", matrices, *lines, *([""] if cautions else []), *cautions)


def _letters(place: int) -> str:
    """Return a to z, then aa, ab and so on."""
    before, last = divmod(place, 26)
    return (_letters(before - 1) if before else "") + chr(ord("a") + last)


def _matrix(
    comparison: Comparison, letters: Sequence[str], title: str, column: str, form: Callable[[float], str]
) -> Group:
    """Return a matrix: its title, then one letter per row and column."""
    heads = [Column(letter, width=_CELL, justify="right") for letter in letters[:_MOST]]
    table = Table(Column(width=max(2, len(letters[-1]) + 1)), *heads, box=None, padding=0, header_style="")
    cells = comparison.matrix.pivot(index="one", columns="other", values=column)
    cells = cells.loc[comparison.labels, comparison.labels[:_MOST]]
    for letter, values in zip(letters, cells.to_numpy(float), strict=True):
        table.add_row(letter, *("-" if math.isnan(value) else form(value) for value in values))
    return Group(Text(title, "bold"), table)
