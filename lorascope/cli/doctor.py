"""``lorascope doctor``: why an adapter or a run is not what was meant."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import Positional, arg

from lorascope.cli.arguments import UsageError, parse
from lorascope.diagnosis.causes import Case, Finding
from lorascope.diagnosis.doctor import collect_evidence, findings, skipped_checks
from lorascope.diagnosis.inspection import json_values
from lorascope.diagnosis.terminal import WIDTH
from lorascope.files.printable import printable
from lorascope.runs.loading import load
from lorascope.runs.run import Run

_INDENT = " " * 15


@dataclass(frozen=True)
class Options:
    """Name the causes why an adapter or a run is not what was meant, each with its evidence and the mend.

    Reads files alone. Of an adapter its factors and configuration tell, with --base also the weights; a run tells its
    history besides. Exit code 0 if nothing was found, 1 if something was.

    Example: lorascope doctor my-adapter
    """

    path: Annotated[Positional[str | None], arg(metavar="PATH", help="folder of an adapter or a run")] = None
    base: Annotated[str | None, arg(metavar="DIR", help="folder of an adapter's base model")] = None
    json: Annotated[bool, arg(help="everything, for a program")] = False


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    options = parse(Options, argv, "lorascope doctor")
    if options.path is None:
        raise UsageError("diagnose what? Give a folder: lorascope doctor my-adapter")
    run = load(options.path, options.base)
    case = collect_evidence(run)
    found = findings(case)
    if options.json:
        plain = {"path": options.path, "findings": list(map(_finding_to_json, found)), "unseen": skipped_checks(case)}
        print(json.dumps(json_values(plain), indent=1))
    else:
        print("\n".join(_format_findings(run, case, found)))
    return 1 if found else 0


def _finding_to_json(finding: Finding) -> dict[str, Any]:
    """A finding for JSON; for one release ``message`` and ``fix`` are there under their old names, too."""
    return dataclasses.asdict(finding) | {"told": finding.message, "mend": finding.fix}


def _format_findings(run: Run, case: Case, found: Sequence[Finding]) -> Iterator[str]:
    state = "" if run.meta["states"] else f", {run.meta['status']}: its factors are not there yet"
    yield from _format_paragraph(
        str(run.path.resolve().name if run.path else run.id), f"{_format_finding_count(len(found))}{state}"
    )
    for finding in found:
        yield from _format_paragraph(finding.cause, finding.message)
        yield from _format_paragraph("", f"mend: {finding.fix}")
    for missing, names in skipped_checks(case).items():
        yield from _format_paragraph("not looked for", f"without {missing}: {', '.join(names)}")


def _format_finding_count(number: int) -> str:
    return f"{number} finding{'s' * (number > 1)}" if number else "nothing found"


def _format_paragraph(label: str, text: str) -> list[str]:
    label = printable(label)
    head = f"{label:<15}" if len(label) < len(_INDENT) else f"{label} "
    return textwrap.wrap(printable(text), WIDTH, initial_indent=head, subsequent_indent=_INDENT, break_long_words=False)
