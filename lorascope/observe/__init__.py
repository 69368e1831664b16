"""Observers: what is read from a model at a step, as records.

An observer is a dataclass whose fields are its settings; it is called at step 0 and after every step, and decides by
``every`` whether it has something to say. ``norms`` is there by default.
"""

from lorascope.observe.base import Observer
from lorascope.observe.neuron_utilization import utilisation
from lorascope.observe.optimizer_moments import factor_drift, factor_optimum, factorings, second_moments
from lorascope.observe.sensitivity import coefficients, neurons
from lorascope.observe.weight_norms import factors, factors_of, memory, norms, storage_bytes

__all__ = [
    "Observer",
    "coefficients",
    "factor_drift",
    "factor_optimum",
    "factorings",
    "factors",
    "factors_of",
    "memory",
    "neurons",
    "norms",
    "second_moments",
    "storage_bytes",
    "utilisation",
]
