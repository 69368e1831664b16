"""``lorascope reproduce``: train, record, draw, judge, report."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from lorascope.cli.arguments import UsageError, parse


@dataclass(frozen=True, kw_only=True)
class Options:
    """Re-make what the papers observed, judge their claims against controls, and write one report.

    Runs that the folder holds already are not trained again; broken ones go on.

    Example: lorascope reproduce --probe lisa --quick -o report
    """

    probe: Annotated[tuple[str, ...], arg(metavar="NAME ...", help="which probes; all by default")] = ()
    quick: Annotated[bool, arg(help="few steps and two seeds: shows that everything works, decides nothing")] = False
    seeds: Annotated[int | None, arg(metavar="N", help="seeds of each run; 2 if quick, else 3, by default")] = None
    out: Annotated[str, arg(aliases=["-o"], metavar="DIR", help="runs and report.html go there")] = "report"
    json: Annotated[bool, arg(help="verdicts, for a program")] = False


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    options = parse(Options, argv, "lorascope reproduce")
    if options.seeds is not None and options.seeds < 1:
        raise UsageError(f"--seeds {options.seeds} leaves nothing to run: give 1 or more, 3 to decide anything")
    from lorascope import probes
    from lorascope.experiments import sweep  # not for --help, which need not wait for torch

    try:
        found = probes.reproduce(options.probe, options.quick, options.seeds, options.out)
    except sweep.RunsFailed as error:
        print(f"lorascope: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(json.dumps(found.to_dict()) if options.json else found)
    return 0
