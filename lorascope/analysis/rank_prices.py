"""Price of a rank: the exact loss of cutting to it, directions beyond it, and what retraining at another rank costs.

The cut price of rank k is the loss of the update cut to the k largest components of every module, minus the loss of
the whole update, paired by row. It is exact for this adapter, and not the price of training at rank k. Prices of
retraining are paired by seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lorascope.analysis.gradient_signal import FAMILY, ModuleSignal, count_directions, signal_p
from lorascope.analysis.paired_rows import LEVEL, estimate_rows, rows_to_decide
from lorascope.analysis.part_verdicts import even_share
from lorascope.analysis.seed_intervals import Estimate, t_estimate
from lorascope.analysis.track_record import FEWEST_CELLS, conformal_bounds
from lorascope.array_types import Float
from lorascope.files.finding_html import finding_html
from lorascope.files.lazy_scipy import false_discovery_control
from lorascope.runs.receipt import Receipt

VERDICTS = ("enough", "wasteful", "short", "not finished", "undecided")
CUTS = ["rank", "components", "parameters", "cut", "cut_low", "cut_high", "placed", "placed_low", "placed_high"]
RETRAINED = ["retrained", "retrained_low", "retrained_high", "seeds", "lr"]
MODULES = ["module", "layer", "role", "rank", "unused", "signal", "signal_p", "directions", "control", "reach"]
RUNS = ["rank", "placed", "lr", "seed", "loss", "change"]


class CutPrice(NamedTuple):
    """Price of a cut: rank of every module, None for a budget over all; kept components; and loss increase in nats.

    ``placed`` is the loss of as many components that are the largest of all modules, minus that of the rank. A rank
    above that of the run has neither, and a budget has no rank to compare with.
    """

    rank: int | None
    components: int
    parameters: int
    increase: Estimate | None
    placed: Estimate | None = None


def count_unused(
    shares: Mapping[str, Float[np.ndarray, "block _"]], counts: Float[np.ndarray, "block"]
) -> dict[str, int]:
    """Count the components of every module whose learn, as path share, ends below the even share of a component.

    Parameters
    ----------
    shares : mapping module -> array (block, component)
        Path share of every component on each block of rows, summed over its targets.
    counts : array (block,)
        Number of targets per block.
    """
    blocks = np.arange(len(counts))
    all_shares = np.concatenate(list(shares.values()), axis=1)
    margin = even_share(all_shares.sum() / counts.sum(), all_shares.shape[1])
    p_values = [estimate_rows(values, counts, blocks).p_below(margin) for values in all_shares.T]
    is_unused = false_discovery_control(np.clip(p_values, 0, 1)) < LEVEL
    # All components are judged together, because the false discovery rate is over all of them.
    ends = np.cumsum([array.shape[1] for array in shares.values()])[:-1]
    return {module: int(flags.sum()) for module, flags in zip(shares, np.split(is_unused, ends), strict=True)}


def components_within(sigma: Mapping[str, Float[np.ndarray, "_"]], budget: int) -> dict[str, int]:
    """Return how many components of every module are among the largest of all, the first ones if some are equal.

    Raises
    ------
    ValueError
        The budget is not between 1 and the number of components.
    """
    total = sum(map(len, sigma.values()))
    if not 1 <= budget <= total:
        raise ValueError(f"budget must be a number of components from 1 to {total}, got {budget}")
    largest = np.argsort(-np.concatenate(list(sigma.values())), kind="stable")[:budget]
    # The module of every component, in the order of the singular values above.
    owners = np.repeat(list(sigma), list(map(len, sigma.values())))[largest]
    return {module: int((owners == module).sum()) for module in sigma}


class Evidence(NamedTuple):
    """Measurements on which the verdict on a rank depends.

    Parameters
    ----------
    retrained : sequence of Estimate
        Prices of retraining at smaller ranks.
    half : Estimate
        Cut price of half the rank.
    directions, control : int
        Directions with real labels, and with drawn ones.
    doubled : int, optional
        Directions of the run that was retrained at twice the rank.
    inside_p : float
        p-value of the signal that the factors can follow.
    """

    retrained: Sequence[Estimate]
    half: Estimate
    directions: int
    control: int
    doubled: int | None
    inside_p: float


def judge_rank(evidence: Evidence, tolerance: float) -> str:
    """Return the verdict on the rank of an adapter.

    ============  ====================================================================================
    verdict       condition
    ============  ====================================================================================
    enough        retraining at a smaller rank costs less than the tolerance, by interval
    wasteful      cutting to half the rank costs less than the tolerance, by interval
    short         directions beyond the rank, and fewer of them after retraining at twice the rank
    not finished  gradients that the factors can follow are above 0
    undecided     otherwise
    ============  ====================================================================================

    A condition further up precedes. The last two verdicts depend on gradients, and are not given if the control with
    drawn labels has any direction.
    """
    # Losses that were measured precede gradients, which only say in which direction the loss would fall.
    if any(estimate.interval(LEVEL).high < tolerance for estimate in evidence.retrained):
        return "enough"
    if evidence.half.interval(LEVEL).high < tolerance:
        return "wasteful"
    if evidence.control:
        return "undecided"
    if evidence.directions and evidence.doubled is not None and evidence.doubled < evidence.directions:
        return "short"
    if evidence.inside_p < FAMILY:
        return "not finished"
    return "undecided"


def tabulate_modules(
    modules: pd.DataFrame,
    sigma: Mapping[str, Float[np.ndarray, "_"]],
    unused: Mapping[str, int],
    real: Mapping[str, ModuleSignal],
    control: Mapping[str, ModuleSignal],
) -> pd.DataFrame:
    """Return the summary of a price; ``modules`` has the columns module, layer and role."""
    # Directions of the control are false by construction.
    directions, false_directions = count_directions(real), count_directions(control)
    records = []
    for module in modules["module"]:
        signal = real[module]
        records.append(
            {
                "rank": len(sigma[module]),
                "unused": unused[module],
                "signal": signal.signal,
                "signal_p": signal_p(signal.outside),
                "directions": directions[module],
                "control": false_directions[module],
                "reach": signal.reach,
            }
        )
    return pd.concat([modules.reset_index(drop=True), pd.DataFrame(records)], axis=1)[MODULES]


def tabulate_prices(cuts: Sequence[CutPrice], runs: pd.DataFrame) -> pd.DataFrame:
    """Return the table of a price: one row per cut, or per cut and learning rate of its retrained runs."""
    records = []
    for cut in cuts:
        record: dict[str, Any] = {"rank": cut.rank, "components": cut.components, "parameters": cut.parameters}
        record |= dict.fromkeys([*CUTS[3:], *RETRAINED], math.nan) | {"seeds": 0}
        for name, estimate in (("cut", cut.increase), ("placed", cut.placed)):
            if estimate is not None:
                interval = estimate.interval(LEVEL)
                record |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
        of_rank = runs[(runs["rank"] == cut.rank) & (runs["placed"] == 0)]
        if of_rank.empty:
            records.append(record)
        for lr, of_rate in of_rank.groupby("lr"):
            interval = t_estimate(of_rate["change"].to_numpy()).interval(LEVEL)
            retrained = {"retrained": interval.mean, "retrained_low": interval.low, "retrained_high": interval.high}
            records.append(record | retrained | {"seeds": interval.n, "lr": lr})
    return pd.DataFrame(records, columns=[*CUTS, *RETRAINED]).astype({"rank": "Int64"})


@dataclass(frozen=True, eq=False)
class Price:
    """Price of the rank of an adapter; see ``ls.price``.

    Parameters
    ----------
    label : str
        Name of the run.
    rank : int
        Largest number of components of a module.
    table : DataFrame
        Columns rank (missing for a budget over all modules), components, parameters, cut, cut_low, cut_high (nats
        against the present rank), placed, placed_low, placed_high (loss of as many components that are the largest of
        all modules, minus that of the rank), retrained, retrained_low, retrained_high, seeds and lr (of retrained
        runs).
    modules : DataFrame
        Result of :meth:`summary`.
    runs : DataFrame
        Retrained runs: rank, placed (1 if as many components were given to the modules by :meth:`ranks`), lr, seed,
        loss and change from the run of the present rank with the same seed (nats).
    sigma : mapping module -> array
        Singular values, the largest first.
    verdict : str
        One of ``VERDICTS``, for the whole adapter.
    tolerance : float
        Loss increase that counts as none, in nats.
    rows_needed : float
        Rows that would decide whether half the rank is enough, if the verdict is undecided; NaN otherwise.
    smallest_signal : float
        Squared gradient along one direction that would have been found, from the spread over blocks.
    residuals : array (cell,)
        Retrained minus cut price of earlier cells of the track record, in nats.
    next_command : str
        Command that retrains; empty if the run cannot be retrained.
    next_cost : str
        Number of runs that this command trains, and their estimated time.
    receipt : Receipt
        What was measured, and with what.
    """

    label: str
    rank: int
    table: pd.DataFrame
    modules: pd.DataFrame
    runs: pd.DataFrame
    sigma: Mapping[str, Float[np.ndarray, "_"]]
    verdict: str
    tolerance: float
    rows_needed: float
    smallest_signal: float
    residuals: Float[np.ndarray, "cell"]
    next_command: str
    next_cost: str
    receipt: Receipt

    def summary(self) -> pd.DataFrame:
        """Return one row per module.

        Returns
        -------
        DataFrame
            ``module, layer, role, rank, unused`` (components whose path share of the learning ends below the even share
            of a component), ``signal`` (squared norm of the expected gradient that the factors cannot follow),
            ``signal_p``, ``directions`` and ``control`` (beyond the rank, with real and with drawn labels), ``reach``
            (fraction of the signal that the factors can follow). A signal does not say which rank a module needs.
        """
        return self.modules.copy()

    def ranks(self, budget: int) -> dict[str, int]:
        """Return the rank of every module if only the largest components of all modules remain.

        This is not a recommendation for a training: a uniform rank of the same budget may be as good, or better.

        Parameters
        ----------
        budget : int
            Number of components of all modules together.

        Raises
        ------
        ValueError
            The budget is not between 1 and the number of components.
        """
        return components_within(self.sigma, budget)

    def to_json(self) -> dict[str, Any]:
        """Return the price as a JSON object."""
        tables = {"table": self.table, "modules": self.modules, "runs": self.runs}
        records = {}
        for name, table in tables.items():
            records[name] = table.astype(object).where(table.notna(), None).to_dict("records")
        return {
            "run": self.label,
            "rank": self.rank,
            **records,
            "verdict": self.verdict,
            "tolerance": self.tolerance,
            "rows_needed": None if math.isnan(self.rows_needed) else self.rows_needed,
            "next": self.next_command,
            "next_cost": self.next_cost,
            "receipt": self.receipt.to_json(),
        }

    def __repr__(self) -> str:
        lines = [f"{self.label}: {self._describe_verdict()}"]
        # A budget has no rank, and the rows of a rank differ in their learning rates.
        for _, rows in self.table.groupby(["rank", "components"], sort=False, dropna=False):
            lines.append(self._describe_rank(rows))
        lines += self._describe_placement()
        lines.append(f"{f'beyond rank {self.rank}':<14} {self._describe_directions()}")
        if self.next_command:
            # The cost is on the next line, so that the command can be pasted.
            lines += [f"{'next':<14} {self.next_command}", f"{'':<14} {self.next_cost}"]
        lines.append("Intervals of cuts are over rows; they do not cover the seed of the training.")
        lines.append(f"{'receipt':<14} {self.receipt}")
        return "\n".join(lines)

    def _describe_verdict(self) -> str:
        if math.isnan(self.rows_needed):
            return f"{self.verdict}, tolerance {self.tolerance:.3g} nats"
        rows = "more rows than exist" if math.isinf(self.rows_needed) else f"about {self.rows_needed:.0f} rows"
        return f"{self.verdict}, tolerance {self.tolerance:.3g} nats; {rows} would decide on rank {self.rank // 2}"

    def _describe_rank(self, rows: pd.DataFrame) -> str:
        """Return the line of a cut, with the runs retrained at its rank."""
        cut = rows.iloc[0]
        head = f"rank {self.rank} -> {cut['rank']:.0f}"
        if pd.isna(cut["rank"]):
            head = f"{cut['components']:.0f} components"
        price = "cannot cut to a larger rank"
        if not pd.isna(cut["cut"]):
            price = f"cut now {_format_interval(cut, 'cut')}"
        return f"{head:<14} {price:<36} after retraining: {self._describe_retraining(rows)}"

    def _describe_retraining(self, rows: pd.DataFrame) -> str:
        measured = rows[rows["seeds"] > 0]
        texts = []
        for _, row in measured.iterrows():
            texts.append(f"{_format_interval(row, 'retrained')} at lr {row['lr']:g} ({row['seeds']:.0f} seeds)")
        if texts:
            return ", ".join(texts)
        cut = rows.iloc[0]
        if len(self.residuals) < FEWEST_CELLS or pd.isna(cut["rank"]) or pd.isna(cut["cut"]):
            return "not measured"
        bounds = conformal_bounds(self.residuals)
        low, high = cut["cut"] + bounds.low, cut["cut"] + bounds.high
        source = f"conformal, {bounds.coverage:.0%}, {len(self.residuals)} cells"
        return f"{low:+.3f} to {high:+.3f} nats expected ({source})"

    def _describe_placement(self) -> list[str]:
        """Return the line that compares half the rank in every module with as many components placed by their size."""
        half = self.table[(self.table["rank"] == self.rank // 2) & self.table["placed"].notna()]
        if half.empty:
            return []
        row = half.iloc[0]
        components = f"the {row['components']:.0f} largest components instead of rank {row['rank']:.0f}"
        return [f"{'placed by size':<14} {components}: {_format_interval(row, 'placed')}"]

    def placement(self, rank: int) -> Estimate | None:
        """Estimate what placed ranks add to the loss of a uniform rank after retraining, each at its better rate.

        Returns
        -------
        Estimate or None
            Paired by seed; negative if the placed ranks of as many components are better. None if not retrained.
        """
        losses = []
        for placed in (1, 0):
            runs = self.runs[(self.runs["rank"] == rank) & (self.runs["placed"] == placed)]
            if runs.empty:
                return None
            by_rate = runs.pivot(index="seed", columns="lr", values="loss")
            losses.append(by_rate[by_rate.mean().idxmin()])
        return t_estimate((losses[0] - losses[1]).to_numpy())

    def _describe_directions(self) -> str:
        directions, control = int(self.modules["directions"].sum()), int(self.modules["control"].sum())
        text = f"signal in {directions} directions; {control} with drawn labels (control)"
        if not directions:
            return f"{text}; one above {self.smallest_signal:.2g} would have been found"
        largest = self.modules.sort_values("signal").iloc[-1]
        name = largest["role"] if pd.isna(largest["layer"]) else f"layer {largest['layer']} {largest['role']}"
        return f"{text}; largest in {name}"

    def _repr_html_(self) -> str:
        return finding_html(f"{self.label}: {self._describe_verdict()}", self.table, self.next_command)


def _format_interval(row: Any, name: str) -> str:
    interval = f"{row[name]:+.3f} nats"
    if pd.isna(row[f"{name}_low"]):  # a single seed
        return interval
    return f"{interval} [{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]"


def rows_for_verdict(half: Estimate, tolerance: float, rows: int) -> float:
    """Return the number of rows that would decide whether half the rank costs less than the tolerance."""
    number = rows_to_decide(half, tolerance, rows)
    return number if math.isinf(number) else math.ceil(number)
