"""All kinds of findings by their stable id, collected from the modules that yield them."""

from __future__ import annotations

from lorascope.diagnosis import merge, neuron_inspection, reading_faults
from lorascope.diagnosis.causes import RULES
from lorascope.diagnosis.causes.finding import Kind
from lorascope.diagnosis.runtimes import runtime

_OTHER_KINDS = (*runtime.KINDS, *merge.KINDS, *reading_faults.KINDS, *neuron_inspection.KINDS)

KINDS: dict[str, Kind] = {
    kind.id: kind for kind in sorted((*RULES, *_OTHER_KINDS), key=lambda kind: kind.id) if kind.id
}
"""Kinds of this package; rules of other packages have no id."""
