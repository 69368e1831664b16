"""Observers: what is read from a model at a step, as records.

An observer is a dataclass whose fields are its settings; it is called at step 0 and after every step, and decides by
``every`` whether it has something to say. ``norms`` is there by default.
"""

from typing import TYPE_CHECKING

from lorascope.observe.base import Observer
from lorascope.observe.factor_snapshots import factors, factors_of
from lorascope.observe.memory_use import memory, storage_bytes
from lorascope.observe.neuron_utilization import utilization
from lorascope.observe.optimizer_moments import factor_drift, factor_optimum, factorings, second_moments
from lorascope.observe.sensitivity import coefficients, neurons
from lorascope.observe.weight_norms import norms
from lorascope.schema.deprecation import old_names

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
    "utilization",
]

# Observers that were renamed, by their old names.
OLD_OBSERVERS = {"utilisation": "utilization"}

if not TYPE_CHECKING:  # type checkers should not see the old names
    __getattr__ = old_names(__name__, OLD_OBSERVERS)
