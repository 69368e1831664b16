"""Figures of rank allocation as data, against hand-computed numbers."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from planted import Values, blocks, lookup, plant
from readers import Mpl
from scipy import stats

import lorascope as ls
from lorascope import plots
from lorascope.charts.marks import Heat
from lorascope.methods import AdaLoRA
from lorascope.plots.figure_registry import FIGURES
from lorascope.runs.run import Run
from lorascope.runs.writer import RunWriter
from lorascope.schema.records import Record

MODULES = blocks(2, ("q", "ffn_in"), hidden=10)
START, END = [4, 4, 4, 4], [4, 0, 2, 3]
DECIDED = {0: START, 4: [4, 2, 4, 4], 6: [4, 1, 2, 3], 7: END, 9: END}


def allotted(decided: Mapping[int, Sequence[int]] = DECIDED, budget: bool = True) -> Values:
    """Return the ranks of q0, ffn_in0, q1, ffn_in1 by step, and their sum as the budget."""
    values: dict[tuple[str, str], dict[int, Any]] = {
        ("rank", module["module"]): {step: float(ranks[place]) for step, ranks in decided.items()}
        for place, module in enumerate(MODULES)
    }
    return values | ({("budget", ""): {step: sum(ranks) for step, ranks in decided.items()}} if budget else {})


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Return ``plant`` for the folder of the test, with modules of known size."""
    return partial(plant, tmp_path, modules=MODULES)


@pytest.fixture
def seeds(write: Any) -> list[Run]:
    """Write three seeds of one recipe with the same budget."""
    ends = (END, [4, 1, 2, 2], [3, 0, 1, 5])
    return [write(f"s{seed}", allotted(DECIDED | {9: end}), "Ada", seed=seed) for seed, end in enumerate(ends)]


def test_rank_allocation_cell_is_the_rank_of_a_role_in_a_layer(write: Any) -> None:
    run = write("a", allotted())
    chart = plots.rank_allocation(run)
    assert lookup(chart, "place", "role") == {("0", "q"): 4, ("0", "ffn_in"): 0, ("1", "q"): 2, ("1", "ffn_in"): 3}
    assert (chart.x.order, chart.y.order) == (("0", "1"), ("q", "ffn_in"))
    assert (chart.marks[0].limits, chart.marks[0].text) == ((0.0, 4.0), ".0f")
    assert "at the end. Total rank: 9." in chart.caption
    early = plots.rank_allocation(run, step=5)
    assert lookup(early, "place", "role")["0", "ffn_in"] == 2
    assert "after step 5. Total rank: 14." in early.caption


def test_rank_allocation_orders_roles_as_in_the_papers(write: Any) -> None:
    modules = blocks(1)[::-1]
    run = write("a", {("rank", module["module"]): {0: 1.0} for module in modules}, modules=modules)
    assert plots.rank_allocation(run).y.order == ("q", "k", "v", "o", "ffn_in", "ffn_out")


def test_rank_allocation_of_seeds_shows_mean_spread_and_agreement(seeds: list[Run]) -> None:
    chart = plots.rank_allocation(seeds)
    assert lookup(chart, "place", "role") == pytest.approx(
        {("0", "q"): 11 / 3, ("0", "ffn_in"): 1 / 3, ("1", "q"): 5 / 3, ("1", "ffn_in"): 10 / 3}
    )
    assert lookup(chart, "place", "role", value="least")["1", "ffn_in"] == 2
    assert lookup(chart, "place", "role", value="words")["1", "ffn_in"] == "3.3 (2–5)"
    assert chart.marks[0].text == ".1f"
    ends = [END, [4, 1, 2, 2], [3, 0, 1, 5]]
    taus = [stats.kendalltau(ends[one], ends[two]).statistic for one, two in ((0, 1), (0, 2), (1, 2))]
    assert f"Ada: {np.mean(taus):.2f} [" in chart.caption
    assert "random: 95th percentile" in chart.caption
    assert "3 seeds (0, 1, 2)" in chart.caption


@pytest.mark.parametrize("number", [1, 2])
def test_rank_allocation_of_many_modules_takes_less_memory_than_their_pairs(write: Any, number: int) -> None:
    modules = blocks(1000, ("q", "ffn_in"), hidden=10)
    ranks = {("rank", module["module"]): {9: float(place % 5)} for place, module in enumerate(modules)}
    runs = [write(f"s{seed}", ranks, "Ada", seed=seed, modules=modules) for seed in range(number)]
    plots.rank_allocation(runs)  # imports and caches
    tracemalloc.start()
    chart = plots.rank_allocation(runs)
    (_, peak), pairs = tracemalloc.get_traced_memory(), len(modules) * (len(modules) - 1) // 2
    tracemalloc.stop()
    assert peak < 8 * pairs  # one number per pair
    assert len(chart.data) == len(modules)
    assert ("not computed for more than 1,000 modules" in chart.caption) == (number > 1)


def test_rank_allocation_shares_the_color_scale_and_hatches_modules_without_adapter(write: Any) -> None:
    half = {key: {0: 8.0} for key in allotted(budget=False) if key[1].endswith(".q")}
    panels = plots.rank_allocation(write("a", allotted(), "Ada"), control=write("b", half, "LoRA"))
    first, second = panels.rows()[0]
    assert first.marks[0].limits == second.marks[0].limits == (0.0, 8.0)
    assert (first.y.order, first.x.order) == (second.y.order, second.x.order)
    drawn = Mpl(panels)
    assert (drawn.hatched(0), drawn.hatched(1)) == (False, True)
    assert "Total rank: Ada: 9; control: LoRA: 16." in first.caption


def test_rank_allocation_stacks_wide_panels(write: Any) -> None:
    modules = blocks(20, ("q",))
    values = {("rank", module["module"]): {0: 2.0} for module in modules}
    runs = {name: write(name, values, modules=modules) for name in "ab"}
    assert [len(row) for row in plots.rank_allocation(runs).rows()] == [1, 1]


def test_rank_allocation_draws_uniform_and_zero_ranks(write: Any, tmp_path: Path) -> None:
    runs = [write(f"s{seed}", allotted({0: START, 9: START}, budget=False), seed=seed) for seed in (0, 1)]
    chart = plots.rank_allocation(runs)
    assert set(chart.data["value"]) == {4.0}
    assert "τ" not in chart.caption
    zero = plots.rank_allocation(write("z", allotted({0: [0] * 4}, budget=False)))
    assert zero.marks[0].limits == (0.0, 1.0)
    for number, drawn in enumerate((chart, zero)):
        assert all(drawn.save(tmp_path / f"{number}.{kind}").exists() for kind in ("png", "html"))


def test_rank_allocation_with_chance_allocates_the_same_budget_at_random(seeds: list[Run]) -> None:
    panels = plots.rank_allocation(seeds, chance=True)
    learned, random = panels.rows()[0]
    assert random.title == "Ada, random"
    assert random.data["value"].sum() == pytest.approx(learned.data["value"].sum()) == pytest.approx(9)
    assert lookup(random, "place", "role") != lookup(learned, "place", "role")
    assert "in any module" in random.caption


def test_rank_allocation_with_chance_never_exceeds_initial_ranks_that_only_fall(write: Any) -> None:
    random = plots.rank_allocation(write("a", allotted()), chance=True).rows()[0][1]
    assert "initial component" in random.caption
    assert random.data["value"].max() <= max(START)


@pytest.mark.parametrize("count", [1, 3])
def test_rank_replay_total_equals_the_budget_at_every_decision(seeds: list[Run], count: int) -> None:
    panels = plots.rank_replay(seeds[:count])
    heat, budget = panels.rows()[0]
    assert (heat.frame, budget.frame) == ("step", None)
    assert sorted(set(heat.data["step"])) == sorted(DECIDED)
    shown = heat.data.groupby("step")["value"].sum().to_dict()
    assert shown == pytest.approx({step: sum(ranks) for step, ranks in DECIDED.items()})
    assert lookup(budget, "step") == pytest.approx(shown)
    line = next(mark for mark in budget.marks if mark.kind == "line")
    corners = list(zip(line.data["at"], line.data["value"], strict=True))
    assert corners == [(0, 16), (4, 16), (4, 14), (6, 14), (6, 10), (7, 10), (7, 9), (9, 9), (9, 9)]


def test_rank_replay_draws_the_budget_once_in_print(write: Any) -> None:
    drawn = plots.rank_replay(write("a", allotted()), frames=3).mpl()
    budgets = [ax for ax in drawn.axes if ax.get_title(loc="left").endswith("budget")]
    assert len(budgets) == 1
    assert len([line for line in budgets[0].get_lines() if line.get_linestyle() != "None"]) == 1


def test_rank_replay_draws_the_budget_lower_than_the_ranks(write: Any) -> None:
    drawn = plots.rank_replay(write("a", allotted()), frames=3).mpl()
    box = next(ax for ax in drawn.axes if ax.get_title(loc="left").endswith("budget")).get_window_extent()
    assert box.height < box.width / 4


def test_rank_replay_phases_follow_changes_of_the_budget(write: Any) -> None:
    _, budget = plots.rank_replay(write("a", allotted())).rows()[0]
    bands = next(mark for mark in budget.marks if mark.kind == "band").data
    assert bands.groupby("series", sort=False)["at"].agg(list).to_dict() == {
        "warm-up": [0, 4], "decay": [4, 7], "final": [7, 9],
    }  # fmt: skip


def test_rank_replay_of_a_constant_budget_has_the_total_in_its_title(write: Any) -> None:
    moving = write("b", allotted({0: START, 4: [5, 3, 4, 4]}), "moves")
    (heat,) = plots.rank_replay(moving).panels
    assert heat.title.endswith(": moves, total rank 16")
    both = plots.rank_replay({"moves": moving, "Ada": write("a", allotted(), "Ada")})
    assert [len(row) for row in both.rows()] == [2, 2]
    assert "band" not in [mark.kind for mark in both.rows()[0][1].marks]


def test_rank_replay_shows_a_control_at_the_same_steps(write: Any) -> None:
    control = write("c", allotted({0: START, 5: [1, 1, 1, 1], 9: [2, 2, 2, 2]}, budget=False), "LoRA")
    panels = plots.rank_replay(write("a", allotted(), "Ada"), control=control, frames=3)
    assert [len(row) for row in panels.rows()] == [2, 2]
    heat, course = panels.rows()[1]
    assert lookup(heat, "step", "place", "role")[6, "0", "q"] == 1
    assert lookup(course, "step") == {0: 16, 6: 4, 9: 8}
    assert "line" not in [mark.kind for mark in course.marks]


def test_rank_replay_says_whether_ranks_were_decided(write: Any) -> None:
    decided, recorded = write("a", allotted(), "Ada"), write("b", allotted(budget=False), "LoRA")
    for run, control, word in ((decided, recorded, "decided"), (recorded, decided, "recorded")):
        caption = plots.rank_replay(run, control=control).panels[0].caption
        assert f"Steps are those at which ranks were {word}." in caption


SCORES = {"encoder.layer.0.q": [[1, 9, 4], [2, 8, 3]], "encoder.layer.1.q": [[7, 5, 6], [1, 1, 9]]}


def scored(ranks: Sequence[float], kept: Sequence[Sequence[float]] | None = None) -> Values:
    """Return scores of three components of two modules after steps 4 and 9, and the final ranks."""
    values: dict[tuple[str, str], dict[int, Any]] = {}
    for place, (module, scores) in enumerate(SCORES.items()):
        values["importance", module] = {4: np.array(scores[0], float), 9: np.array(scores[1], float)}
        values["rank", module] = {0: 3.0, 9: ranks[place]}
        if kept is not None:
            values["kept", module] = {4: np.ones(3), 9: np.array(kept[place], float)}
    return values


def test_importance_separates_retained_and_dropped_components(write: Any) -> None:
    chart = plots.importance(write("a", scored([2.0, 1.0])))
    retained = {4: [9, 4, 6], 9: [8, 3, 9]}
    dropped = {4: [1, 7, 5], 9: [2, 1, 1]}
    for fate, values in (("retained", retained), ("dropped", dropped)):
        for step, found in values.items():
            row = chart.data.set_index(["fate", "step"]).loc[(fate, step)]
            assert row[["low", "value", "high"]].tolist() == pytest.approx(list(np.quantile(found, [0.1, 0.5, 0.9])))
            assert row["n"] == 3
    assert "3 of 6 components" in chart.caption
    assert not chart.y.log


def test_importance_prefers_the_retained_components_that_the_method_recorded(write: Any) -> None:
    chart = plots.importance(write("a", scored([1.0, 1.0], kept=[[1, 0, 0], [0, 1, 0]])), module="encoder.layer.0.q")
    assert lookup(chart, "component", "step", value="fate") == {
        (0, 4): "retained", (0, 9): "retained", (1, 4): "dropped", (1, 9): "dropped", (2, 4): "dropped",
        (2, 9): "dropped",
    }  # fmt: skip
    assert lookup(chart, "component", "step")[1, 9] == 8


def test_importance_counts_components_without_a_final_score_as_dropped(write: Any) -> None:
    run = write("a", {("lr", ""): {9: 0.1}})
    writer = RunWriter(run.path.parent / "b", replace(run.meta, id="b"))
    module = MODULES[0]["module"]
    for step, ids, scores, rank in ((4, [0, 1, 5], [1.0, 2.0, 3.0], 2), (9, [1, 5], [5.0, 4.0], 4)):
        writer.collect(
            step, [Record("importance", np.array(scores), module, np.array(ids)), Record("rank", rank, module)]
        )
    writer.finish("done")
    chart = plots.importance(Run.read(run.path.parent / "b"), module=module)
    assert lookup(chart, "component", value="fate") == {0: "dropped", 1: "retained", 5: "retained"}


def test_importance_of_a_module_has_one_panel_per_run_and_lists_known_modules(write: Any) -> None:
    runs = [write(f"s{seed}", scored([2.0, 1.0]), seed=seed) for seed in range(3)]
    panels = plots.importance(runs, module="encoder.layer.0.q")
    assert [len(row) for row in panels.rows()] == [2, 1]
    assert panels.rows()[1][0].title.endswith("seed 2")
    with pytest.raises(ValueError, match=r"importance in run s0, got 'q'; expected one of encoder\.layer"):
        plots.importance(runs, module="q")


def test_importance_axis_is_logarithmic_for_positive_scores_of_many_magnitudes(write: Any) -> None:
    values = {
        key: {s: v**4 if key[0] == "importance" else v for s, v in at.items()} for key, at in scored([2, 1]).items()
    }
    assert plots.importance(write("a", values)).y.log
    signed = {key: {s: -v if key[0] == "importance" else v for s, v in at.items()} for key, at in values.items()}
    assert not plots.importance(write("b", signed)).y.log


def test_adapted_types_compare_test_metrics_at_stated_parameters(write: Any) -> None:
    def trained(id: str, role: str, rank: float, metric: float, seed: int) -> Run:
        names = [module["module"] for module in MODULES if module["role"] == role]
        values: Values = {("rank", name): {9: rank} for name in names} | {("test_metric", ""): {9: metric}}
        return write(id, values, seed=seed)

    queries = [trained(f"q{seed}", "q", 5.0, metric, seed) for seed, metric in enumerate((0.5, 0.6, 0.7))]
    inner = trained("f", "ffn_in", 2.0, 0.8, 0)
    chart = plots.adapted_types({"W_q": queries, "W_f1": inner})  # of other seeds, so without differences
    assert lookup(chart, "recipe") == pytest.approx({"W_q": 0.6, "W_f1": 0.8})
    low, high = stats.t.interval(0.95, 2, 0.6, stats.sem([0.5, 0.6, 0.7]))
    assert chart.data[["low", "high"]].iloc[1].tolist() == pytest.approx([low, high])
    assert chart.y.order == ("W_f1", "W_q")
    assert "Adapter parameters: 200 each." in chart.caption  # 2 modules: 5 (10 + 10) and 2 (40 + 10)
    more = plots.adapted_types({"W_q": queries, "W_f1": trained("g", "ffn_in", 3.0, 0.8, 0)})
    assert "Adapter parameters: W_q: 200; W_f1: 300." in more.caption


def test_rank_allocation_cells_show_the_spread_if_there_is_room(seeds: list[Run]) -> None:
    chart = plots.rank_allocation(seeds)
    printed = {text for *_, text in Mpl(chart).words()}
    assert "3.3 (2–5)" in printed
    heat = chart.plotly().data[0]
    assert "3.3 (2–5)" in str(heat.customdata)
    assert "3.3" in str(heat.text)
    crowded = pd.DataFrame({"layer": range(30), "role": "q", "value": 4.0, "words": "4.0 (2–5)"})
    narrow = ls.Chart(crowded, [Heat("layer", "role", "value", text=".0f", words="words")])
    assert {text for *_, text in Mpl(narrow).words()} == {"4"}


@pytest.mark.parametrize("name", ["rank_allocation", "rank_replay", "importance", "adapted_types"])
def test_figure_is_available_with_its_records_only(write: Any, name: str) -> None:
    values = allotted() | scored([2.0, 1.0]) | {("test_metric", ""): {9: 0.5}}
    run = write("a", values, seed=0)
    assert plots.available(run).set_index("figure").loc[name, "drawable"]
    assert FIGURES[name].draw([run], **({"frames": 2} if name == "rank_replay" else {})).rows()
    bare = write("b", {("lr", ""): {1: 0.1}})
    with pytest.raises(ValueError, match=rf"{name}.*records of \w+: train "):
        FIGURES[name].draw(bare)


def test_plot_command_does_not_import_the_method_of_the_run(write: Any, tmp_path: Path) -> None:
    """AdaLoRA registers ``kept`` and needs torch, but the run stores the definition of the quantity."""
    run = write("a", allotted() | scored([2.0, 1.0], kept=[[1, 1, 0], [1, 0, 0]]))
    script = (
        "import sys; from lorascope.cli.main import main; "
        f"code = main(['plot', 'rank_allocation', {str(run.path)!r}, '-o', {str(tmp_path / 'x.png')!r}, '--chance']); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "x.png")), done.stderr


def test_rank_replay_of_a_trained_allocator_follows_its_budget(bert: Any, task: Any, tmp_path: Path) -> None:
    method = AdaLoRA(init_rank=3, target_rank=1, initial_steps=1, final_steps=2, mask_every=2)
    settings = {"steps": 8, "batch_size": 4, "progress": False, "device": "cpu"}
    run = ls.train(bert, task, method, seed=0, out=tmp_path / "a", **settings)
    heat, budget = plots.rank_replay(run).rows()[0]
    recorded = run.table[run.table["quantity"] == "budget"]
    expected = dict(zip(recorded["step"], recorded["value"], strict=True))
    assert heat.data.groupby("step")["value"].sum().to_dict() == expected == lookup(budget, "step")
    assert plots.rank_allocation(run).data["value"].sum() == sum(run.ranks().values())
    fates = plots.importance(run).data.groupby("fate")["n"].first()
    assert fates["retained"] == sum(run.ranks().values())
    for name in ("importance_left", "sensitivity"):
        assert not plots.importance(run, quantity=name).data.empty
