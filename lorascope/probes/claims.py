"""A sentence of a paper turned into something that can fail, and the rule that decides it.

A claim names a statistic, a control that would show the same picture without the claimed cause, and a margin: the
smallest effect worth the sentence, fixed before the runs. The effect is statistic minus control, paired by seed.
A sentence that says "lower" enters with the sign of its statistic (and control) turned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from lorascope.analysis.seed_intervals import t_interval

MINIMUM_SEEDS = 3
Outcome = Literal["supported", "not supported", "inconclusive"]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What is claimed, and how it is to be judged.

    Parameters
    ----------
    sentence : str
        The paper's statement, in one's own words.
    statistic : str
        What is measured, signed so that the claim says "higher".
    control : str
        What would show the same without the claimed cause.
    margin : float
        Smallest effect worth the sentence, in the unit of the statistic; above zero.
    source : str
        Paper, section or figure.

    Raises
    ------
    ValueError
        The margin is not a positive number.
    """

    sentence: str
    statistic: str
    control: str
    margin: float
    source: str = ""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.margin) and self.margin > 0):
            raise ValueError(f"margin {self.margin} of {self.sentence!r}: must be a finite number above zero")

    def judge(self, statistic: Mapping[int, float], control: Mapping[int, float]) -> Verdict:
        """Decide the claim from one value of statistic and control a seed.

        Parameters
        ----------
        statistic, control : mapping seed -> value
            Measured for the same seeds.

        Raises
        ------
        ValueError
            The seeds differ, there are none, or a value is not finite.
        """
        values = _pair(statistic, control)
        mean, low, high, n = t_interval(values["effect"].to_numpy(np.float64))
        outcome: Outcome = "inconclusive"
        if n >= MINIMUM_SEEDS and low > self.margin:
            outcome = "supported"
        elif n >= MINIMUM_SEEDS and high < self.margin:
            outcome = "not supported"
        return Verdict(self, outcome, mean, low, high, n, values)


@dataclass(frozen=True)
class Verdict:
    """The outcome of a claim with its numbers.

    Parameters
    ----------
    claim : Claim
        What was judged.
    outcome : {"supported", "not supported", "inconclusive"}
        By the lower and upper end of the interval against the margin.
    effect, low, high : float
        Mean of statistic minus control and its 95 % t-interval over seeds; the bounds are NaN for one seed.
    n : int
        Number of seeds.
    values : DataFrame
        ``seed, statistic, control, effect``: one row a seed.
    """

    claim: Claim
    outcome: Outcome
    effect: float
    low: float
    high: float
    n: int
    values: pd.DataFrame

    def __str__(self) -> str:
        interval = f"[{self.low:.3g}, {self.high:.3g}]" if self.n > 1 else "no interval"
        seeds = "1 seed" if self.n == 1 else f"{self.n} seeds"
        return f"{self.outcome}: effect {self.effect:.3g} {interval} against margin {self.claim.margin:.3g}, {seeds}"


def _pair(statistic: Mapping[int, float], control: Mapping[int, float]) -> pd.DataFrame:
    """Join statistic and control by seed, checked."""
    unpaired = sorted(statistic.keys() ^ control.keys())
    if unpaired:
        raise ValueError(f"seeds {unpaired} have a statistic or a control only: both must be measured for every seed")
    seeds = sorted(statistic)
    values = pd.DataFrame(
        {
            "seed": seeds,
            "statistic": [float(statistic[seed]) for seed in seeds],
            "control": [float(control[seed]) for seed in seeds],
        }
    )
    values["effect"] = values["statistic"] - values["control"]
    broken = values.loc[~np.isfinite(values["effect"]), "seed"].tolist()
    if broken:
        raise ValueError(f"seeds {broken} have a statistic or control that is not finite")
    return values
