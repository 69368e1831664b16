"""Verdicts of the claims of a probe by id: ``from verdicts import effects, verdict``."""

from __future__ import annotations

from typing import Any

from lorascope.probes.base import Findings, Probe
from lorascope.probes.claims import CLAIMS, Verdict


def verdict(probe: Probe, id: str, data: Any) -> Verdict:
    """Judge one claim of a probe on its data, without figures and tables."""
    statistic, control = probe.claims[id]
    return CLAIMS[id].judge(statistic(data), control(data))


def effects(found: Findings) -> dict[str, float]:
    """Return the effect of each judged claim."""
    return {each.claim.id: each.effect for each in found.verdicts}
