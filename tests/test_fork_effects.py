"""Effects of forks: statistics and verdicts from worked numbers, and of tiny trainings."""

from __future__ import annotations

import math

import numpy as np
import pytest
from killing import SETTINGS
from parsed_pages import Tree
from scipy import stats

import lorascope as ls
from lorascope.analysis.fork_effects import independent_effects, judge_effects, pairs_needed
from lorascope.analysis.seed_intervals import t_estimate
from lorascope.inputs import models
from lorascope.methods import LoRA
from lorascope.papers.setups import planted_teacher

COLUMNS = ["trunk", "fork", "seed", "step", "change", "loss_trunk", "loss_fork", "effect", "low", "high", "identical"]


@pytest.fixture(scope="module")
def forks(bert, task, tmp_path_factory) -> list[ls.Run]:
    """Five seeds, each forked twice: with a tenth of the rate, and without a change."""
    root, method = tmp_path_factory.mktemp("effects"), LoRA(rank=2, targets="all-linear", lr=1e-2)
    forks = []
    for seed in range(5):
        model, out = models.load(bert, task=task), root / f"trunk {seed}"
        trunk = ls.train(model, task, method, seed=seed, out=out, **SETTINGS | {"keep_checkpoints": (2,)})
        for change in ({"lr": 1e-3}, {}):
            model = models.load(bert, task=task)
            forks.append(ls.fork(trunk, model, task, step=2, device="cpu", progress=False, **change))
    return forks


def test_effect_is_the_difference_of_test_losses_with_the_interval_of_its_pairs(forks):
    effects = ls.fork_effects(forks)
    assert list(effects.table) == COLUMNS
    for fork, row in zip(forks, effects.table.itertuples(), strict=True):
        assert (row.fork, row.trunk, row.seed, row.step) == (fork.id, fork.trunk.id, fork.seed, 2)
        assert row.effect == fork.score.loss - fork.trunk.score.loss
        differences = fork.predictions["nll"].astype(float) - fork.trunk.predictions["nll"].astype(float)
        if differences.any():
            low, high = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
            assert (row.high - row.low) == pytest.approx(high - low)
    changed, empty = effects.summary().itertuples()
    rows = effects.table[effects.table["change"] == "lr 0.001"]
    low, high = stats.ttest_1samp(rows["effect"], 0).confidence_interval(0.95)
    assert (changed.low, changed.high) == pytest.approx((low, high))
    assert (changed.pairs, changed.fraction, changed.sd) == (5, 2 / 5, pytest.approx(rows["effect"].std()))
    assert changed.margin == pytest.approx(rows["loss_trunk"].std())
    assert (empty.effect, empty.low, empty.high, empty.verdict) == (0, 0, 0, "no difference")
    assert effects.table.loc[effects.table["change"] == "no change", "identical"].all()
    assert not rows["identical"].any()


def test_one_pair_has_an_interval_over_rows_and_no_verdict(forks):
    effects = ls.fork_effects(forks[0])
    (pair,), (summary,) = effects.table.itertuples(), effects.summary().itertuples()
    assert (summary.low, summary.high) == (pair.low, pair.high)
    assert summary.verdict == ""
    assert math.isnan(summary.sd)
    assert "no verdict below 5 pairs" in repr(effects)
    assert "do not cover the seed" in repr(effects)
    assert "(40% of the training)" in repr(effects)


def test_effects_are_json_and_have_a_receipt(forks):
    content = ls.fork_effects(forks, margin=0.5).to_json()
    assert content["changes"][0]["margin"] == 0.5
    assert content["table"][0]["fork"] == forks[0].id
    assert content["receipt"]["rows"] == {"test": f"8 rows {forks[0].meta.data_hash[:12]}"}
    assert "receipt" in repr(ls.fork_effects(forks)).splitlines()[-1]


def test_effects_of_forks_are_html_with_their_finding(forks):
    effects = ls.fork_effects(forks)
    page = Tree(effects._repr_html_()).root
    (finding,) = page.all("p")
    for row in effects.summary().itertuples():
        assert f"{row.change}, from step {row.step} on: {row.effect:+.4g} nats [" in finding.text
    (table,) = page.all("table")
    assert len(table.all("tr")) == 1 + len(effects.table)


def test_independent_pairs_leave_out_those_with_one_seed(forks):
    rows = ls.fork_effects(forks[::2]).table
    differences = independent_effects(rows)
    assert len(differences) == 5 * 4
    assert differences.mean() == pytest.approx(rows["effect"].mean())
    summary = ls.fork_effects(forks[::2]).summary().loc[0]
    assert summary["independent_sd"] ** 2 == pytest.approx(rows["loss_fork"].var() + rows["loss_trunk"].var())


@pytest.mark.parametrize(
    ("effects", "margin", "verdict"),
    [
        ([-0.02, -0.021, -0.022, -0.019, -0.02], 0.01, "lower"),
        ([0.02, 0.021, 0.022, 0.019, 0.02], 0.05, "higher"),
        ([0.001, -0.001, 0.0005, -0.0005, 0.0], 0.01, "no difference"),
        ([0.0] * 5, 0.0, "no difference"),
        ([0.03, -0.02, 0.01, -0.03, 0.02], 0.01, "undecided"),
    ],
)
def test_every_verdict_has_its_condition(effects, margin, verdict):
    assert judge_effects([t_estimate(np.array(effects))], [margin]) == [verdict]


def test_many_changes_are_corrected_together():
    """One effect at p = 0.04 is significant, and among ten it is not."""
    noise = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    shift = 2.9 * noise.std(ddof=1) / math.sqrt(5)
    lone, null = t_estimate(noise + shift), t_estimate(noise + 0.01)
    assert stats.ttest_1samp(noise + shift, 0).pvalue == pytest.approx(0.044, abs=1e-3)
    assert judge_effects([lone], [0.0]) == ["higher"]
    assert judge_effects([lone] + [null] * 9, [0.0] * 10) == ["undecided"] * 10


@pytest.mark.slow
def test_forks_have_at_most_half_the_spread_of_independent_seeds(tmp_path):
    """Students of a planted teacher whose rate falls to 0.3 of its value after half of the training, 5 seeds."""
    base, task, method = planted_teacher.base(), planted_teacher.task(0), LoRA(rank=4, targets="all-linear", lr=1e-2)
    settings = {"steps": 150, "batch_size": 16, "eval_every": 0, "progress": False, "device": "cpu"}
    forks = []
    for seed in range(5):
        out = tmp_path / str(seed)
        trunk = ls.train(base, task, method, seed=seed, out=out, keep_checkpoints=(75,), **settings)
        forks.append(ls.fork(trunk, base, task, step=75, lr=3e-3, device="cpu", progress=False))
    (change,) = ls.fork_effects(forks).summary().itertuples()
    assert change.sd <= change.independent_sd / 2


@pytest.mark.slow
def test_equal_arms_have_a_verdict_in_at_most_one_of_twenty():
    """The matched null: effects around 0, and a margin below their spread."""
    draw = np.random.default_rng(0)
    verdicts = [judge_effects([t_estimate(draw.normal(size=5))], [1e-3])[0] for _ in range(2000)]
    assert np.mean([verdict in ("lower", "higher") for verdict in verdicts]) == pytest.approx(0.05, abs=0.012)


def test_pairs_needed_follow_from_the_distance_to_a_bound():
    estimate = t_estimate(np.array([0.03, -0.02, 0.01, -0.03, 0.02]))
    error = estimate.errors[0][0]
    assert pairs_needed(estimate, 0.001) == math.ceil(5 * (1.96 * error / 0.002) ** 2)
    near_zero = math.ceil(5 * (1.96 * error / (0.02 - 0.002)) ** 2)
    assert pairs_needed(estimate, 0.02) == max(6, near_zero)
    assert pairs_needed(t_estimate(np.array([-1.0, 1.0])), 0.0) == math.inf


def test_bad_input_is_one_line(forks, tmp_path):
    with pytest.raises(ValueError, match=r"forks must be runs of ls.fork, got run .* \(LoRA"):
        ls.fork_effects(forks[0].trunk)
    with pytest.raises(ValueError, match=r"forks must be runs of ls.fork, got adapter"):
        ls.fork_effects(ls.example("adapter"))
    with pytest.raises(ValueError, match="forks must contain at least 1 fork"):
        ls.fork_effects([])
    with pytest.raises(ValueError, match=f"must have different trunks, got two of {forks[0].trunk.id}"):
        ls.fork_effects([forks[0], forks[0]])
    with pytest.raises(ValueError, match="margin must be >= 0, got -1"):
        ls.fork_effects(forks, margin=-1)


def test_figure_shows_each_trunk_and_its_forks_from_their_step_on(forks):
    left, right = ls.plots.forks(forks).panels
    losses = left.data.groupby("arm")["step"].agg(["min", "max"])
    assert losses.loc["trunk"].to_list() == [0, 5]
    assert losses.loc["lr 0.001"].to_list() == [2, 5]
    assert left.data["run"].nunique() == 15
    assert [mark.x for mark in left.marks_of(ls.Rule)] == [2]
    assert list(right.y.order) == ["lr 0.001", "no change"]
    ticks, dots = right.marks_of(ls.Point)
    assert len(right.table(ticks)) == 2 * 5 * 4
    assert len(right.table(dots)) == 10
    assert "no change, from step 2 (40% of the training): effect 0, bitwise equal predictions." in left.caption
    assert "lr 0.001 (trunks lr 0.01), from step 2 (40% of the training): " in left.caption
    trunk_line, fork_line = left.marks_of(ls.Line)
    assert set(left.table(trunk_line)["arm"]) == {"trunk"}
    assert trunk_line.muted
    assert set(left.table(fork_line)["arm"]) == {"lr 0.001", "no change"}
    assert not fork_line.muted


def test_figure_of_one_pair_has_an_interval_over_rows_and_no_ticks(forks):
    _, right = ls.plots.forks(forks[0]).panels
    (dot,) = right.marks_of(ls.Point)
    assert (dot.low, dot.high) == ("low", "high")
    assert "95% t-interval over test rows, 1 pair." in right.caption


def test_figure_needs_validation_losses_at_several_steps(bert, task, tmp_path):
    method, settings = LoRA(rank=2), SETTINGS | {"eval_every": 0, "keep_checkpoints": (2,)}
    trunk = ls.train(models.load(bert, task=task), task, method, out=tmp_path / "trunk", **settings)
    fork = ls.fork(trunk, models.load(bert, task=task), task, step=2, device="cpu", progress=False)
    with pytest.raises(ValueError, match="forks needs eval_loss at more than one step"):
        ls.plots.forks(fork)
