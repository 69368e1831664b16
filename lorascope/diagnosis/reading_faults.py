"""Findings about adapters that cannot be read, because their tensors have a fault."""

from __future__ import annotations

from collections.abc import Mapping

from lorascope.diagnosis.causes.finding import Finding, Kind
from lorascope.diagnosis.causes.whole_weights import empty_tensors
from lorascope.diagnosis.runtimes.runtime import REFUSED
from lorascope.formats.adapter_faults import AdapterFault, FaultKind

INCOMPLETE = Kind(
    "LS027",
    "missing-factor",
    "error",
    needs="config",
    problem="A module lacks a factor of its update.",
    evidence="names of tensors: for LoRA, lora_A without lora_B, or the reverse",
    fix="save the adapter again, with all its tensors, or remove those of this module",
)
RANK = Kind(
    "LS028",
    "rank-mismatch",
    "error",
    needs="config",
    problem="The factors do not have the rank of the configuration.",
    evidence="rank of the factors, and r or the rank_pattern of the configuration",
    fix="use the adapter_config.json of this training, or set r and rank_pattern to the ranks of the factors",
)
SHAPE = Kind(
    "LS029",
    "wrong-shape",
    "error",
    needs="config",
    problem="The tensors of a module do not fit each other.",
    evidence="shapes of the tensors, such as those of A and B with different ranks",
    fix="save the adapter again: these tensors are of different adapters, or damaged",
)
KINDS = (INCOMPLETE, RANK, SHAPE)
_KINDS_OF_FAULTS: Mapping[FaultKind, Kind] = {
    "empty": empty_tensors,
    "incomplete": INCOMPLETE,
    "rank": RANK,
    "shape": SHAPE,
    "misfit": REFUSED,
}


def fault_finding(fault: AdapterFault) -> Finding:
    """Return the finding about a fault that prevents reading an adapter."""
    kind, fix = _KINDS_OF_FAULTS[fault.kind], ""
    if kind is REFUSED:
        fix = "load it into the model that it was trained on"
    return kind.finding(fault.reason, (), fix)
