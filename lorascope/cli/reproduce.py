"""``lorascope reproduce``: training of the papers' experiments, verdicts on their claims, and a report."""

from __future__ import annotations

import math
import os
import sys
from json import dumps
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from lorascope.cli.arguments import command
from lorascope.evidence import store


@command
def main(
    *,
    probe: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = (),
    quick: bool = False,
    seeds: Annotated[int | None, arg(metavar="N")] = None,
    out: Annotated[str, arg(aliases=["-o"], metavar="DIR")] = "report",
    evidence: Annotated[str | None, arg(metavar="DIR")] = None,
    minutes: Annotated[float, arg(metavar="N")] = math.inf,
    json: bool = False,
) -> int:
    """Reproduce the observations of the papers, judge their claims against controls, and write one report.

    Finished runs in the folder are not trained again, and interrupted ones resume.

    Example: lorascope reproduce --probe lisa --quick -o report

    Parameters
    ----------
    probe
        Probes to run; all if omitted.
    quick
        Few steps and two seeds: checks that everything runs, decides no claim.
    seeds
        Number of seeds; if omitted, 2 with --quick, else 3.
    out
        Folder for the runs and report.html.
    evidence
        Instead, train the runs that data/registered.toml asks for and that this folder of evidence lacks, and add them.
    minutes
        With --evidence: start no run after N minutes.
    json
        Print verdicts as JSON.
    """
    if seeds is not None and seeds < 1:
        raise ValueError(f"--seeds must be >= 1, got {seeds}: a verdict requires 3")
    if evidence is not None:
        # Before torch is imported, so that machines with other instructions compute the same numbers.
        os.environ |= store.INSTRUCTIONS
        from lorascope.probes.evidence import write_evidence

        write_evidence(Path(evidence), Path(out) / "runs", minutes)
        return 0
    from lorascope import probes
    from lorascope.experiments import sweep  # imported here, so that --help does not import torch

    try:
        found = probes.reproduce(probe, quick, seeds, out)
    except sweep.RunsFailed as error:
        print(f"lorascope: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(dumps(found.to_dict()) if json else found)
    return 0
