"""Verdicts from planted evidence: intervals by hand, blocks, seeds, corrections, and files that come back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from lorascope.analysis.seed_intervals import pseudo_values, t_estimate, t_interval, two_way_estimate
from lorascope.papers.judging import csv_tables, evidence_manifest, kept_runs, looks, registration
from lorascope.papers.judging import verdicts as judging
from lorascope.papers.judging.kept_runs import RUN_COLUMNS, Evidence
from lorascope.papers.judging.registration import Bound, ClaimText, Design, Paper, Registered, RegisteredArm
from lorascope.papers.judging.statistics import (
    Accuracy,
    Constant,
    LogLikelihood,
    MeanOverRows,
    OfPairs,
    OfRun,
    Simulated,
    Statistic,
    average,
    estimate_effect,
)
from lorascope.papers.judging.verdicts import correct, judge_all

ROWS = 60
MACHINE = {"capability": "AVX2", "torch": "2.6.0", "threads": 1, "device": "cpu"}


def run_row(arm: str, seed: int, **values: Any) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(RUN_COLUMNS, "x")
    row |= {"run": f"{arm}-{seed}", "arm": arm, "role": "judged", "seed": seed, "rate": 1e-3, "steps": 300}
    row |= {"task_hash": "t", "dirty": False, "cpu_seconds": 1.5, "trained_parameters": 10}
    row |= {"validation_chance": 0.3}
    row |= {f"{split}_{score}": 0.5 for split in ("validation", "test") for score in ("loss", "metric")}
    return row | MACHINE | values


def planted(accuracies: dict[str, float], seeds: int = 5, machine: dict[str, Any] | None = None) -> Evidence:
    """Return evidence in which each arm is right on its share of the rows, drawn anew for each seed."""
    rng, runs, margins, nll = np.random.default_rng(7), [], {}, {}
    for arm, accuracy in accuracies.items():
        for seed in range(100, 100 + seeds):
            row = run_row(arm, seed, **(machine or {}))
            row["run"] += (machine or MACHINE)["capability"]
            runs.append(row)
            margins[row["run"]] = np.where(rng.random(ROWS) < accuracy, 5, -5).astype(np.int8)
            nll[row["run"]] = rng.random(ROWS).astype(np.float16)
    rows = pd.DataFrame({"task_hash": "t", "row": range(ROWS), "text": "", "label": 0, "group": "g"})
    return Evidence(pd.DataFrame(runs), rows.assign(cluster=[f"c{row // 3}" for row in range(ROWS)]), margins, nll)


def registered(id: str = "a.b", interval: Any = "two-way", tier: Any = "secondary", **bound: Any) -> Registered:
    bound = bound or {"kind": "superiority", "margin": 0.1}
    return Registered(
        id, Paper("0", "t", tier), ClaimText("s", "x", "y", "arm"), Bound(unit="u", origin="o", **bound),
        Design(interval, (5, 10), (0.005, 0.0215)),
    )  # fmt: skip


def test_effect_of_accuracies_is_the_two_way_interval_of_the_rows() -> None:
    evidence = planted({"A": 0.8, "B": 0.5})
    found, values = estimate_effect(Accuracy("A"), Accuracy("B"), evidence, range(100, 105), "two-way")
    rows = {arm: np.stack([evidence.margins[f"{arm}-{seed}AVX2"] > 0 for seed in range(100, 105)]) for arm in "AB"}
    assert found == two_way_estimate(rows["A"] * 1.0 - rows["B"], np.arange(ROWS) // 3)
    assert values["statistic"].tolist() == pytest.approx(rows["A"].mean(1))
    assert values["effect"].mean() == pytest.approx(found.mean)


def test_loss_is_signed_so_that_higher_is_better() -> None:
    evidence = planted({"A": 0.5})
    assert LogLikelihood("A")(evidence, [101])[0] == pytest.approx(-evidence.nll["A-101AVX2"].astype(float))


def test_mean_of_arms_and_differences_combine_row_by_row() -> None:
    evidence = planted({"A": 0.8, "B": 0.5, "C": 0.2})
    seeds = [100, 103]
    a, b, c = (Accuracy(arm)(evidence, seeds) for arm in "ABC")
    assert average([Accuracy("A"), Accuracy("B")])(evidence, seeds) == pytest.approx((a + b) / 2)
    assert (Accuracy("A") - Accuracy("C"))(evidence, seeds) == pytest.approx(a - c)
    assert (-MeanOverRows(Accuracy("C")) / 2)(evidence, seeds) == pytest.approx(-c.mean(1) / 2)
    assert (Accuracy("A") - Accuracy("B")).arms() == {"A", "B"}


def kept(evidence: Evidence, values: dict[str, float]) -> Evidence:
    tables = {run: pd.DataFrame({"value": [value]}) for run, value in values.items()}
    return Evidence(evidence.runs, evidence.rows, evidence.margins, evidence.nll, {"ranks": tables})


def first(table: pd.DataFrame) -> float:
    return float(table["value"].iloc[0])


def test_values_of_runs_have_the_t_interval() -> None:
    evidence = planted({"A": 0.5})
    values = np.array([0.3, 0.5, 0.4, 0.6, 0.1])
    evidence = kept(evidence, {f"A-{100 + i}AVX2": value for i, value in enumerate(values)})
    found, _ = estimate_effect(OfRun(first, "ranks", "A"), Constant(1 / 3), evidence, range(100, 105), "t")
    assert tuple(found.interval(0.025)) == pytest.approx(tuple(t_interval(values - 1 / 3)))


def product(one: pd.DataFrame, two: pd.DataFrame) -> float:
    return first(one) * first(two)


def test_values_of_pairs_never_compare_equal_seeds() -> None:
    evidence = planted({"A": 0.5, "B": 0.5})
    numbers = {f"{arm}-{100 + i}AVX2": float(i + 1) * (10 if arm == "B" else 1) for arm in "AB" for i in range(4)}
    evidence = kept(evidence, numbers)
    values = OfPairs(product, "ranks", "A", "B")(evidence, range(100, 104))
    assert np.isnan(np.diag(values)).all()
    assert values[0, 2] == 1 * 30
    assert values[2, 0] == 3 * 10
    found, by_seed = estimate_effect(
        OfPairs(product, "ranks", "A", "A"), Constant(0.0), evidence, range(100, 104), "jackknife"
    )
    pairs = np.outer(np.arange(1.0, 5), np.arange(1.0, 5))
    assert by_seed["statistic"].tolist() == pytest.approx(pseudo_values(pairs).tolist())
    assert found.mean == pytest.approx(pairs[~np.eye(4, dtype=bool)].mean())


@pytest.mark.parametrize(("statistic", "interval"), [(Accuracy("A"), "t"), (MeanOverRows(Accuracy("A")), "two-way")])
def test_statistic_of_another_shape_than_the_interval_is_refused(statistic: Statistic, interval: Any) -> None:
    with pytest.raises(ValueError, match=f"values of a {interval} interval must have shape"):
        estimate_effect(statistic, Constant(0.0), planted({"A": 0.5}), range(100, 105), interval)


def test_verdicts_of_planted_claims() -> None:
    evidence = planted({"A": 0.95, "B": 0.5, "C": 0.5}, seeds=10)
    claims = {id: registered(id) for id in ("p.true", "p.null")}
    pairs: Any = {"p.true": (Accuracy("A"), Accuracy("B")), "p.null": (Accuracy("B"), Accuracy("A"))}
    verdicts, values = judge_all(claims, pairs, evidence)
    assert verdicts["outcome"].tolist() == ["supported", "not supported"]
    assert verdicts["side"].tolist() == ["above 0", "below 0"]
    assert values.groupby("claim")["seed"].agg(list)["p.true"] == list(range(100, 105))
    assert (verdicts["n"] == 5).all()


def replayed(table: pd.DataFrame, group: str) -> float:
    return float(table.loc[table["group"] == group, "value"].item())


def test_draws_of_a_simulated_control_are_kept_with_its_values() -> None:
    evidence = planted({"A": 0.5})
    tables = {
        run: pd.DataFrame({"group": ["x", "y"], "value": [0.1, 0.2], "draws": 1000, "error": [0.01, 0.02 + 0.001 * i]})
        for i, run in enumerate(evidence.runs["run"])
    }
    evidence = Evidence(evidence.runs, evidence.rows, evidence.margins, evidence.nll, {"replays": tables})
    own = MeanOverRows(Accuracy("A"))
    controls = {
        "a.replays": OfRun(partial(replayed, group="y"), "replays", "A"),
        "a.simulated": Simulated(0.5, draws=10_000, error=0.003),
        "a.constant": Constant(0.5),
    }
    claims = {id: registered(id, "t") for id in controls}
    values = judge_all(claims, {id: (own, control) for id, control in controls.items()}, evidence)[1]
    of = {id: rows.reset_index(drop=True) for id, rows in values.groupby("claim")}
    assert of["a.replays"]["draws"].tolist() == [1000] * 5
    assert of["a.replays"]["draw_error"].tolist() == pytest.approx([0.02, 0.021, 0.022, 0.023, 0.024])
    assert of["a.replays"]["runs_control"].tolist() == of["a.replays"]["runs_statistic"].tolist()
    assert of["a.simulated"][["draws", "draw_error"]].drop_duplicates().to_numpy().tolist() == [[10_000, 0.003]]
    assert of["a.constant"][["draws", "draw_error"]].isna().all(axis=None)
    assert b",10000,0.003,A-100AVX2,\n" in csv_tables.to_csv(values)


def test_baseline_enters_with_every_seed_and_has_none() -> None:
    evidence = planted({"A": 0.95}, seeds=10)
    row = run_row("TF-IDF", 0, role="baseline", capability="", threads=0)
    margins = {**evidence.margins, row["run"]: np.full(ROWS, -3, np.int8)}
    evidence = Evidence(pd.concat([evidence.runs, pd.DataFrame([row])]), evidence.rows, margins)
    verdicts, values = judge_all({"a.b": registered()}, {"a.b": (Accuracy("A"), Accuracy("TF-IDF"))}, evidence)
    assert verdicts["outcome"].item() == "supported"
    assert (values["control"] == 0).all()


def test_seeds_end_at_the_first_that_an_arm_lacks() -> None:
    evidence = planted({"A": 0.95, "B": 0.5}, seeds=10)
    gap = evidence.runs[(evidence.runs["arm"] != "B") | (evidence.runs["seed"] != 107)]
    evidence = Evidence(gap, evidence.rows, evidence.margins, evidence.nll)
    assert evidence.seeds(["A", "B"], 100) == list(range(100, 107))
    assert evidence.seeds(["B"], 101) == list(range(101, 107))


def test_claim_is_judged_on_the_machine_that_first_reached_the_look() -> None:
    other = MACHINE | {"capability": "AVX512"}
    one, two, three = (
        planted({"A": 0.95, "B": 0.5}, 3),
        planted({"A": 0.5, "B": 0.95}, 5, other),
        planted({"A": 0.95, "B": 0.5}, 10, MACHINE | {"capability": "NEON"}),
    )
    runs = pd.concat([one.runs, two.runs, three.runs])
    both = Evidence(runs, one.rows, {**one.margins, **two.margins, **three.margins})
    verdicts, _ = judge_all({"a.b": registered()}, {"a.b": (Accuracy("A"), Accuracy("B"))}, both)
    assert verdicts["block"].item() == "AVX512 / 2.6.0 / 1 / cpu"
    assert verdicts["outcome"].item() == "not supported"
    # The first run of another machine does not decide, but the run that completes its first look.
    late = pd.concat([three.runs[:1], two.runs, three.runs[1:]])
    both = Evidence(late, one.rows, {**two.margins, **three.margins})
    verdicts, _ = judge_all({"a.b": registered()}, {"a.b": (Accuracy("A"), Accuracy("B"))}, both)
    assert verdicts["block"].item() == "AVX512 / 2.6.0 / 1 / cpu"


def test_main_machine_has_the_most_judged_runs() -> None:
    few, many = (planted({"A": 0.8}, n, MACHINE | {"capability": name}) for n, name in ((2, "AVX2"), (3, "AVX512")))
    tuning = pd.DataFrame([run_row("A", 9000 + i, run=f"tuning-{i}", role="tuning") for i in range(5)])
    runs = pd.concat([tuning, few.runs, many.runs], ignore_index=True)
    found = Evidence(runs, few.rows, few.margins | many.margins, few.nll | many.nll).of_main_machine()
    assert set(found.runs["run"]) == set(many.runs["run"])
    assert few.of_main_machine().runs["run"].tolist() == few.runs["run"].tolist()


def test_two_runs_of_one_seed_are_refused() -> None:
    evidence = planted({"A": 0.9})
    with pytest.raises(ValueError, match="two of arm 'A', seed 100"):
        Evidence(pd.concat([evidence.runs, evidence.runs[:1]]), evidence.rows)


def test_two_tuning_runs_of_one_rate_and_seed_are_refused() -> None:
    row = run_row("A", 9001, role="tuning")
    runs = pd.DataFrame([row, row | {"run": "other rate", "rate": 3e-3}, row | {"run": "copy", "validation_loss": 0.1}])
    Evidence(runs[:2], pd.DataFrame())
    with pytest.raises(ValueError, match="two of arm 'A', seed 9001"):
        Evidence(runs, pd.DataFrame())


@pytest.mark.parametrize(("statistic", "lacks"), [
    (Accuracy("A"), "margins"), (LogLikelihood("A"), "losses"), (OfRun(first, "ranks", "A"), "table 'ranks'"),
])  # fmt: skip
def test_run_without_its_files_is_one_line(statistic: Statistic, lacks: str) -> None:
    evidence = planted({"A": 0.5})
    with pytest.raises(ValueError, match=f"the evidence lacks the {lacks} of run A-100AVX2"):
        statistic(Evidence(evidence.runs, evidence.rows), [100])


def test_value_that_is_not_finite_names_its_claim() -> None:
    evidence = planted({"A": 0.5})
    evidence = kept(evidence, dict.fromkeys(evidence.runs["run"], np.nan))
    with pytest.raises(ValueError, match=r"cannot judge a\.b from kept/ranks: values must be finite, got nan"):
        judge_all({"a.b": registered(interval="t")}, {"a.b": (OfRun(first, "ranks", "A"), Constant(0.0))}, evidence)


def test_claim_without_runs_is_stopped_by_the_budget() -> None:
    verdicts, values = judge_all({"a.b": registered()}, {"a.b": (Accuracy("Z"), Accuracy("A"))}, planted({"A": 0.5}))
    assert (verdicts["outcome"].item(), verdicts["note"].item(), verdicts["n"].item()) == (
        "inconclusive",
        looks.STOPPED,
        0,
    )
    assert values.empty


def test_seeds_with_other_test_rows_are_compared_by_their_means() -> None:
    evidence, rng = planted({"A": 0.5, "B": 0.5}), np.random.default_rng(1)
    runs = evidence.runs.assign(task_hash=[f"task {seed}" for seed in evidence.runs["seed"]])
    nll = {
        run: rng.random(50 + seed % 7).astype(np.float16) for run, seed in zip(runs["run"], runs["seed"], strict=True)
    }
    evidence = Evidence(runs, evidence.rows, evidence.margins, nll)
    pairs: Any = {"a.b": (MeanOverRows(LogLikelihood("A")), MeanOverRows(LogLikelihood("B")))}
    verdicts, values = judge_all({"a.b": registered(interval="t")}, pairs, evidence)
    means = {
        arm: np.array([-nll[f"{arm}-{seed}AVX2"].astype(float).mean() for seed in range(100, 105)]) for arm in "AB"
    }
    assert values["statistic"].tolist() == pytest.approx(means["A"].tolist())
    assert verdicts["effect"].item() == pytest.approx((means["A"] - means["B"]).mean())
    assert verdicts["high"].item() == pytest.approx(t_estimate(means["A"] - means["B"]).interval(0.005).high)


@pytest.mark.parametrize(("seeds", "n"), [(1, 1), (4, 4), (7, 5)])
def test_interrupted_look_leaves_the_verdict_open(seeds: int, n: int) -> None:
    evidence = planted({"A": 0.5, "B": 0.5}, seeds)
    values = {f"{arm}-{100 + i}AVX2": 0.7 * (i % 2) for arm in "AB" for i in range(seeds)}
    evidence = kept(evidence, values)
    pairs: Any = {
        "a.pairs": (OfPairs(product, "ranks", "A", "A"), Constant(0.0)),
        "a.rows": (Accuracy("A"), Accuracy("B")),
        "a.runs": (OfRun(first, "ranks", "A"), Constant(0.1)),
    }
    claims = {id: registered(id, interval) for id, interval in zip(pairs, ("jackknife", "two-way", "t"), strict=True)}
    verdicts, found = judge_all(claims, pairs, evidence)
    assert verdicts["n"].tolist() == [n] * 3
    assert verdicts["outcome"].tolist() == ["inconclusive"] * 3
    assert verdicts["note"].tolist() == [looks.STOPPED] * 3
    # No number comes from seeds before a look.
    assert ("effect" in verdicts) == (seeds >= 5)
    assert len(found) == (3 * n if seeds >= 5 else 0)


@pytest.mark.parametrize(
    ("metrics", "loss", "note"),
    [
        ((0.34, 0.35, 0.9, 0.9, 0.9), 0.5, "B did not train: chance level"),
        ((0.34, 0.36, 0.9, 0.9, 0.9), 0.5, ""),
        ((0.9, 0.9, 0.9, 0.9, 0.9), np.inf, "B did not train: a loss is not finite"),
        ((0.9, 0.9, 0.9, 0.9, 0.9), np.nan, "B did not train: a loss is not finite"),
    ],
)
def test_claim_on_an_arm_that_did_not_train_is_void(metrics: tuple[float, ...], loss: float, note: str) -> None:
    evidence = planted({"A": 0.95, "B": 0.5})
    runs = evidence.runs.copy()
    of_b = runs["arm"] == "B"
    runs.loc[of_b, "validation_metric"] = metrics
    runs.loc[of_b & (runs["seed"] == 103), "test_loss"] = loss
    evidence = Evidence(runs, evidence.rows, evidence.margins, evidence.nll)
    pairs: Any = {"a.b": (Accuracy("A"), Accuracy("B"))}
    verdicts, _ = judge_all({"a.b": registered()}, pairs, evidence)
    assert verdicts["outcome"].item() == ("void" if note else "supported")
    assert verdicts["note"].item() == note
    exempt = {"B": RegisteredArm("B", may_void=False)}
    kept_from_text, _ = judge_all({"a.b": registered()}, pairs, evidence, exempt)
    assert kept_from_text["outcome"].item() == "supported"


TASKS = ("domain", "order", "sentiment", "strength")


def mixture(seeds_at_chance: int) -> Evidence:
    """Return evidence of four tasks in which B is right on 90% of three, and at chance on one for some seeds."""
    evidence = planted({"A": 0.95, "B": 0.9})
    runs = evidence.runs.assign(validation_metric=0.9)
    # Each task has 15 rows, and its most frequent class has 9 of them.
    rows = evidence.rows.assign(group=np.repeat(TASKS, ROWS // 4), label=np.tile([0] * 9 + [1] * 6, 4))
    margins = dict(evidence.margins)
    for run, seed in runs.loc[runs["arm"] == "B", ["run", "seed"]].itertuples(index=False):
        right = np.where(np.arange(ROWS) % 15 < 14, 5, -5)
        if seed < 100 + seeds_at_chance:
            right[rows["group"] == "order"] = np.where(rows["label"][rows["group"] == "order"] == 0, 5, -5)
        margins[run] = right.astype(np.int8)
    return Evidence(runs, rows, margins, evidence.nll)


@pytest.mark.parametrize(("seeds", "note"), [(1, ""), (2, "B did not train: chance level in order")])
def test_claim_is_void_if_one_task_of_four_stays_at_chance(seeds: int, note: str) -> None:
    pairs: Any = {"a.b": (Accuracy("A"), Accuracy("B"))}
    verdicts, _ = judge_all({"a.b": registered()}, pairs, mixture(seeds))
    assert verdicts["note"].item().startswith(note or looks.STOPPED)
    assert (verdicts["outcome"].item() == "void") == bool(note)
    exempt, _ = judge_all({"a.b": registered()}, pairs, mixture(seeds), {"B": RegisteredArm("B", may_void=False)})
    assert exempt["outcome"].item() != "void"


@pytest.mark.parametrize(("accuracies", "void"), [
    ((0.56, 0.64, 0.9, 0.9, 0.9), True),
    ((0.56, 0.66, 0.9, 0.9, 0.9), False),
])  # fmt: skip
@pytest.mark.parametrize("may_void", [True, False])
def test_claim_is_void_if_an_earlier_phase_stays_at_chance(
    accuracies: tuple[float, ...], void: bool, may_void: bool
) -> None:
    """An arm whose last phase need not learn is still void by its search."""
    evidence = planted({"A": 0.95, "B": 0.5})
    tables = {}
    for seed, accuracy in enumerate(accuracies, start=100):
        searched = {"phase": "search", "group": ["x", "y"], "accuracy": [0.9, accuracy], "chance": [0.5, 0.6]}
        tables[f"B-{seed}AVX2"] = pd.DataFrame(searched)
    runs = evidence.runs.assign(validation_metric=0.9)
    evidence = Evidence(runs, evidence.rows, evidence.margins, evidence.nll, {judging.PHASES: tables})
    arms = {"B": RegisteredArm("B", may_void=may_void)}
    verdicts, _ = judge_all({"a.b": registered()}, {"a.b": (Accuracy("A"), Accuracy("B"))}, evidence, arms)
    assert verdicts["outcome"].item() == ("void" if void else "supported")
    assert verdicts["note"].item() == ("B did not train: chance level in phase search" if void else "")


def test_arms_are_void_by_their_first_five_judged_seeds() -> None:
    evidence = planted({"A": 0.95, "B": 0.5}, seeds=10)
    runs = evidence.runs.copy()
    for seeds, void in (((103, 105), False), ((103, 104), True)):
        failed = (runs["arm"] == "B") & runs["seed"].isin(seeds)
        changed = Evidence(
            runs.assign(validation_metric=np.where(failed, 0.34, 0.9)), evidence.rows, evidence.margins, evidence.nll
        )
        verdicts, _ = judge_all({"a.b": registered()}, {"a.b": (Accuracy("A"), Accuracy("B"))}, changed)
        assert (verdicts["outcome"].item() == "void") == void


def table_of(tiers: list[str], p: list[float], outcomes: list[str]) -> pd.DataFrame:
    return pd.DataFrame({"claim": range(len(p)), "tier": tiers, "p_looks": p, "outcome": outcomes, "note": ""})


def test_secondary_verdicts_are_corrected_by_benjamini_hochberg() -> None:
    p = [0.001, 0.015, 0.04, 0.9, 0.03]
    found = correct(table_of(["secondary"] * 5, p, ["supported", "not supported", "supported", "inconclusive", "void"]))
    expected = scipy.stats.false_discovery_control([0.001, 0.015, 0.04, 0.9, 1.0])  # a void claim counts with p = 1
    assert found["adjusted_p"].tolist() == pytest.approx(expected)
    assert expected[2] > judging.FALSE_DISCOVERIES > expected[1]
    assert found["outcome"].tolist() == ["supported", "not supported", "inconclusive", "inconclusive", "void"]
    assert found["uncorrected"].tolist() == ["supported", "not supported", "supported", "inconclusive", "void"]
    assert found["note"][2] == "decided before the correction for 5 claims"


@pytest.mark.parametrize("note", [looks.STOPPED, judging.CHANGED])
def test_claims_without_a_verdict_count_with_p_of_1(note: str) -> None:
    table = table_of(["secondary"] * 3, [1e-6, 0.03, 0.9], ["inconclusive", "supported", "inconclusive"])
    found = correct(table.assign(note=[note, "", ""]))
    assert found["adjusted_p"].tolist() == pytest.approx(scipy.stats.false_discovery_control([1.0, 0.03, 0.9]))
    assert found["outcome"][1] == "inconclusive"


def test_changed_claims_get_no_verdict_and_do_not_help_others() -> None:
    evidence = planted({"A": 0.97, "B": 0.5})
    claims = {id: registered(id) for id in ("a.b", "c.d")}
    pairs: Any = dict.fromkeys(claims, (Accuracy("A"), Accuracy("B")))
    verdicts, _ = judge_all(claims, pairs, evidence, changed={"a.b"})
    assert verdicts["outcome"].tolist() == ["inconclusive", "supported"]
    assert verdicts["note"].tolist() == [judging.CHANGED, ""]
    p = verdicts["p_looks"]
    assert verdicts["adjusted_p"].tolist() == pytest.approx(scipy.stats.false_discovery_control([1.0, p[1]]))


def test_primary_verdicts_stand_with_holms_p_beside_and_published_ones_without() -> None:
    found = correct(table_of(["primary", "primary", "published"], [0.03, 0.04, 0.5], ["supported", "supported", "x"]))
    assert found["outcome"].tolist() == ["supported", "supported", "x"]
    assert found["adjusted_p"].tolist() == pytest.approx([0.06, 0.06, np.nan], nan_ok=True)


def write(folder: Path, evidence: Evidence) -> None:
    for row in evidence.runs.to_dict("records"):
        scores = {"margin": evidence.margins[row["run"]], "nll": evidence.nll[row["run"]]}
        kept_runs.add_run(folder, row, scores, {"ranks": pd.DataFrame({"value": [row["seed"] * 1.0]})})
    evidence.rows.to_parquet(folder / "rows.parquet")


def test_evidence_comes_back_from_its_files(tmp_path: Path) -> None:
    evidence = planted({"A": 0.8, "B": 0.5}, 3)
    write(tmp_path, evidence)
    found = kept_runs.read(tmp_path)
    pd.testing.assert_frame_equal(found.runs, evidence.runs, check_dtype=False)
    assert all((found.margins[run] == evidence.margins[run]).all() for run in evidence.margins)
    assert all((found.nll[run] == evidence.nll[run]).all() for run in evidence.nll)
    assert first(found.table("ranks", "B", 102)) == 102
    assert found.clusters("A", 100).tolist() == (np.arange(ROWS) // 3).tolist()
    (tmp_path / "MANIFEST").touch()
    (tmp_path / "kept" / "MANIFEST").touch()  # only the one of the folder itself is left out
    lines = evidence_manifest.manifest(tmp_path).splitlines()
    assert len(lines) == 2 + 6 + 6 + 1
    assert lines == sorted(lines, key=lambda line: line.split("  ")[1])


def test_run_is_never_written_twice(tmp_path: Path) -> None:
    evidence = planted({"A": 0.8}, 2)
    write(tmp_path, evidence)
    before = evidence_manifest.manifest(tmp_path)
    row = evidence.runs.iloc[0].to_dict()
    kept_runs.add_run(tmp_path, row | {"cpu_seconds": 99.0}, {}, {})  # trained again, as slowly as the machine is busy
    assert evidence_manifest.manifest(tmp_path) == before
    with pytest.raises(ValueError, match=r"cannot add run A-100AVX2: .*runs.csv has it with other numbers"):
        kept_runs.add_run(tmp_path, row | {"test_metric": 0.6}, {}, {})


def without_processor(file: Path) -> bytes:
    """Return the content of ``runs.csv`` as earlier versions wrote it."""
    return csv_tables.to_csv(csv_tables.text_table(file.read_bytes()).drop(columns="processor", errors="ignore"))


def test_runs_of_an_older_file_have_an_unknown_processor_and_keep_their_numbers(tmp_path: Path) -> None:
    evidence, file = planted({"A": 0.8}, 2), tmp_path / "runs.csv"
    write(tmp_path, evidence)
    before = kept_runs.read(tmp_path).runs
    file.write_bytes(without_processor(file))
    pd.testing.assert_frame_equal(kept_runs.read(tmp_path).runs, before.assign(processor=""), check_dtype=False)
    kept_runs.add_run(tmp_path, run_row("A", 102) | {"processor": "a new one"}, {}, {})
    assert kept_runs.read(tmp_path).runs["processor"].tolist() == ["", "", "a new one"]
    kept = without_processor(registration.FILE.parent / "evidence" / "runs.csv")
    file.write_bytes(kept)
    kept_runs.add_run(tmp_path, run_row("A", 102) | {"processor": "a new one"}, {}, {})
    header, *lines = kept.splitlines()
    assert file.read_bytes().splitlines()[:-1] == [header + b",processor", *(line + b"," for line in lines)]


def test_run_of_another_processor_with_equal_numbers_is_the_same_run(tmp_path: Path) -> None:
    evidence = planted({"A": 0.8}, 1)
    write(tmp_path, evidence)
    before = (tmp_path / "runs.csv").read_bytes()
    kept_runs.add_run(tmp_path, evidence.runs.iloc[0].to_dict() | {"processor": "another"}, {}, {})
    assert (tmp_path / "runs.csv").read_bytes() == before


def test_processor_is_no_part_of_the_machine_by_which_runs_are_grouped() -> None:
    evidence = planted({"A": 0.8, "B": 0.5}, 3)
    mixed = evidence.runs.assign(processor=["one", "two", "", "one", "", "three"])
    assert Evidence(mixed, evidence.rows, evidence.margins).blocks() == evidence.blocks()
    assert len(evidence.blocks()) == 1


def test_interrupted_write_leaves_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evidence = planted({"A": 0.8}, 2)
    write(tmp_path, evidence)
    real, written = kept_runs.write_bytes, []

    def stop(file: Path, content: bytes) -> None:
        if file.name == "runs.csv":
            raise KeyboardInterrupt
        written.append(file)
        real(file, content)

    monkeypatch.setattr(kept_runs, "write_bytes", stop)
    row = run_row("A", 102) | {"run": "late"}
    with pytest.raises(KeyboardInterrupt):
        kept_runs.add_run(tmp_path, row, {"margin": np.zeros(ROWS, np.int8)}, {})
    assert written
    assert kept_runs.read(tmp_path).runs["run"].tolist() == evidence.runs["run"].tolist()


def table_without(file: Path, column: str) -> None:
    pd.read_parquet(file).drop(columns=column).to_parquet(file)


def arrays(**changed: Any) -> Callable[[Path], None]:
    return lambda file: np.savez(file, **changed)


def replace(old: bytes, new: bytes) -> Callable[[Path], None]:
    """Replace the first occurrence in a file."""

    def change(file: Path) -> None:
        assert old in file.read_bytes()
        file.write_bytes(file.read_bytes().replace(old, new, 1))

    return change


def twice(file: Path) -> None:
    rows = pd.read_parquet(file)
    pd.concat([rows, rows]).to_parquet(file)


RUN = "predictions/A-100AVX2.npz"
SEED = b",100,0.001,300,"
DAMAGED: list[tuple[str, Callable[[Path], Any], str]] = [
    ("runs.csv", lambda file: file.write_bytes(b"run,arm\na,b\n"), "runs.csv: its columns differ from schema 1"),
    ("runs.csv", lambda file: file.write_bytes(b"\xff\xfe\n"), "runs.csv: 'utf-8' codec can't decode"),
    ("runs.csv", lambda file: file.write_bytes(b""), "runs.csv: its last row is incomplete"),
    ("runs.csv", lambda file: file.write_bytes(file.read_bytes()[:-40]), "runs.csv: its last row is incomplete"),
    ("runs.csv", replace(b"\nA-100AVX2", b"\nx,A-100AVX2"), "runs.csv: row 2 must have 28 fields, got 29"),
    (
        "runs.csv",
        replace(SEED, b",abc,0.001,300,"),
        "runs.csv: row 2: seed must be an integer from 0 to 4294967295, got 'abc'",
    ),
    (
        "runs.csv",
        replace(SEED, b",100.5,0.001,300,"),
        "row 2: seed must be an integer from 0 to 4294967295, got '100.5'",
    ),
    ("runs.csv", replace(SEED, b",,0.001,300,"), "row 2: seed must be an integer from 0 to 4294967295, got ''"),
    ("runs.csv", replace(SEED, b",-1,0.001,300,"), "row 2: seed must be an integer from 0 to 4294967295, got '-1'"),
    ("runs.csv", replace(SEED, b",4294967296,0.001,300,"), "an integer from 0 to 4294967295, got '4294967296'"),
    ("runs.csv", replace(SEED, b",100,x,300,"), "row 2: rate must be a number or empty, got 'x'"),
    ("runs.csv", replace(b",1.5,", b",x,"), "row 2: cpu_seconds must be a number >= 0, got 'x'"),
    ("runs.csv", replace(b",judged,", b",Judged,"), "row 2: role must be tuning, judged or baseline, got 'Judged'"),
    ("runs.csv", replace(b",False,", b",maybe,"), "row 2: dirty must be True or False, got 'maybe'"),
    ("runs.csv", replace(b"A-100AVX2", b""), "runs.csv: invalid run id ''"),
    ("runs.csv", replace(b"A-101AVX2", b"A-100AVX2"), "runs.csv: run ids must be unique, got 'A-100AVX2' twice"),
    ("rows.parquet", lambda file: table_without(file, "task_hash"), "rows.parquet: .* schema 1: task_hash"),
    ("rows.parquet", lambda file: table_without(file, "cluster"), "rows.parquet: .* schema 1: cluster"),
    ("rows.parquet", Path.unlink, "rows.parquet: it has no test rows, but there are predictions of them"),
    ("rows.parquet", twice, "rows.parquet: row 0 of a task occurs twice"),
    (RUN, lambda file: file.write_bytes(b"PK\x03\x04 half"), "A-100AVX2.npz"),
    (RUN, arrays(margin=np.array(["9", "-9"])), "A-100AVX2.npz: margin must be a vector of dtype int8"),
    (RUN, arrays(margin=np.zeros((1, ROWS), np.int8)), "A-100AVX2.npz: margin must be a vector"),
    (RUN, arrays(nll=np.array([1, np.nan], np.float16)), "nll must be a vector of dtype floating without NaN"),
    (RUN, arrays(x=np.zeros(ROWS)), "A-100AVX2.npz: unknown array 'x', expected margin or nll"),
    ("kept/ranks/A-100AVX2.parquet", lambda file: file.write_bytes(b"PAR1"), "A-100AVX2.parquet"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGED)
def test_damaged_file_is_one_line(tmp_path: Path, name: str, damage: Callable[[Path], Any], message: str) -> None:
    write(tmp_path, planted({"A": 0.8}, 2))
    damage(tmp_path / name)
    with pytest.raises(ValueError, match=message) as raised:
        kept_runs.read(tmp_path)
    assert "\n" not in str(raised.value)


def test_run_id_cannot_lead_outside_the_folder(tmp_path: Path) -> None:
    write(tmp_path, planted({"A": 0.8}, 2))
    file = tmp_path / "runs.csv"
    file.write_text(file.read_text().replace("A-100AVX2", "../../secret"))
    with pytest.raises(ValueError, match="invalid run id"):
        kept_runs.read(tmp_path)


def test_simulated_controls_of_the_kept_effects_are_known_to_a_twentieth_of_their_margin() -> None:
    """An effect is a mean over seeds, so the errors of single seeds may be larger than its own."""
    folder = registration.FILE.parent / "evidence"
    bounds = pd.read_csv(folder / "verdicts.csv").set_index("claim")["bound"]
    simulated = pd.read_csv(folder / "values.csv").dropna(subset=["draw_error", "look"])
    assert {"alora.attention", "alora.queries"} <= set(simulated["claim"])
    for id, rows in simulated.groupby("claim"):
        error = np.sqrt(np.sum(rows["draw_error"] ** 2)) / len(rows)
        assert error < abs(bounds[id]) / 20, id
