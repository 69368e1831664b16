"""``lorascope inspect``: norms, ranks and findings of adapters, runs and whole models."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from json import dumps
from pathlib import Path
from typing import Any

from lorascope.cli.arguments import Folder, Paths, command
from lorascope.cli.opened_runs import open_runs
from lorascope.diagnosis.inspection import Inspection, inspect, rows
from lorascope.diagnosis.inspection_screen import inspection_screen, modules_screen
from lorascope.diagnosis.null import null_table
from lorascope.diagnosis.terminal import console
from lorascope.files.hub import locate
from lorascope.files.lazy_pandas import pandas as pd
from lorascope.files.safe_csv import csv_text
from lorascope.runs.adapter import Adapter
from lorascope.runs.loading import NoUpdatesError, is_series, is_whole_model


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
    if null and all and not (json or csv):
        raise ValueError("--null has no place on the screen of --all: add --json or --csv, or omit --all")
    found = [locate(path) for path in paths]
    if whole := [path for path in found if is_whole_model(path)]:
        if len(paths) > 1:
            raise ValueError(f"cannot compare {whole[0]}: only adapters and runs are compared, not whole models")
        if base is None:
            raise ValueError(
                f"cannot inspect {whole[0]}: a whole model requires the model it was tuned from, --base DIR"
            )
        if null:
            raise ValueError(f"--null requires one adapter or run, got a whole model: {whole[0]}")
        shown = _neurons(whole[0], base, all)
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
        shown = _comparison(inspections, spectra, all) if len(runs) > 1 else _modules(inspections[0], all, null)
    if csv:
        print(csv_text(shown.table()), end="")
    elif json:
        print(dumps(shown.to_json(), indent=1))
    else:
        print("\n\n".join(screen(item, console(sys.stdout)) for screen, item in shown.screens))
    return 0


@dataclass(frozen=True)
class _Shown:
    """An inspection as JSON, as a table and on the screen."""

    to_json: Callable[[], Any]
    table: Callable[[], pd.DataFrame]
    screens: Sequence[tuple[Callable[..., str], Any]]


def _neurons(model: Path, base: str, all: bool) -> _Shown:
    from lorascope.diagnosis.neuron_inspection import inspect_neurons
    from lorascope.diagnosis.neuron_screen import neurons_screen, projections_screen

    found = inspect_neurons(model, base)
    screens = [(projections_screen if all else neurons_screen, found)]
    return _Shown(found.to_json, partial(found.scores.drop, columns="top"), screens)


def _comparison(inspections: Sequence[Inspection], spectra: bool, all: bool) -> _Shown:
    from lorascope.diagnosis.pair_comparison import compare
    from lorascope.diagnosis.pair_screen import comparison_screen

    compared = compare(inspections, spectra)
    modules = [(modules_screen, item) for item in inspections] if all else []
    return _Shown(compared.to_json, compared.table, [*modules, (comparison_screen, compared)])


def _modules(item: Inspection, all: bool, null: bool) -> _Shown:
    random = null_table(item) if null else None
    screen = modules_screen if all else partial(inspection_screen, null=random)

    def to_json() -> dict[str, Any]:
        return item.to_json() | ({} if random is None else {"null": rows(random)})

    return _Shown(to_json, partial(_named_modules, item, random), [(screen, item)])


def _named_modules(item: Inspection, null: pd.DataFrame | None) -> pd.DataFrame:
    table = item.modules.assign(name=item.name)
    if null is not None:
        table = table.join(null.drop(columns=["module", "role", "layer"]))
    return table[["name", *table.columns.drop("name")]]
