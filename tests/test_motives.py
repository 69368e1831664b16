"""Tests of the motives of LISA and HydraLoRA: norms by layer, nearest factors, their claims and figures."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from lorascope import observe
from lorascope.charts.marks import Point
from lorascope.inputs import tasks
from lorascope.methods import LoRA
from lorascope.methods.lora import LoRADelta
from lorascope.papers import hydralora_factors as hydra
from lorascope.papers import lisa
from lorascope.papers.judging.kept_study import StudyEvidence
from lorascope.papers.setups import planted_teacher, planted_truths
from lorascope.training.loop import train
from lorascope.updates import LowRank

DOMAINS = dict(zip("abcdef", ("x", "x", "y", "y", "z", "z"), strict=True))
"""Runs -> domain, as on text."""


def draw_updates(seed: int, modules: int = 5) -> dict[str, dict[str, LowRank]]:
    """Draw independent updates of modules of two shapes."""
    rng = np.random.default_rng(seed)
    shapes = {f"h.{number}": (7, 9) if number % 2 else (9, 7) for number in range(modules)}

    def draw(out: int, into: int) -> LowRank:
        return LowRank(rng.normal(size=(out, 3)), rng.normal(size=(3, into)))

    return {run: {name: draw(*shape) for name, shape in shapes.items()} for run in DOMAINS}


def overlap(view: str, left: np.ndarray, right: np.ndarray) -> float:
    """Compute the similarity of two factors with rows of components, from its definition."""
    if view == "space":
        bases = [np.linalg.qr(array.T)[0] for array in (left, right)]
        return float(np.linalg.norm(bases[0].T @ bases[1]) ** 2 / len(left))
    return float((left * right).sum() / np.linalg.norm(left) / np.linalg.norm(right))


def brute_force(updates: Any, view: str, factor: str) -> dict[tuple[str, str], tuple[str, str]]:
    """Find the nearest factor of every (run, module) by a loop over all pairs."""
    points = {
        (run, name): update.A if factor == "A" else update.B.T
        for run, modules in updates.items()
        for name, update in modules.items()
    }
    nearest = {}
    for (run, module), array in points.items():
        best = -np.inf
        for (other, name), candidate in points.items():
            is_other = DOMAINS[run] != DOMAINS[other]
            if view == "module":
                is_other = run != other and module == name
            if array.shape == candidate.shape and is_other and overlap(view, array, candidate) > best:
                best = overlap(view, array, candidate)
                nearest[run, module] = other, name
    return nearest


@pytest.mark.parametrize("seed", range(3))
def test_nearest_factors_equal_a_loop_over_all_pairs(seed: int) -> None:
    updates = draw_updates(seed)
    table = hydra.nearest_factors(updates, DOMAINS)
    modules = list(updates["a"])
    for factor, view in product("AB", ("raw", "space", "module")):
        rows = table[(table["factor"] == factor) & (table["view"] == view)]
        expected = brute_force(updates, view, factor)
        counts = rows.value_counts(["module", "task", "other_module", "other_task"]).to_dict()
        wanted = [(module, DOMAINS[run], name, DOMAINS[other]) for (run, module), (other, name) in expected.items()]
        assert counts == pd.Series(wanted).value_counts().to_dict()
        assert rows[["x", "y"]].notna().all(axis=None) == (view == "raw")
        assert sorted(set(rows["module"])) == sorted(modules)


def test_equal_spaces_are_shared_in_any_coordinates_and_independent_ones_are_not() -> None:
    """A's with one row space per module are shared by spaces only; independent ones near 1 / modules."""
    rng, modules = np.random.default_rng(0), 12
    spaces = [rng.normal(size=(3, 40)) for _ in range(modules)]

    def update(A: np.ndarray) -> LowRank:
        return LowRank(rng.normal(size=(20, 3)), A)

    shared, equal, independent = (
        {run: {f"h.{number}": update(draw(spaces[number])) for number in range(modules)} for run in DOMAINS}
        for draw in (
            lambda A: rng.normal(size=(3, 3)) @ A,
            lambda A: A,
            lambda A: rng.normal(size=A.shape),
        )
    )
    fractions = {}
    for name, updates in {"shared": shared, "equal": equal, "independent": independent}.items():
        table = hydra.nearest_factors(updates, DOMAINS)
        fractions[name] = {view: hydra.shared_fraction(table, "A", view) for view in ("raw", "space")}
        assert hydra.shared_fraction(table, "B", "space") < 25
    assert fractions["equal"] == {"raw": 100, "space": 100}
    assert fractions["shared"]["space"] == 100
    assert fractions["shared"]["raw"] < 100
    assert max(fractions["independent"].values()) < 25  # 100 / 12 is 8.3


@pytest.mark.parametrize(("noise", "low", "high"), [(0.3, 100, 100), (100.0, 12, 28)])
def test_own_group_fraction_is_100_for_domains_and_a_fifth_at_random(noise: float, low: float, high: float) -> None:
    rng = np.random.default_rng(5)
    centers = {(domain, number): rng.normal(size=(8, 2)) for domain in "xyz" for number in range(24)}
    updates = {
        run: {
            f"h.{number}": LowRank(centers[domain, number] + noise * rng.normal(size=(8, 2)), rng.normal(size=(2, 8)))
            for number in range(24)
        }
        for run, domain in DOMAINS.items()
    }
    assert low <= hydra.own_group_fraction(hydra.nearest_factors(updates, DOMAINS)) <= high


def test_a_replicate_has_17_runs_that_share_only_the_initial_a_of_their_set(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tasks.from_frame(pd.DataFrame({"text": [f"text {number}" for number in range(90)]}))
    monkeypatch.setattr(tasks, "load", lambda name: whole)
    arms = {arm.label: arm for arm in hydra.study_arms()}
    text = (hydra.TEXT, hydra.TEXT_SHARED, hydra.TEXT_THIRDS)
    assert set(arms) == {label for name in hydra.SETS for label in hydra.SETS[name]}
    assert len(arms) == 17 + 16
    seeds: dict[int, set[int]] = {}
    for seed in (200, 201, 203):
        for name in text:
            replicate = [arms[label].of_seed(seed) for label in hydra.SETS[name]]
            run_seeds = [arm.settings["seed"] for arm in replicate]
            assert run_seeds == list(range(6 * seed, 6 * seed + 6))
            # The first run is in both sets on domains, and draws its A from its own seed.
            init_seeds = [6 * seed] * 6 if name != hydra.TEXT else [None] * 6
            if name == hydra.TEXT_SHARED:
                init_seeds[0] = None
            assert [arm.method.init_seed for arm in replicate] == init_seeds
            seeds.setdefault(seed, set()).update(run_seeds)
            if name == hydra.TEXT_THIRDS:
                parts = [arm.task.name.split("part ")[1] for arm in replicate]
                assert parts == [f"{1 + order // 2} of 3, draw {seed}" for order in range(6)]
            else:
                assert [arm.task for arm in replicate] == [f"sentiment/{task}" for task in hydra.SETS[name].values()]
    assert len(set.union(*seeds.values())) == 18


def test_planted_tasks_share_initial_factors_of_their_seed_only_in_the_shared_sets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learned = []

    def note_task(truth: str, seed: int, task: int | None) -> str:
        learned.append((truth, seed, task))
        return "sentiment"

    monkeypatch.setattr(planted_truths, "sampled_task", note_task)
    arms = {arm.label: arm for arm in hydra.study_arms()}
    separate: set[int] = set()
    for seed, truth in product((200, 201), (hydra.SHARED_A, hydra.UNRELATED)):
        for start in (hydra.SEPARATE, hydra.SHARED):
            replicate = [arms[label].of_seed(seed) for label in hydra.SETS[f"{truth}, {start}"]]
            seeds = {arm.method.init_seed for arm in replicate}
            assert len(seeds) == (4 if start == hydra.SEPARATE else 1)
            assert not seeds & separate or truth == hydra.UNRELATED  # both truths have the same starts
            separate |= seeds
            assert learned[-4:] == [(truth, seed, number) for number in range(4)]
            assert {(arm.method.rank, arm.method.alpha) for arm in replicate} == {(4, 16.0)}
    assert len(separate) == 2 * 5


@pytest.mark.slow
@pytest.mark.real
def test_thirds_of_a_replicate_are_the_whole_text_and_two_orders_have_the_same_rows() -> None:
    arms = {arm.label: arm for arm in hydra.study_arms()}
    parts = [arms[label].of_seed(200).task for label in hydra.SETS[hydra.TEXT_THIRDS]]
    assert [part.hash for part in parts[::2]] == [part.hash for part in parts[1::2]]
    texts = [text for part in parts[::2] for text in part.split("train")["text"]]
    assert sorted(texts) == sorted(tasks.load("sentiment").split("train")["text"])


def made_evidence(tables: dict[tuple[str, str], pd.DataFrame], seeds: range) -> StudyEvidence:
    """Return judged runs with these tables, by name and arm, for every seed."""
    runs, by_name = [], {}
    for (name, arm), table in tables.items():
        for seed in seeds:
            run = f"{arm} {seed}"
            runs.append({"arm": arm, "seed": seed, "run": run, "role": "judged", "rate": 1.0, "phase": "", "task": ""})
            by_name.setdefault(name, []).append(table.assign(arm=arm, seed=seed, run=run))
    return StudyEvidence(pd.DataFrame(runs), {name: pd.concat(group) for name, group in by_name.items()})


def made_nearest(name: str, same: dict[tuple[str, str], int]) -> pd.DataFrame:
    """Return a table ``nearest``: how many of 100 factors have their nearest in the same module and task."""
    tables = []
    for (factor, view), count in same.items():
        is_same = np.arange(100) < count
        table = pd.DataFrame({"set": name, "factor": factor, "view": view, "module": "m", "task": "t"}, range(100))
        others = {"other_module": np.where(is_same, "m", "n"), "other_task": np.where(is_same, "t", "u")}
        tables.append(table.assign(**others))
    return pd.concat(tables)


def test_claims_on_factors_compare_the_sets_that_they_name() -> None:
    # Every set, factor and view has another fraction, so that no two can be exchanged.
    kinds = list(product("AB", ("raw", "space", "module")))
    percent = {}
    for number, name in enumerate(hydra.SETS):
        percent[name] = {kind: 2 + 11 * number + 3 * index for index, kind in enumerate(kinds)}
    tables = {("nearest", [*hydra.SETS[name]][-1]): made_nearest(name, same) for name, same in percent.items()}
    evidence, (text, shared, thirds) = (
        made_evidence(tables, range(200, 203)),
        [percent[name] for name in [*percent][:3]],
    )
    truth, _, apart, apart_shared = [percent[name] for name in [*percent][3:]]
    A, own, power = ("A", "space"), ("B", "module"), truth["A", "space"] - apart["A", "space"]
    expected = {
        "factors.start": {"for": shared["A", "raw"] - text["A", "raw"]},
        "factors.space": {"for": text[A] - text["B", "space"], "positive": power},
        "factors.domain": {"for": shared[own] - thirds[own], "positive": shared[own] - 20},
        "factors.artifact": {"for": apart_shared[A] - apart[A]},
        "factors.power": {"for": power},
    }
    assert hydra.JUDGED.keys() == expected.keys()
    for id, comparison in hydra.JUDGED.items():
        effects = {name: statistic(evidence, [200, 202]) for name, statistic in comparison.statistics().items()}
        assert effects.keys() == expected[id].keys()
        for name, values in effects.items():
            np.testing.assert_allclose(values, expected[id][name])
    labels = {label for name in hydra.SETS for label in hydra.SETS[name]}
    assert set.union(*(comparison.arms() for comparison in hydra.JUDGED.values())) == labels - {
        label for label in hydra.SETS[hydra.SHARED_A_SHARED]
    }


def made_norms(embed: float, head: float | None) -> pd.DataFrame:
    """Return a table ``norms`` whose blocks have the median norm 2 in the reading "update"."""
    values = {"embed": embed, "0": 1.0, "1": 2.0, "2": 40 * embed} | ({"head": head} if head else {})
    rows = [("update", place, place.isdigit(), value) for place, value in values.items()]
    rows += [("weight", place, place.isdigit(), 7.0) for place in values]
    return pd.DataFrame(rows, columns=["reading", "place", "block", "value"])


def test_claims_on_norms_compare_log_ratios_to_the_median_block() -> None:
    tables = {
        ("norms", lisa.NORM_FULL): made_norms(4.0, None),
        ("norms", lisa.NORM_LORA): made_norms(2000.0, 200.0),
        ("norms", lisa.NORM_SMALL): made_norms(20.0, 20000.0),
    }
    evidence, full = made_evidence(tables, range(200, 202)), np.log10(2)
    expected = {"norms.embedding": 1 - full, "norms.head": 2 - full, "norms.start": 2}
    for id, effect in expected.items():
        comparison = lisa.JUDGED[id]
        np.testing.assert_allclose(comparison.effect(evidence, [200, 201]), effect)
        assert (comparison.positive is None) == (id == "norms.start")
        if comparison.positive is not None:
            np.testing.assert_allclose(comparison.positive(evidence, [200, 201]), 2)


def test_norms_by_layer_equal_those_from_dense_matrices() -> None:
    lines = tasks.from_frame(pd.DataFrame({"text": [f"w{number % 60 + 1} w3 w5" for number in range(80)]}))
    method = LoRA(rank=2, alpha=6.0, targets=("all-linear", "embed", "lm_head"), lr=1e-2)
    settings = {"steps": 4, "batch_size": 4, "eval_every": 0, "eval_size": 4, "progress": False, "device": "cpu"}
    observers = [observe.norms(every=2), observe.factors(every=1)]
    model = planted_teacher.student()
    base = {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}
    run = train(model, lines, method, observe=observers, **settings)
    table = lisa.norms_by_layer(run).set_index(["reading", "place"])["value"]
    squares: dict[tuple[str, str], dict[int, float]] = {}
    for step in (2, 4):
        first, factors = run.factors(0), run.factors(step)
        for module, arrays in factors.items():
            update = 3.0 * arrays["B"] @ arrays["A"]
            place = "embed" if "embed" in module else "head" if "head" in module else module.split(".")[2]
            start = first[module]
            values = {
                "update": update,
                "factors": np.concatenate([arrays["A"].ravel(), arrays["B"].ravel()]),
                "factors − start": np.concatenate([(arrays[name] - start[name]).ravel() for name in "AB"]),
            }
            for reading, array in values.items():
                of_step = squares.setdefault((reading, place), {})
                of_step[step] = of_step.get(step, 0.0) + float((array.astype(float) ** 2).sum())
    for key, of_step in squares.items():
        assert table[key] == pytest.approx(np.mean(np.sqrt([*of_step.values()])), rel=1e-5)
    assert {reading for reading, _ in squares} | {"weight"} == set(lisa.READINGS)
    assert table["weight", "embed"] == pytest.approx(np.linalg.norm(base["model.embed_tokens.weight"]), rel=0.05)


def test_the_figure_of_factors_has_the_planes_of_one_seed_and_the_fractions_of_all() -> None:
    tables = []
    for name, labels in hydra.SETS.items():
        table = hydra.nearest_factors(dict.fromkeys(labels, draw_updates(0)["a"]), labels).assign(set=name)
        # Equal updates are shared by all runs of the first seed, and here by none of the second.
        tables += [table.assign(seed=200), table.assign(seed=201, other_module="none")]
    table = pd.concat(tables)
    # Text with separate starts has a third seed, without a neighbor of the same module.
    of_text = table[(table["set"] == hydra.TEXT) & (table["seed"] == 201)].assign(seed=202)
    panels = hydra.factors_figure(pd.concat([table, of_text]))
    planes, fractions = panels.rows()
    # One of two seeds, and one of three.
    assert panels.title == (
        "The nearest A in another domain is of the same module in 50% with a shared start, in 33% with separate ones "
        "(chance 8%)"
    )
    assert "Seeds, by row: 3, 2, 2, 2, 2, 2." in fractions[0].caption
    assert [chart.title for chart in planes] == [
        f"{factor}, {start}" for factor in "AB" for start in ("separate starts", "shared start")
    ]
    for chart in planes:
        assert chart.square
        assert set(chart.data["seed"]) == {200}
        assert chart.data[["x", "y"]].abs().max(axis=None) == pytest.approx(0.5, abs=1e-6)
        # Equal factors of one module are in one place, and modules are apart.
        by_module = chart.data.groupby("module")[["x", "y"]]
        assert by_module.std().max(axis=None) < 0.1 * by_module.mean().std().min()
        assert len(chart.data) == 30
    # Two measures of a row would cover each other in one panel.
    assert [chart.title for chart in fractions] == [
        f"nearest {factor}\nby {view}"
        for factor, space in (("A", "row"), ("B", "column"))
        for view in ("cosine", f"{space} space")
    ]
    for chart in fractions:
        cells = chart.data[["value", "low", "high"]].drop_duplicates().to_numpy()
        np.testing.assert_allclose(cells, [[100 / 3, 0, 100], [50, 0, 100]])
        assert len(chart.data) == 6  # three grounds with two starts
        names = ["text", "tasks share A", "unrelated updates"]
        assert list(chart.y.ticks.values())[::2] == [f"{name}: separate starts" for name in names]
        assert list(chart.y.ticks.values())[1::2] == [f"{name}: shared start" for name in names]
        chances = chart.table(chart.marks[0]).groupby("row", sort=False)["value"].first()
        assert chances.round().tolist() == [8, 8, 17, 17, 17, 17]


def test_the_figure_of_norms_has_means_and_ranges_over_seeds() -> None:
    arms = [*lisa.DECODER_NORMS.values(), *lisa.ENCODER_NORMS.values()]
    tables = [made_norms(seed * 2.0, 3.0).assign(arm=arm, seed=seed) for seed in (1, 2, 6) for arm in arms]
    table = pd.concat(tables)
    updates = table[table["reading"] == "update"]
    panels = lisa.norms_figure(table)
    others = lisa.factor_norms_figure(pd.concat([updates.assign(reading=name) for name in ("factors", lisa.LEARNED)]))
    assert [[len(row) for row in drawn.rows()] for drawn in (panels, others)] == [[2], [2, 2]]
    # The mean of 1, 2 and 6 times 2, over blocks of 2; the learned norms are half as large.
    learned = updates.assign(reading=lisa.LEARNED, value=updates["value"] / np.where(updates["block"], 1, 2))
    title = lisa.factor_norms_figure(pd.concat([updates.assign(reading="factors"), learned])).title
    assert title == "LoRA's factors of SmolLM2's embedding: norm 3 times a block's, 1.5 without the start"
    assert panels.title == (
        "Norm of LoRA's update of the embedding over that of a block: "
        "3 on SmolLM2, 3 on SmolLM2 with a small start, 3 on MiniLM"
    )
    assert "range over seeds: SmolLM2 3, MiniLM 3." in panels.panels[0].caption
    fewer = table[(table["arm"] != lisa.DECODER_NORMS["LISA"]) | (table["seed"] < 6)]
    assert "range over seeds: SmolLM2 3 (LISA: 2), MiniLM 3." in lisa.norms_figure(fewer).panels[0].caption
    for chart, arms_of_model in zip(*panels.rows(), (lisa.DECODER_NORMS, lisa.ENCODER_NORMS), strict=True):
        (dots,) = chart.marks_of(Point)
        outer = chart.table(dots).set_index(["method", "place"])
        for method in arms_of_model:
            # Over the median block, whose norm is 2.
            assert outer.loc[(method, "embed"), ["value", "low", "high"]].tolist() == [3, 1, 6]
            of_block = chart.data[(chart.data["method"] == method) & (chart.data["place"] == "1")]
            # LISA draws its blocks at random.
            expected = [] if method == "LISA" else [[1, 1, 1]]
            assert of_block[["value", "low", "high"]].to_numpy().tolist() == expected
        assert outer["layer"].max() < chart.x.limits[1]
        assert {name: position for position, name in chart.x.ticks.items()}["embed"] == outer["layer"].min()


def test_embedding_adapter_has_a_larger_gain_than_a_linear_adapter() -> None:
    """At minilm's width the gains are sqrt(384) and 1 / sqrt(3); full fine-tuning has no such factor of 34."""
    torch.manual_seed(0)
    gains = []
    for host, trained in ((nn.Embedding(3000, 384), "A"), (nn.Linear(384, 384), "B")):
        delta = LoRADelta(host, 16)
        factor = getattr(delta, trained)
        assert not factor.any()
        nn.init.normal_(factor)
        gains.append((delta.weight().norm() / factor.norm()).item())
    assert gains == pytest.approx([384**0.5, 3**-0.5], rel=0.03)
    assert np.log10(gains[0] / gains[1]) == pytest.approx(1.53, abs=0.02)
