"""Advice on a run or an adapter: the instruments that fit into a budget of CPU time, and what follows from them."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorascope.adapters.delta import attach
from lorascope.adapters.hidden_states import evaluation_mode
from lorascope.analysis import advice_rules
from lorascope.analysis.advice import (
    COSTS,
    LEARNED,
    WRONG,
    Action,
    Advice,
    Fact,
    OpenQuestion,
    SkippedMeasurement,
    Subject,
    order_actions,
)
from lorascope.analysis.dial import WHOLE
from lorascope.analysis.forgetting_course import forgetting_course
from lorascope.analysis.rank_prices import Price
from lorascope.analysis.turning_points import FEWEST_CHECKPOINTS, find_turns
from lorascope.diagnosis.doctor import diagnose
from lorascope.diagnosis.inspection import inspect
from lorascope.inputs import models
from lorascope.inputs.tasks import Task
from lorascope.inputs.text_rows import FEWEST_ROWS, encode_rows, load_keep
from lorascope.insight.adapted_base import open_adapted
from lorascope.insight.dial import PROBE_ROWS, dial
from lorascope.insight.instrument_costs import (
    MeasurementCost,
    RemainingSeconds,
    dial_passes,
    price_passes,
    reading_passes,
    time_passes,
)
from lorascope.insight.price import BLOCK_ROWS, BLOCKS, SHARE_BLOCKS, price
from lorascope.insight.reader import LARGEST_ROWS, read
from lorascope.insight.receipt_origin import origin_of
from lorascope.insight.update_parts import ScaledUpdates, group_parts
from lorascope.observe.measured_rows import TaskLoss
from lorascope.runs.lora_config import next_lora_keywords
from lorascope.runs.receipt import Receipt
from lorascope.runs.result import Result
from lorascope.runs.series import Series
from lorascope.training.run_spec import reload_task
from lorascope.training.settings import Settings

BUDGET = 120.0
_PRICE_ROWS = (160, 320, 640, 1280)
_TIMED_ROWS = 64
_CARDS = 3
_FEWEST_PRICE_ROWS = 128  # 16 blocks of 8 rows


class Plan(NamedTuple):
    """Instruments to use: parts of the dial, empty for none, rows of the price, and whether to read words."""

    by: str = ""
    price_rows: int = 0
    reads: bool = False

    def describe(self) -> str:
        """Return the names of the instruments."""
        names = {f"dial by {self.by}": bool(self.by), "price of the rank": self.price_rows > 0, "reader": self.reads}
        return ", ".join(name for name, is_used in names.items() if is_used) or "nothing fits into the budget"


def advise(
    run: Result,
    model: str | Path | None = None,
    task: str | Path | Task | None = None,
    keep: str | Path | Task | None = None,
    *,
    budget: float = BUDGET,
    retrain: int = 0,
    reads: bool = False,
    rows: int = 192,
    keep_rows: int = 192,
    state: str = "last",
    progress: bool = True,
) -> Advice:
    """Advise what to change about a run or an adapter: which scale to ship, what to cut, and how to train next.

    The instruments that the input allows run within a budget of CPU time, the cheapest first; those that do not fit are
    named with their commands. No file changes.

    Parameters
    ----------
    run : Run, Adapter or Series
        Run or adapter; of a series of checkpoints, the last one.
    model : str or path, optional
        Its base model; see ``ls.models.load``. Without it, only the files are read.
    task : str, path or Task, optional
        Its task; see ``ls.tasks.load``.
    keep : str, path or Task, optional
        Text on which the model should stay as it was; see ``ls.dial``.
    budget : float
        CPU seconds for measurements, without retraining.
    retrain : int
        Number of seeds with which to train at another rank, and with as many components placed by size as the control
        of a uniform rank. 0 trains nothing.
    reads : bool
        Also read which words the three largest components use.
    rows, keep_rows : int
        Maximum numbers of rows of the dial.
    state : {"last", "best"}
        Saved parameters.
    progress : bool
        Show progress bars, and announce what is measured.

    Returns
    -------
    Advice
        With ``facts``, ``actions``, ``undecided``, ``skipped`` and ``config``.

    Raises
    ------
    ValueError
        Only one of ``model`` and ``task`` is given, the model is not the base of the run, or an argument is out of
        range.
    """
    if (model is None) != (task is None):
        raise ValueError("model and task are required together: losses are measured with both")
    if not budget > 0:
        raise ValueError(f"budget must be > 0 CPU seconds, got {budget:g}")
    if retrain and model is None:
        raise ValueError("retrain requires a model and a task")
    adviser = Adviser(run, model, task, keep, rows, keep_rows, state, progress)
    if model is not None:
        adviser.measure(adviser.choose(budget, reads), retrain)
    else:
        for name in ("dial", "price"):
            adviser.skip(name, "requires the base model and the task", adviser.subject.command(name))
    call = {"budget": budget, "retrain": retrain, "reads": reads, "rows": rows, "keep_rows": keep_rows}
    return adviser.give(call)


class Adviser:
    """Collects what the instruments say about one run."""

    def __init__(
        self,
        run: Result,
        model: str | Path | None,
        task: str | Path | Task | None,
        keep: str | Path | Task | None,
        rows: int,
        keep_rows: int,
        state: str,
        progress: bool,
    ) -> None:
        self.began = time.process_time()
        self.source, self.run = run, run
        if isinstance(run, Series):
            self.run = run.last
        self.model, self.task, self.keep = model, task, keep
        self.rows, self.keep_rows, self.state, self.progress = rows, keep_rows, state, progress
        names = [str(getattr(text, "name", text) or "") for text in (task, keep)]
        self.subject = Subject(str(run.path or run.id), str(model or "NAME"), names[0] or "NAME", names[1])
        self.subject = self.subject._replace(state=state)
        self.plan = Plan()
        self.learns = True  # until the dial says otherwise
        self.facts: list[Fact] = []
        self.actions: list[Action] = []
        self.questions: list[OpenQuestion] = []
        self.skipped: list[SkippedMeasurement] = []
        self.receipts: dict[str, str] = {}
        self.config: dict[str, Any] = {}
        self._read_files(run)

    def skip(self, name: str, reason: str, command: str = "") -> None:
        """Note a measurement that is not made."""
        self.skipped.append(SkippedMeasurement(name, reason, command))

    def _note(self, facts: Iterable[Fact], command: str) -> None:
        """Note facts with the command that measures them again."""
        self.facts += [fact._replace(command=command) for fact in facts]

    def _command(self, verb: str, *options: str) -> str:
        """Return a command that reads the files of the run; "" if it has none."""
        if self.run.path is None:
            return ""
        return shlex.join(["lorascope", *verb.split(), str(self.run.path), *options])

    def _read_files(self, run: Result) -> None:
        """Note what the files say: faults, ranks that hold the energy, and turning points of a series."""
        findings = diagnose(self.run)
        self._note([Fact(WRONG, finding.cause, finding.message) for finding in findings], self._command("doctor"))
        self.actions += advice_rules.actions_of_findings([(finding.cause, finding.fix) for finding in findings])
        inspection = inspect(self.run)
        (_, kind), *facts = inspection.facts
        self.description = "; ".join([kind, *dict(facts).values()])
        modules = inspection.modules
        adapted = modules[modules["rank"].notna() & modules["energy_rank"].notna()]
        if len(adapted):
            used, total = int(adapted["energy_rank"].sum()), int(adapted["rank"].sum())
            text = f"{used} of {total} components hold 90% of the energy"
            self._note([Fact(LEARNED, "energy", text, used)], self._command("inspect"))
        if isinstance(run, Series) and len(run.update_steps()) >= FEWEST_CHECKPOINTS:
            turned = find_turns(run)
            text = "; ".join(turned.describe())
            self._note([Fact(LEARNED, "turns", text, len(turned.summary()))], turned.receipt.command)
        self._read_course()

    def _read_course(self) -> None:
        """Note the step that a recorded gauge says to keep."""
        # Only a run that was trained with the gauge has both.
        if not self.run.has_history or "row_loss" not in set(self.run.table["quantity"]):
            return
        course = forgetting_course(self.run)
        kept, last = course[course["keep"]].iloc[0], course.iloc[-1]
        if kept["step"] < last["step"]:
            text = (
                f"step {kept['step']:.0f} is {kept['distance']:.3g} from the base, the last step {last['distance']:.3g}"
            )
            fact = Fact(COSTS, "step to keep", text, float(kept["step"]))
            self._note([fact], self._command("plot kl", "-o", "kl.csv"))

    # What fits is decided before anything is measured, so that a receipt can repeat it at any speed of the machine.
    def choose(self, budget: float, reads: bool) -> Plan:
        """Choose the instruments that fit into a budget, the cheapest first; note the others with their commands."""
        if not self.run.ranks(self.state):
            self.skip("dial, price", "the run has no adapter")
            return Plan()
        if dependent := sorted(self.run.input_dependent_modules(self.state)):
            self.skip("dial, price", f"the update of {dependent[0]} depends on its input; see ls.at_gates")
            return Plan()
        costs = self._estimate_costs()
        spent = time.process_time() - self.began
        remaining = RemainingSeconds(budget - spent)
        by, is_read = "", False
        if remaining.takes(costs.dial[WHOLE].seconds):
            by = WHOLE
        else:
            self._skip_costly("dial", costs.dial[WHOLE], budget, "--by", WHOLE)
        price_rows = 0
        if not costs.price_rows:
            self.skip("price", f"fewer than {_FEWEST_PRICE_ROWS} rows in the validation split")
        elif remaining.takes(costs.price.seconds_of(costs.price_rows[0])):
            price_rows = costs.price_rows[0]
        else:
            self._skip_costly("price", costs.price, budget)
        # Finer parts replace coarser ones, so that only the difference of their costs is added.
        for finer in ("layer", "module"):
            if by and remaining.takes(costs.dial[finer].seconds - costs.dial[by].seconds):
                by = finer
        if by and by != "module":
            self._skip_costly("dial", costs.dial["module"], budget, "--by", "module")
        if reads and remaining.takes(costs.reading.seconds):
            is_read = True
        elif reads:
            self._skip_costly("read", costs.reading, budget)
        # What remains shortens the intervals of the price.
        for rows in costs.price_rows:
            if rows > price_rows > 0 and remaining.takes(costs.price.per_row * (rows - price_rows)):
                price_rows = rows
        return Plan(by, price_rows, is_read)

    def _skip_costly(self, name: str, cost: MeasurementCost, budget: float, *options: str) -> None:
        """Skip a measurement that the budget does not pay for, with the command of as many rows as it would pay for."""
        title = " ".join([name, *options])
        reason = f"about {cost.seconds:.0f} CPU seconds do not fit into the budget of {budget:g}"
        rows = cost.rows_within(budget)
        if 0 < rows < cost.rows:
            reason += f"; {rows} rows take about {cost.seconds_of(rows):.0f}"
            options += ("--rows", str(rows))
            if name == "dial":
                options += ("--keep-rows", str(rows))
        elif rows:
            reason += " with the others"
        self.skip(title, reason, self.subject.command(name, *options))

    def _estimate_costs(self) -> _Costs:
        """Estimate the CPU seconds of every instrument from timed passes over a few rows of the adapted model."""
        assert self.model is not None
        began = time.process_time()
        adapted = open_adapted(self.run, self.model, self.loaded_task, self.state)
        opening = time.process_time() - began
        # An unreadable text must not look like one that is missing, which skips the dial.
        if self.keep is not None:
            load_keep(self.keep, adapted.task, adapted.base)
        max_length = self.run.meta.settings.get("max_length", Settings.max_length)
        text = encode_rows(adapted.base, adapted.task, "validation", _TIMED_ROWS, max_length)
        loss = TaskLoss(adapted.base, *text)
        attach(adapted.base, adapted.deltas)
        with evaluation_mode(adapted.base):
            timed = time_passes(loss, ScaledUpdates(adapted.base, adapted.deltas, {}))
        modules = len(adapted.updates)
        layers = len(group_parts(adapted.base, adapted.updates, "layer").parts)
        available = self.validation_rows
        dial_rows = max(min(self.rows, available), self.keep_rows)
        probe_seconds = 0.0
        if models.missing(adapted.base):  # a probe is of encoders with a new head, whose base predicts nothing
            probe_seconds = 2 * PROBE_ROWS * timed.forward
        dials = {}
        for by, number in ((WHOLE, 0), ("layer", layers), ("module", modules)):
            # Rows to keep are about as many as those of the task, and about as long.
            seconds = 2 * timed.per_row(dial_passes(by, number))
            dials[by] = MeasurementCost(opening + probe_seconds, seconds, dial_rows, FEWEST_ROWS)
        price_rows = sorted({min(rows, available) for rows in _PRICE_ROWS if available >= _FEWEST_PRICE_ROWS})
        # Cuts to every rank, to as many components of all modules, and to them as a budget.
        # With more rows, path shares are measured on a smaller fraction of them.
        shared = SHARE_BLOCKS / min(BLOCKS, _PRICE_ROWS[0] // BLOCK_ROWS)
        seconds = timed.per_row(price_passes(3 * len(self._cut_ranks()), shared))
        price_cost = MeasurementCost(opening, seconds, price_rows[-1] if price_rows else 0, _FEWEST_PRICE_ROWS)
        rows = min(LARGEST_ROWS, available)
        train_rows = int((self.loaded_task.table["split"] == "train").sum())
        selection = min(LARGEST_ROWS, train_rows) / rows
        seconds = timed.per_row(reading_passes(_CARDS, selection))
        return _Costs(dials, price_cost, price_rows, MeasurementCost(opening, seconds, rows, rows))

    @cached_property
    def loaded_task(self) -> Task:
        """Task of the call, which is loaded once."""
        assert self.task is not None
        if isinstance(self.task, Task):
            return self.task
        return reload_task(self.run, str(self.task))

    @property
    def validation_rows(self) -> int:
        """Number of rows of the validation split."""
        return len(self.loaded_task.split("validation"))

    @cached_property
    def counts(self) -> list[int]:
        """Number of components of every module."""
        return [int((update.svd()[1] > 0).sum()) for update in self.run.updates(state=self.state).values()]

    def _cut_ranks(self) -> list[int]:
        """Return the ranks to cut to: halves of the present one."""
        ranks, rank = [], max(self.counts, default=0) // 2
        while rank:
            ranks.append(rank)
            rank //= 2
        return ranks or [1]

    def measure(self, plan: Plan, retrain: int) -> None:
        """Use the instruments of a plan."""
        self.plan = plan
        if plan.by or plan.price_rows:
            self.subject = self.subject._replace(rows=self.validation_rows)
        if self.progress:
            print(f"advise: {plan.describe()}", file=sys.stderr)
        if plan.by:
            self._turn_dial(plan.by)
        if plan.price_rows and not self.learns:
            # Cuts of an update that learns nothing cost nothing, at any rank.
            self.skip("price", "the update is not shown to learn, so no rank follows", self.subject.command("price"))
        elif plan.price_rows:
            self._price(plan.price_rows, retrain)
        elif retrain:
            self.skip("retraining", "follows the price of the rank, which was not measured")
        if plan.reads:
            self._read_words()

    def _turn_dial(self, by: str) -> None:
        assert self.model is not None
        limits: dict[str, Any] = {"rows": self.rows, "keep_rows": self.keep_rows}
        try:
            dialed = dial(
                self.run,
                self.model,
                self.loaded_task,
                self.keep,
                by=by,
                state=self.state,
                progress=self.progress,
                **limits,
            )
        except ValueError as error:  # the model fits, so its texts do not
            self.skip("dial", str(error))
            return
        self.learns = advice_rules.is_learning_shown(dialed)
        self._note(advice_rules.facts_of_dial(dialed), dialed.receipt.command)
        self.actions += advice_rules.actions_of_dial(dialed, self.subject)
        self.questions += advice_rules.questions_of_dial(dialed, self.subject)
        self.receipts |= dialed.receipt.rows

    def _price(self, rows: int, retrain: int) -> None:
        assert self.model is not None
        ranks = self._cut_ranks()
        budgets = [int(np.minimum(self.counts, rank).sum()) for rank in ranks]
        options: dict[str, Any] = {"rows": rows, "state": self.state, "progress": self.progress}
        try:
            priced = price(self.run, self.model, self.loaded_task, ranks, budgets=budgets, **options)
        except ValueError as error:  # such as an update that has no factors
            self.skip("price", str(error))
            return
        if retrain:
            # The first price decides at which rank to train, since training is the only costly part.
            target = 2 * priced.rank if _points_beyond(priced) else max(1, priced.rank // 2)
            options |= {"retrain": retrain, "placed": True, "budgets": budgets}
            try:
                priced = price(self.run, self.model, self.loaded_task, [target], **options)
                self._configure(priced, target)
            except ValueError as error:  # the cuts of such a run are measured all the same
                self.skip("retraining", str(error))
        self._note(advice_rules.facts_of_price(priced), priced.receipt.command)
        self.actions += advice_rules.actions_of_price(priced, self.subject)
        self.questions += advice_rules.questions_of_price(priced, self.subject)
        self.questions += advice_rules.find_contradictions(self.actions, priced)
        self.receipts["rank"] = priced.receipt.rows["task"]

    def _configure(self, priced: Price, rank: int) -> None:
        """Set the configuration of the next training, if it was retrained and is as good as the present rank."""
        if priced.verdict != "enough":
            return
        row = advice_rules.smallest_enough(priced)
        # Ranks that differ between modules are harder to serve, so they must be shown to be better.
        ranks = dict.fromkeys(priced.sigma, rank)
        placement = priced.placement(rank)
        if placement is not None and placement.interval(0.025).high < 0:
            ranks = priced.ranks(int(row["components"]))
        keywords = next_lora_keywords(self.run, ranks, self.run.updates(state=self.state))
        self.config = keywords | {"lr": float(row["lr"])}

    def _read_words(self) -> None:
        assert self.model is not None
        try:
            reading = read(self.run, self.model, self.loaded_task, _CARDS, state=self.state, progress=self.progress)
        except ValueError as error:  # such as too few rows
            self.skip("read", str(error))
            return
        for card in reading.cards:
            text = f"{card.title}: {', '.join(card.used) or 'no word above random components'}"
            self._note([Fact(LEARNED, "words", text, *card.total[:3], "nats")], reading.receipt.command)

    def give(self, call: Mapping[str, Any]) -> Advice:
        """Return the advice with everything that was noted."""
        names = {name: str(getattr(value, "name", value) or "") for name, value in self._texts().items()}
        task = None
        if self.model is not None:
            task = self.loaded_task
        options = {"read" if name == "reads" else name: value or None for name, value in call.items()}
        receipt = Receipt(
            run=self.run.id,
            base=str(self.model or ""),
            rows=self.receipts,
            call={"path": self.subject.path, **names, "state": self.state, "plan": self.plan._asdict(), **call},
            **origin_of("advise", self.source, str(self.model or ""), task, self.keep, **options, state=self.state),
            seconds=time.process_time() - self.began,
        )
        return Advice(
            label=self.run.label,
            description=self.description,
            facts=tuple(self.facts),
            actions=order_actions(self.actions),
            undecided=tuple(self.questions),
            skipped=tuple(self.skipped),
            config=self.config,
            receipt=receipt,
        )

    def _texts(self) -> dict[str, Any]:
        return {"model": self.model, "task": self.task, "keep": self.keep}


@dataclass(frozen=True)
class _Costs:
    """Costs of the dial by its parts, of the price with the numbers of rows to choose from, and of the reader."""

    dial: Mapping[str, MeasurementCost]
    price: MeasurementCost
    price_rows: Sequence[int]
    reading: MeasurementCost


def _points_beyond(priced: Price) -> bool:
    """Return whether gradients point beyond the rank, while the control finds none and half the rank is not enough."""
    modules = priced.modules
    return priced.verdict != "wasteful" and modules["directions"].sum() > 0 and modules["control"].sum() == 0
