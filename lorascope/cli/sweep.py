"""``lorascope sweep``: all runs of a TOML file, and the comparison of their recipes."""

from __future__ import annotations

import json
import sys
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import pandas as pd
from tyro.conf import Positional, arg

from lorascope.analysis import recipe_comparison
from lorascope.analysis.seed_intervals import Interval
from lorascope.cli.arguments import UsageError, parse
from lorascope.diagnosis.terminal import WIDTH, elide
from lorascope.files.printable import printable

if TYPE_CHECKING:
    from lorascope.experiments.sweep import SweepResult

_NAME = 36


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train every combination of methods, tasks, settings and seeds in a TOML file, and compare the recipes.

    Finished runs are not trained again, interrupted ones resume, and a failed run does not stop the others.

    Example: lorascope sweep ranks.toml
    """

    file: Annotated[Positional[str], arg(metavar="FILE", help="TOML file with task, method, settings, seeds, ...")] = ""
    backend: Annotated[str | None, arg(metavar="NAME", help="loky (this machine), dask or ray; overrides the file")] = (
        None
    )
    address: Annotated[str | None, arg(metavar="ADDRESS", help="cluster address, such as tcp://host:8786")] = None
    jobs: Annotated[int | None, arg(metavar="N", help="number of parallel runs; the number of cores if omitted")] = None
    json: Annotated[bool, arg(help="print runs, recipes and their comparison as JSON")] = False
    progress: Annotated[bool, arg(help="hide the live table of runs")] = True


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    options = parse(Options, argv, "lorascope sweep")
    if not options.file:
        raise UsageError("FILE is required: lorascope sweep ranks.toml")
    from lorascope.experiments import grid, sweep  # imported here, so that --help does not import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FutureWarning)
        found = grid.read(options.file)
    for warning in caught:
        print(f"lorascope: {printable(str(warning.message))}", file=sys.stderr)
    swept = sweep.run_grid(replace(found, backend=_choose_backend(found.backend, options)), progress=options.progress)
    print(json.dumps(sweep_to_json(swept), indent=1) if options.json else format_standings(swept))
    for line in swept.complaints():
        print(f"lorascope: failed: {printable(' '.join(line.split()))}", file=sys.stderr)
    return 1 if swept.failures else 0


def _choose_backend(stored: Any, options: Options) -> dict[str, Any]:
    """Override the file's backend by the command line; another backend discards the file's options."""
    kept = stored if options.backend in (None, stored.get("name")) else {}
    given = {"name": options.backend, "address": options.address, "jobs": options.jobs}
    return dict(kept) | {key: value for key, value in given.items() if value is not None}


def format_standings(swept: SweepResult) -> str:
    """Format the comparison of the recipes as a table with notes."""
    table = recipe_comparison.scores(swept.runs())
    if table.empty:
        return "no finished runs"
    compared = recipe_comparison.pairs(table)
    rows = recipe_comparison.standings(table, compared)
    several = [column for column in ("model", "task") if rows[column].nunique() > 1]
    cells = [["recipe", *several, "test", "seeds", "place"]]
    for row in rows.to_dict("records"):
        value = Interval(row["value"], row["low"], row["high"], row["n"]).format(4)
        place = str(row["first"]) if row["first"] == row["last"] else f"{row['first']}-{row['last']}"
        names = [elide(str(row[column]), _NAME) for column in ("recipe", *several)]
        cells.append([*names, f"{printable(row['metric'])} {value}", str(row["n"]), place])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    note = "± half-width of the 95% t-interval over seeds; places by t-tests paired by seed (Holm, 5%)"
    return "\n".join(
        [
            *lines,
            "",
            *(
                textwrap.fill(printable(line), WIDTH)
                for line in (note, *recipe_comparison.describe_comparison(compared))
            ),
        ]
    )


def sweep_to_json(swept: SweepResult) -> dict[str, Any]:
    """Convert runs, failures, recipes and their comparison to JSON values."""
    table = recipe_comparison.scores(swept.runs())
    compared = recipe_comparison.pairs(table)
    folders = [str(swept.folders[number]) for number in sorted(swept.folders)]
    return {
        "runs": table_to_records(table.assign(path=folders)),
        "failed": swept.complaints(),
        "recipes": table_to_records(recipe_comparison.standings(table, compared)) if len(table) else [],
        "pairs": table_to_records(compared),
        "words": recipe_comparison.describe_comparison(compared),
    }


def table_to_records(table: pd.DataFrame) -> Any:
    """Convert a table to JSON rows; NaN becomes null."""
    return json.loads(table.to_json(orient="records", double_precision=15))
