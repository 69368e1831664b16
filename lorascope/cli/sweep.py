"""``lorascope sweep``: all runs of a TOML file, and the comparison of their recipes."""

from __future__ import annotations

import math
import shutil
import sys
from dataclasses import replace
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pandas as pd
from tyro.conf import arg

from lorascope.analysis import recipe_tests
from lorascope.analysis.rate_card import compares_rates, rate_card
from lorascope.analysis.seed_intervals import Interval
from lorascope.cli.arguments import Name, command
from lorascope.experiments.executors import use_backend
from lorascope.files.printable import printable
from lorascope.files.text_layout import WIDTH, elide, format_frame, format_span, wrap_paragraph
from lorascope.files.typed_json import to_json_rows

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorascope.experiments.recipe import Recipe
    from lorascope.experiments.sweep import SweepResult

_NAME_WIDTH = 36
_RATES_NOTE = (
    "best rate by validation loss (* at an end of the range); not worse: 95% t-interval paired by seed; stable: below "
    "the first rate that diverged"
)
_NOTE = "± half-width of the 95% t-interval over seeds; places by t-tests paired by seed (Holm, 5%)"


@command
def main(
    file: Annotated[str | None, arg(metavar="FILE")] = None,
    /,
    *,
    backend: Name = None,
    address: Annotated[str | None, arg(metavar="ADDRESS")] = None,
    jobs: Annotated[int | None, arg(metavar="N")] = None,
    smoke: bool = False,
    check: bool = False,
    measure: bool = False,
    table: bool = False,
    new: Annotated[str | None, arg(metavar="FILE")] = None,
    source: Annotated[str | None, arg(name="from", metavar="RECIPE")] = None,
    json: bool = False,
    progress: bool = True,
) -> int:
    """Train a sweep: every combination of methods, tasks, settings and seeds in a TOML file, and compare the recipes.

    Finished runs are not trained again, interrupted ones resume, and a failed run does not stop the others. A file with
    parts is a recipe of a table in a paper, such as adalora-table1, and its results are printed next to the paper's.

    Example: lorascope sweep ranks.toml

    Parameters
    ----------
    file
        TOML file with the keys task, method, settings and seeds, among others, or the name of a recipe.
    backend
        Loky (this machine), slurm, dask or ray; overrides the file.
    address
        Cluster address, such as tcp://host:8786.
    jobs
        Number of parallel runs; the number of cores if omitted.
    smoke
        Of a recipe: try everything in minutes and offline, with tiny random models, generated rows and 4 steps.
    check
        Of a recipe: train nothing, and print what it needs: models, data, steps, trained parameters and memory. The
        exit code is 1 if something is missing.
    measure
        With --check: also run 20 steps per distinct model, length and method, with random weights of the real shape,
        and print seconds, peak memory and hours.
    table
        Of a recipe: train nothing, and print the table of the finished runs.
    new
        Copy the recipe of --from to this file, to change it.
    source
        Recipe to copy.
    json
        Print runs, recipes and their comparison, or the table of a recipe, as JSON.
    progress
        Show the live table of runs.
    """
    from lorascope.experiments import grid, recipe, sweep  # imported here, so that --help does not import torch

    if new is not None or source is not None:
        if new is None or source is None:
            raise ValueError("--new and --from belong together: --new mine.toml --from adalora-table1")
        # The file may be the only copy of an own recipe.
        if Path(new).exists():
            raise ValueError(f"cannot write {printable(new)}: it exists; name another file")
        shutil.copy(recipe.find_recipe(source), new)
        return 0
    if measure and not check:
        raise ValueError("--measure requires --check, as in lorascope sweep adalora-table1 --check --measure")
    if file is None:
        raise ValueError("FILE is required: lorascope sweep ranks.toml")
    path = recipe.find_recipe(file)
    options = {"name": backend, "address": address, "jobs": jobs}
    overrides = {name: value for name, value in options.items() if value is not None}
    if recipe.is_recipe(grid.read_toml(path)):
        if check:
            return _print_needs(path, measure)
        return _run_recipe(recipe.read(path, smoke), overrides, table, json, progress)
    if smoke or check or table:
        raise ValueError(f"--smoke, --check and --table require a recipe, which has parts, got {printable(file)}")
    plan = grid.read(path)
    swept = sweep.run_grid(replace(plan, backend=_override(plan.backend, overrides)), progress=progress)
    if json:
        print(dumps(_sweep_to_json(swept), indent=1))
    else:
        print(_format_standings(swept))
        _print_rates(swept)
    return _report_failures(swept)


def _override(backend: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a backend with those of the command line; another backend discards the file's options."""
    if overrides.get("name", backend.get("name")) != backend.get("name"):
        return dict(overrides)
    return {**backend, **overrides}


def _report_failures(swept: SweepResult) -> int:
    """Print a line for each failed run, and return the exit code."""
    for line in swept.complaints():
        print(f"lorascope: failed: {printable(' '.join(line.split()))}", file=sys.stderr)
    return int(bool(swept.failures))


def _print_needs(path: Path, measure: bool) -> int:
    """Print what the parts of a recipe need, and return whether something is missing."""
    from lorascope.experiments.recipe_check import check

    # A missing model is a problem of many parts, and one line.
    titles: dict[str, list[str]] = {}
    for needs in check(path, measure):
        print(printable(needs.title), *(f"  {printable(line)}" for line in needs.lines), sep="\n")
        for problem in needs.problems:
            titles.setdefault(problem, []).append(needs.title)
    for problem, parts_with_it in titles.items():
        print(f"lorascope: {printable(', '.join(parts_with_it))}: {printable(problem)}", file=sys.stderr)
    return int(bool(titles))


def _run_recipe(plan: Recipe, overrides: Mapping[str, Any], only_table: bool, json: bool, progress: bool) -> int:
    """Train the runs of a recipe that are not finished, unless only its table is requested, and print the table."""
    from lorascope.experiments import recipe_table, sweep

    code = 0
    if only_table:
        runs = recipe_table.find_runs(plan)
    else:
        with use_backend(**_override(plan.backend, overrides)):
            swept = sweep.run_jobs(plan.jobs(), progress=progress)
        runs = dict(zip(swept.finished_names, swept.runs(), strict=True))
        code = _report_failures(swept)
    cells = recipe_table.tabulate(plan, runs)
    if json:
        print(dumps(to_json_rows(cells), indent=1))
    else:
        print(printable(recipe_table.title_line(plan)))
        for title, frame in recipe_table.format_cells(plan, cells).items():
            print("", printable(title), format_frame(frame), sep="\n")
    # Without runs there is not even a folder.
    if runs:
        files = recipe_table.write_files(plan, cells, runs)
        print("", f"written: {', '.join(map(printable, files))}", sep="\n", file=sys.stderr)
    return code


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


def _print_rates(swept: SweepResult) -> None:
    """Print the learning rates of each rank, if the sweep compares several."""
    card = _rates(swept)
    if card.empty:
        return
    varied = [column for column in ("model", "task", "method") if card[column].nunique() > 1]
    lines = []
    for row in card.to_dict("records"):
        best, similar = _format_rate(row["best_lr"]), _format_rate(row["low_lr"])
        if row["at_end"]:
            best += "*"
        if row["low_lr"] < row["high_lr"]:
            similar += f" to {row['high_lr']:g}"
        rates = {"best rate": best, "not worse": similar, "stable up to": _format_rate(row["stable_lr"])}
        names = {column: elide(str(row[column]), _NAME_WIDTH) for column in varied}
        lines.append(names | {"rank": _format_rate(row["rank"])} | rates | {"loss": f"{row['loss']:.4g}"})
    print("", format_frame(pd.DataFrame(lines)), "", wrap_paragraph(_RATES_NOTE, width=WIDTH), sep="\n")


def _format_rate(rate: float) -> str:
    if math.isnan(rate):  # of full fine-tuning, or with too few seeds
        return "-"
    return f"{rate:g}"


def _rates(swept: SweepResult) -> pd.DataFrame:
    """Return the rate card, empty if the sweep has no rates to compare at one setting."""
    runs = [*swept.runs(), *swept.broken_runs()]
    if not compares_rates(runs):
        return pd.DataFrame()
    return rate_card(runs)


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
        "rates": to_json_rows(_rates(swept)),
        "words": recipe_tests.describe_comparison(compared),
    }
