"""Probes: one study per paper, each with its registered runs, what is kept of them, and figures.

Every module of this package that defines ``PROBE`` is a probe.
"""

from importlib import import_module
from pkgutil import iter_modules

from lorascope.pages.report_figure import ReportFigure
from lorascope.probes.base import PROBES, Arm, Probe
from lorascope.schema.deprecation import accept_old_names

__all__ = ["PROBES", "Arm", "Probe", "ReportFigure"]

_modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
_defined = [module.PROBE for module in _modules if hasattr(module, "PROBE")]
PROBES.update({probe.name: probe for probe in sorted(_defined, key=lambda probe: probe.order)})

accept_old_names(__name__, Exhibit="ReportFigure")
