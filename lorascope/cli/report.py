"""``lorascope report``: new verdicts and report from the runs of an earlier ``reproduce``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from lorascope.cli.arguments import parse


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write the report of the runs of an earlier ``lorascope reproduce``, without training.

    Example: lorascope report report
    """

    folder: Annotated[Positional[str], arg(metavar="DIR", help="output folder of reproduce")] = "report"
    json: Annotated[bool, arg(help="print verdicts as JSON")] = False


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    options = parse(Options, argv, "lorascope report")
    from lorascope import probes  # imported here, so that --help does not import torch

    found = probes.write_report(options.folder)
    print(json.dumps(found.to_dict()) if options.json else found)
    return 0
