"""Figures of routers as data, against gates that were planted and against a small run's own snapshots."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted import COMMON, MODULES, lookup, plant

import lorascope as ls
from lorascope import plots
from lorascope.charts.chart import Heat, Rule
from lorascope.inputs import models
from lorascope.methods import HydraLoRA
from lorascope.runs.run import Run
from lorascope.runs.writer import RunWriter
from lorascope.schema.records import Record, Snapshot

DOMAINS = ["film", "music"]
UPPER = np.array([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]])


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """``plant`` in a folder of the test."""
    return partial(plant, tmp_path)


def routed(folder: Path, id: str, shift: float = 0.0, seed: int = 0, label: str = "Hydra") -> Run:
    """Gates of two modules in two layers at steps 0 and 9; every number of the second module is moved by ``shift``."""
    named = {"id": id, "label": label, "seed": seed, "modules": MODULES, "recipe": {"name": "hydralora"}}
    states = {"last": {"step": 9, "ranks": {}}}
    writer = RunWriter(folder / id, COMMON | named | {"states": states})
    for step, scale in ((0, 0.1), (9, 1.0)):
        for module, moved in (("h.0.up", 0.0), ("h.1.up", shift)):
            by_domain = 1 / 3 + scale * (UPPER - 1 / 3) + moved * np.array([1, -1, 0])
            entropy, told = 1.0 - 0.5 * scale + moved, 0.2 * scale + moved
            items = [Record("gate", by_domain.mean(0), module), Record("gate_entropy", entropy, module)]
            items += [Record("gate_information", told, module), Record("gate_chance", 0.01, module)]
            kept = Snapshot(f"{module}/gate_by_domain", by_domain, ("domain", "head"), {"domain": DOMAINS})
            writer.add(step, [*items, kept])
    writer.finish("done")
    return Run.read(folder / id)


def test_a_cell_is_the_gate_of_a_domain_less_an_even_share(tmp_path):
    chart = plots.gates(routed(tmp_path, "a", shift=0.1))
    found = lookup(chart, "layer", "column", "domain")
    assert len(found) == 2 * 3 * 2
    assert found["0", "ffn_in 0", "film"] == pytest.approx(0.5 - 1 / 3)
    assert found["1", "ffn_in 1", "film"] == pytest.approx(0.3 - 0.1 - 1 / 3)
    assert found["0", "ffn_in 2", "music"] == pytest.approx(0.6 - 1 / 3)
    assert (chart.frame, chart.x.order, chart.y.order) == (
        "layer", ("ffn_in 0", "ffn_in 1", "ffn_in 2"), ("film", "music"),
    )  # fmt: skip
    heat = chart.marks[0]
    assert isinstance(heat, Heat)
    assert heat.scale == "diverging"
    assert heat.limits == pytest.approx((-0.6 + 1 / 3, 0.6 - 1 / 3))
    assert "after step 9. One run (seed 0)" in chart.caption


def test_gates_of_the_start_are_there_too_and_other_steps_are_not(tmp_path):
    run = routed(tmp_path, "a")
    early = lookup(plots.gates(run, step=0), "layer", "column", "domain")
    assert early["0", "ffn_in 2", "music"] == pytest.approx(0.1 * (0.6 - 1 / 3))
    with pytest.raises(ValueError, match=r"kept no gates by domain after step 4; it did after \[0, 9\]"):
        plots.gates(run, step=4)


def test_of_several_seeds_one_is_drawn_since_heads_have_no_names(tmp_path):
    runs = [routed(tmp_path, f"s{seed}", 0.1 * seed, seed) for seed in range(2)]
    assert "seed 0" in plots.gates(runs).caption
    assert lookup(plots.gates(runs), "layer", "column", "domain")["1", "ffn_in 0", "film"] == pytest.approx(1 / 6)


def test_two_recipes_stand_below_each_other_in_one_colour_scale(tmp_path):
    panels = plots.gates(routed(tmp_path, "a"), control=routed(tmp_path, "b", shift=0.3, label="other"))
    (one,), (other,) = panels.rows()
    assert (one.title, other.title) == ("Hydra", "control: other")
    assert one.marks[0].limits == other.marks[0].limits
    assert one.marks[0].limits[1] == pytest.approx(0.5 + 0.3 - 1 / 3)


def test_the_course_is_the_mean_over_modules_with_a_band_over_seeds(tmp_path):
    runs = [routed(tmp_path, f"s{seed}", 0.1 * seed, seed) for seed in range(3)]
    entropy, told = plots.gate_course(runs).rows()[0]
    assert lookup(entropy, "step") == pytest.approx({0: 0.95 + 0.05, 9: 0.5 + 0.05})
    assert lookup(told, "recipe", "step") == pytest.approx(
        {("Hydra", 0): 0.02 + 0.05, ("Hydra", 9): 0.25, ("Hydra, by lot", 0): 0.01, ("Hydra, by lot", 9): 0.01}
    )
    assert entropy.data["low"].notna().all()
    rule = entropy.marks[0]
    assert isinstance(rule, Rule)
    assert rule.y == pytest.approx(math.log(3))
    assert "3 seeds (0, 1, 2)" in entropy.caption


def test_a_run_without_routers_says_what_is_missing(write):
    run = write("a", {("loss", ""): {0: 1.0, 1: 1.0}})
    with pytest.raises(ValueError, match="gates needs records of gate_information: train HydraLoRA on a task with gr"):
        plots.gates(run)
    with pytest.raises(ValueError, match="gate_course needs records of gate_entropy: train HydraLoRA"):
        plots.gate_course(run)


def test_without_domains_the_course_is_that_of_the_entropy(write):
    entropy = {("gate_entropy", "h.0.up"): {0: 0.6, 9: 0.5}, ("gate", "h.0.up"): {9: np.array([0.4, 0.6])}}
    chart = plots.gate_course(write("a", entropy))
    assert lookup(chart, "step") == {0: 0.6, 9: 0.5}
    assert chart.marks[0].y == pytest.approx(math.log(2))


def test_a_small_run_is_drawn_by_both_renderers(bert, task, tmp_path):
    run = ls.train(
        models.load(bert, task=task), task, HydraLoRA(), steps=3, batch_size=4, eval_size=16, progress=False,
        device="cpu", out=tmp_path / "run",
    )  # fmt: skip
    name = "bert.encoder.layer.1.output.dense"
    kept = run.snapshot(f"{name}/gate_by_domain", 3).set_index(["domain", "head"])["value"]
    chart = plots.gates(run)
    assert lookup(chart, "layer", "column", "domain", value="gate")["1", "ffn_out 2", "film"] == kept["film", 2]
    for figure in (chart, plots.gate_course(run)):
        assert figure.save(tmp_path / "figure.png").stat().st_size > 0
        assert figure.plotly().data
