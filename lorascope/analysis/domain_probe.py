"""Closed-form classifier of hidden states: a question that an encoder was not trained on, answered before and after.

Linear discriminant analysis on states z (d,) with class means mu_c and the covariance S within classes, shrunk by 0.3
to its mean variance:

.. math::

    \\operatorname{logit}_c = (z^\\top S^{-1} \\mu_c - \\tfrac12 \\mu_c^\\top S^{-1} \\mu_c) / T

The temperature T is fitted on held-out states, because in many dimensions the probe is overconfident.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from lorascope.array_types import Float, Int

SHRINKAGE = 0.3
_TEMPERATURES = (-3.0, 6.0)  # natural logarithms


@dataclass(frozen=True, eq=False)
class DomainProbe:
    """Fitted probe: logits are ``states @ weights + bias``.

    Parameters
    ----------
    weights : array (d, classes)
    bias : array (classes,)
    accuracy : float
        Accuracy on the held-out states.
    chance : float
        Frequency of the most frequent class there.
    """

    weights: Float[np.ndarray, "d classes"]
    bias: Float[np.ndarray, "classes"]
    accuracy: float
    chance: float

    def logits(self, states: Float[np.ndarray, "rows d"]) -> Float[np.ndarray, "rows classes"]:
        """Return the logits of states."""
        return states @ self.weights + self.bias


def fit_probe(
    states: Float[np.ndarray, "rows d"],
    classes: Int[np.ndarray, "rows"],
    held_out_states: Float[np.ndarray, "held d"],
    held_out_classes: Int[np.ndarray, "held"],
) -> DomainProbe:
    """Fit a probe on the states of classes numbered from 0, and its temperature on held-out states.

    Source: Friedman 1989, Regularized discriminant analysis (shrinkage); Guo et al. (arXiv 1706.04599) (temperature).
    """
    number = int(classes.max()) + 1
    means = np.stack([states[classes == label].mean(axis=0) for label in range(number)])
    centered = states - means[classes]
    covariance = centered.T @ centered / (len(states) - number)
    spread = np.trace(covariance) / len(covariance)
    shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * spread * np.eye(len(covariance))
    # The shrunk covariance has full rank also with fewer rows than dimensions.
    weights = np.linalg.solve(shrunk, means.T)
    bias = -0.5 * (means.T * weights).sum(axis=0)
    logits = held_out_states @ weights + bias
    rows = np.arange(len(held_out_classes))

    def loss(log_temperature: float) -> float:
        return -float(log_softmax(logits / np.exp(log_temperature), axis=1)[rows, held_out_classes].mean())

    temperature = float(np.exp(minimize_scalar(loss, bounds=_TEMPERATURES, method="bounded").x))
    accuracy = float((logits.argmax(axis=1) == held_out_classes).mean())
    chance = float(np.bincount(held_out_classes).max() / len(held_out_classes))
    return DomainProbe(weights / temperature, bias / temperature, accuracy, chance)
