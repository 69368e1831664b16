"""``lorascope doctor``: diagnosis of an adapter or a run."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import Positional, arg

from lorascope.cli.arguments import UsageError, parse
from lorascope.diagnosis.causes import Finding
from lorascope.diagnosis.doctor import SKIP_REASONS, findings, skipped_checks
from lorascope.diagnosis.evidence import Case
from lorascope.diagnosis.inspection import json_values
from lorascope.diagnosis.terminal import WIDTH
from lorascope.files.printable import printable
from lorascope.runs.loading import load
from lorascope.runs.result import Result

_INDENT = " " * 15


@dataclass(frozen=True)
class Options:
    """Diagnose problems of an adapter or a run, each with its evidence and a fix.

    Only files are read: factors and configuration of an adapter, the base weights with --base, and the training history
    of a run. The exit code is 0 without findings and 1 with findings.

    Example: lorascope doctor my-adapter
    """

    path: Annotated[Positional[str | None], arg(metavar="PATH", help="folder of an adapter or run")] = None
    base: Annotated[str | None, arg(metavar="DIR", help="folder of the adapter's base model")] = None
    json: Annotated[bool, arg(help="print JSON")] = False


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    options = parse(Options, argv, "lorascope doctor")
    if options.path is None:
        raise UsageError("PATH is required: lorascope doctor my-adapter")
    run = load(options.path, options.base)
    case = Case(run)
    found = findings(case)
    if options.json:
        plain = {"path": options.path, "findings": list(map(_finding_to_json, found)), "unseen": skipped_checks(case)}
        print(json.dumps(json_values(plain), indent=1))
    else:
        print("\n".join(_format_findings(run, case, found)))
    return 1 if found else 0


def _finding_to_json(finding: Finding) -> dict[str, Any]:
    """Convert a finding to JSON values; the old names of ``message`` and ``fix`` stay for one release."""
    plain = {"cause": finding.cause, "message": finding.message, "evidence": finding.evidence, "fix": finding.fix}
    return plain | {"told": finding.message, "mend": finding.fix}


def _format_findings(run: Result, case: Case, found: Sequence[Finding]) -> Iterator[str]:
    state = "" if run.meta.states else f", {run.meta.status}: no factors saved yet"
    yield from _format_paragraph(
        str(run.path.resolve().name if run.path else run.id), f"{_format_finding_count(len(found))}{state}"
    )
    for finding in found:
        yield from _format_paragraph(finding.cause, finding.message)
        yield from _format_paragraph("", f"fix: {finding.fix}")
    for missing, names in skipped_checks(case).items():
        yield from _format_paragraph(f"skipped ({SKIP_REASONS[missing]}):", ", ".join(names))


def _format_finding_count(number: int) -> str:
    return f"{number} finding{'s' * (number > 1)}" if number else "no findings"


def _format_paragraph(label: str, text: str) -> list[str]:
    label = printable(label)
    head = f"{label:<15}" if len(label) < len(_INDENT) else f"{label} "
    return textwrap.wrap(printable(text), WIDTH, initial_indent=head, subsequent_indent=_INDENT, break_long_words=False)
