"""Probes: studies of the claims of the papers, each with its runs, controls and verdicts."""

from lorascope.probes import (
    adalora,
    adalora_placement,
    adapprox,
    alora,
    autolora,
    fourierft,
    fourierft_expressiveness,
    hydralora,
    hydralora_asymmetry,
    lisa,
    lisa_training,
    lora,
    neft,
    planted,
    score_agreement,
)
from lorascope.probes.base import PROBES, Arm, Findings, Probe, ReportFigure
from lorascope.probes.reproduction import CONTENTS, QUICK_SEEDS, REPORT, Outcome, findings, reproduce, write_report
from lorascope.schema.deprecation import accept_old_names

__all__ = [
    "CONTENTS",
    "PROBES",
    "QUICK_SEEDS",
    "REPORT",
    "Arm",
    "Findings",
    "Outcome",
    "Probe",
    "ReportFigure",
    "adalora",
    "adalora_placement",
    "adapprox",
    "alora",
    "autolora",
    "findings",
    "fourierft",
    "fourierft_expressiveness",
    "hydralora",
    "hydralora_asymmetry",
    "lisa",
    "lisa_training",
    "lora",
    "neft",
    "planted",
    "reproduce",
    "score_agreement",
    "write_report",
]

accept_old_names(__name__, Exhibit="ReportFigure")
