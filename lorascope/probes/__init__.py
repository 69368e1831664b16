"""Probes: studies of the claims of the papers, each with its runs, controls and verdicts.

Every module of this package that defines ``PROBE`` is a probe.
"""

from importlib import import_module
from pkgutil import iter_modules

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
    "findings",
    "reproduce",
    "write_report",
]

_modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
_defined = [module.PROBE for module in _modules if hasattr(module, "PROBE")]
PROBES.update({probe.name: probe for probe in sorted(_defined, key=lambda probe: probe.order)})

accept_old_names(__name__, Exhibit="ReportFigure")
