"""One run among the kept seeds: what claims compute of a single run, and the range of kept tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lorascope.pages.report_figure import ReportFigure
from lorascope.papers.judging.kept_runs import RUN_COLUMNS, Evidence
from lorascope.papers.judging.registration import Registration
from lorascope.papers.judging.statistics import Statistic
from lorascope.papers.lisa import NORMS
from lorascope.papers.lora import AMPLIFICATION
from lorascope.papers.rank_tables import RANKS
from lorascope.papers.registry import PAIRS
from lorascope.papers.score_agreement import SCORES
from lorascope.papers.training.study_training import machine
from lorascope.papers.training.train_arms import keep_functions
from lorascope.plots.builders import over_kept
from lorascope.runs.run import Run

# Predictions are on other test rows; scores of components take longer than the training of the run.
_LEFT_OUT = {"margin", "nll", SCORES}
Tables = Mapping[tuple[str, str], pd.DataFrame]
"""Kept tables by name and label of the arm."""


@dataclass(frozen=True)
class ComparedQuantity:
    """A quantity of each run of one arm, by which a run is compared with the kept ones."""

    claim: str
    text: str
    statistic: Statistic

    @property
    def arm(self) -> str:
        """Label of the arm."""
        (label,) = self.statistic.arms()
        return label


def quantities(claims: Registration, labels: Collection[str]) -> list[ComparedQuantity]:
    """Return the quantities to compare: what claims compute of single runs, except predictions and component scores."""
    compared = []
    for id, claim in claims.of_tier("primary", "secondary").items():
        if claim.design.interval != "t":  # two-way intervals are of test rows, and pairs need several runs
            continue
        # The text of a control says what differs from the statistic, so it does not describe a quantity.
        texts = (claim.text.statistic, f"{claim.text.statistic}; control: {claim.text.control}")
        for statistic, text in zip(PAIRS[id], texts, strict=True):
            arms, read = statistic.arms(), {name for name, _ in statistic.reads()}
            if len(arms) == 1 and arms <= set(labels) and not read & _LEFT_OUT:
                compared.append(ComparedQuantity(id, text, statistic))
    return compared


def keep_tables(runs: Mapping[str, Run], compared: Sequence[ComparedQuantity]) -> dict[tuple[str, str], pd.DataFrame]:
    """Compute the tables of the runs that are compared with those of the kept runs, as the evidence keeps them."""
    make = keep_functions()
    keys = {key for quantity in compared for key in quantity.statistic.reads()}
    return {(name, label): make[name, label](runs[label]) for name, label in sorted(keys)}


def positions(
    runs: Mapping[str, Run], tables: Tables, compared: Sequence[ComparedQuantity], evidence: Evidence
) -> pd.DataFrame:
    """Compare runs with the kept seeds: tabulate accuracy and quantities, and their positions among these.

    Returns
    -------
    DataFrame
        ``arm, claim, quantity, value, seeds, lowest, mean, highest, below``: the number of kept seeds, the range of
        their values, and the number of those below the value of the run.
    """
    new_runs, rows = _as_evidence(runs, tables), []
    for label, run in runs.items():
        accuracies = _judged(evidence, label)["test_metric"].to_numpy("float64")
        row = {"arm": label, "claim": "", "quantity": "test accuracy"}
        rows.append(row | _position(run.score.metric, accuracies))
    for quantity in compared:
        statistic, of_arm = quantity.statistic, _judged(evidence, quantity.arm)
        for name, _ in statistic.reads():
            of_arm = of_arm[of_arm["run"].isin(evidence.kept.get(name, {}).keys())]
        value = float(statistic(new_runs, [runs[quantity.arm].seed])[0])
        values = np.array([])
        if len(of_arm):
            values = statistic(evidence, of_arm["seed"].tolist())
        row = {"arm": quantity.arm, "claim": quantity.claim, "quantity": quantity.text}
        rows.append(row | _position(value, values))
    return pd.DataFrame(rows)


def _judged(evidence: Evidence, label: str) -> pd.DataFrame:
    return evidence.judged[evidence.judged["arm"] == label]


def _position(value: float, values: np.ndarray) -> dict[str, Any]:
    """Return a value with the number and range of other ones, and the number of those below it."""
    lowest = mean = highest = below = math.nan
    if len(values):
        lowest, mean, highest, below = values.min(), values.mean(), values.max(), int((values < value).sum())
    return {
        "value": value, "seeds": len(values), "lowest": lowest, "mean": mean, "highest": highest, "below": below,
    }  # fmt: skip


def _as_evidence(runs: Mapping[str, Run], tables: Tables) -> Evidence:
    """Return the runs and their tables in the form that statistics read."""
    rows = []
    for label, run in runs.items():
        facts = {"run": run.id, "arm": label, "role": "judged", "seed": run.seed}
        rows.append(dict.fromkeys(RUN_COLUMNS) | machine() | facts)
    by_name: dict[str, dict[str, pd.DataFrame]] = {}
    for (name, label), table in tables.items():
        by_name.setdefault(name, {})[runs[label].id] = table
    return Evidence(pd.DataFrame(rows), pd.DataFrame(), kept=by_name)


@dataclass(frozen=True)
class View:
    """Chart that compares a table with the kept ones: ``cells(table, modules)`` returns ``panel, x, value``."""

    title: str
    axes: tuple[str, str]
    cells: Callable[[pd.DataFrame, pd.DataFrame], pd.DataFrame]


def _by_module(table: pd.DataFrame, modules: pd.DataFrame, value: pd.Series) -> pd.DataFrame:
    rows = modules.astype({"module": "str"}).set_index("module").loc[table["module"]]
    x, panel = rows["layer"].astype("int64").to_numpy(), rows["role"].astype("str").to_numpy()
    return pd.DataFrame({"panel": panel, "x": x, "value": value.to_numpy(np.float64)})


def _layer_norms(table: pd.DataFrame, modules: pd.DataFrame) -> pd.DataFrame:
    rows = table[table["quantity"] == "update_norm"]
    return pd.DataFrame({"panel": "", "x": rows["place"].astype("str"), "value": rows["value"]})


VIEWS = {
    RANKS: View("Final ranks", ("layer", "rank"), lambda table, modules: _by_module(table, modules, table["value"])),
    NORMS: View("Update by layer", ("layer", "mean ‖ΔW‖ over the steps"), _layer_norms),
    AMPLIFICATION: View(
        "Base weight along the update",
        ("layer", "norm relative to random directions"),
        lambda table, modules: _by_module(table, modules, table["update"] / table["random"]),
    ),
}
"""Kept table -> its chart."""


def figures(runs: Mapping[str, Run], tables: Tables, evidence: Evidence) -> dict[tuple[str, str], ReportFigure]:
    """Draw a comparison of the runs' tables with those of the kept seeds, if any, by name and label of the arm."""
    drawn_tables = {}
    for (name, label), table in tables.items():
        by_run = evidence.kept.get(name, {})
        kept_tables = [by_run[run] for run in _judged(evidence, label)["run"] if run in by_run]
        if name not in VIEWS or not kept_tables:
            continue
        view, modules = VIEWS[name], runs[label].modules
        kept_cells = [view.cells(kept_table, modules) for kept_table in kept_tables]
        chart = over_kept(view.cells(table, modules), kept_cells, view.axes, view.title, f"{label}.")
        drawn_tables[name, label] = ReportFigure(
            chart,
            "Dots inside the band are as in the kept runs. Dots outside it differ from all kept runs.",
            "This run has fewer steps and shorter texts than the kept ones, which can move its values out of the band.",
        )
    return drawn_tables
