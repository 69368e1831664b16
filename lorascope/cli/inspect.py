"""``lorascope inspect``: norms, ranks and findings of adapters, runs and whole models."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from lorascope.cli.arguments import UsageError, parse
from lorascope.cli.load_runs import open_runs
from lorascope.diagnosis import terminal
from lorascope.diagnosis.comparison import compare
from lorascope.diagnosis.inspection import Inspection, inspect
from lorascope.diagnosis.neuron_inspection import inspect_neurons
from lorascope.diagnosis.neuron_scores import is_checkpoint
from lorascope.diagnosis.terminal import comparison_screen
from lorascope.files.safe_csv import csv_text
from lorascope.runs.adapter import Adapter


@dataclass(frozen=True)
class Options:
    """Show the norms, ranks and findings of a PEFT adapter or a run.

    Several adapters or runs are compared in pairs: norms, cosines, angles, rank allocation. Nothing is trained, and
    only FourierFT adapters require their base model. For a whole model, --base shows which neurons rotated.

    Example: lorascope inspect my-adapter
    """

    paths: Annotated[Positional[tuple[str, ...]], arg(metavar="PATH ...", help="folders of adapters or runs")] = ()
    base: Annotated[
        str | None,
        arg(
            metavar="DIR",
            help="folder of the base model: adds |dW|/|W|, intruder dimensions and neuron rotation of adapters; for a "
            "whole model, the model it was tuned from",
        ),
    ] = None
    spectra: Annotated[
        bool,
        arg(
            help="also run full SVDs (slow): spectra of FourierFT, and of DoRA with its base; intruder dimensions in "
            "matrices wider than 1024"
        ),
    ] = False
    all: Annotated[bool, arg(help="print one line per module")] = False
    json: Annotated[bool, arg(help="print JSON")] = False
    csv: Annotated[bool, arg(help="print CSV: one row per module, neuron or pair of adapters")] = False


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    options = parse(Options, argv, "lorascope inspect")
    if not options.paths:
        raise UsageError("PATH is required: lorascope inspect my-adapter")
    if options.json and options.csv:
        raise UsageError("--json and --csv cannot be combined")
    whole = [path for path in options.paths if is_checkpoint(path)]
    if whole:
        print(format_neuron_inspection(whole[0], options), end="")
        return 0
    runs = open_runs(options.paths, options.base)
    unfinished = [run for run in runs if not isinstance(run, Adapter) and not run.meta.states]
    for run in unfinished:
        print(run)
    if unfinished:
        return 1
    print(format_inspection([inspect(run, options.spectra) for run in runs], options), end="")
    return 0


def format_neuron_inspection(path: str, options: Options) -> str:
    """Format the neuron rotation of a whole model relative to its base as text, JSON or CSV."""
    if len(options.paths) > 1:
        raise UsageError(f"cannot compare {path}: only adapters and runs are compared, not whole models")
    if options.base is None:
        raise UsageError(f"cannot inspect {path}: a whole model requires the model it was tuned from, --base DIR")
    item = inspect_neurons(path, options.base)
    if options.csv:
        return csv_text(item.scores.drop(columns="top"))
    if options.json:
        return json.dumps(item.to_json(), indent=1) + "\n"
    target = terminal.console(sys.stdout)
    return (terminal.projections_screen if options.all else terminal.neurons_screen)(item, target) + "\n"


def format_inspection(inspections: list[Inspection], options: Options) -> str:
    """Format one inspection, or the comparison of several, as text, JSON or CSV."""
    if len(inspections) > 1:
        return format_inspections(inspections, options)
    item, target = inspections[0], terminal.console(sys.stdout)
    if options.csv:
        table = item.modules.assign(name=item.name)
        return csv_text(table[["name", *table.columns.drop("name")]])
    if options.json:
        return json.dumps(item.to_json(), indent=1) + "\n"
    return (terminal.modules_screen if options.all else terminal.inspection_screen)(item, target) + "\n"


def format_inspections(inspections: list[Inspection], options: Options) -> str:
    """Format the comparison of several inspections as text, JSON or CSV."""
    comparison, target = compare(inspections, options.spectra), terminal.console(sys.stdout)
    if options.csv:
        return csv_text(comparison.table())
    if options.json:
        return json.dumps(comparison.to_json(), indent=1) + "\n"
    screens = [terminal.modules_screen(item, target) for item in inspections] if options.all else []
    return "\n\n".join([*screens, comparison_screen(comparison, target)]) + "\n"
