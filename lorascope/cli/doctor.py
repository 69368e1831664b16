"""``lorascope doctor``: diagnosis of an adapter or a run."""

from __future__ import annotations

import textwrap
from json import dumps
from typing import Annotated

from tyro.conf import arg

from lorascope.cli.arguments import Folder, command
from lorascope.diagnosis.doctor import SKIP_REASONS, findings, skipped_checks
from lorascope.diagnosis.evidence import Case
from lorascope.diagnosis.inspection import json_values
from lorascope.diagnosis.terminal import WIDTH
from lorascope.files.hub import label
from lorascope.files.printable import printable
from lorascope.runs.loading import load

_INDENT = 15


@command
def main(path: Annotated[str | None, arg(metavar="PATH")] = None, /, *, base: Folder = None, json: bool = False) -> int:
    """Diagnose problems of an adapter or a run, each with its evidence and a fix.

    Only files are read: factors and configuration of an adapter, the base weights with --base, and the training history
    of a run. The exit code is 0 without findings and 1 with findings.

    Example: lorascope doctor my-adapter

    Parameters
    ----------
    path
        Adapter or run: a folder, a .safetensors file, or a name on the Hugging Face Hub (user/adapter).
    base
        Folder of the adapter's base model.
    json
        Print JSON.
    """
    if path is None:
        raise ValueError("PATH is required: lorascope doctor my-adapter")
    run = load(path, base)
    case = Case(run)
    found, skipped = findings(case), skipped_checks(case)
    if json:
        told = [
            {"cause": each.cause, "message": each.message, "evidence": each.evidence, "fix": each.fix}
            | {"told": each.message, "mend": each.fix}  # the old names stay for one release
            for each in found
        ]
        print(dumps(json_values({"path": path, "findings": told, "unseen": skipped}), indent=1))
        return 1 if found else 0
    count = f"{len(found)} finding{'s' * (len(found) > 1)}" if found else "no findings"
    state = "" if run.meta.states else f", {run.meta.status}: no factors saved yet"
    paragraphs = [(label(run.path) if run.path else run.id, count + state)]
    for finding in found:
        paragraphs += [(finding.cause, finding.message), ("", f"fix: {finding.fix}")]
    paragraphs += [(f"skipped ({SKIP_REASONS[missing]}):", ", ".join(names)) for missing, names in skipped.items()]
    layout = textwrap.TextWrapper(WIDTH, subsequent_indent=" " * _INDENT, break_long_words=False)
    for heading, text in paragraphs:
        shown = printable(heading)
        layout.initial_indent = shown.ljust(_INDENT) if len(shown) < _INDENT else f"{shown} "
        print(layout.fill(printable(text)))
    return 1 if found else 0
