"""Observers: quantities of a model that are recorded during training.

An observer is a dataclass whose fields are its settings. It is called at step 0 and after every step, and records every
``every`` steps. ``norms`` is used by default. The class statement registers an observer in ``OBSERVERS``.

Other packages add observers through the entry point group ``lorascope.observers``, which names the module with the
class statement.
"""

from lorascope.observe.distance_from_base import kl
from lorascope.observe.factor_snapshots import factors, factors_of
from lorascope.observe.fault_alarms import alarms
from lorascope.observe.gradient_norms import gradients
from lorascope.observe.memory_use import memory, storage_bytes
from lorascope.observe.neuron_utilization import utilization
from lorascope.observe.observer import OBSERVERS, Observer
from lorascope.observe.optimizer_moments import factor_drift, factor_optimum, factorings, second_moments
from lorascope.observe.sensitivity import coefficients, neurons
from lorascope.observe.weight_norms import norms
from lorascope.schema.plugins import load_plugins

__all__ = [
    "OBSERVERS",
    "Observer",
    "alarms",
    "coefficients",
    "factor_drift",
    "factor_optimum",
    "factorings",
    "factors",
    "factors_of",
    "gradients",
    "kl",
    "memory",
    "neurons",
    "norms",
    "second_moments",
    "storage_bytes",
    "utilization",
]

load_plugins(__name__, "lorascope.observers")


def __dir__() -> list[str]:
    return __all__
