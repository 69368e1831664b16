"""Testable claims and the rule that judges them.

A claim has a statistic, a control and a margin. The control is a comparison in which the claimed cause is absent. The
margin is the smallest effect that supports the claim; it is fixed before the runs. The effect is statistic minus
control, paired by seed. If a paper claims a lower value, statistic and control have their signs flipped.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

import numpy as np
import pandas as pd

from lorascope.analysis.seed_intervals import t_interval

MINIMUM_SEEDS = 3
Outcome = Literal["supported", "not supported", "inconclusive"]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim and the margin that judges it: a row of ``claims.toml``.

    Parameters
    ----------
    id : str
        Name of the claim, such as "lora.parity". Default "".
    sentence : str
        Paraphrase of the paper's statement.
    statistic : str
        Measured quantity, signed so that the claim predicts a higher value.
    control : str
        Same quantity in a comparison without the claimed cause.
    margin : float
        Smallest effect that supports the claim, > 0, in the unit of the statistic.
    source : str
        Section, table or figure of the paper. Default "".

    Raises
    ------
    ValueError
        ``margin`` is not a finite number > 0.
    """

    id: str = ""
    sentence: str
    statistic: str
    control: str
    margin: float
    source: str = ""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.margin) and self.margin > 0):
            raise ValueError(f"margin must be a finite number > 0, got {self.margin}: claim {self.sentence!r}")

    def judge(self, statistic: Mapping[int, float], control: Mapping[int, float]) -> Verdict:
        """Judge the claim from one statistic and one control value per seed.

        Parameters
        ----------
        statistic, control : mapping seed -> value
            Values for the same seeds.

        Returns
        -------
        Verdict
            Supported if the 95% t-interval of the effect is above the margin, not supported if it is below, else
            inconclusive. Fewer than ``MINIMUM_SEEDS`` seeds are always inconclusive.

        Raises
        ------
        ValueError
            The seeds differ, there are no seeds, or a value is not finite.
        """
        unpaired = sorted(statistic.keys() ^ control.keys())
        if unpaired:
            raise ValueError(f"cannot pair statistic and control: seeds {unpaired} have only one of the two")
        values = pd.DataFrame({"seed": sorted(statistic)})
        for name, found in (("statistic", statistic), ("control", control)):
            values[name] = [float(found[seed]) for seed in values["seed"]]
        values["effect"] = values["statistic"] - values["control"]
        broken = values.loc[~np.isfinite(values["effect"]), "seed"].tolist()
        if broken:
            raise ValueError(f"statistic and control must be finite, got NaN or infinity for seeds {broken}")
        mean, low, high, n = t_interval(values["effect"].to_numpy(np.float64))
        # With two seeds the t-interval has one degree of freedom and is too wide to decide a claim.
        outcome: Outcome = "inconclusive"
        if n >= MINIMUM_SEEDS and low > self.margin:
            outcome = "supported"
        elif n >= MINIMUM_SEEDS and high < self.margin:
            outcome = "not supported"
        return Verdict(self, outcome, mean, low, high, n, values)


@dataclass(frozen=True)
class Verdict:
    """Outcome of a claim and the numbers behind it.

    Parameters
    ----------
    claim : Claim
        Judged claim.
    outcome : {"supported", "not supported", "inconclusive"}
        Result of comparing the interval with the margin.
    effect, low, high : float
        Mean of statistic minus control and its 95% t-interval over seeds; the bounds are NaN for one seed.
    n : int
        Number of seeds.
    values : DataFrame
        ``seed, statistic, control, effect``: one row per seed.
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
        return f"{self.outcome}: effect {self.effect:.3g} {interval}, margin {self.claim.margin:.3g}, {seeds}"


_TABLE = files("lorascope.probes").joinpath("claims.toml").read_text(encoding="utf-8")
CLAIMS = {row["id"]: Claim(**row) for row in tomllib.loads(_TABLE)["claim"]}
"""Claims of all probes by id."""
