"""Figures of routers as data, against planted gates and the snapshots of a small run."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from planted import COMMON, MODULES, lookup, manifest

import lorascope as ls
from lorascope import plots
from lorascope.charts.marks import Heat, Rule
from lorascope.inputs import models
from lorascope.methods import HydraLoRA
from lorascope.runs.run import Run
from lorascope.runs.writer import RunWriter
from lorascope.schema.records import QUANTITIES, Record, Snapshot

DOMAINS = ["film", "music"]
UPPER = np.array([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]])


def routed(folder: Path, id: str, shift: float = 0.0, seed: int = 0, label: str = "Hydra") -> Run:
    """Write gates of two modules in two layers at steps 0 and 9; ``shift`` is added to the values of the second."""
    named = {"id": id, "label": label, "seed": seed, "modules": MODULES, "recipe": {"name": "hydralora"}}
    states = {"last": {"step": 9, "ranks": {}}}
    writer = RunWriter(folder / id, manifest(**COMMON | named | {"states": states}))
    for step, scale in ((0, 0.1), (9, 1.0)):
        for module, moved in (("h.0.up", 0.0), ("h.1.up", shift)):
            by_domain = 1 / 3 + scale * (UPPER - 1 / 3) + moved * np.array([1, -1, 0])
            entropy, information = 1.0 - 0.5 * scale + moved, 0.2 * scale + moved
            items = [Record("gate", by_domain.mean(0), module), Record("gate_entropy", entropy, module)]
            items += [Record("gate_information", information, module), Record("gate_chance", 0.01, module)]
            snapshot = Snapshot(f"{module}/gate_by_domain", by_domain, ("domain", "head"), {"domain": DOMAINS})
            writer.collect(step, [*items, snapshot])
    writer.finish("done")
    return Run.read(folder / id)


def test_gates_rows_are_those_of_all_groups_minus_uniform_and_of_a_group_minus_all(tmp_path):
    """With two groups, the differences from all are opposite; a shift of both groups is in the rows of all alone."""
    chart = plots.gates(routed(tmp_path, "a", shift=0.1))
    found = lookup(chart, "layer", "column", "row")
    assert len(found) == 2 * 3 * 4
    start, end, *groups = rows = ("all − 1/3, step 0", "all − 1/3, step 9", "film − all", "music − all")
    assert found["0", "ffn_in 0", end] == pytest.approx(100 * (0.35 - 1 / 3))
    assert found["0", "ffn_in 0", start] == pytest.approx(10 * (0.35 - 1 / 3))
    assert found["1", "ffn_in 1", end] == pytest.approx(100 * (0.25 - 0.1 - 1 / 3))
    for layer in "01":
        assert [found[layer, "ffn_in 2", group] for group in groups] == pytest.approx([-20, 20])
        assert [found[layer, "ffn_in 0", group] for group in groups] == pytest.approx([15, -15])
    assert (chart.frame, chart.x.order, chart.y.order) == ("layer", ("ffn_in 0", "ffn_in 1", "ffn_in 2"), rows)
    heat = chart.marks[0]
    assert isinstance(heat, Heat)
    assert heat.scale == "diverging"
    assert heat.limits == pytest.approx((-20, 20))
    assert heat.text == "+.0f"
    assert chart.title.endswith("Hydra, information on the group 0.25 nats (shuffled 0.01)")  # of 0.2 and 0.3
    assert "after step 9." in chart.caption
    assert "One run (seed 0)" in chart.caption


def test_gates_at_step_zero_are_available_and_unsaved_steps_raise(tmp_path):
    run = routed(tmp_path, "a")
    early = lookup(plots.gates(run, step=0), "layer", "column", "row")
    assert early["0", "ffn_in 2", "music − all"] == pytest.approx(2)
    assert {row for _, _, row in early} == {"all − 1/3, step 0", "film − all", "music − all"}
    with pytest.raises(ValueError, match=r"step must be one of 0, 9.*got 4"):
        plots.gates(run, step=4)


def test_gates_need_no_records_of_gates(tmp_path, monkeypatch):
    """Their array suffices, and without HydraLoRA's module their definition is unknown."""
    run = routed(tmp_path, "a")
    monkeypatch.delitem(QUANTITIES, "gate", raising=False)
    assert "Mean gate weight of each expert" in plots.gates(run).caption


def test_gates_draw_the_first_of_several_seeds(tmp_path):
    """The experts of different seeds do not correspond, so they are not averaged."""
    runs = [routed(tmp_path, f"s{seed}", 0.1 * seed, seed) for seed in range(2)]
    assert "seed 0" in plots.gates(runs).caption
    gates = lookup(plots.gates(runs), "layer", "column", "row", value="gate")
    assert gates["1", "ffn_in 0", "film − all"] == pytest.approx(0.5)


def test_gates_stack_recipes_with_one_color_scale(tmp_path):
    panels = plots.gates(routed(tmp_path, "a"), control=routed(tmp_path, "b", shift=0.3, label="other"))
    (one,), (other,) = panels.rows()
    assert [chart.title.partition(", ")[0] for chart in (one, other)] == ["Hydra", "control: other"]
    assert one.marks[0].limits == other.marks[0].limits
    assert one.marks[0].limits[1] == pytest.approx(100 * (1 / 3 + 0.3 - 0.25))


def test_gate_course_is_the_mean_over_modules_with_a_band_over_seeds(tmp_path):
    runs = [routed(tmp_path, f"s{seed}", 0.1 * seed, seed) for seed in range(3)]
    entropy, information = plots.gate_course(runs).rows()[0]
    assert lookup(entropy, "step") == pytest.approx({0: 0.95 + 0.05, 9: 0.5 + 0.05})
    baseline = "Hydra, shuffled groups"
    assert lookup(information, "recipe", "step") == pytest.approx(
        {("Hydra", 0): 0.02 + 0.05, ("Hydra", 9): 0.25, (baseline, 0): 0.01, (baseline, 9): 0.01}
    )
    assert entropy.data["low"].notna().all()
    rule = entropy.marks[0]
    assert isinstance(rule, Rule)
    assert rule.y == pytest.approx(math.log(3))
    assert "3 seeds (0, 1, 2)" in entropy.caption


def test_figures_of_routers_without_records_name_the_method(write):
    run = write("a", {("loss", ""): {0: 1.0, 1: 1.0}})
    with pytest.raises(ValueError, match=r"gates.*gate_information.*HydraLoRA.*groups"):
        plots.gates(run)
    with pytest.raises(ValueError, match=r"gate_course.*gate_entropy.*HydraLoRA"):
        plots.gate_course(run)


def test_gate_course_without_domains_shows_only_the_entropy(write):
    entropy = {("gate_entropy", "h.0.up"): {0: 0.6, 9: 0.5}, ("gate", "h.0.up"): {9: np.array([0.4, 0.6])}}
    chart = plots.gate_course(write("a", entropy))
    assert lookup(chart, "step") == {0: 0.6, 9: 0.5}
    assert chart.marks[0].y == pytest.approx(math.log(2))


def test_gates_of_a_trained_run_are_those_it_saved(bert, task, tmp_path):
    run = ls.train(
        models.load(bert, task=task), task, HydraLoRA(), steps=3, batch_size=4, eval_size=16, progress=False,
        device="cpu", out=tmp_path / "run",
    )  # fmt: skip
    name = "bert.encoder.layer.1.output.dense"
    saved = run.snapshot(f"{name}/gate_by_domain", 3).set_index(["domain", "head"])["value"]
    chart = plots.gates(run)
    gates = lookup(chart, "layer", "column", "row", value="gate")
    assert gates["1", "ffn_out 2", "film − all"] == saved["film", 2]
