"""Thresholds of the doctor: planted evidence just below and just above each of them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from adapter_bits import peft_folder
from planted import plant
from test_advise import made_dial
from test_doctor_recorded import case

import lorascope as ls
from lorascope.analysis.stored_measurements import DIAL
from lorascope.diagnosis.case import Case, TrainedModule
from lorascope.diagnosis.causes.adapter import dead_layers
from lorascope.diagnosis.causes.finding import DoctorRule
from lorascope.diagnosis.causes.in_training import dominated, far_from_base, loss_flat, rate_large, rate_zero
from lorascope.diagnosis.causes.late_checkpoint import late_checkpoint
from lorascope.diagnosis.causes.training import collapsed
from lorascope.diagnosis.causes.update_too_strong import update_too_strong
from lorascope.diagnosis.training_case import TrainingEvidence


def found(rule: DoctorRule, given: Case | TrainingEvidence) -> bool:
    """Return whether a rule has a finding."""
    return bool(list(rule.findings(given)))


def live(moved: tuple[float, ...] = (1.0,), **more: object) -> TrainingEvidence:
    """Return evidence of a training whose modules moved that far, with weights of norm 1."""
    modules = [
        TrainedModule(
            f"h.{number}.q", "", number, "q", 1, each, relative_update=each, weight_norm=1.0, moved=each, adapted=True
        )
        for number, each in enumerate(moved)
    ]
    given = {"modules": modules, "losses": {}, "steps": 9, "moving_steps": 9, "learning_rate": 0.1}
    given |= {"masks_components": False, "expects_adapters": True, "tied": [], "unoptimized": [], "has_gradient": True}
    return TrainingEvidence(**(given | more))


@pytest.mark.parametrize(("least", "expected"), [(1.01e-3, False), (0.99e-3, True)])
def test_layer_is_dead_below_a_thousandth_of_the_median_layer(least: float, expected: bool) -> None:
    given = case({"name": "lora"}, moved=[5.0, 1.0, least], update_norm=[5.0, 1.0, least])
    assert found(dead_layers, given) == expected


@pytest.mark.parametrize(
    ("rank", "effective", "expected"),
    [(4, 1.0101, False), (4, 1.0099, True), (3, 1.0, False)],
    ids=["above one", "one direction", "few components"],
)
def test_update_is_collapsed_if_at_least_four_components_have_one_direction(
    rank: int, effective: float, expected: bool
) -> None:
    given = case({"name": "lora"}, rank=[rank], used=[float(rank)], update_norm=[1.0], effective_rank=[effective])
    assert found(collapsed, given) == expected


def test_updates_are_collapsed_if_more_than_half_of_them_are() -> None:
    for ranks, expected in (([1.0, 2.0], False), ([1.0, 1.0, 2.0], True)):
        count = len(ranks)
        given = case(
            {"name": "lora"}, rank=[4] * count, used=[4.0] * count, update_norm=[1.0] * count, effective_rank=ranks
        )
        assert found(collapsed, given) == expected


@pytest.mark.parametrize(("rank", "expected"), [(8, True), (7, False), (3, False), (2, True)])
def test_scale_is_uneven_from_twice_or_half_the_usual_one(rank: int, expected: bool, tmp_path: Path) -> None:
    """The usual scale is 8 / 4; without an entry in alpha_pattern, that of v is 8 / rank."""
    draw = np.random.default_rng(0)
    ranks = {f"layers.{layer}.{name}": size for layer in (0, 1) for name, size in (("q", 4), ("k", 5), ("v", rank))}
    pairs = {
        name: (draw.standard_normal((9, size)).astype("f4"), draw.standard_normal((size, 7)).astype("f4"))
        for name, size in ranks.items()
    }
    patterns = {"rank_pattern": {"k": 5, "v": rank}, "alpha_pattern": {"k": 10}}
    adapter = ls.load(peft_folder(tmp_path / "adapter", pairs, r=4, lora_alpha=8, **patterns))
    causes = [finding.cause for finding in ls.diagnose(adapter)]
    assert causes == ["uneven-scale"] * expected


def test_scale_that_alpha_pattern_sets_is_not_the_usual_one(tmp_path: Path) -> None:
    """Scale 1 / 4 of q is meant; of the others, v has 8 / 2 by its rank alone, which differs from 8 / 4 only with o."""
    draw, patterns = np.random.default_rng(0), {"rank_pattern": {"v": 2}, "alpha_pattern": {"q": 1}}

    def found_with(**ranks: int) -> list[str]:
        pairs = {
            f"layers.0.{name}": (draw.standard_normal((9, r)).astype("f4"), draw.standard_normal((r, 7)).astype("f4"))
            for name, r in ranks.items()
        }
        adapter = ls.load(peft_folder(tmp_path / "-".join(ranks), pairs, r=4, lora_alpha=8, **patterns))
        return [finding.message for finding in ls.diagnose(adapter) if finding.cause == "uneven-scale"]

    assert found_with(q=4, v=2) == []
    assert ["so scale 4 instead of 2" in message for message in found_with(q=4, v=2, o=4)] == [True]


@pytest.mark.parametrize(("steps", "expected"), [(2, False), (3, True)])
def test_learning_rate_is_zero_from_the_third_step_on(steps: int, expected: bool) -> None:
    assert found(rate_zero, live(steps=steps, moving_steps=0)) == expected
    assert not found(rate_zero, live(steps=steps, moving_steps=1))


@pytest.mark.parametrize(("moved", "expected"), [(9.99, False), (10.01, True)])
def test_rate_is_large_if_the_change_exceeds_ten_times_the_weights(moved: float, expected: bool) -> None:
    assert found(rate_large, live((moved, moved))) == expected


def test_rate_is_not_large_if_all_weights_were_zero() -> None:
    modules = [replace(each, weight_norm=0.0, relative_update=math.nan) for each in live((1.0, 1.0)).modules]
    assert not found(rate_large, live(modules=modules))


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([0.7] * 4, False),
        ([0.7] * 5, True),
        ([0.7, 0.7, 0.7, 0.7, 0.7 * (1 + 0.99e-6)], True),
        ([0.7, 0.7, 0.7, 0.7, 0.7 * (1 + 1.01e-6)], False),
    ],
)
def test_loss_is_flat_if_five_are_equal_to_a_millionth(losses: list[float], expected: bool) -> None:
    assert found(loss_flat, live(losses=dict(enumerate(losses, start=1)))) == expected


@pytest.mark.parametrize(
    ("fraction", "others", "expected"),
    [(0.9989, 3, False), (0.9991, 3, True), (0.9999, 2, False)],
    ids=["not enough", "dominated", "few modules"],
)
def test_one_of_at_least_four_modules_dominates_above_999_thousandths(
    fraction: float, others: int, expected: bool
) -> None:
    rest = ((1 - fraction) / others) ** 0.5
    assert found(dominated, live((fraction**0.5, *[rest] * others))) == expected


@pytest.mark.parametrize(("distance", "expected"), [(0.5, False), (0.51, True), (math.nan, False)])
def test_model_is_far_from_its_base_above_the_limit(distance: float, expected: bool) -> None:
    assert found(far_from_base, live(distance=distance, distance_limit=0.5)) == expected
    assert not found(far_from_base, live(distance=distance))


# Losses of four rows at steps 0, 50 and 100: the last is lowest, and 0.001 below that of step 50 with an error of 0.03.
FLAT = {0: [2.0, 2.1, 2.2, 2.3], 50: [1.0, 1.1, 1.2, 1.3], 100: [1.05, 1.04, 1.246, 1.26]}
FALLING = FLAT | {100: [0.9, 1.01, 1.1, 1.21]}


@pytest.mark.parametrize(
    ("losses", "distances", "expected"),
    [
        (FLAT, (0.0, 0.4, 0.51), True),
        (FLAT, (0.0, 0.4, 0.499), False),
        (FLAT, (0.0, 0.01, 0.0199), False),
        (FLAT, (0.4, 0.4, 0.4), False),
        (FALLING, (0.0, 0.4, 0.8), False),
    ],
    ids=["farther", "hardly farther", "never far", "horizontal path", "still learning"],
)
def test_checkpoint_is_late_if_an_earlier_one_has_its_loss_and_is_nearer(
    losses: dict[int, list[float]], distances: tuple[float, ...], expected: bool, tmp_path: Path
) -> None:
    rows = {step: np.array(values) for step, values in losses.items()}
    gauge = dict(zip(losses, distances, strict=True))
    given = Case(plant(tmp_path, "a", {("row_loss", ""): rows, ("kl_keep", ""): gauge}))
    findings = list(late_checkpoint.findings(given))
    assert bool(findings) == expected
    if expected:
        assert findings[0].evidence["step"] == 50
        assert findings[0].evidence["above"] == pytest.approx(0.001)


def test_checkpoint_is_not_late_without_a_gauge_or_a_finite_loss(tmp_path: Path) -> None:
    assert not found(late_checkpoint, Case(plant(tmp_path, "a", {("loss", ""): {0: 1.0}})))
    rows = {0: np.full(4, np.nan)}
    assert not found(late_checkpoint, Case(plant(tmp_path, "b", {("row_loss", ""): rows, ("kl_keep", ""): {0: 0.0}})))


@pytest.mark.parametrize(
    ("loss", "spread", "changes", "expected"),
    [
        (0.05, 0.35, {}, True),
        (0.05, 0.36, {}, False),
        (0.11, 0.0, {}, False),
        (0.05, 0.0, {"learn_low": -0.1}, False),
        (0.05, 0.0, {"best_distance_high": 0.1}, False),
        (0.05, 0.0, {"run": "another"}, False),
    ],
    ids=["below", "touches", "costs more", "not shown to learn", "not shown to be nearer", "of another run"],
)
def test_update_is_too_strong_if_the_loss_at_a_smaller_scale_ends_below_the_margin(
    loss: float, spread: float, changes: dict[str, object], expected: bool, tmp_path: Path
) -> None:
    """The margin is a tenth of the learning, 0.1, and half an interval of 200 rows is 0.14 spreads."""
    run = plant(tmp_path, "a", {("loss", ""): {0: 1.0}})
    assert run.path is not None
    table = made_dial(loss, spread).summary().assign(run=run.id)
    table.assign(**changes).to_csv(run.path / DIAL, index=False)
    findings = list(update_too_strong.findings(Case(run)))
    assert bool(findings) == expected
    if expected:
        evidence = findings[0].evidence
        assert evidence["scale"] == 0.5
        assert evidence["loss"] == pytest.approx(0.05)
        assert evidence["distance"] == pytest.approx(-1.0)
        assert evidence["threshold"] == pytest.approx(0.1)


def test_strength_of_an_update_is_not_checked_without_a_dial(tmp_path: Path) -> None:
    assert not Case(plant(tmp_path, "a", {("loss", ""): {0: 1.0}})).has("dial")
