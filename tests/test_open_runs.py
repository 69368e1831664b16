"""Runs that are open: the order of stages and looks, by planted evidence of two arms."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lorascope.papers.judging.kept_runs import RUN_COLUMNS, Evidence
from lorascope.papers.judging.registration import (
    Bound,
    ClaimText,
    Design,
    Paper,
    Registered,
    RegisteredArm,
    Registration,
    Stage,
)
from lorascope.papers.judging.statistics import Constant, OfRun
from lorascope.papers.training.missing_runs import OpenRun, missing_runs

GRID = (1e-3, 1e-2, 1e-1)
BLOCK = {"capability": "AVX2", "torch": "2", "threads": 1, "device": "cpu"}
LOOKS = Design("t", (5, 10), (0.005, 0.0215))
ONCE = Design("t", (5,), (0.025,))
ARMS = [
    RegisteredArm("A", rates=GRID, fields={"lr": 1.0}, tuning_seeds=(9001, 9002)),
    RegisteredArm("B", rate_of="A", fields={"lr": 1.0}),
    RegisteredArm("words", baseline=True),
    RegisteredArm("points"),
]


def value(table: pd.DataFrame) -> float:
    return float(table["value"].iloc[0])


def statistic(arm: str) -> OfRun:
    return OfRun(value, "values", arm)


PAIRS: Any = {
    "p.better": (statistic("A"), statistic("B")),
    "p.words": (statistic("A"), statistic("words")),
    "q.more": (statistic("points"), Constant(0.0)),
}


def claim(id: str, design: Design, *arms: str) -> Registered:
    bound = Bound("superiority", "accuracy", "planted", margin=0.1)
    return Registered(id, Paper("1", "table 1", "primary"), ClaimText("s", "x", "y", "arm"), bound, design, arms)


def registration(*stages: Stage, shown: Sequence[RegisteredArm] = ()) -> Registration:
    claims = [claim("p.better", LOOKS, "A", "B"), claim("p.words", ONCE, "A", "words"), claim("q.more", ONCE, "points")]
    return Registration({each.id: each for each in claims}, {arm.label: arm for arm in (*ARMS, *shown)}, (), stages)


class Runs:
    """Planted runs of some arms, whose kept value is given."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.tables: dict[str, pd.DataFrame] = {}

    def add(self, arm: str, seed: int, role: str = "judged", rate: float = 1e-2, of: float = 0.0, **row: Any) -> None:
        run = f"{arm}{seed}{role}{rate}{row}"
        fixed = dict.fromkeys(RUN_COLUMNS, "") | BLOCK | {"validation_metric": 0.9, "validation_chance": 0.5}
        scores = {"validation_loss": abs(np.log10(rate) + 2), "test_loss": 0.5, "method": json.dumps({})}
        named = {"run": run, "arm": arm, "seed": seed, "role": role, "rate": rate}
        self.rows.append(fixed | scores | named | row)
        self.tables[run] = pd.DataFrame({"value": [of]})

    def tuned(self) -> Runs:
        for rate in GRID:
            for seed in (9001, 9002):
                self.add("A", seed, "tuning", rate)
        return self

    def judged(self, effect: float, seeds: range, **row: Any) -> Runs:
        for seed in seeds:
            self.add("A", seed, of=effect + 0.001 * (seed % 3), **row)
            self.add("B", seed, **row)
        return self

    def evidence(self) -> Evidence:
        columns = pd.DataFrame(self.rows, columns=list(RUN_COLUMNS))
        return Evidence(
            columns, pd.DataFrame(columns=["task_hash", "row", "label", "group"]), kept={"values": self.tables}
        )


def found(runs: Runs, *stages: Stage, shown: Sequence[RegisteredArm] = ()) -> list[OpenRun]:
    return missing_runs(registration(*stages, shown=shown), PAIRS, runs.evidence(), BLOCK)


EVERYTHING = (Stage(("*",), (0,)), Stage(("p",), (1, 2)), Stage(("q.more",), (1,)))


def test_rates_are_chosen_before_the_first_look() -> None:
    needed = found(Runs(), *EVERYTHING)
    assert needed == [OpenRun("A", seed, "tuning", rate) for rate in GRID for seed in (9001, 9002)]


def test_a_tuning_run_is_trained_once() -> None:
    runs = Runs()
    runs.add("A", 9001, "tuning", 1e-3)
    assert OpenRun("A", 9001, "tuning", 1e-3) not in found(runs, *EVERYTHING)
    assert len(found(runs, *EVERYTHING)) == 5


def test_both_arms_and_the_baseline_train_at_the_chosen_rate() -> None:
    needed = found(Runs().tuned(), *EVERYTHING)
    pairs = [OpenRun(arm, seed, "judged", 1e-2) for seed in range(100, 105) for arm in "AB"]
    assert needed == [*pairs, OpenRun("words", 100, "baseline", None)]


def test_a_decided_claim_takes_no_second_look() -> None:
    runs = Runs().tuned().judged(5.0, range(100, 105))
    runs.add("words", 0, "baseline")
    needed = found(runs, *EVERYTHING)
    assert needed == [OpenRun("points", seed, "judged", None) for seed in range(100, 105)]


def test_an_undecided_claim_takes_its_second_look() -> None:
    runs = Runs().tuned()
    for seed, effect in zip(range(100, 105), (-2.0, 3.0, -1.0, 2.0, 0.0), strict=True):
        runs.judged(effect, range(seed, seed + 1))
    runs.add("words", 0, "baseline")
    needed = found(runs, *EVERYTHING)
    assert needed == [OpenRun(arm, seed, "judged", 1e-2) for seed in range(105, 110) for arm in "AB"]


def test_runs_of_another_machine_do_not_count() -> None:
    runs = Runs().tuned().judged(5.0, range(100, 105), capability="AVX512")
    runs.add("words", 0, "baseline")
    assert len(found(runs, *EVERYTHING)) == 10


def test_claims_on_an_arm_that_did_not_train_end() -> None:
    runs = Runs().tuned().judged(5.0, range(100, 102), validation_metric=0.5)
    runs.add("words", 0, "baseline")
    assert found(runs, *EVERYTHING[:2]) == []


def test_arms_that_only_figures_show_come_before_the_looks() -> None:
    shown = [
        RegisteredArm(label, rate_of="A", fields={"lr": 1.0}, seeds=seeds) for label, seeds in (("C", 1), ("D", 3))
    ]
    assert {run.role for run in found(Runs(), *EVERYTHING, shown=shown)} == {"tuning"}
    runs = Runs().tuned()
    needed = [("C", 100), ("D", 100), ("D", 101), ("D", 102)]
    assert found(runs, *EVERYTHING, shown=shown) == [OpenRun(label, seed, "judged", 1e-2) for label, seed in needed]
    for label, seed in needed:
        assert found(runs, *EVERYTHING, shown=shown)[0] == OpenRun(label, seed, "judged", 1e-2)
        runs.add(label, seed)
    assert found(runs, *EVERYTHING, shown=shown) == found(runs, *EVERYTHING)


@pytest.mark.parametrize(
    ("claims", "expected"), [(("*",), True), (("p",), True), (("p.better",), True), (("p.bet", "q"), False)]
)
def test_a_stage_has_claims_by_id_or_probe(claims: tuple[str, ...], expected: bool) -> None:
    assert Stage(claims, (1,)).has("p.better") == expected
