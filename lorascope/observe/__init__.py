"""Observers: quantities of a model that are recorded during training.

An observer is a dataclass whose fields are its settings. It is called at step 0 and after every step, and records every
``every`` steps. ``norms`` is used by default.
"""

from lorascope.observe.factor_snapshots import factors, factors_of
from lorascope.observe.fault_alarms import alarms
from lorascope.observe.gradient_norms import gradients
from lorascope.observe.memory_use import memory, storage_bytes
from lorascope.observe.neuron_utilization import utilization
from lorascope.observe.observer import Observer
from lorascope.observe.optimizer_moments import factor_drift, factor_optimum, factorings, second_moments
from lorascope.observe.sensitivity import coefficients, neurons
from lorascope.observe.weight_norms import norms

__all__ = [
    "Observer",
    "alarms",
    "coefficients",
    "factor_drift",
    "factor_optimum",
    "factorings",
    "factors",
    "factors_of",
    "gradients",
    "memory",
    "neurons",
    "norms",
    "second_moments",
    "storage_bytes",
    "utilization",
]


def __dir__() -> list[str]:
    return __all__
