"""lorascope: train low-rank adapters, record what happens inside them, draw it and judge it."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "train": "lorascope.loop:train",
    "load": "lorascope.checkpoints:load",
    "sweep": "lorascope.sweeps:sweep",
    "explore": "lorascope.widgets:explore",
    "diagnose": "lorascope.doctor:diagnose",
    "TrainerRecorder": "lorascope.hf:TrainerRecorder",
    "trainer_kwargs": "lorascope.hf:trainer_kwargs",
    "AdaLoRA": "lorascope.methods:AdaLoRA",
    "AutoLoRA": "lorascope.methods:AutoLoRA",
    "ALoRA": "lorascope.methods:ALoRA",
    "Adapprox": "lorascope.methods:Adapprox",
    "FourierFT": "lorascope.methods:FourierFT",
    "Full": "lorascope.methods:Full",
    "HydraLoRA": "lorascope.methods:HydraLoRA",
    "LISA": "lorascope.methods:LISA",
    "LoRA": "lorascope.methods:LoRA",
    "NeFT": "lorascope.methods:NeFT",
    "neuron_scores": "lorascope.scoring:neuron_scores",
    "at_gates": "lorascope.gated:at_gates",
    "choose_heads": "lorascope.analysis.clusters:choose_heads",
    "mean_gates": "lorascope.mixing:mean_gates",
    "METHODS": "lorascope.methods:METHODS",
    "Method": "lorascope.method:Method",
    "Phase": "lorascope.method:Phase",
    "Step": "lorascope.method:Step",
    "Delta": "lorascope.delta:Delta",
    "attach": "lorascope.delta:attach",
    "detach": "lorascope.delta:detach",
    "fold": "lorascope.delta:fold",
    "deltas": "lorascope.delta:deltas",
    "Run": "lorascope.run:Run",
    "Record": "lorascope.records:Record",
    "Snapshot": "lorascope.records:Snapshot",
    "QUANTITIES": "lorascope.records:QUANTITIES",
    "Chart": "lorascope.chart:Chart",
}
_MODULES = (
    "allocation",
    "analysis",
    "export",
    "memory",
    "models",
    "names",
    "observe",
    "pace",
    "plots",
    "probes",
    "tasks",
    "update",
    "worth",
)

__all__ = sorted([*_PUBLIC, *_MODULES])


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that ``import lorascope`` itself costs nothing."""
    if name in _MODULES:
        return importlib.import_module(f"lorascope.{name}")
    if name in _PUBLIC:
        module, attribute = _PUBLIC[name].split(":")
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module 'lorascope' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
