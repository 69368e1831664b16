"""Tests of the allocator probes: statistics computed by hand, planted ranks, and each probe from runs to report."""

from __future__ import annotations

import html
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from planted import plant

from lorascope import plots, probes
from lorascope.adapters import delta
from lorascope.analysis.planted_ranks import absolute_error, rank_correlation
from lorascope.experiments import sweep
from lorascope.inputs import models
from lorascope.probes import adalora_placement, alora, autolora, planted, planted_teacher, rank_statistics
from lorascope.probes.rank_statistics import RankAgreement, RankFraction
from lorascope.schema import module_table
from lorascope.schema.records import QUANTITIES

RANKS = {"h.0.q": 1, "h.0.up": 3, "h.1.q": 0, "h.1.up": 4}


def run_with(folder, id, ranks, seed=0, truth=None, **meta):
    values = {("rank", module): {0: 2.0, 9: float(rank)} for module, rank in ranks.items()}
    values |= {("planted_rank", module): {0: float(rank)} for module, rank in (truth or {}).items()}
    factors = {module: (np.zeros((4, rank)), np.zeros((rank, 3))) for module, rank in ranks.items()}
    return plant(folder, id, values, seed=seed, factors=factors, **meta)


def test_rank_fractions_match_values_by_hand(tmp_path):
    run = run_with(tmp_path, "a", RANKS)
    for fraction, expected in (
        (RankFraction("a", rank_statistics.FEED_FORWARD), 7 / 8),
        (RankFraction("a", rank_statistics.ATTENTION), 1 / 8),
        (RankFraction("a", ("top",), by="third"), 4 / 8),
    ):
        assert fraction({"a": [run]}) == {0: pytest.approx(expected)}


def test_agreement_compares_with_next_run_or_with_given_runs(tmp_path):
    """The reversed order disagrees in all six pairs of modules; swapping two neighboring values disagrees in one."""
    reversed_ranks = dict(zip(RANKS, (3, 1, 4, 0), strict=True))
    swapped = RANKS | {"h.0.q": 0, "h.1.q": 1}
    flat = dict.fromkeys(RANKS, 2)
    first, second, third, fourth = (
        run_with(tmp_path, name, ranks, seed)
        for seed, (name, ranks) in enumerate({"a": RANKS, "b": reversed_ranks, "c": swapped, "d": flat}.items())
    )
    runs = {"three": [first, second, third], "odd": [first, third], "late": [third, fourth], "one": [first]}
    assert RankAgreement("three")(runs) == pytest.approx({0: -1, 1: -4 / 6, 2: 4 / 6})
    assert RankAgreement("odd", other="late")(runs) == pytest.approx({0: 4 / 6, 2: 0})
    assert RankAgreement("one")(runs) == {}


def test_randomly_moved_ranks_keep_the_total_and_have_no_bias(tmp_path):
    config = {"name": "alora", "init_rank": 4, "prune": "block"}
    biases = []
    for seed in range(60):
        run = run_with(tmp_path, f"r{seed}", dict.fromkeys(RANKS, 4), seed, method=config)
        table = run.table
        for step in (3, 6, 9):
            row = table.iloc[[0]].assign(step=step, quantity="score_full", module="")
            table = pd.concat([table.astype({"quantity": "str", "module": "str"}), row], ignore_index=True)
        run.__dict__["table"] = table
        drawn = alora.randomly_moved_ranks(
            run, rank_statistics.final_ranks([run_with(tmp_path, f"s{seed}", RANKS, seed)])
        )
        assert drawn["value"].sum() <= 16
        moved = np.abs(drawn["value"] - 4).sum()
        assert 0 < moved <= 2 * 3 * 2
        by_module = drawn.set_index(drawn["module"].astype("str"))["value"]
        biases.append(by_module["h.0.q"] + by_module["h.1.q"] - by_module["h.0.up"] - by_module["h.1.up"])
    assert abs(np.mean(biases)) < 3 * np.std(biases) / 60**0.5


def test_random_logit_ranks_are_below_half_of_the_initial_rank(tmp_path):
    modules = {f"m{number}": 4 for number in range(400)}
    ranks = autolora.random_logit_ranks(run_with(tmp_path, "a", modules, recipe={"name": "autolora", "rank": 8}))
    assert len(ranks) == 400
    assert ranks.min() >= 1
    # Log-normal weights exceed their mean with probability P(z > 1/2) = 0.31, and a little more often for small k.
    assert 2.3 < ranks.mean() < 3.5


def test_recovery_statistics_match_values_by_hand(tmp_path):
    found = run_with(tmp_path, "a", {"h.0.q": 1, "h.0.up": 2, "h.1.q": 4}, truth=RANKS)
    # The planted ranks are 1, 3, 0, 4 and the found ranks 1, 2, 4, 0; the last module has no adapter.
    assert absolute_error(found) == pytest.approx((0 + 1 + 4 + 4) / 4)
    assert rank_correlation(found) == pytest.approx(np.corrcoef([2, 3, 1, 4], [2, 3, 4, 1])[0, 1])
    assert rank_correlation(run_with(tmp_path, "b", RANKS, truth=RANKS)) == pytest.approx(1)
    assert rank_correlation(run_with(tmp_path, "c", dict.fromkeys(RANKS, 2), truth=RANKS)) == 0


def test_planted_figure_shows_mean_found_rank_per_planted_rank(tmp_path):
    truth = {"h.0.q": 1, "h.0.up": 1, "h.1.q": 4, "h.1.up": 4}
    runs = [
        run_with(tmp_path, f"r{seed}", dict(zip(truth, found, strict=True)), seed, truth)
        for seed, found in enumerate([(0, 2, 3, 5), (1, 3, 3, 3)])
    ]
    chart = plots.planted({"it": runs})
    assert dict(zip(chart.data["planted"], chart.data["value"], strict=True)) == {1: 1.5, 4: 3.5}
    chart.mpl()


@pytest.fixture
def small_teacher(monkeypatch, tmp_path):
    monkeypatch.setenv("LORASCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(planted_teacher, "TEXTS", 120)
    for made in (planted_teacher.task, planted_teacher.planted_ranks):
        made.cache_clear()
    yield
    for made in (planted_teacher.task, planted_teacher.planted_ranks):
        made.cache_clear()


def test_base_is_written_without_output(small_teacher, capfd):
    assert transformers.utils.logging.is_progress_bar_enabled()
    planted_teacher.base()
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_teacher_update_has_the_planted_ranks_and_singular_values(small_teacher):
    base, model, truth = planted_teacher.student(), planted_teacher.teacher(3), planted_teacher.planted_ranks(3)
    assert sum(truth.values()) == planted_teacher.BUDGET * len(truth)
    assert list(truth) == module_table.match(module_table.describe(base), "all-linear")
    before = {name: parameter.detach() for name, parameter in base.named_parameters()}
    for name, update in delta.deltas(model, before):
        sigma = update.singular_values()
        size = planted_teacher.STRENGTH * float(torch.linalg.matrix_norm(before[f"{name}.weight"], 2))
        expected = np.zeros(len(sigma))
        expected[: truth.get(name, 0)] = size
        assert sigma == pytest.approx(expected, abs=1e-5)
    assert planted_teacher.planted_ranks(4) != truth
    assert planted_teacher.task(3).hash != planted_teacher.task(4).hash


def shrunk(probe, bert, files):
    """Shrink a probe to runs of a few steps on a tiny encoder; the planted probe keeps its own tiny decoder."""

    def tiny(arm):
        settings = dict(arm.settings) | {"steps": 10, "batch_size": 4, "eval_every": 0, "eval_size": 8, "test_size": 8}
        settings["observe"] = [replace(observer, every=5) for observer in arm.settings["observe"]]
        inputs = {} if arm.vary else {"model": bert, "task": files["tweets" in str(arm.task)]}
        return replace(arm, settings=settings, **inputs)

    arms = [tiny(arm) for arm in probe.arms(True)]
    return replace(probe, arms=lambda quick: arms)


@pytest.mark.parametrize(
    "name", ["adalora", "alora", "autolora", "agreement", pytest.param("planted", marks=pytest.mark.slow)]
)
def test_probe_from_runs_to_report(name, bert, task, tmp_path, monkeypatch, small_teacher):
    files = [str(tmp_path / "toy.csv"), str(tmp_path / "toy-film.csv")]
    rows = task.table[["text", "label", "group"]]
    rows.to_csv(files[0], index=False)
    rows[rows["group"] == "film"].to_csv(files[1], index=False)
    monkeypatch.setitem(probes.PROBES, name, shrunk(probes.PROBES[name], bert, files))
    monkeypatch.setattr(sweep, "cpu_count", lambda: 1)  # run in this process, without workers
    found = probes.reproduce([name], True, 2, tmp_path / "out")
    page = html.unescape(found.path.read_text(encoding="utf-8"))
    verdicts = found.verdicts[name]
    assert len(verdicts) >= 3
    for verdict in verdicts:
        assert verdict.claim.sentence in page
        assert verdict.outcome == "inconclusive"
        assert np.isfinite(verdict.effect)
    measured = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "measured").glob("*")}
    assert bool(measured) == (probes.PROBES[name].measure is not None)
    if measured:
        assert str(probes.write_report(tmp_path / "out")) == str(found)
    assert measured == {file: file.stat().st_mtime_ns for file in measured}


def test_planted_ranks_are_recorded_and_used_by_the_truth_arm(small_teacher):
    arm = next(arm for arm in planted.arms(True) if arm.label == planted.TRUTH)
    of_two = arm.vary(arm, 2)
    assert of_two.method.rank == planted_teacher.planted_ranks(2)
    assert of_two.settings["observe"][-1].ranks == planted_teacher.planted_ranks(2)
    assert sum(planted.random_ranks(2).values()) == sum(planted_teacher.planted_ranks(2).values())
    assert "planted_rank" in QUANTITIES


def test_placement_arms_have_equal_parameters():
    """Count the parameters of each arm's adapters on the model; the ranks have the paper's ratios of 5 and 2."""
    counted, ranks = {}, {}
    for arm in adalora_placement.arms(True):
        model = models.load("minilm")
        arm.method.attach(model)
        deltas = delta.attached_deltas(model)
        counted[arm.label] = sum(parameter.numel() for one in deltas.values() for parameter in one.parameters())
        ranks[arm.label] = {one.rank for one in deltas.values()}
        layers = {name.split("layer.")[1][0] for name in deltas}
        assert len(deltas) == (6 if arm.label in adalora_placement.TYPES else 12)
        assert layers == (
            {*"012345"} if arm.label in adalora_placement.TYPES else {*arm.label.removeprefix("layers ")} - {*", "}
        )
    assert set(counted.values()) == {69_120}
    assert list(ranks.values()) == [{15}] * 4 + [{6}] * 2 + [{5}] * 3


def test_placement_claims_compare_means_of_types_and_layers(tmp_path):
    """Feed-forward types have a mean of 0.85 and attention types of 0.65; upper layers 0.9 and lower layers 0.7."""
    accuracies = [0.5, 0.6, 0.7, 0.8, 0.8, 0.9, 0.7, 0.1, 0.9]
    runs = {
        label: [
            plant(
                tmp_path,
                f"{number}{seed}",
                {("test_metric", ""): {9: value}},
                seed=seed,
                test={"name": "accuracy", "metric": value, "loss": 0.5},
            )
            for seed in range(3)
        ]
        for number, (label, value) in enumerate(
            zip((*adalora_placement.TYPES, *adalora_placement.GROUPS), accuracies, strict=True)
        )
    }
    first, second = adalora_placement.PROBE.judge(runs).verdicts
    assert (first.effect, second.effect) == (pytest.approx(0.2), pytest.approx(0.2))
    assert {first.outcome, second.outcome} == {"supported"}
