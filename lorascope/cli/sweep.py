"""``lorascope sweep``: all runs of a TOML file, and the comparison of their recipes."""

from __future__ import annotations

import sys
from dataclasses import replace
from json import dumps
from typing import TYPE_CHECKING, Annotated, Any

import pandas as pd
from tyro.conf import arg

from lorascope.analysis import recipe_tests
from lorascope.analysis.seed_intervals import Interval
from lorascope.cli.arguments import Name, command
from lorascope.files.printable import printable
from lorascope.files.text_layout import WIDTH, elide, format_frame, format_span, wrap_paragraph
from lorascope.files.typed_json import to_json_rows

if TYPE_CHECKING:
    from lorascope.experiments.sweep import SweepResult

_NAME_WIDTH = 36
_NOTE = "± half-width of the 95% t-interval over seeds; places by t-tests paired by seed (Holm, 5%)"


@command
def main(
    file: Annotated[str | None, arg(metavar="FILE")] = None,
    /,
    *,
    backend: Name = None,
    address: Annotated[str | None, arg(metavar="ADDRESS")] = None,
    jobs: Annotated[int | None, arg(metavar="N")] = None,
    json: bool = False,
    progress: bool = True,
) -> int:
    """Train a sweep: every combination of methods, tasks, settings and seeds in a TOML file, and compare the recipes.

    Finished runs are not trained again, interrupted ones resume, and a failed run does not stop the others.

    Example: lorascope sweep ranks.toml

    Parameters
    ----------
    file
        TOML file with the keys task, method, settings and seeds, among others.
    backend
        Loky (this machine), dask or ray; overrides the file.
    address
        Cluster address, such as tcp://host:8786.
    jobs
        Number of parallel runs; the number of cores if omitted.
    json
        Print runs, recipes and their comparison as JSON.
    progress
        Show the live table of runs.
    """
    if file is None:
        raise ValueError("FILE is required: lorascope sweep ranks.toml")
    from lorascope.experiments import grid, sweep  # imported here, so that --help does not import torch

    plan = grid.read(file)
    options: dict[str, Any] = {}
    if backend in (None, plan.backend.get("name")):  # another backend discards the file's options
        options |= plan.backend
    for name, value in {"name": backend, "address": address, "jobs": jobs}.items():
        if value is not None:
            options[name] = value
    swept = sweep.run_grid(replace(plan, backend=options), progress=progress)
    print(dumps(_sweep_to_json(swept), indent=1) if json else _format_standings(swept))
    for line in swept.complaints():
        print(f"lorascope: failed: {printable(' '.join(line.split()))}", file=sys.stderr)
    return int(bool(swept.failures))


def _format_standings(swept: SweepResult) -> str:
    """Format the comparison of the recipes as a table with notes."""
    table = recipe_tests.collect_scores(swept.runs())
    if table.empty:
        return "no finished runs"
    compared = recipe_tests.compare_pairs(table)
    rows = recipe_tests.standings(table, compared)
    varied = [column for column in ("model", "task") if rows[column].nunique() > 1]
    lines = []
    for row in rows.to_dict("records"):
        names = {column: elide(str(row[column]), _NAME_WIDTH) for column in ("recipe", *varied)}
        value = Interval(row["value"], row["low"], row["high"], row["n"]).format(4)
        test = {"test": f"{row['metric']} {value}", "seeds": row["n"]}
        lines.append(names | test | {"place": format_span(row["first"], row["last"])})
    notes = [_NOTE, *recipe_tests.describe_comparison(compared)]
    paragraphs = [str(wrap_paragraph(note, width=WIDTH)) for note in notes]
    return "\n".join([format_frame(pd.DataFrame(lines)), "", *paragraphs])


def _sweep_to_json(swept: SweepResult) -> dict[str, Any]:
    """Convert runs, failures, recipes and their comparison to JSON values; NaN becomes null."""
    table = recipe_tests.collect_scores(swept.runs())
    compared = recipe_tests.compare_pairs(table)
    folders = [str(swept.folders[number]) for number in sorted(swept.folders)]
    return {
        "runs": to_json_rows(table.assign(path=folders)),
        "failed": swept.complaints(),
        "recipes": to_json_rows(recipe_tests.standings(table, compared)) if len(table) else [],
        "pairs": to_json_rows(compared),
        "words": recipe_tests.describe_comparison(compared),
    }
