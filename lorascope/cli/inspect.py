"""``lorascope inspect``: norms, ranks and findings of adapters, runs and whole models."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from json import dumps
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from lorascope.cli.arguments import Folder, Paths, command, reject
from lorascope.cli.opened_runs import open_runs
from lorascope.diagnosis.inspection import Inspection, inspect
from lorascope.diagnosis.inspection_screen import inspection_screen, modules_screen
from lorascope.diagnosis.null import null_table
from lorascope.files.lazy_pandas import pandas as pd
from lorascope.files.safe_csv import csv_text
from lorascope.files.text_layout import make_console
from lorascope.runs.adapter import Adapter
from lorascope.runs.loading import NoUpdatesError, is_series, is_whole_model, load_series, locate_result, runs_in
from lorascope.runs.module_summary import json_rows


@command
def main(
    paths: Paths = (),
    /,
    *,
    base: Folder = None,
    spectra: bool = False,
    all: bool = False,
    null: bool = False,
    series: bool = False,
    json: bool = False,
    csv: bool = False,
) -> int:
    """Inspect an adapter or a run: show its norms, ranks and findings.

    Several adapters or runs, or all runs in a folder, are compared in pairs: norms, cosines, angles, rank allocation. A
    folder of checkpoints is shown as one training: first, last, and where it still moves. Nothing is trained. Only
    adapters that store no shapes, such as FourierFT, or that rescale the base, such as IA3, require their base model.
    For a whole model, --base shows which neurons rotated.

    Example: lorascope inspect my-adapter

    Parameters
    ----------
    paths
        Adapters or runs: folders, .safetensors files, or names on the Hugging Face Hub (user/adapter).
    base
        Folder of the base model: adds |dW|/|W|, intruder dimensions and neuron rotation of adapters; for a whole model,
        the model it was tuned from.
    spectra
        Also run full SVDs (slow): spectra of FourierFT, and of DoRA with its base; intruder dimensions in matrices
        wider than 1024.
    all
        Print one line per module.
    null
        Compare ranks with random factors of the same shape, and norms with the same role in other layers.
    series
        Show the checkpoints in a folder with a final adapter, or several adapters, as one training.
    json
        Print JSON.
    csv
        Print CSV: one row per module, neuron or pair of adapters.
    """
    reject(
        {
            "PATH is required: lorascope inspect my-adapter": not paths,
            "--json and --csv cannot be combined": json and csv,
        }
    )
    if len(paths) == 1 and (folders_of_sweep := runs_in(paths[0])):
        paths = tuple(map(str, folders_of_sweep))
    if len(paths) == 1 and not series and is_series(folder := locate_result(paths[0])):
        series, paths = True, (str(folder),)
    if series:
        if null:
            raise ValueError("--null requires one adapter or run: inspect one checkpoint")
        return _print_output(_inspect_series(paths, base, spectra, all), json, csv)
    if null and all and not (json or csv):
        raise ValueError("--null has no place on the screen of --all: add --json or --csv, or omit --all")
    folders = list(map(locate_result, paths))
    models = list(filter(is_whole_model, folders))
    if models:
        return _print_output(_inspect_model(models[0], len(folders) > 1, base, null, all), json, csv)
    try:
        runs = open_runs(folders, base)
    except NoUpdatesError as error:
        if len(folders) > 1:
            raise
        print(dumps({"path": str(folders[0]), "message": error.sentence}, indent=1) if json else error.sentence)
        return 0
    unfinished = [run for run in runs if not isinstance(run, Adapter) and not run.meta.states]
    if unfinished:
        if json:
            states = [{"path": str(run.path), "status": run.meta.status, "message": str(run)} for run in unfinished]
            print(dumps(states, indent=1))
        else:
            print(*unfinished, sep="\n", file=sys.stderr if csv else None)  # stdout is a table or empty
        return 1
    if null and len(runs) > 1:
        raise ValueError(f"--null requires one adapter or run, got {len(runs)}")
    inspections = [inspect(run, spectra) for run in runs]
    if len(runs) > 1:
        return _print_output(_compare(inspections, spectra, all), json, csv)
    return _print_output(_inspect_modules(inspections[0], all, null), json, csv)


class _Output(NamedTuple):
    """An inspection as JSON, as a table and on the screen."""

    to_json: Callable[[], Any]
    table: Callable[[], pd.DataFrame]
    screens: Sequence[Callable[[Console], str]]


def _print_output(output: _Output, json: bool, csv: bool) -> int:
    if csv:
        print(csv_text(output.table()), end="")
    elif json:
        print(dumps(output.to_json(), indent=1))
    else:
        print("\n\n".join(screen(make_console(sys.stdout)) for screen in output.screens))
    return 0


# Modules for whole models, comparisons and series are imported in their functions: together they take as long as all
# others.


def _inspect_series(paths: Sequence[str], base: str | None, spectra: bool, all: bool) -> _Output:
    """Inspect the checkpoints of a folder, or several adapters as those of one training."""
    from lorascope.diagnosis.series_inspection import inspect_series, series_screen

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # skipped checkpoints are on the screen
        series = load_series(paths[0] if len(paths) == 1 else paths, base)
    inspection = inspect_series(series, spectra)
    return _Output(inspection.to_json, inspection.table, [partial(series_screen, inspection, all=all)])


def _inspect_model(model: Path, has_others: bool, base: str | None, null: bool, all: bool) -> _Output:
    from lorascope.diagnosis.neuron_inspection import inspect_neurons, neurons_screen, projections_screen

    if has_others:
        raise ValueError(f"cannot compare {model}: only adapters and runs are compared, not whole models")
    if base is None:
        raise ValueError(f"cannot inspect {model}: a whole model requires the model it was tuned from, --base DIR")
    if null:
        raise ValueError(f"--null requires one adapter or run, got a whole model: {model}")
    inspection = inspect_neurons(model, base)
    screen = projections_screen if all else neurons_screen
    return _Output(inspection.to_json, partial(inspection.scores.drop, columns="top"), [partial(screen, inspection)])


def _compare(inspections: Sequence[Inspection], spectra: bool, all: bool) -> _Output:
    from lorascope.diagnosis.pair_comparison import compare_inspections, comparison_screen

    comparison = compare_inspections(inspections, spectra)
    screens = []
    if all:
        for inspection in inspections:
            screens.append(partial(modules_screen, inspection))
    screens.append(partial(comparison_screen, comparison))
    return _Output(comparison.to_json, comparison.table, screens)


def _inspect_modules(inspection: Inspection, all: bool, null: bool) -> _Output:
    random = null_table(inspection) if null else None

    def to_json() -> dict[str, Any]:
        values = inspection.to_json()
        if random is not None:
            values["null"] = json_rows(random)
        return values

    def table() -> pd.DataFrame:
        modules = inspection.modules.assign(name=inspection.name)
        if random is not None:
            modules = modules.join(random.drop(columns=["module", "role", "layer"]))
        return modules[["name", *modules.columns.drop("name")]]

    screen = partial(modules_screen, inspection) if all else partial(inspection_screen, inspection, null=random)
    return _Output(to_json, table, [screen])
