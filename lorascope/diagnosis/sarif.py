"""Findings as a SARIF 2.1.0 log, which services that review code display.

Source: OASIS, Static Analysis Results Interchange Format 2.1.0.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lorascope.diagnosis.causes.finding import Finding, Kind
from lorascope.diagnosis.kinds import KINDS
from lorascope.files.printable import printable
from lorascope.files.typed_json import json_values

_LEVELS = {"error": "error", "caution": "warning", "note": "note"}


def sarif_log(findings: Sequence[Finding], file: Path, version: str) -> dict[str, Any]:
    """Return the SARIF log of one diagnosis, with a rule per kind of finding in it.

    Parameters
    ----------
    findings : sequence of Finding
        Findings about one adapter or run.
    file : path
        File that they concern. Its URI is relative to the working directory, or its name if it is outside.
    version : str
        Version of lorascope.
    """
    ids = list(dict.fromkeys(map(_rule_id, findings)))
    location = {"physicalLocation": {"artifactLocation": {"uri": _relative_uri(file)}}}
    # The first finding of a kind gives the texts, so it is the last to be stored.
    first = {_rule_id(finding): finding for finding in reversed(findings)}
    driver = {"name": "lorascope", "version": version, "rules": [_rule(id, first[id]) for id in ids]}
    results = [
        {
            "ruleId": _rule_id(finding),
            "ruleIndex": ids.index(_rule_id(finding)),
            "level": _LEVELS[finding.severity],
            "message": {"text": printable(f"{finding.message}. Fix: {finding.fix}")},
            "locations": [location | _logical_locations(finding)],
            "properties": json_values(finding.evidence),
        }
        for finding in findings
    ]
    return {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "results": results}],
    }


def _rule_id(finding: Finding) -> str:
    return finding.id or finding.cause


def _rule(id: str, finding: Finding) -> dict[str, Any]:
    """Return a rule; one of another package has no kind, so it has the texts of its first finding."""
    kind = KINDS.get(id) or Kind(
        "", finding.cause, finding.severity, problem=f"{finding.cause}.", evidence=finding.message, fix=finding.fix
    )
    return {
        "id": id,
        "name": kind.name,
        "shortDescription": {"text": printable(kind.problem)},
        "fullDescription": {"text": printable(f"{kind.problem} Evidence: {kind.evidence}.")},
        "help": {"text": printable(kind.fix)},
        "defaultConfiguration": {"level": _LEVELS[kind.severity]},
    }


def _logical_locations(finding: Finding) -> dict[str, Any]:
    """Return the modules of a finding; SARIF requires at least one."""
    if not finding.modules:
        return {}
    modules = [{"fullyQualifiedName": printable(module), "kind": "module"} for module in finding.modules]
    return {"logicalLocations": modules}


def _relative_uri(file: Path) -> str:
    path, folder = file.resolve(), Path.cwd().resolve()
    uri = path.name
    if path.is_relative_to(folder):
        uri = path.relative_to(folder).as_posix()
    return quote(os.fsencode(uri))
