"""Probes: budgets, statistics on planted tables, and one small reproduction from runs to report."""

from __future__ import annotations

import html
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from lorascope import probes, sweeps
from lorascope.probes import lisa, lora
from lorascope.probes.yardstick import tfidf_accuracy
from lorascope.records import Record, frame
from lorascope.run import Run

MODULES = pd.DataFrame(
    {
        "module": ["embed", "block.0", "block.1", "block.2", "head"],
        "stack": "",
        "layer": pd.array([None, 0, 1, 2, None], dtype="Int16"),
        "role": ["embed", "q", "q", "q", "head"],
        "tied": "",
    }
)


class Planted(Run):
    """A run that consists of a table."""

    def __init__(self, rows, seed=0, **meta):
        super().__init__(None, {"seed": seed} | meta)
        self.table = frame(f"run{seed}", rows, MODULES)


def test_quick_budgets_are_what_the_probes_say_and_fit_a_laptop():
    seen = {}
    measuring = 0
    for probe in probes.PROBES.values():
        arms = probe.arms(True)
        assert probes.QUICK_SEEDS * (sum(arm.budget for arm in arms) + probe.measure_cost) <= probe.quick_budget
        seen |= {arm.label: arm.budget for arm in arms}
        measuring += probe.measure_cost
    assert probes.QUICK_SEEDS * (sum(seen.values()) + measuring) <= 1100


def test_every_probe_shares_its_arms_with_the_others():
    by_label = {}
    for probe in probes.PROBES.values():
        for quick in (True, False):
            for arm in probe.arms(quick):
                assert by_label.setdefault((arm.label, quick), arm) == arm


def test_skew_is_log_ratio_to_the_median_block_averaged_over_steps():
    """Mean over steps 1, 2: embed 50, blocks 2, 3, 10, so log10(50 / 3); step 0: log10(5 / 1)."""
    steps = {
        0: (5.0, 1.0, 1.0, 1.0, 1.0),
        1: (40.0, 1.0, 2.0, 9.0, 1.0),
        2: (60.0, 3.0, 4.0, 11.0, 2.0),
    }
    rows = [
        (step, Record("adapter_norm", value, module))
        for step, values in steps.items()
        for module, value in zip(MODULES["module"], values, strict=True)
    ]
    run = Planted(rows)
    assert lisa.skew(run, "adapter_norm", "embed") == pytest.approx(np.log10(50 / 3))
    assert lisa.skew(run, "adapter_norm", "embed", start=True) == pytest.approx(np.log10(5))
    assert lisa.skew(run, "adapter_norm", "head") == pytest.approx(np.log10(1.5 / 3))


def _arm(kind, ends):
    rows = []
    for step in (0, 1):
        for module in MODULES["module"]:
            grown = {"embed": ends[0], "head": ends[1]}.get(module, 1.0)
            rows.append((step, Record("update_norm", grown * step, module)))
            if kind == "lora":
                rows.append((step, Record("adapter_norm", grown, module)))
    return rows


@pytest.mark.parametrize(("factor", "outcome"), [(100.0, "supported"), (1.05, "not supported")])
def test_a_planted_skew_is_found_and_one_drawn_at_the_start_is_not(factor, outcome):
    noise = np.random.default_rng(0).normal(1, 0.01, 3)
    adapted = [Planted(_arm("lora", (factor * noise[s], 1.0)), s) for s in range(3)]
    full = [Planted(_arm("full", (1.0, 1.0)), s) for s in range(3)]
    moved, learned = lisa._judge_layer(adapted, full, "embed", lisa.BOTTOM, lisa.BOTTOM_LEARNED)
    assert moved.outcome == outcome
    assert moved.effect == pytest.approx(np.log10(factor), abs=0.02)
    # the adapters' norm is as large before the first step as after it: nothing was learned
    assert learned.outcome == "not supported"
    assert learned.effect == pytest.approx(0, abs=1e-12)


def test_pairs_share_no_seed():
    low, high = ([Planted([(0, Record("loss", 1.0))], seed) for seed in range(3)] for _ in range(2))
    pairs = [(a.meta["seed"], b.meta["seed"]) for a, b in lora.neighbours(low, high)]
    assert pairs == [(0, 1), (1, 2), (2, 0)]
    assert lora.neighbours(low[:1], high[:1]) == []


def test_accuracy_table_shows_points_and_half_the_interval():
    runs = [
        Planted([], seed, test={"metric": value, "groups": {"film": value}})
        for seed, value in enumerate((0.80, 0.82, 0.84))
    ]
    table = lora.accuracy_table({"arm": runs}, {"all": 0.5, "film": 0.25})
    assert table.iloc[0].tolist() == ["TF-IDF, logistic regression", "50.0", "25.0"]
    assert table.iloc[1]["all"] == "82.0 ± 5.0"  # 4.303 * 2 / sqrt(3)


def test_yardstick_learns_what_words_tell(task):
    accuracy = tfidf_accuracy(task)
    assert accuracy["all"] > 0.9
    assert set(accuracy) == {"all", "film", "music"}


def test_reproduce_trains_judges_and_reports(bert, task, tmp_path, monkeypatch):
    file = tmp_path / "toy.csv"
    task.table[["text", "label", "group"]].to_csv(file, index=False)

    def tiny(arm):
        settings = dict(arm.settings) | {"steps": 4, "batch_size": 4, "eval_every": 2}
        settings["observe"] = [replace(observer, every=2) for observer in arm.settings["observe"]]
        return replace(arm, model=bert, task=str(file), settings=settings)

    for name in ("lora", "lisa"):
        probe = probes.PROBES[name]
        arms = [tiny(arm) for arm in probe.arms(True)]
        monkeypatch.setitem(probes.PROBES, name, replace(probe, arms=lambda quick, arms=arms: arms))
    monkeypatch.setattr(sweeps, "cpu_count", lambda: 1)  # in this process: no workers to start
    found = probes.reproduce(["lora", "lisa"], True, None, tmp_path / "out")
    page = found.path.read_text()
    for claim in (lora.PARITY, lora.USEFUL, lora.SHARED, lisa.BOTTOM, lisa.BOTTOM_LEARNED):
        assert claim.sentence in html.unescape(page)
    assert page.count("inconclusive") >= 5
    folders = sorted(found.path.parent.glob("runs/*"))
    assert len(folders) == 8  # four arms, two seeds; full fine-tuning is shared
    assert [claim["outcome"] for claim in found.plain()["claims"]] == ["inconclusive"] * 5
    found.path.unlink()
    assert str(probes.write_report(tmp_path / "out")) == str(found)
    assert found.path.exists()
    before = {folder: (folder / "run.json").stat().st_mtime_ns for folder in folders}
    probes.reproduce(["lisa"], True, None, tmp_path / "out")
    assert before == {folder: (folder / "run.json").stat().st_mtime_ns for folder in folders}


def test_an_unknown_probe_is_told_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="unknown probe 'lore'; there are"):
        probes.reproduce(["lore"], True, None, tmp_path)


def test_a_report_of_no_reproduction_is_told_in_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no probes\.json"):
        probes.write_report(tmp_path)
