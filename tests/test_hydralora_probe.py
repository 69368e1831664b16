"""Tests of the HydraLoRA probe: statistics compared with dense matrices and planted tables, and tiny runs."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from planted import MODULES, plant
from tiny import tiny
from verdicts import effects

import lorascope as ls
from lorascope import probes
from lorascope.adapters.delta import attached_deltas
from lorascope.analysis.head_similarity import cosines, update_inner
from lorascope.inputs import models
from lorascope.methods.hydralora import HydraDelta
from lorascope.probes import hydralora
from lorascope.runs.run import Run

UP = [module["module"] for module in MODULES if module["role"] == "ffn_in"]


def test_cosines_of_updates_equal_cosines_of_dense_matrices():
    draw = np.random.default_rng(0)
    B = draw.standard_normal((3, 5, 2))
    for A in (draw.standard_normal((2, 4)), draw.standard_normal((3, 2, 4))):
        dense = np.array([(b @ a).ravel() for b, a in zip(B, np.broadcast_to(A, (3, 2, 4)), strict=True)])
        unit = dense / np.linalg.norm(dense, axis=1, keepdims=True)
        assert cosines(update_inner(A, B)) == pytest.approx(unit @ unit.T, abs=1e-12)
    assert cosines(update_inner(A[0], B[[0, 0]])) == pytest.approx(np.ones((2, 2)))


@pytest.mark.parametrize(("rank", "number"), [(4, 4), (2, 6)])
def test_equal_rank_gives_lora_the_same_number_of_parameters(rank, number):
    method = replace(hydralora.METHOD, rank=rank, num_experts=number)
    assert replace(hydralora.METHOD, rank=4, num_experts=4) == hydralora.METHOD
    counts = []
    for other in (method, ls.LoRA(rank=hydralora.equal_rank(method), targets=("ffn_in", "ffn_out"))):
        model = tiny("bert")
        other.attach(model)
        counts.append(sum(p.numel() for delta in attached_deltas(model).values() for p in delta.parameters()))
    assert counts[0] == counts[1] > 0


def test_arms_differ_only_in_the_ablated_part():
    routed, even, split, lora, *others = hydralora.arms(False)
    assert hydralora.arms(True)[1].method == even.method
    assert len(hydralora.arms(True)) == 4
    for number, other in zip((1, 2, 8), others, strict=True):
        assert other.method == replace(routed.method, num_experts=number)
        assert other.settings == routed.settings
    assert replace(even.method, router="learned") == replace(split.method, shared_a=True) == routed.method
    assert (lora.method.lr, lora.method.head_lr) == (routed.method.lr, routed.method.head_lr)
    assert lora.method.alpha / lora.method.rank == routed.method.alpha / routed.method.rank
    assert lora.label == f"LoRA, rank {lora.method.rank}, feed-forward"


def test_domain_information_subtracts_the_random_baseline(tmp_path):
    steps = {"gate_information": {0: (0.02, 0.04), 9: (0.3, 0.5)}, "gate_chance": {0: (0.01, 0.01), 9: (0.1, 0.1)}}
    values = {
        (name, module): {step: pair[number] for step, pair in found.items()}
        for name, found in steps.items()
        for number, module in enumerate(UP)
    }
    run = plant(tmp_path, "a", values)
    assert hydralora.domain_information(run, start=True) == pytest.approx(0.03 - 0.01)
    assert hydralora.domain_information(run) == pytest.approx(0.4 - 0.1)


def information_at(run: Run, step: int) -> float:
    """Compute the domain information minus its random baseline at a step from the records, mean over modules."""
    table = run.table[run.table["step"] == step]
    information, chance = (
        table[table["quantity"] == name].set_index("module")["value"] for name in ("gate_information", "gate_chance")
    )
    assert len(information) == len(chance) == 4
    return float((information - chance).mean())


def with_test_metric(run: Run, metric: float) -> Run:
    """Return a copy of the run with this test metric."""
    return Run(run.path, replace(run.meta, test=replace(run.score, metric=metric)))


def test_probe_judges_tiny_runs(bert, task, tmp_path):
    runs = {}
    for arm in hydralora.arms(True):
        settings = dict(arm.settings) | {"steps": 4, "batch_size": 4, "eval_every": 0, "eval_size": 16}
        settings["observe"] = [replace(observer, every=4) for observer in settings["observe"]]
        runs[arm.label] = [
            ls.train(
                models.load(bert, task=task), task, arm.method, seed=seed, out=tmp_path / f"{arm.label}{seed}",
                progress=False, device="cpu", **settings,
            )
            for seed in range(2)
        ]  # fmt: skip
    found = probes.PROBES["hydralora"].judge(runs)
    assert [*effects(found)] == [f"hydralora.{name}" for name in ("tasks", "apart", "better", "routing", "sharing")]
    assert {verdict.outcome for verdict in found.verdicts} == {"inconclusive"}
    learned = [information_at(run, 4) - information_at(run, 0) for run in runs[hydralora.ROUTED]]
    assert found.verdicts[0].values["effect"].tolist() == pytest.approx(learned, rel=1e-9)
    assert min(map(abs, learned)) > 1e-9  # so a swap of first and last step would be noticed
    apart = found.verdicts[1].values.iloc[0]
    routed, split = (runs[label][0] for label in (hydralora.ROUTED, hydralora.SPLIT))
    assert apart["statistic"] == pytest.approx(hydralora.mean_expert_distance(routed))
    assert apart["control"] == pytest.approx(hydralora.mean_expert_distance(split) / 2)
    assert 0 < hydralora.mean_expert_distance(routed) < hydralora.mean_expert_distance(split)
    # With uniform gate weights, experts get equal gradients and stay equal.
    assert hydralora.mean_expert_distance(runs[hydralora.EVEN][0]) == pytest.approx(0, abs=1e-6)
    bars, *_, atlas = (one.chart for one in found.figures)
    assert len(found.figures) == 5
    order = (hydralora.ROUTED, hydralora.SPLIT, hydralora.EVEN, hydralora.LORA)
    assert bars.x.order == ("HydraLoRA", "separate A's", "uniform gates", "LoRA")
    assert bars.data["value"].tolist() == pytest.approx(
        [np.mean([run.score.metric for run in runs[label]]) for label in order]
    )
    angles = atlas.rows()[1][0].data.set_index(["row", "column"])["value"]
    assert angles.between(0, 90).all()
    assert len(angles) == 4 * 4  # with two seeds, recipes are also compared with themselves
    mixed = f"{hydralora.ROUTED}, {hydralora.SPLIT}.*mean gate"
    assert all(re.search(mixed, chart.caption) for row in atlas.rows() for chart in row)
    (counted,) = [note for note in found.notes if note.startswith("Trained parameters")]
    for label, of in runs.items():
        model = models.load(bert, task=task)
        of[0].restore(model)
        of_routers = sum(p.numel() for name, p in model.named_parameters() if name.endswith(".router"))
        entry = f"{label} {of[0].meta.parameters.trained:,}"
        assert (f"{entry}, {of_routers:,} of them in routers" if of_routers else entry) in re.split(
            "; |: |[.]$", counted
        )
    # Distinct accuracies show that each claim on accuracy uses its own control.
    reached = {hydralora.ROUTED: 0.80, hydralora.EVEN: 0.77, hydralora.SPLIT: 0.82, hydralora.LORA: 0.75}
    marked = [
        [with_test_metric(run, reached[label] + 0.001 * run.meta.seed) for run in of] for label, of in runs.items()
    ]
    again = effects(probes.PROBES["hydralora"].judge(dict(zip(runs, marked, strict=True))))
    assert again["hydralora.better"] == pytest.approx(0.80 - 0.75)
    assert again["hydralora.routing"] == pytest.approx(0.80 - 0.77)
    assert again["hydralora.sharing"] == pytest.approx(0.80 - 0.82)
    assert all(again[verdict.claim.id] == verdict.effect for verdict in found.verdicts[:2])
    # Other numbers of experts add a figure if they were trained.
    single = ls.train(
        models.load(bert, task=task), task, replace(hydralora.METHOD, num_experts=1), seed=0, out=tmp_path / "single",
        progress=False, device="cpu", **settings,
    )  # fmt: skip
    more = probes.PROBES["hydralora"].judge(runs | {hydralora.expert_label(1): [single]}).figures
    assert len(more) == 6
    assert more[1].chart.data.set_index("series").loc["HydraLoRA", "number"].tolist() == [1, 4]
    model = models.load(bert, task=task)
    runs[hydralora.EVEN][0].restore(model)
    assert {type(delta) for delta in attached_deltas(model).values()} == {HydraDelta}
