"""Price of the rank of an adapter: exact cuts to smaller ranks, directions beyond it, and retraining at other ranks."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from lorascope.adapters.activation_patching import Batch
from lorascope.adapters.delta import attach, detach
from lorascope.adapters.hidden_states import evaluation_mode
from lorascope.analysis.gradient_signal import ModuleSignal, count_directions, signal_p, smallest_signal, total_inside
from lorascope.analysis.part_verdicts import even_share
from lorascope.analysis.rank_prices import (
    RUNS,
    CutPrice,
    Evidence,
    Price,
    components_within,
    count_unused,
    judge_rank,
    rows_for_verdict,
    tabulate_modules,
    tabulate_prices,
)
from lorascope.analysis.seed_intervals import Estimate, t_estimate
from lorascope.analysis.track_record import RECORD, add_entries, read_residuals
from lorascope.array_types import Float
from lorascope.inputs.tasks import Task
from lorascope.inputs.text_rows import TextRows, encode_rows
from lorascope.insight.adapted_base import AdaptedBase, open_adapted
from lorascope.insight.cut_updates import component_shares, cut_updates
from lorascope.insight.instrument_costs import announce, price_passes, time_passes
from lorascope.insight.measured_results import recall
from lorascope.insight.missing_directions import CONTROL, REAL, find_signals
from lorascope.insight.receipt_origin import origin_of
from lorascope.insight.retraining import (
    RetrainedSpec,
    describe_cost,
    list_retrainings,
    missing_for_retraining,
    tabulate_runs,
    train_ranks,
)
from lorascope.insight.update_parts import ScaledUpdates, component_parts
from lorascope.observe.measured_rows import TaskLoss
from lorascope.runs.receipt import Receipt
from lorascope.runs.result import Result
from lorascope.runs.run import Run
from lorascope.schema import module_table
from lorascope.training.settings import Settings
from lorascope.updates import LowRank
from lorascope.updates.low_rank import Residual

RANKS = (1, 2, 4, 8)
BLOCKS, FEWEST_BLOCKS = 40, 16
BLOCK_ROWS = 8  # gradients of fewer rows are too far from normal for tests over blocks
SHARE_BLOCKS = 10  # path shares take a pass per node of the quadrature, so not on all blocks
_SEEDS = 3  # of a suggested retraining: with two, an interval reaches 12.7 standard errors to each side


def price(
    run: Result,
    model: str | Path,
    task: str | Path | Task,
    ranks: Sequence[int] = RANKS,
    rows: int = 1280,
    retrain: int = 0,
    *,
    budgets: Sequence[int] = (),
    placed: bool = False,
    tolerance: float | None = None,
    state: str = "last",
    progress: bool = True,
) -> Price:
    """Measure the cost of smaller ranks, and whether the present one is too small.

    The cut price is exact for this adapter. It is not the price of training at a smaller rank, which only retraining
    measures.

    Parameters
    ----------
    run : Run or Adapter
        Run or adapter whose updates are products B A.
    model : str or path
        Its base model; see ``ls.models.load``.
    task : str, path or Task
        Task on whose validation rows all is measured; see ``ls.tasks.load``. For retraining, the task of the run.
    ranks : sequence of int
        Ranks per module to cut to, and to train at. Half the present rank is always among those to cut to.
    rows : int
        Maximum number of rows.
    retrain : int
        Number of seeds with which to train at each rank, at the same and at three times the learning rate. The runs are
        stored next to the run, and their prices are added to the track record ``prices.jsonl`` there.
    budgets : sequence of int
        Numbers of components of all modules to cut to as well, keeping the largest singular values.
    placed : bool
        With ``retrain``, also train every smaller rank with as many components that the modules have among the largest
        of all, to see whether this is better than a uniform rank.
    tolerance : float, optional
        Increase of the mean task loss that counts as none, in nats; by default a tenth of the decrease by the update.
    state : {"last", "best"}
        Saved parameters.
    progress : bool
        Show a progress bar, and announce the cost of retraining.

    Returns
    -------
    Price
        With ``table``, ``summary()`` and ``ranks(budget)``.

    Raises
    ------
    ValueError
        The run has no low-rank update, the model is not its base, there are fewer than 16 blocks of 8 rows, the run
        cannot be trained again, or an argument is out of range.
    """
    _require_arguments(ranks, retrain, tolerance)
    products = _require_products(run, state)
    adapted = open_adapted(run, model, task, state)
    if retrain and (reason := missing_for_retraining(run, adapted.task)):
        raise ValueError(f"cannot retrain at another rank: {reason}")
    residuals = _read_record(run)
    call = PriceCall(str(model), tuple(ranks), rows, retrain, tuple(budgets), placed, tolerance, state)
    measure = partial(_measure_price, run, adapted, products, call, progress)
    if retrain:  # its runs are stored themselves
        return replace(measure(), residuals=residuals)
    content = {"call": call, "task": adapted.task.hash}
    return replace(recall("price", run, adapted, content, measure, progress), residuals=residuals)


class PriceCall(NamedTuple):
    """Arguments of a price that change its result, apart from its task."""

    model: str
    ranks: tuple[int, ...]
    rows: int
    retrain: int
    budgets: tuple[int, ...]
    placed: bool
    tolerance: float | None
    state: str


def _measure_price(
    run: Result, adapted: AdaptedBase, products: Mapping[str, LowRank], call: PriceCall, progress: bool
) -> Price:
    """Measure the price of the rank of a run; the track record is read by the caller."""
    began = time.process_time()
    ranks, retrain, budgets = call.ranks, call.retrain, call.budgets
    max_length = run.meta.settings.get("max_length", Settings.max_length)
    text = encode_rows(adapted.base, adapted.task, "validation", call.rows, max_length)
    if retrain and progress:
        print(f"retraining: {describe_cost(cast(Run, run), ranks, retrain, call.placed)}", file=sys.stderr)
    with tqdm(desc="price", unit="pass", disable=not progress, leave=False) as bar:
        measured = _MeasuredRank(adapted, products, text, bar)
        with evaluation_mode(adapted.base):
            per_pass = time_passes(measured.loss, measured.updates)
        shared = len(measured.shared_blocks) / len(measured.blocks)
        per_row = per_pass.per_row(price_passes(2 * len(ranks) + len(budgets), shared))
        announce("price", per_row * len(text.table), progress)
        rank = measured.rank
        cuts = measured.cut_prices(sorted({*ranks, rank // 2}), budgets)
        learn = measured.increase(dict.fromkeys(products, 0))
        signals = measured.signals()
        unused = measured.unused()
        # Retrained runs open separate bases, and this one is not needed any more.
        detach(adapted.base, join=False)
        runs, doubled = pd.DataFrame(columns=RUNS), None
        smaller: list[Estimate] = []
        if retrain:
            repeated = _Retraining(cast(Run, run), call.model, adapted.task, text, measured.placements(ranks), bar)
            runs, doubled = repeated.measure(ranks, retrain, call.placed)
            repeated.record(cuts, runs)
            smaller = repeated.prices_below(runs)
    tolerance = even_share(learn.mean, 0) if call.tolerance is None else call.tolerance
    half = next(cut.increase for cut in cuts if cut.rank == rank // 2)
    # Half the rank is never above the rank.
    assert half is not None
    evidence = Evidence(
        retrained=smaller,
        half=half,
        directions=sum(count_directions(signals[REAL]).values()),
        control=sum(count_directions(signals[CONTROL]).values()),
        doubled=doubled,
        inside_p=signal_p(total_inside(signals[REAL])),
    )
    verdict = judge_rank(evidence, tolerance)
    receipt = Receipt(
        run=run.id,
        base=call.model,
        rows={"task": measured.loss.receipt},
        call={
            "task": adapted.task.name,
            "ranks": [*ranks],
            "retrain": retrain,
            "budgets": [*budgets],
            "placed": call.placed,
            "tolerance": call.tolerance,
            "state": call.state,
        },
        **origin_of(
            "price",
            run,
            call.model,
            adapted.task,
            ranks=ranks,
            rows=call.rows,
            retrain=retrain or None,
            budgets=budgets,
            placed=call.placed,
            tolerance=call.tolerance,
            state=call.state,
        ),
        seconds=time.process_time() - began,
    )
    return Price(
        label=run.label,
        rank=rank,
        table=tabulate_prices(cuts, runs),
        modules=tabulate_modules(measured.describe(), measured.sigma, unused, signals[REAL], signals[CONTROL]),
        runs=runs,
        sigma=measured.sigma,
        verdict=verdict,
        tolerance=tolerance,
        rows_needed=rows_for_verdict(half, tolerance, len(text.table)) if verdict == "undecided" else np.nan,
        smallest_signal=smallest_signal(signals[REAL]),
        residuals=np.zeros(0),
        **_next_training(run, call.model, adapted.task, evidence, verdict),
        receipt=receipt,
    )


def _require_arguments(ranks: Sequence[int], retrain: int, tolerance: float | None) -> None:
    if not ranks or min(ranks) < 0 or len(set(ranks)) < len(ranks):
        raise ValueError(f"ranks must be different integers >= 0, got {', '.join(map(str, ranks)) or 'none'}")
    if retrain < 0:
        raise ValueError(f"retrain must be a number of seeds >= 0, got {retrain}")
    if retrain and min(ranks) < 1:
        raise ValueError("ranks must be >= 1 for retraining, got 0")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance must be > 0, got {tolerance:g}")


def _require_products(run: Result, state: str) -> dict[str, LowRank]:
    """Return the updates as the products whose factors train."""
    updates = dict(run.updates(state=state)) if run.ranks(state) else {}
    if not updates:
        raise ValueError(f"price requires low-rank updates, but {run.reference} has none")
    for module, update in updates.items():
        # Other products, such as VeRA's, have factors that do not train, so that their steps are not B X + Y A.
        if type(update) not in (LowRank, Residual) or not update.whole:
            raise ValueError(f"price requires low-rank updates B A, got {type(update).__name__} in {module}")
    return cast(dict[str, LowRank], updates)


class _MeasuredRank:
    """Adapted model with the rows on which its rank is measured; its adapters stay attached."""

    def __init__(self, adapted: AdaptedBase, products: Mapping[str, LowRank], text: TextRows, bar: tqdm) -> None:
        self.base, self.products, self.bar = adapted.base, products, bar
        self.loss = TaskLoss(adapted.base, *text)
        self.blocks = make_blocks(text, self.loss.clusters)
        self.components = component_parts(adapted.base, adapted.updates).directions
        self.sigma: dict[str, Float[np.ndarray, "_"]] = {}
        for module, directions in self.components.items():
            self.sigma[module] = directions.size.double().numpy()
        self.rank = max(map(len, self.sigma.values()))
        if self.rank == 0:
            raise ValueError("cannot price a rank: the update is zero in all modules")
        attach(adapted.base, adapted.deltas)
        self.updates = ScaledUpdates(adapted.base, adapted.deltas, self.components)
        with evaluation_mode(adapted.base):
            self.values = self.loss.values()

    def _cut_values(self, ranks: Mapping[str, int]) -> Float[np.ndarray, "row"]:
        """Return the loss of each row after a cut to a number of components per module."""
        self.bar.update()
        with evaluation_mode(self.base), cut_updates(self.base, self.components, ranks):
            return self.loss.values()

    def increase(self, ranks: Mapping[str, int]) -> Estimate:
        """Estimate the loss increase of a cut to a number of components per module."""
        return self.loss.rows().estimate(self._cut_values(ranks) - self.values)

    def placements(self, ranks: Sequence[int]) -> dict[int, dict[str, int]]:
        """Return the ranks of the modules if as many components as a smaller rank has are the largest of all."""
        return {rank: components_within(self.sigma, self._count(self._truncate_ranks(rank))[0]) for rank in ranks}

    def _truncate_ranks(self, rank: int) -> dict[str, int]:
        """Return the number of components of every module at a rank; a module may have fewer."""
        return {module: min(rank, len(sigma)) for module, sigma in self.sigma.items()}

    def cut_prices(self, ranks: Sequence[int], budgets: Sequence[int]) -> list[CutPrice]:
        """Measure cuts to ranks and to budgets; a rank above that of the update only has its size."""
        prices = []
        for rank in ranks:
            # A larger rank is only trained.
            if rank > self.rank:
                prices.append(CutPrice(rank, *self._count(dict.fromkeys(self.sigma, rank)), None))
                continue
            kept_ranks = self._truncate_ranks(rank)
            cut_values = self._cut_values(kept_ranks)
            increase = self.loss.rows().estimate(cut_values - self.values)
            size = self._count(kept_ranks)
            placed = None
            if size[0]:
                placed_values = self._cut_values(components_within(self.sigma, size[0]))
                placed = self.loss.rows().estimate(placed_values - cut_values)
            prices.append(CutPrice(rank, *size, increase, placed))
        for budget in budgets:
            kept_ranks = components_within(self.sigma, budget)
            prices.append(CutPrice(None, *self._count(kept_ranks), self.increase(kept_ranks)))
        return prices

    def _count(self, kept_ranks: Mapping[str, int]) -> tuple[int, int]:
        """Return the numbers of components and of their parameters."""
        parameters = sum(number * sum(self.products[module].shape) for module, number in kept_ranks.items())
        return sum(kept_ranks.values()), parameters

    def signals(self) -> dict[str, dict[str, ModuleSignal]]:
        """Measure the gradient signal of every module, with real and with drawn labels."""
        with evaluation_mode(self.base):
            return find_signals(self.base, self.products, self.loss, self.blocks, self.bar)

    @property
    def shared_blocks(self) -> list[Batch]:
        """Blocks on which path shares are measured."""
        return self.blocks[:: max(1, len(self.blocks) // SHARE_BLOCKS)]

    def unused(self) -> dict[str, int]:
        """Count the unused components of every module."""
        blocks = self.shared_blocks
        counts = np.array([float(self.loss.count_targets(block).sum()) for block in blocks])
        with evaluation_mode(self.base):
            return count_unused(component_shares(self.updates, self.loss, blocks, self.bar), counts)

    def describe(self) -> pd.DataFrame:
        """Return module, layer and role of the adapted modules."""
        table = module_table.describe(self.base)
        return table.loc[table["module"].isin(list(self.sigma)), ["module", "layer", "role"]]


def make_blocks(text: TextRows, clusters: Any) -> list[Batch]:
    """Divide rows into blocks of similar size, each of whole clusters, because rows of a cluster are not independent.

    Raises
    ------
    ValueError
        There are fewer than 16 blocks of 8 rows.
    """
    rows = len(clusters)
    # A cluster belongs to the block in which its first row would be.
    sizes = np.bincount(clusters)
    starts = np.cumsum(sizes) - sizes
    count = min(BLOCKS, rows // BLOCK_ROWS)
    blocks = (starts * count // rows)[clusters]
    numbers = np.unique(blocks)
    if len(numbers) < FEWEST_BLOCKS:
        raise ValueError(
            f"cannot price a rank: {FEWEST_BLOCKS} blocks of {BLOCK_ROWS} validation rows or more are required, got "
            f"{rows} rows in {len(sizes)} clusters"
        )
    return [text.encoded.batch(np.flatnonzero(blocks == number)) for number in numbers]


@dataclass(frozen=True)
class _Retraining:
    """Training of a run at other ranks, and measurement of the results on the same rows."""

    run: Run
    model: str | Path
    task: Task
    text: TextRows
    placements: Mapping[int, Mapping[str, int]]
    bar: tqdm

    def measure(self, ranks: Sequence[int], seeds: int, placed: bool) -> _Retrained:
        """Train at ranks, and return the runs and the number of directions beyond twice the present rank."""
        specs = list_retrainings(self.run, ranks, seeds, placed)
        runs = train_ranks(self.run, self.model, self.task, specs, self.placements, self.bar)
        meta = self.run.meta
        doubled = runs.get(RetrainedSpec(2 * meta.recipe["rank"], 0, meta.settings["lr"], meta.seed or 0))
        directions = None
        if doubled is not None:
            signals = self._open(doubled).signals()
            directions = sum(count_directions(signals[REAL]).values())
        return _Retrained(tabulate_runs(runs, self.run, self._loss), directions)

    def _open(self, run: Run) -> _MeasuredRank:
        adapted = open_adapted(run, self.model, self.task, "last")
        return _MeasuredRank(adapted, _require_products(run, "last"), self.text, self.bar)

    def _loss(self, run: Run) -> float:
        measured = self._open(run)
        return float(measured.values.sum() / measured.loss.counts.sum())

    def prices_below(self, runs: pd.DataFrame) -> list[Estimate]:
        """Estimate the prices of retraining at smaller ranks, by rank and learning rate."""
        uniform = runs[runs["placed"] == 0]
        smaller = uniform[uniform["rank"] < self.run.meta.recipe["rank"]].groupby(["rank", "lr"])["change"]
        # A single seed has no interval.
        return [t_estimate(changes.to_numpy()) for _, changes in smaller if len(changes) > 1]

    def record(self, cuts: Sequence[CutPrice], runs: pd.DataFrame) -> None:
        """Add the prices of smaller ranks at the same learning rate to the track record."""
        meta = self.run.meta
        entries = []
        for cut in cuts:
            is_uniform = (runs["rank"] == cut.rank) & (runs["placed"] == 0)
            same_rate = runs[is_uniform & (runs["lr"] == meta.settings["lr"])]
            # Only a smaller rank at the same rate has both prices.
            if cut.increase is None or cut.rank is None or cut.rank >= meta.recipe["rank"] or same_rate.empty:
                continue
            entries.append(
                {
                    "run": meta.id,
                    "task": meta.task,
                    "base": meta.model,
                    "rank": meta.recipe["rank"],
                    "to": cut.rank,
                    "seeds": len(same_rate),
                    "cut": cut.increase.mean,
                    "retrained": float(same_rate["change"].mean()),
                }
            )
        assert self.run.path is not None
        add_entries(self.run.path.parent / RECORD, entries)


class _Retrained(NamedTuple):
    runs: pd.DataFrame
    directions: int | None


def _read_record(run: Result) -> Float[np.ndarray, "cell"]:
    if run.path is None:
        return np.zeros(0)
    return read_residuals(run.path.parent / RECORD, run.id)


def _next_training(run: Result, model: str, task: Task, evidence: Evidence, verdict: str) -> dict[str, str]:
    """Return the command that retrains where the answer is open, with its cost.

    The answer is open above the rank if directions are missing, or below it.
    """
    if missing_for_retraining(run, task) or evidence.retrained:
        return {"next_command": "", "next_cost": ""}
    rank = run.meta.recipe["rank"]
    # A cut without loss precedes gradients, as in the verdict. Below rank 1 there is nothing to train.
    points_beyond = evidence.directions > 0 and not evidence.control
    is_open_above = rank == 1 or (points_beyond and verdict != "wasteful")
    target = 2 * rank if is_open_above else rank // 2
    words = ["lorascope", "price", str(run.path), "--model", model, "--task", task.name]
    command = shlex.join([*words, "--ranks", str(target), "--retrain", str(_SEEDS)])
    return {"next_command": command, "next_cost": describe_cost(cast(Run, run), [target], _SEEDS)}
