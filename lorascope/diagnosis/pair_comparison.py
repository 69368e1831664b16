"""Comparison of several adapters or runs, and its screen: their sizes, and matrices of all pairs."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from lorascope.analysis import adapter_similarity
from lorascope.analysis.rate_card import compares_rates
from lorascope.diagnosis.inspection import Inspection
from lorascope.diagnosis.inspection_screen import add_command, finding_paragraph, shell_word
from lorascope.files.lazy_pandas import pandas as pd
from lorascope.files.printable import utf8_text
from lorascope.files.text_layout import (
    WIDTH,
    Block,
    TableColumn,
    aligned_table,
    block_grid,
    format_norm,
    format_number,
    format_ratio,
    format_span,
    format_whole_number,
    render_text,
    text_block,
)
from lorascope.runs.module_summary import json_rows

_CELL = 6  # width of a cell of a matrix: five characters of ``format_ratio`` and a gap
_MOST_COLUMNS = (WIDTH - 2) // _CELL


class _Matrix(NamedTuple):
    title: str
    column: str
    form: Callable[[float], str]


_MATRICES = (
    _Matrix("|dW|, row over column", "norm_ratio", format_ratio),
    _Matrix("cosine of dW", "cosine", lambda value: format_number(round(value, 2) + 0.0, 2)),  # not -0.00
    _Matrix("angle of subspaces, degrees", "angle", format_whole_number),
    _Matrix("rank in other modules, %", "rank_moved", lambda value: format_whole_number(100 * value)),
)


@dataclass(frozen=True)
class Comparison:
    """Pairwise comparison of inspections, with the tables of ``adapter_similarity``.

    Labels are the names of the folders, or their paths if names are equal.
    """

    inspections: tuple[Inspection, ...]
    matrix: pd.DataFrame
    modules: pd.DataFrame

    @property
    def labels(self) -> list[str]:
        """Labels of the inspections."""
        return list(dict.fromkeys(self.matrix["one"]))

    def table(self) -> pd.DataFrame:
        """Return the matrix, with ``module`` empty, followed by one row per module and pair."""
        modules = self.modules.drop(columns="inner")
        columns = ["one", "other", "module", *self.matrix.columns[2:]]
        return pd.concat([self.matrix.assign(module=""), modules])[columns]

    def to_json(self) -> list[dict[str, Any]]:
        """Return the JSON form of each inspection, with its comparison with each of the others, also per module."""
        entries = []
        for label, item in zip(self.labels, self.inspections, strict=True):
            pairs = self.matrix[(self.matrix["one"] == label) & (self.matrix["other"] != label)].drop(columns="one")
            modules = self.modules[self.modules["one"] == label].drop(columns=["one", "inner"])
            compared = {"label": label, "compared": json_rows(pairs), "compared_modules": json_rows(modules)}
            entries.append(item.to_json() | compared)
        return entries


def compare_inspections(inspections: Sequence[Inspection], spectra: bool = False) -> Comparison:
    """Compare every pair of inspections.

    Raises
    ------
    ValueError
        They are not on one model, or one occurs twice.
    """
    labels = distinct_labels(inspections)
    runs = {label: item.run for label, item in zip(labels, inspections, strict=True)}
    shared = adapter_similarity.compare_modules(runs, spectra)
    return Comparison(tuple(inspections), adapter_similarity.compare_adapters(runs, shared), shared)


def distinct_labels(inspections: Sequence[Inspection]) -> list[str]:
    """Return labels for a pairwise comparison: names of the inspected folders, or their paths where names are equal.

    Raises
    ------
    ValueError
        One occurs twice.
    """
    name_counts = Counter(item.name for item in inspections)
    labels = []
    for item in inspections:
        label = item.name
        if name_counts[label] > 1:
            label = utf8_text(item.path)
        labels.append(label)
    for label, count in Counter(labels).items():
        if count > 1:
            raise ValueError(f"duplicate adapter or run {label!r}")
    return labels


def comparison_screen(comparison: Comparison, target: Console) -> str:
    """Format a pairwise comparison of adapters or runs, with one letter each, or more after z."""
    count = len(comparison.inspections)
    letters = list(map(_letters, range(count)))
    columns = [
        TableColumn("", len(letters[-1]), "letter"),
        TableColumn("", WIDTH - 52, "label"),  # what the other columns leave
        TableColumn("method", 10, "method"),
        TableColumn("|dW|", 7, "norm", format_norm),
        TableColumn("rank", 7, "least_rank", format_span, "most_rank"),
        TableColumn("modules", 7, "modules", str),
        TableColumn("parameters", 13, "parameters", "{:,}".format),
    ]
    sizes, warnings = [], []
    for letter, label, inspection in zip(letters, comparison.labels, comparison.inspections, strict=True):
        method = inspection.facts[0][1].partition(",")[0]
        labeled = {"letter": letter, "label": label, "method": method, "norm": inspection.norm}
        sizes.append(labeled | inspection.size)
        # Notes say nothing that affects the comparison.
        findings = [finding for finding in inspection.details if finding.severity != "note"]
        if findings:
            warnings.append(Block(letter, list(map(finding_paragraph, findings))))
    matrices = [_format_matrix(comparison, letters, matrix) for matrix in _MATRICES]
    # Two matrices next to each other, if they fit.
    per_row = 2 if 2 + _CELL * count < WIDTH // 2 else 1
    grid = Table.grid()
    for _ in range(per_row):
        grid.add_column(width=WIDTH // per_row)
    for start in range(0, len(matrices), per_row):
        grid.add_row(*matrices[start : start + per_row])
        grid.add_row("")
    screen: list[RenderableType] = [aligned_table(columns, sizes), "", grid, block_grid(_legend(comparison))]
    if warnings:
        screen += ["", block_grid(warnings)]
    return add_command(render_text(target, *screen), target, _next_command(comparison))


def _next_command(comparison: Comparison) -> str:
    """Return the command that plots losses of compared runs, by learning rate if they have several."""
    runs = [inspection.run for inspection in comparison.inspections]
    recorded = set.intersection(*(set(run.meta.quantities or {}) for run in runs))
    folders = [shell_word(str(run.path)) for run in runs]
    figure = "training_curves"
    # Adapters and recordings of another trainer may have no rate.
    if all("lr" in run.meta.settings for run in runs) and compares_rates(runs):
        # Seeds of one label are averaged, so the labels have the rate.
        for index, run in enumerate(runs):
            folders[index] = shlex.quote(f"{run.label} at {run.meta.settings['lr']:g}=") + folders[index]
        if {"eval_loss", "test_loss"} <= recorded:
            figure = "learning_rates"
    if "loss" not in recorded and figure == "training_curves":
        return ""
    return f"lorascope plot {figure} {' '.join(folders)} -o {figure}.pdf"


def _letters(index: int) -> str:
    """Return a to z, then aa, ab and so on."""
    before, last = divmod(index, 26)
    return (_letters(before - 1) if before else "") + chr(ord("a") + last)


def _legend(comparison: Comparison) -> list[Block]:
    """Return the definitions of the matrices."""
    blocks = [text_block("cosine", "of all updates as one vector; modules not shared count as 0")]
    chance = comparison.matrix["chance"].dropna()
    if len(chance):
        level = " to ".join(dict.fromkeys((f"{chance.min():.0f}", f"{chance.max():.0f}")))
        dimensions = f"{adapter_similarity.DIRECTIONS} leading dimensions"
        blocks.append(text_block("angle", f"mean over shared modules, {dimensions}; random: {level}"))
    blocks.append(text_block("rank", "fraction to move to other modules for the same allocation"))
    if len(comparison.inspections) > _MOST_COLUMNS:
        blocks.append(text_block("columns", f"only the first {_MOST_COLUMNS} are shown; use --csv or --json for all"))
    return blocks


def _format_matrix(comparison: Comparison, letters: Sequence[str], matrix: _Matrix) -> Group:
    """Return a matrix: its title, then one letter per row and column."""
    cells = comparison.matrix.pivot(index="one", columns="other", values=matrix.column)
    heads = letters[:_MOST_COLUMNS]
    rows = []
    for letter, label in zip(letters, comparison.labels, strict=True):
        values = cells.loc[label, comparison.labels[:_MOST_COLUMNS]]
        rows.append({"": letter} | dict(zip(heads, values, strict=True)))
    columns = [TableColumn("", len(letters[-1]) + 1, "")]
    columns += [TableColumn(letter, _CELL - 1, letter, matrix.form) for letter in heads]
    return Group(Text(matrix.title, "bold"), aligned_table(columns, rows))
