"""lorascope: train, record and inspect LoRA and related methods, and test whether a pattern is learned or random."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

from lorascope.extras import requirement

__version__ = "0.2.0"

# The classes of the methods are found by their class statements, because importing them would import torch.
_METHODS = {
    name: f"lorascope.methods.{file.stem}:{name}"
    for file in sorted(Path(__file__).parent.glob("methods/*.py"))
    for name in re.findall(r'^class (\w+)\([^)]*\bname="', file.read_text(encoding="utf-8"), re.MULTILINE)
}
_PUBLIC = {
    "train": "lorascope.training.loop:train",
    "Generation": "lorascope.training.generation:Generation",
    "load": "lorascope.runs.loading:load",
    "load_series": "lorascope.runs.loading:load_series",
    "example": "lorascope.runs.examples:example",
    "examples": "lorascope.runs.examples:list_examples",
    "restore": "lorascope.training.state:restore",
    "fork": "lorascope.training.fork:fork",
    "fork_effects": "lorascope.analysis.fork_effects:fork_effects",
    "sweep": "lorascope.experiments.sweep:sweep",
    "score": "lorascope.experiments.rescoring:score",
    "harness": "lorascope.experiments.harness:harness",
    "advise": "lorascope.insight.advise:advise",
    "Advice": "lorascope.analysis.advice:Advice",
    "dial": "lorascope.insight.dial:dial",
    "Dial": "lorascope.analysis.dial:Dial",
    "read": "lorascope.insight.reader:read",
    "align": "lorascope.analysis.direction_alignment:align",
    "Reading": "lorascope.analysis.reading:Reading",
    "ReadingCard": "lorascope.analysis.reading:ReadingCard",
    "price": "lorascope.insight.price:price",
    "Price": "lorascope.analysis.rank_prices:Price",
    "explore": "lorascope.plots.explore:explore",
    "diagnose": "lorascope.diagnosis.doctor:diagnose",
    "survey": "lorascope.diagnosis.survey:survey",
    "report": "lorascope.pages.report_card:report",
    "rate_card": "lorascope.analysis.rate_card:rate_card",
    "turns": "lorascope.analysis.turning_points:find_turns",
    "TrainerRecorder": "lorascope.training.hf_trainer.trainer_recorder:TrainerRecorder",
    "record": "lorascope.training.any_loop:record",
    "LoopRecorder": "lorascope.training.any_loop:LoopRecorder",
    "trainer_kwargs": "lorascope.training.hf_trainer.trainer_kwargs:trainer_kwargs",
    **_METHODS,
    "neuron_scores": "lorascope.diagnosis.neuron_scores:neuron_scores",
    "at_gates": "lorascope.runs.gated_run:at_gates",
    "choose_num_experts": "lorascope.analysis.head_count:choose_num_experts",
    "mean_gates": "lorascope.experiments.mean_gates:mean_gates",
    "METHODS": "lorascope.methods:METHODS",
    "Method": "lorascope.methods.method:Method",
    "Phase": "lorascope.methods.method:Phase",
    "Step": "lorascope.methods.method:Step",
    "Delta": "lorascope.adapters.delta:Delta",
    "attach": "lorascope.adapters.delta:attach",
    "detach": "lorascope.adapters.delta:detach",
    "fold": "lorascope.adapters.delta:fold",
    "deltas": "lorascope.adapters.delta:deltas",
    "Run": "lorascope.runs.run:Run",
    "Adapter": "lorascope.runs.adapter:Adapter",
    "Series": "lorascope.runs.series:Series",
    "Record": "lorascope.schema.records:Record",
    "Snapshot": "lorascope.schema.records:Snapshot",
    "QUANTITIES": "lorascope.schema.records:QUANTITIES",
    "Drawable": "lorascope.charts.chart:Drawable",
    "Chart": "lorascope.charts.chart:Chart",
    "Panels": "lorascope.charts.chart:Panels",
    "set_side_by_side": "lorascope.charts.chart:set_side_by_side",
    "stack_vertically": "lorascope.charts.chart:stack_vertically",
    "Axis": "lorascope.charts.marks:Axis",
    "Band": "lorascope.charts.marks:Band",
    "Bar": "lorascope.charts.marks:Bar",
    "Heat": "lorascope.charts.marks:Heat",
    "Line": "lorascope.charts.marks:Line",
    "Point": "lorascope.charts.marks:Point",
    "Rule": "lorascope.charts.marks:Rule",
    "Text": "lorascope.charts.marks:Text",
    "set_style": "lorascope.charts.figure_style:set_style",
}
_MODULES = {
    "analysis": "lorascope.analysis",
    "baseline_ranks": "lorascope.analysis.baseline_ranks",
    "component_importance": "lorascope.experiments.component_importance",
    "export": "lorascope.export",
    "metrics": "lorascope.inputs.metrics",
    "models": "lorascope.inputs.models",
    "module_table": "lorascope.schema.module_table",
    "observe": "lorascope.observe",
    "papers": "lorascope.papers",
    "plots": "lorascope.plots",
    "recipes": "lorascope.experiments.recipes",
    "step_memory": "lorascope.experiments.step_memory",
    "step_time": "lorascope.experiments.step_time",
    "tasks": "lorascope.inputs.tasks",
    "updates": "lorascope.updates",
}
__all__ = sorted([*_PUBLIC, *_MODULES])


def __getattr__(name: str) -> Any:
    """Import a public name on first use, which keeps ``import lorascope`` fast."""
    module, _, attribute = (_MODULES | _PUBLIC).get(name, "").partition(":")
    if not module:
        raise AttributeError(f"module 'lorascope' has no attribute {name!r}")
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (required := requirement(error)) is None:
            raise
        raise ImportError(f"lorascope.{name} {required}") from error
    return getattr(imported, attribute) if attribute else imported


def __dir__() -> list[str]:
    return __all__
