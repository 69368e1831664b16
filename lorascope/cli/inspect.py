"""``lorascope inspect``: norms, ranks and findings of adapters, runs and whole models."""

from __future__ import annotations

import sys
from functools import partial
from json import dumps
from typing import Any

from lorascope.cli.arguments import Folder, Paths, command
from lorascope.cli.load_runs import open_runs
from lorascope.diagnosis.inspection import Inspection, inspect, rows
from lorascope.diagnosis.inspection_screen import inspection_screen, modules_screen
from lorascope.diagnosis.null import null_table
from lorascope.diagnosis.terminal import console
from lorascope.files.hub import locate
from lorascope.files.lazy_pandas import pandas as pd
from lorascope.files.safe_csv import csv_text
from lorascope.runs.adapter import Adapter
from lorascope.runs.loading import NoUpdatesError, is_checkpoint, is_series


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
    """Show the norms, ranks and findings of an adapter or a run.

    Several adapters or runs are compared in pairs: norms, cosines, angles, rank allocation. A folder of checkpoints is
    shown as one training: first, last, and where it still moves. Nothing is trained. Only
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
    if not paths:
        raise ValueError("PATH is required: lorascope inspect my-adapter")
    if json and csv:
        raise ValueError("--json and --csv cannot be combined")
    # Modules for whole models, comparisons and series are imported below: together they take as long as all others.
    if series or (len(paths) == 1 and is_series(locate(paths[0]))):
        if null:
            raise ValueError("--null requires one adapter or run: inspect one checkpoint")
        from lorascope.cli.inspect_series import show_series

        return show_series(paths, base, spectra, all, json, csv)
    shown: Any
    screens: list[tuple[Any, Any]]
    found = [locate(path) for path in paths]
    if whole := [path for path in found if is_checkpoint(path)]:
        if len(paths) > 1:
            raise ValueError(f"cannot compare {whole[0]}: only adapters and runs are compared, not whole models")
        if base is None:
            raise ValueError(
                f"cannot inspect {whole[0]}: a whole model requires the model it was tuned from, --base DIR"
            )
        from lorascope.diagnosis.neuron_inspection import inspect_neurons
        from lorascope.diagnosis.neuron_screen import neurons_screen, projections_screen

        shown = inspect_neurons(whole[0], base)
        table = partial(shown.scores.drop, columns="top")
        screens = [(projections_screen if all else neurons_screen, shown)]
    else:
        try:
            runs = open_runs(found, base)
        except NoUpdatesError as error:
            if len(found) > 1:
                raise
            print(dumps({"path": str(found[0]), "message": error.sentence}, indent=1) if json else error.sentence)
            return 0
        if unfinished := [run for run in runs if not isinstance(run, Adapter) and not run.meta.states]:
            if json:
                states = [{"path": str(run.path), "status": run.meta.status, "message": str(run)} for run in unfinished]
                print(dumps(states, indent=1))
            else:
                print(*unfinished, sep="\n", file=sys.stderr if csv else None)
            return 1
        if null and len(runs) > 1:
            raise ValueError(f"--null requires one adapter or run, got {len(runs)}")
        inspections = [inspect(run, spectra) for run in runs]
        screens = [(modules_screen, item) for item in inspections] if all else []
        if len(inspections) > 1:
            from lorascope.diagnosis.comparison import compare
            from lorascope.diagnosis.comparison_screen import comparison_screen

            shown = compare(inspections, spectra)
            table = shown.table
            screens.append((comparison_screen, shown))
        else:
            (shown,) = inspections
            compared = null_table(shown) if null else None
            table = partial(_named_modules, shown, compared)
            screens = screens or [(partial(inspection_screen, null=compared), shown)]
            if compared is not None and json:
                print(dumps(shown.to_json() | {"null": rows(compared)}, indent=1))
                return 0
    if csv:
        print(csv_text(table()), end="")
    elif json:
        print(dumps(shown.to_json(), indent=1))
    else:
        print("\n\n".join(screen(item, console(sys.stdout)) for screen, item in screens))
    return 0


def _named_modules(item: Inspection, null: pd.DataFrame | None) -> pd.DataFrame:
    table = item.modules.assign(name=item.name)
    if null is not None:
        table = table.join(null.drop(columns=["module", "role", "layer"]))
    return table[["name", *table.columns.drop("name")]]
