"""Effects of changes that forks make: the test loss of each fork minus that of its trunk.

.. math::

    \\operatorname{effect} = L(\\text{fork}) - L(\\text{trunk})

in nats. A fork and its trunk share seed, batches and all steps before the change, so their difference has less spread
than that of independent seeds. It is the effect from the step of the fork on, not that of a training with the change.
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lorascope.analysis.paired_rows import LEVEL, rows_to_decide
from lorascope.analysis.seed_intervals import Estimate, t_estimate
from lorascope.array_types import Float
from lorascope.files.finding_html import finding_html
from lorascope.files.lazy_scipy import false_discovery_control
from lorascope.files.printable import count_phrase
from lorascope.files.typed_json import to_json_rows
from lorascope.runs.receipt import Receipt
from lorascope.runs.result import Result
from lorascope.runs.run import Run

VERDICTS = ("lower", "higher", "no difference", "undecided")
FEWEST_PAIRS = 5  # of a verdict: with four, an interval over seeds reaches 3.2 standard errors to each side
_SETTING = ["change", "step"]


class Pair(NamedTuple):
    """A finished fork and its trunk."""

    fork: Run
    trunk: Run


@dataclass(frozen=True, eq=False)
class ForkEffects:
    """Effects of forks; see ``ls.fork_effects``.

    Parameters
    ----------
    table : DataFrame
        One row per fork: ``trunk, fork`` (ids), ``seed, step, change, loss_trunk, loss_fork, effect, low, high`` (nats;
        the 95% interval is over test rows), ``identical`` (whether both predict the same).
    changes : DataFrame
        Result of :meth:`summary`.
    receipt : Receipt
        What was compared.
    """

    table: pd.DataFrame
    changes: pd.DataFrame
    receipt: Receipt

    def summary(self) -> pd.DataFrame:
        """Return one row per change and step.

        Returns
        -------
        DataFrame
            ``change, step, fraction`` (of the training before the change), ``pairs, effect, low, high`` (nats; the 95%
            interval is over pairs, or over test rows for a single one), ``sd`` (of the effects over pairs),
            ``independent_sd`` (of the difference if fork and trunk had independent seeds), ``margin`` (nats),
            ``verdict`` ("" for fewer than 5 pairs) and ``pairs_needed`` (NaN unless undecided).
        """
        return self.changes.copy()

    def to_json(self) -> dict[str, Any]:
        """Return the effects as a JSON object."""
        return {
            "changes": to_json_rows(self.changes),
            "table": to_json_rows(self.table),
            "receipt": self.receipt.to_json(),
        }

    def __repr__(self) -> str:
        lines = ["Effects of forks on the test loss"]
        row: Any
        for row in self.changes.itertuples():
            lines.append(f"  {row.change}, from step {row.step} on ({100 * row.fraction:.0f}% of the training)")
            lines.append(f"    {_describe_effect(row)}")
        lines.append("  Intervals of one pair are over test rows, and do not cover the seed of the training.")
        lines.append(f"  receipt  {self.receipt}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        effects = []
        row: Any
        for row in self.changes.itertuples():
            effects.append(f"{row.change}, from step {row.step} on: {_describe_effect(row)}")
        return finding_html("; ".join(effects), self.table)


def _describe_effect(row: Any) -> str:
    """Return the effect of one change with its interval and its verdict."""
    verdict = row.verdict or f"no verdict below {FEWEST_PAIRS} pairs"
    if row.verdict == "no difference":
        verdict += f" above {row.margin:.2g}"
    if row.verdict == "undecided" and math.isfinite(row.pairs_needed):
        verdict += f", about {row.pairs_needed:.0f} pairs would decide"
    pairs = count_phrase(row.pairs, "pair")
    return f"{row.effect:+.4g} nats [{row.low:.4g}, {row.high:.4g}], {pairs}: {verdict}"


def fork_effects(forks: Result | Sequence[Result], margin: float | None = None) -> ForkEffects:
    """Compare forks with their trunks: the effect of each change on the test loss, paired by seed.

    Parameters
    ----------
    forks : Run or sequence of Run
        Finished forks. Those with the same change and step are pairs of one effect, with different trunks.
    margin : float, optional
        Largest effect in nats that makes no difference, by default the standard deviation of the trunks' test losses
        over seeds.

    Returns
    -------
    ForkEffects
        With ``table``, ``summary()`` and ``to_json()``. For 5 or more pairs, the verdict is *lower* or *higher* if the
        effect differs from 0 (t-test over pairs, Benjamini-Hochberg over changes at 5%), *no difference* if its 95%
        interval is within the margin, else *undecided*.

    Raises
    ------
    ValueError
        A run is not a fork, a fork or its trunk has no test score, two forks of one trunk make the same change, or the
        margin is negative.

    Examples
    --------
    >>> forks = [ls.fork(run, step=50, lr=1e-4) for run in seeds]  # doctest: +SKIP
    >>> ls.fork_effects(forks)  # doctest: +SKIP
    """
    began = time.process_time()
    if margin is not None and not margin >= 0:
        raise ValueError(f"margin must be >= 0, got {margin}")
    pairs = pairs_of(forks)
    table = pd.DataFrame(map(_pair_row, pairs))
    first = pairs[0].trunk
    receipt = Receipt(
        run=", ".join(table["trunk"].unique()),
        base=first.meta.model,
        rows={"test": f"{len(first.predictions)} rows {(first.meta.data_hash or '')[:12]}"},
        call={"forks": table["fork"].to_list(), "margin": margin},
        seed=_seeds_of(pairs),
        command=_command_of(pairs, margin),
        seconds=time.process_time() - began,
    )
    steps = pd.Series([pair.trunk.meta.settings["steps"] for pair in pairs])
    return ForkEffects(table, _summarize(table, table["step"] / steps, margin), receipt)


def _seeds_of(pairs: Sequence[Pair]) -> int | tuple[int, ...] | None:
    """Return the seed of the pairs, or all of them if they differ."""
    seeds = [pair.fork.meta.seed for pair in pairs if pair.fork.meta.seed is not None]
    distinct = tuple(dict.fromkeys(seeds))
    if len(distinct) > 1:
        return distinct
    return pairs[0].fork.meta.seed


def _command_of(pairs: Sequence[Pair], margin: float | None) -> str:
    """Return the command that compares finished forks again; "" if it would not find a fork or a trunk."""
    words = ["lorascope", "fork"]
    for fork, trunk in pairs:
        if fork.path is None or trunk.path is None:
            return ""
        # A trunk is found by its id next to its fork, or in the folder of its recipe there.
        if fork.path.absolute().parent not in list(trunk.path.absolute().parents)[:2]:
            return ""
        words.append(str(fork.path))
    if margin is not None:
        words += ["--margin", repr(float(margin))]
    return shlex.join(words)


def pairs_of(forks: Result | Sequence[Result]) -> list[Pair]:
    """Return forks with their trunks; a ValueError reports another run."""
    pairs: list[Pair] = []
    for fork in [forks] if isinstance(forks, Result) else forks:
        if not isinstance(fork, Run) or fork.trunk is None:
            raise ValueError(f"forks must be runs of ls.fork, got {fork.kind} {fork.id} ({fork.label})")
        pairs.append(Pair(fork, fork.trunk))
    if not pairs:
        raise ValueError("forks must contain at least 1 fork, got none")
    return pairs


def independent_effects(table: pd.DataFrame) -> Float[np.ndarray, "pair"]:
    """Return the differences of one change with other seeds: each fork minus the trunk of every other fork.

    Parameters
    ----------
    table : DataFrame
        Rows of ``ForkEffects.table`` of one change.
    """
    differences = np.subtract.outer(table["loss_fork"].to_numpy(), table["loss_trunk"].to_numpy())
    return differences[~np.eye(len(table), dtype=bool)]


def _pair_row(pair: Pair) -> dict[str, Any]:
    fork, trunk = pair
    assert fork.meta.fork is not None
    rows = fork.predictions, trunk.predictions
    if len(rows[0]) != len(rows[1]):
        raise ValueError(f"fork {fork.id} must have the {len(rows[1])} test rows of its trunk, got {len(rows[0])}")
    # The trunk may have been trained before predictions had classes.
    columns = [name for name in rows[0] if name in rows[1]]
    effect = fork.score.loss - trunk.score.loss
    # Predictions are stored in 16 bits, so they give only the width of the interval.
    half = t_estimate((rows[0]["nll"].astype(float) - rows[1]["nll"].astype(float)).to_numpy()).half_width(LEVEL)
    return {
        "trunk": trunk.id,
        "fork": fork.id,
        "seed": fork.meta.seed,
        "step": fork.meta.fork.step,
        "change": fork.meta.fork.description,
        "loss_trunk": trunk.score.loss,
        "loss_fork": fork.score.loss,
        "effect": effect,
        "low": effect - half,
        "high": effect + half,
        "identical": fork.score == trunk.score and rows[0][columns].equals(rows[1][columns]),
    }


def _summarize(table: pd.DataFrame, fractions: pd.Series, margin: float | None) -> pd.DataFrame:
    """Return one row per change and step, with a verdict."""
    records: list[dict[str, Any]] = []
    judged: dict[int, Estimate] = {}
    # Rows of one group differ in their seed only.
    for (change, step), rows in table.groupby(_SETTING, sort=False):
        if rows["trunk"].duplicated().any():
            trunk = rows["trunk"][rows["trunk"].duplicated()].iloc[0]
            raise ValueError(f"forks of one change must have different trunks, got two of {trunk}")
        spread = rows[["effect", "loss_trunk", "loss_fork"]].std(ddof=1)
        record = {"change": change, "step": step, "fraction": fractions[rows.index[0]], "pairs": len(rows)}
        estimate = t_estimate(rows["effect"].to_numpy())
        bounds = estimate.interval(LEVEL)
        low, high = (rows["low"].iloc[0], rows["high"].iloc[0]) if len(rows) == 1 else (bounds.low, bounds.high)
        record |= {"effect": estimate.mean, "low": low, "high": high, "sd": spread["effect"]}
        record["independent_sd"] = math.hypot(spread["loss_trunk"], spread["loss_fork"])
        record["margin"] = spread["loss_trunk"] if margin is None else margin
        records.append(record)
        if len(rows) >= FEWEST_PAIRS:
            judged[len(records) - 1] = estimate
    summary = pd.DataFrame(records).assign(verdict="", pairs_needed=math.nan)
    margins = summary.loc[list(judged), "margin"].to_list()
    verdicts = judge_effects(list(judged.values()), margins)
    for (row, estimate), bound, verdict in zip(judged.items(), margins, verdicts, strict=True):
        summary.loc[row, "verdict"] = verdict
        if verdict == "undecided":
            summary.loc[row, "pairs_needed"] = pairs_needed(estimate, bound)
    return summary


def judge_effects(estimates: Sequence[Estimate], margins: Sequence[float]) -> list[str]:
    """Return the verdict on each effect: lower, higher, no difference above its margin, or undecided."""
    if not estimates:
        return []
    # Two-sided, from the one-sided values that agree with the interval.
    p_values = [min(1.0, 2 * min(estimate.p_above(0), estimate.p_below(0))) for estimate in estimates]
    verdicts = []
    for estimate, margin, q in zip(estimates, margins, false_discovery_control(p_values), strict=True):
        interval = estimate.interval(LEVEL)
        verdict = "undecided"
        # Both may hold. The sign comes first, because the margin is printed next to the effect.
        if q < 2 * LEVEL and estimate.mean:
            verdict = "lower" if estimate.mean < 0 else "higher"
        elif -margin <= interval.low and interval.high <= margin:
            verdict = "no difference"
        verdicts.append(verdict)
    return verdicts


def pairs_needed(estimate: Estimate, margin: float) -> float:
    """Return how many pairs would decide an effect, if mean and spread stay: against 0, or within the margin."""
    bounds = [0.0]
    if abs(estimate.mean) < margin:
        bounds.append(math.copysign(margin, estimate.mean))
    number = min(rows_to_decide(estimate, bound, estimate.n) for bound in bounds)
    if math.isinf(number):
        return number
    # At least one more: the effect may be undecided only because several changes are tested.
    return max(estimate.n + 1, math.ceil(number))
