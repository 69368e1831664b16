"""Table of claims, and the statistic and control of each claim of the allocators and of LoRA on planted runs."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import pytest
from planted import plant
from verdicts import verdict

from lorascope.analysis import rank_allocations
from lorascope.probes import PROBES, adalora, alora, autolora, lora, planted, rank_statistics
from lorascope.probes.claims import CLAIMS
from lorascope.probes.seed_statistics import Combined, EachRun, NextSeed, accuracy, average, loss

MODULES = ("h.0.q", "h.0.up", "h.1.q", "h.1.up")


def scored(metric, nats=0.5):
    return {"name": "accuracy", "metric": metric, "loss": nats, "groups": {}}


def ranked(folder, arm, seed, ranks, truth=(), metric=0.5, nats=0.5, **meta):
    """Plant a run with these final ranks of ``MODULES``."""
    values = {("rank", module): {0: 4.0, 9: float(rank)} for module, rank in zip(MODULES, ranks, strict=True)}
    values |= {("planted_rank", module): {0: float(rank)} for module, rank in zip(MODULES, truth, strict=False)}
    factors = {name: (np.zeros((4, rank)), np.zeros((rank, 3))) for name, rank in zip(MODULES, ranks, strict=True)}
    return plant(folder, f"{arm}-{seed}", values, arm, seed, factors, test=scored(metric, nats), **meta)


def test_every_claim_belongs_to_one_probe():
    judged = [id for probe in PROBES.values() for id in probe.claims]
    assert sorted(judged) == sorted(CLAIMS)
    assert len(set(judged)) == len(judged) == 75


def test_probes_are_in_the_order_of_their_files_after_lora():
    assert [*PROBES][:5] == ["lora", "adalora", "placement", "adapprox", "alora"]
    assert [*PROBES][-2:] == ["planted", "agreement"]
    assert all(PROBES[name].name == name for name in PROBES)


def test_statistics_by_seed_match_values_by_hand(tmp_path):
    runs = {
        arm: [ranked(tmp_path, arm, seed, (1, 1, 1, 1), metric=start + seed / 8, nats=seed) for seed in range(3)]
        for arm, start in (("a", 0.25), ("b", 0.5))
    }
    a, b = EachRun(accuracy, "a"), EachRun(accuracy, "b")
    assert a(runs) == {0: 0.25, 1: 0.375, 2: 0.5}
    assert (b - a)(runs) == {0: 0.25, 1: 0.25, 2: 0.25}
    assert (a - 0.25)(runs) == {0: 0.0, 1: 0.125, 2: 0.25}
    assert (-EachRun(loss, "a"))(runs) == {0: 0.0, 1: -1.0, 2: -2.0}
    assert (a / 2)(runs) == {0: 0.125, 1: 0.1875, 2: 0.25}
    assert average([a, b])(runs) == {0: 0.375, 1: 0.5, 2: 0.625}
    assert Combined(max, (a, b, 0.55))(runs) == {0: 0.55, 1: 0.625, 2: 0.75}
    pairs = NextSeed(lambda first, second: 10 * first.seed + second.seed, "a", "b")
    assert pairs(runs) == {0: 1, 1: 12, 2: 20}
    assert pairs({arm: found[:1] for arm, found in runs.items()}) == {}


def test_claim_on_pairs_of_seeds_is_not_judged_for_a_single_seed(tmp_path):
    runs = {"a": [ranked(tmp_path, "a", 0, (1, 1, 1, 1))]}
    pairs = NextSeed(lambda first, second: 1.0, "a", "a")
    template = dict.fromkeys(("name", "title", "source", "question"), "x")
    probe = type(lora.PROBE)(
        **template, quick_budget=1, arms=lambda quick: [], figures=lambda data: [],
        claims={"lora.direction": (pairs, pairs), "lora.parity": (EachRun(accuracy, "a"), EachRun(accuracy, "a"))},
    )  # fmt: skip
    found = probe.judge(runs)
    assert [each.claim.id for each in found.verdicts] == ["lora.parity"]
    assert found.notes == [
        f"Not judged: {CLAIMS['lora.direction'].sentence!r} It needs two seeds, because the runs of a pair must not "
        "share a seed."
    ]


def test_claim_on_a_missing_arm_is_left_out_only_if_quick_runs_omit_the_arm(tmp_path):
    both = {"x": [ranked(tmp_path, "x", 0, (1, 1, 1, 1))]}
    arms = dict(zip("xy", lora.arms(True), strict=False))
    arms = {label: type(arm)(label=label, method=arm.method, settings=arm.settings) for label, arm in arms.items()}
    probe = partial(
        type(lora.PROBE), **dict.fromkeys(("name", "title", "source", "question"), "x"), quick_budget=1,
        figures=lambda data: [], claims={"lora.parity": (EachRun(accuracy, "x"), EachRun(accuracy, "y"))},
    )  # fmt: skip
    assert probe(arms=lambda quick: [arms["x"]] if quick else [*arms.values()]).judge(both).verdicts == []
    with pytest.raises(KeyError, match="y"):
        probe(arms=lambda quick: [*arms.values()]).judge(both)


def test_lora_claims_match_planted_runs(tmp_path, monkeypatch):
    """A of rank 8 with seed s has the direction of A of rank 64 with seed s + 1 after training, and none before."""
    monkeypatch.setattr(lora, "tfidf_words", lambda task: {"all": 0.6})

    def run(arm, seed, metric, direction):
        A = np.eye(8)[[direction, 6, 7]] * np.array([[9.0], [1.0], [0.5]])
        start = np.eye(8)[[3 + seed if arm == lora.LOW else 5 - seed]]
        factors, starts = ({"h.0.q": (np.ones((8, len(each))), each)} for each in (A, start))
        return plant(
            tmp_path, f"{arm}-{seed}", {("loss", ""): {9: 0.5}}, arm, seed, factors, starts=starts, test=scored(metric)
        )  # fmt: skip

    runs = {
        lora.LOW: [run(lora.LOW, seed, 0.80 + seed / 100, seed) for seed in range(3)],
        lora.HIGH: [run(lora.HIGH, seed, 0.1, (seed - 1) % 3) for seed in range(3)],
        lora.FULL: [run(lora.FULL, seed, 0.83 + seed / 100, seed) for seed in range(3)],
    }
    assert verdict(lora.PROBE, "lora.parity", runs).effect == pytest.approx(-0.03 + 0.02)
    assert verdict(lora.PROBE, "lora.words", runs).values["effect"].tolist() == pytest.approx([0.20, 0.21, 0.22])
    shared = verdict(lora.PROBE, "lora.direction", runs).values
    assert shared["statistic"].tolist() == pytest.approx([1, 1, 1])
    # Before training, seed 0 has the direction 3 and its pair 4, seed 1 has 4 and 3, and seed 2 has 5 and 5.
    assert shared["control"].tolist() == pytest.approx([0, 0, 1])


def test_adalora_claims_match_planted_ranks(tmp_path):
    chosen = [(1, 3, 0, 4), (1, 2, 0, 5), (0, 3, 1, 4)]
    method = {"name": "adalora", "init_rank": 5}
    runs = {
        adalora.ADAPTED: [
            ranked(tmp_path, "ada", seed, ranks, metric=0.8, method=method) for seed, ranks in enumerate(chosen)
        ],
        adalora.LOW: [ranked(tmp_path, "low", seed, (2, 2, 2, 2), metric=0.7 + seed / 100) for seed in range(3)],
    }
    random = adalora.random_ranks(runs[adalora.ADAPTED])
    assert random["value"].max() <= 5
    assert random.groupby("run", observed=True)["value"].sum().tolist() == [8, 8, 8]
    wide = random.pivot(index="run", columns="module", values="value")[list(MODULES)].to_numpy()
    shares = verdict(adalora.PROBE, "adalora.ffn", runs).values
    assert shares["statistic"].tolist() == pytest.approx([7 / 8, 7 / 8, 7 / 8])
    assert shares["control"].tolist() == pytest.approx(((wide[:, 1] + wide[:, 3]) / 8).tolist())
    top = verdict(adalora.PROBE, "adalora.top", runs).values
    assert top["statistic"].tolist() == pytest.approx([4 / 8, 5 / 8, 5 / 8])
    assert top["control"].tolist() == pytest.approx(((wide[:, 2] + wide[:, 3]) / 8).tolist())
    stable = verdict(adalora.PROBE, "adalora.stable", runs).values
    # The third run orders the modules 0 and 2 the other way round.
    assert stable["statistic"].tolist() == pytest.approx([1, 4 / 6, 4 / 6])
    tau = np.nan_to_num(rank_allocations.kendall_tau(wide))
    assert stable["control"].tolist() == pytest.approx([tau[0, 1], tau[1, 2], tau[2, 0]])
    assert verdict(adalora.PROBE, "adalora.better", runs).values["effect"].tolist() == pytest.approx([0.1, 0.09, 0.08])


def test_alora_claims_match_planted_ranks(tmp_path):
    """The tiny model has queries but no keys, values and outputs."""
    method = {"name": "alora", "init_rank": 4, "prune": "block"}
    moved = []
    for seed, ranks in enumerate([(6, 2, 5, 3), (7, 1, 4, 4), (4, 4, 4, 4)]):
        run = ranked(tmp_path, "alora", seed, ranks, metric=0.8, method=method)
        table = run.table.astype({"quantity": "str", "module": "str"})
        rows = [table.iloc[[0]].assign(step=step, quantity="score_full", module="") for step in (3, 6, 9)]
        run.__dict__["table"] = pd.concat([table, *rows], ignore_index=True)
        moved.append(run)
    runs = {alora.ADAPTED: moved, alora.LOW: [ranked(tmp_path, "l", s, (4,) * 4, metric=0.7) for s in range(3)]}
    final = [rank_statistics.final_ranks([run]) for run in moved]
    drawn = [alora.randomly_moved_ranks(run, found) for run, found in zip(moved, final, strict=True)]
    random = [
        each.loc[each["module"].astype("str").isin(MODULES[::2]), "value"].sum() / each["value"].sum() for each in drawn
    ]
    assert len(set(random)) > 1
    for id in ("alora.attention", "alora.queries"):
        found = verdict(alora.PROBE, id, runs).values
        assert found["statistic"].tolist() == pytest.approx([11 / 16, 11 / 16, 8 / 16])
        assert found["control"].tolist() == pytest.approx(random)
    assert verdict(alora.PROBE, "alora.better", runs).effect == pytest.approx(0.1)


def test_alora_subtracts_values_and_outputs_from_queries_and_keys(tmp_path):
    roles = dict(zip(MODULES, ("q", "k", "v", "o"), strict=True))
    modules = [{"module": name, "stack": "", "layer": 0, "role": role} for name, role in roles.items()]
    run = ranked(tmp_path, "a", 0, (4, 2, 1, 3), modules=modules)
    statistic, _ = alora.PROBE.claims["alora.queries"]
    assert statistic({alora.ADAPTED: [run]}) == {0: pytest.approx(6 / 10 - 4 / 10)}
    statistic, _ = alora.PROBE.claims["alora.attention"]
    assert statistic({alora.ADAPTED: [run]}) == {0: pytest.approx(1)}


def test_autolora_claims_match_planted_ranks(tmp_path):
    recipe = {"name": "autolora", "rank": 8}
    movies = [ranked(tmp_path, "movies", seed, (1, 3, 5, 7), metric=0.8, recipe=recipe) for seed in range(3)]
    tweets = [ranked(tmp_path, "tweets", seed, (7, 5, 3, 1), metric=0.1, recipe=recipe) for seed in range(3)]
    uniform = [ranked(tmp_path, "uniform", seed, (4,) * 4, metric=0.75) for seed in range(3)]
    runs = {autolora.MOVIES: movies, autolora.TWEETS: tweets, autolora.UNIFORM: uniform}
    spread = verdict(autolora.PROBE, "autolora.spread", runs).values
    assert spread["statistic"].tolist() == pytest.approx([np.std([1, 3, 5, 7], ddof=1)] * 3)
    assert spread["control"].tolist() == pytest.approx([np.std(autolora.random_logit_ranks(r), ddof=1) for r in movies])
    tasks = verdict(autolora.PROBE, "autolora.tasks", runs).values
    assert tasks["statistic"].tolist() == pytest.approx([1, 1, 1])
    assert tasks["control"].tolist() == pytest.approx([-1, -1, -1])
    assert verdict(autolora.PROBE, "autolora.better", runs).effect == pytest.approx(0.05)


def test_planted_claims_match_planted_ranks(tmp_path):
    """AdaLoRA finds the truth, AutoLoRA its reverse, and ALoRA one unit too much everywhere."""
    truth = (0, 1, 3, 4)
    arms = {
        planted.ALLOCATORS["AdaLoRA"]: ((0, 1, 3, 4), 0.5),
        planted.ALLOCATORS["AutoLoRA"]: ((4, 3, 1, 0), 0.625),
        planted.ALLOCATORS["ALoRA"]: ((1, 2, 4, 5), 0.75),
        planted.RANDOM: ((1, 0, 3, 4), 9.0),
        planted.UNIFORM: ((2, 2, 2, 2), 1.0),
    }
    runs = {
        arm: [ranked(tmp_path, arm.replace(" ", ""), seed, ranks, truth, nats=nats) for seed in range(3)]
        for arm, (ranks, nats) in arms.items()
    }
    expected = {
        "adalora": (1 - 0.8, 1.5 - 0, 0.5),
        "autolora": (-1 - 0.8, 1.5 - 3, 0.375),
        "alora": (1 - 0.8, 1.5 - 1, 0.25),
    }
    for name, effects in expected.items():
        for quantity, effect in zip(("correlation", "distance", "loss"), effects, strict=True):
            assert verdict(planted.PROBE, f"planted.{name}_{quantity}", runs).effect == pytest.approx(effect)
