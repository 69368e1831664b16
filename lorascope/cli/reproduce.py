"""``lorascope reproduce``: training of the papers' experiments, verdicts on their claims, and a report."""

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
    """Reproduce the observations of the papers, judge their claims against controls, and write one report.

    Finished runs in the folder are not trained again, and interrupted ones resume.

    Example: lorascope reproduce --probe lisa --quick -o report
    """

    probe: Annotated[tuple[str, ...], arg(metavar="NAME ...", help="probes to run; all if omitted")] = ()
    quick: Annotated[bool, arg(help="few steps and two seeds: checks that everything runs, decides no claim")] = False
    seeds: Annotated[int | None, arg(metavar="N", help="number of seeds; if omitted, 2 with --quick, else 3")] = None
    out: Annotated[str, arg(aliases=["-o"], metavar="DIR", help="folder for the runs and report.html")] = "report"
    json: Annotated[bool, arg(help="print verdicts as JSON")] = False


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    options = parse(Options, argv, "lorascope reproduce")
    if options.seeds is not None and options.seeds < 1:
        raise UsageError(f"--seeds must be >= 1, got {options.seeds}: a verdict requires 3")
    from lorascope import probes
    from lorascope.experiments import sweep  # imported here, so that --help does not import torch

    try:
        found = probes.reproduce(options.probe, options.quick, options.seeds, options.out)
    except sweep.RunsFailed as error:
        print(f"lorascope: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(json.dumps(found.to_dict()) if options.json else found)
    return 0
