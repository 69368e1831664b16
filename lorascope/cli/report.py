"""``lorascope report``: new verdicts and report from the runs of an earlier ``reproduce``."""

from __future__ import annotations

from json import dumps

from lorascope.cli.arguments import Folder, command


@command
def main(folder: Folder = "report", /, *, json: bool = False) -> int:
    """Write the report of the runs of an earlier ``lorascope reproduce``, without training.

    Example: lorascope report report

    Parameters
    ----------
    folder
        Output folder of reproduce.
    json
        Print verdicts as JSON.
    """
    from lorascope import probes  # imported here, so that --help does not import torch

    found = probes.write_report(str(folder))
    print(dumps(found.to_dict()) if json else found)
    return 0
