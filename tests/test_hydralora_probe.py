"""HydraLoRA's probe: its statistics against dense matrices and planted tables, and all of it on tiny runs."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from planted import MODULES, plant
from tiny import tiny

import lorascope as ls
from lorascope import probes
from lorascope.adapters.delta import attached_deltas
from lorascope.inputs import models
from lorascope.methods.hydralora import HydraDelta
from lorascope.probes import hydralora
from lorascope.runs.run import Run

UP = [module["module"] for module in MODULES if module["role"] == "ffn_in"]


def test_cosines_of_updates_are_those_of_the_matrices():
    draw = np.random.default_rng(0)
    B = draw.standard_normal((3, 5, 2))
    for A in (draw.standard_normal((2, 4)), draw.standard_normal((3, 2, 4))):
        dense = np.array([(b @ a).ravel() for b, a in zip(B, np.broadcast_to(A, (3, 2, 4)), strict=True)])
        unit = dense / np.linalg.norm(dense, axis=1, keepdims=True)
        assert hydralora.update_cosines(A, B) == pytest.approx(unit @ unit.T, abs=1e-12)
    assert hydralora.update_cosines(A[0], B[[0, 0]]) == pytest.approx(np.ones((2, 2)))


@pytest.mark.parametrize(("rank", "number"), [(4, 4), (2, 6)])
def test_the_lora_beside_it_has_as_many_parameters(rank, number):
    method = replace(hydralora.METHOD, rank=rank, num_experts=number)
    assert replace(hydralora.METHOD, rank=4, num_experts=4) == hydralora.METHOD
    counts = []
    for other in (method, ls.LoRA(rank=hydralora.equal_rank(method), targets=("ffn_in", "ffn_out"))):
        model = tiny("bert")
        other.attach(model)
        counts.append(sum(p.numel() for delta in attached_deltas(model).values() for p in delta.parameters()))
    assert counts[0] == counts[1] > 0


def test_arms_differ_in_what_they_leave_out_alone():
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


def test_what_is_told_of_the_domain_is_beyond_that_by_lot(tmp_path):
    steps = {"gate_information": {0: (0.02, 0.04), 9: (0.3, 0.5)}, "gate_chance": {0: (0.01, 0.01), 9: (0.1, 0.1)}}
    values = {
        (name, module): {step: pair[number] for step, pair in found.items()}
        for name, found in steps.items()
        for number, module in enumerate(UP)
    }
    run = plant(tmp_path, "a", values)
    assert hydralora.told_of_domain(run, start=True) == pytest.approx(0.03 - 0.01)
    assert hydralora.told_of_domain(run) == pytest.approx(0.4 - 0.1)


def told_at(run: Run, step: int) -> float:
    """What gates tell of the domain beyond lots at a step, mean over modules, from the bare records."""
    table = run.table[run.table["step"] == step]
    told, lot = (
        table[table["quantity"] == name].set_index("module")["value"] for name in ("gate_information", "gate_chance")
    )
    assert len(told) == len(lot) == 4
    return float((told - lot).mean())


def replaced(run: Run, metric: float) -> Run:
    """The run as if it had reached this on the test split."""
    return Run(run.path, run.meta | {"test": run.meta["test"] | {"metric": metric}})


def test_the_probe_judges_tiny_runs(bert, task, tmp_path):
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
    claims = (hydralora.DOMAINS, hydralora.APART, hydralora.BETTER, hydralora.ROUTING, hydralora.SHARING)
    assert [verdict.claim for verdict in found.verdicts] == list(claims)
    assert {verdict.outcome for verdict in found.verdicts} == {"inconclusive"}
    learned = [told_at(run, 4) - told_at(run, 0) for run in runs[hydralora.ROUTED]]
    assert found.verdicts[0].values["effect"].tolist() == pytest.approx(learned, rel=1e-9)
    assert min(map(abs, learned)) > 1e-9  # a swap of start and end would show
    apart = found.verdicts[1].values.iloc[0]
    routed, split = (runs[label][0] for label in (hydralora.ROUTED, hydralora.SPLIT))
    assert apart["statistic"] == pytest.approx(hydralora.mean_apart(routed))
    assert apart["control"] == pytest.approx(hydralora.mean_apart(split) / 2)
    assert 0 < hydralora.mean_apart(routed) < hydralora.mean_apart(split)
    # nothing tells heads with even gates apart
    assert hydralora.mean_apart(runs[hydralora.EVEN][0]) == pytest.approx(0, abs=1e-6)
    bars, *_, atlas = (one.chart for one in found.exhibits)
    assert len(found.exhibits) == 5
    order = (hydralora.ROUTED, hydralora.SPLIT, hydralora.EVEN, hydralora.lora_label())
    assert bars.x.order == ("HydraLoRA", "an A each", "even gates", "plain LoRA")
    assert bars.data["value"].tolist() == pytest.approx(
        [np.mean([run.meta["test"]["metric"] for run in runs[label]]) for label in order]
    )
    angles = atlas.rows()[1][0].data.set_index(["row", "column"])["value"]
    assert angles.between(0, 90).all()
    assert len(angles) == 4 * 4  # two seeds of each, so recipes are compared with themselves, too
    told = f"Updates of {hydralora.ROUTED}, {hydralora.SPLIT} at mean gates."
    assert all(told in chart.caption for row in atlas.rows() for chart in row)
    (counted,) = [note for note in found.notes if note.startswith("Trained parameters")]
    for label, of in runs.items():
        model = models.load(bert, task=task)
        of[0].restore(model)
        of_routers = sum(p.numel() for name, p in model.named_parameters() if name.endswith(".router"))
        told = f"{label} {of[0].meta['parameters']['trained']:,}"
        assert (f"{told}, {of_routers:,} of them in routers" if of_routers else told) in re.split("; |: |[.]$", counted)
    # each claim about accuracy against its own control
    reached = {hydralora.ROUTED: 0.80, hydralora.EVEN: 0.77, hydralora.SPLIT: 0.82, hydralora.lora_label(): 0.75}
    marked = [[replaced(run, reached[label] + 0.001 * run.meta["seed"]) for run in of] for label, of in runs.items()]
    again = probes.PROBES["hydralora"].judge(dict(zip(runs, marked, strict=True))).verdicts
    effects = {verdict.claim: verdict.effect for verdict in again}
    assert effects[hydralora.BETTER] == pytest.approx(0.80 - 0.75)
    assert effects[hydralora.ROUTING] == pytest.approx(0.80 - 0.77)
    assert effects[hydralora.SHARING] == pytest.approx(0.80 - 0.82)
    assert all(effects[verdict.claim] == verdict.effect for verdict in found.verdicts[:2])
    # other numbers of heads are drawn where they were trained
    single = ls.train(
        models.load(bert, task=task), task, replace(hydralora.METHOD, num_experts=1), seed=0, out=tmp_path / "single",
        progress=False, device="cpu", **settings,
    )  # fmt: skip
    more = probes.PROBES["hydralora"].judge(runs | {hydralora.num_heads_label(1): [single]}).exhibits
    assert len(more) == 6
    assert more[1].chart.data.set_index("series").loc["HydraLoRA", "number"].tolist() == [1, 4]
    model = models.load(bert, task=task)
    runs[hydralora.EVEN][0].restore(model)
    assert {type(delta) for delta in attached_deltas(model).values()} == {HydraDelta}
