"""Types in the signatures of public functions that ``lorascope`` does not export itself, for your own annotations."""

from __future__ import annotations

import importlib
from typing import Any

_DEFINED_IN = {
    "lorascope.analysis.advice": ("Action", "Fact", "OpenQuestion", "SkippedMeasurement"),
    "lorascope.analysis.component_blocks": ("ComponentBlock",),
    "lorascope.analysis.factor_embeddings": ("Factor", "View"),
    "lorascope.analysis.fork_effects": ("ForkEffects",),
    "lorascope.analysis.reading": ("Passage",),
    "lorascope.analysis.seed_intervals": ("Estimate", "Interval"),
    "lorascope.analysis.subspace_similarity": ("Side",),
    "lorascope.analysis.turning_points": ("Turns",),
    "lorascope.charts.figure_style": ("Palette",),
    "lorascope.charts.marks": ("Mark",),
    "lorascope.diagnosis.causes.finding": ("Finding",),
    "lorascope.diagnosis.survey": ("Surveyed",),
    "lorascope.experiments.component_importance": ("Losses",),
    "lorascope.experiments.isolated_run": ("Data", "Model"),
    "lorascope.experiments.rescoring": ("RescoredMetric",),
    "lorascope.export.rank_budget": ("RankBudget",),
    "lorascope.formats.pretrained_weights": ("PretrainedWeights",),
    "lorascope.formats.stored_update": ("AdapterFiles",),
    "lorascope.inputs.metrics": ("Metric",),
    "lorascope.inputs.tasks": ("HashedTable", "Task"),
    "lorascope.inputs.tokenization": ("EncodedRows",),
    "lorascope.methods.adalora": ("AdaLoRADelta", "Schedule"),
    "lorascope.methods.alora": ("ALoRADelta",),
    "lorascope.methods.autolora": ("AutoLoRADelta",),
    "lorascope.methods.dora": ("DoRADelta",),
    "lorascope.methods.hydralora": ("HydraDelta",),
    "lorascope.methods.lora": ("LoRADelta",),
    "lorascope.methods.method": ("Batch", "HeldOut"),
    "lorascope.methods.optimizers.adapprox": ("AdapproxOptimizer",),
    "lorascope.methods.pissa": ("ResidualDelta",),
    "lorascope.methods.vera": ("VeRADelta",),
    "lorascope.observe.observer": ("Observer",),
    "lorascope.plots.explore": ("Explorer",),
    "lorascope.plots.figure_registry": ("Topic",),
    "lorascope.plots.run_groups": ("Runs",),
    "lorascope.runs.manifest": ("Manifest",),
    "lorascope.runs.module_summary": ("ModuleSummary",),
    "lorascope.runs.receipt": ("Receipt",),
    "lorascope.runs.result": ("Result",),
    "lorascope.schema.module_roles": ("Location",),
    "lorascope.schema.records": ("Factors", "Item"),
    "lorascope.training.curve_report": ("CurveReport",),
    "lorascope.updates.low_rank": ("Product",),
    "lorascope.updates.neuron_angles": ("NeuronChange",),
    "lorascope.updates.weight_update": ("Update",),
}
_MODULES = {name: module for module, names in _DEFINED_IN.items() for name in names}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    """Import a type on first use, because some need torch."""
    if name not in _MODULES:
        raise AttributeError(f"module 'lorascope.api_types' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
