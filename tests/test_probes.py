"""Tests of probes: budgets, statistics on planted tables, and one small reproduction from runs to report."""

from __future__ import annotations

import html
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from planted import manifest, plant
from torch import nn
from verdicts import effects, verdict

from lorascope import observe, probes
from lorascope.experiments import sweep
from lorascope.inputs.models import load
from lorascope.methods import Full, LoRA, NeFT
from lorascope.methods.lora import LoRADelta
from lorascope.probes import lisa, lora
from lorascope.probes.base import Arm, Findings, Probe, draw
from lorascope.probes.claims import CLAIMS
from lorascope.probes.seed_statistics import pair_next_seeds
from lorascope.probes.tfidf_baseline import tfidf_accuracy
from lorascope.runs.run import Run
from lorascope.runs.writer import remove_states
from lorascope.schema.records import Record, frame
from lorascope.training import loop
from lorascope.training.output_folder import StateRemoved

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
    """Run that consists of a table."""

    def __init__(self, rows, seed=0, **meta):
        super().__init__(None, manifest(seed=seed, **meta))
        self.table = frame(f"run{seed}", rows, MODULES)


def test_quick_budgets_cover_the_arms_and_fit_a_laptop():
    seen = {}
    measuring = 0
    for probe in probes.PROBES.values():
        arms = probe.arms(True)
        assert probes.QUICK_SEEDS * (sum(arm.budget for arm in arms) + probe.measure_cost) <= probe.quick_budget
        seen |= {arm.label: arm.budget for arm in arms}
        measuring += probe.measure_cost
    assert probes.QUICK_SEEDS * (sum(seen.values()) + measuring) <= 1100


def test_arms_with_the_same_label_are_equal_in_all_probes():
    by_label = {}
    for probe in probes.PROBES.values():
        for quick in (True, False):
            for arm in probe.arms(quick):
                assert by_label.setdefault((arm.label, quick), arm) == arm


def test_skew_equals_log_ratio_of_mean_norm_to_median_block():
    """Means over steps 1 and 2 are 50 for embed and 2, 3, 10 for blocks: log10(50 / 3). Step 0 gives log10(5 / 1)."""
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
def test_lisa_claims_find_planted_skew_but_not_initial_skew(factor, outcome):
    noise = np.random.default_rng(0).normal(1, 0.01, 3)
    adapted = [Planted(_arm("lora", (factor * noise[s], 1.0)), s) for s in range(3)]
    full = [Planted(_arm("full", (1.0, 1.0)), s) for s in range(3)]
    runs = {lisa.ADAPTED: adapted, lisa.FULL: full}
    moved, learned = (verdict(lisa.PROBE, id, runs) for id in ("lisa.embed", "lisa.learned"))
    assert moved.outcome == outcome
    assert moved.effect == pytest.approx(np.log10(factor), abs=0.02)
    # The adapter norms do not change after step 0, so no skew is learned.
    assert learned.outcome == "not supported"
    assert learned.effect == pytest.approx(0, abs=1e-12)


def _decoder_arm(kind, update, start=None, grown=None):
    """Build norms of embedding and head for blocks of norm 1. Full fine-tuning has one tied tensor, so no head."""
    places = {"words": 0, "score": 1} if len(update) > 1 else {"words": 0}
    inside = ("h.0.q", "h.1.q")
    at = {("update_norm", name): {0: 0.0, 9: update[end]} for name, end in places.items()}
    at |= {("update_norm", name): {0: 0.0, 9: 1.0} for name in inside}
    at |= {("weight_norm", name): {0: 7.0, 9: 7.0} for name in (*places, *inside)}
    if kind == "lora":
        at |= {("adapter_norm", name): {0: start[end], 9: grown[end]} for name, end in places.items()}
        at |= {("adapter_norm", name): {0: 1.0, 9: 1.0} for name in inside}
    return at


def test_lisa_judges_embedding_and_head_of_a_decoder(tmp_path):
    """All planted skews differ; full fine-tuning has one tensor for embedding and head."""
    planted = {
        lisa.FULL: _decoder_arm("full", (3.0, 1.0)),
        lisa.ADAPTED: _decoder_arm("lora", (6.0, 1.0), (5.0, 1.0), (10.0, 1.0)),
        lisa.FULL_DECODER: _decoder_arm("full", (2.0,)),
        lisa.ADAPTED_DECODER: _decoder_arm("lora", (40.0, 10.0), (20.0, 1.5), (22.0, 12.0)),
    }
    runs = {label: [plant(tmp_path, f"r{n}", values)] for n, (label, values) in enumerate(planted.items())}
    found = lisa.PROBE.judge(runs)
    assert {id: 10**effect for id, effect in effects(found).items()} == pytest.approx(
        {
            "lisa.embed": 2.0,
            "lisa.learned": 2.0,
            "lisa.embed_decoder": 20.0,
            "lisa.learned_decoder": 1.1,
            "lisa.head_decoder": 5.0,
            "lisa.learned_head": 8.0,
        }
    )
    assert "head" in CLAIMS["lisa.head_decoder"].sentence
    assert [shown.figure for shown in found.figures] == ["mean_norm", "norm_over_steps", "mean_norm"]
    assert any("scales with its random B" in note and "factor of 34" in note for note in found.notes)
    assert any("SmolLM2" in note and "has no random B" in note for note in found.notes)
    quick = lisa.PROBE.judge({label: runs[label] for label in (lisa.FULL, lisa.ADAPTED)})
    assert [*effects(quick)] == ["lisa.embed", "lisa.learned"]
    assert any("SmolLM2" in note and "only in a full run" in note for note in quick.notes)


def test_embedding_adapter_has_a_larger_gain_than_a_linear_adapter():
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


def test_pair_next_seeds_never_pairs_equal_seeds():
    low, high = ([Planted([(0, Record("loss", 1.0))], seed) for seed in range(3)] for _ in range(2))
    pairs = [(a.meta.seed, b.meta.seed) for a, b in pair_next_seeds(low, high)]
    assert pairs == [(0, 1), (1, 2), (2, 0)]
    assert pair_next_seeds(low[:1], high[:1]) == []


def test_accuracy_table_shows_points_and_half_the_interval():
    runs = [
        Planted([], seed, test={"name": "accuracy", "metric": value, "loss": 0.5, "groups": {"film": value}})
        for seed, value in enumerate((0.80, 0.82, 0.84))
    ]
    table = lora.accuracy_table({"arm": runs}, {"all": 0.5, "film": 0.25})
    assert table.iloc[0].tolist() == ["TF-IDF, logistic regression", "50.0", "25.0"]
    assert table.iloc[1]["all"] == "82.0 ± 5.0"  # 4.303 * 2 / sqrt(3)


def test_tfidf_baseline_classifies_the_toy_task(task):
    accuracy = tfidf_accuracy(task)
    assert accuracy["all"] > 0.9
    assert set(accuracy) == {"all", "film", "music"}


def test_reproduce_trains_judges_and_writes_report(bert, task, tmp_path, monkeypatch):
    file = tmp_path / "toy.csv"
    task.table[["text", "label", "group"]].to_csv(file, index=False)

    def tiny(arm):
        settings = dict(arm.settings) | {"steps": 4, "batch_size": 4, "eval_every": 2}
        settings["observe"] = [replace(observer, every=2) for observer in arm.settings["observe"]]
        return replace(arm, model=bert, task=str(file), settings=settings)

    for name in ("lora", "lisa"):
        probe = probes.PROBES[name]
        shrunk = replace(probe, arms=lambda quick, probe=probe: [tiny(arm) for arm in probe.arms(quick)])
        monkeypatch.setitem(probes.PROBES, name, shrunk)
    monkeypatch.setattr(sweep, "cpu_count", lambda: 1)  # run in this process, without workers
    found = probes.reproduce(["lora", "lisa"], True, None, tmp_path / "out")
    page = found.path.read_text(encoding="utf-8")
    for id in ("lora.parity", "lora.words", "lora.direction", "lisa.embed", "lisa.learned"):
        assert CLAIMS[id].sentence in html.unescape(page)
    assert page.count("inconclusive") >= 5
    folders = sorted(found.path.parent.glob("runs/*"))
    assert len(folders) == 8  # four arms, two seeds; full fine-tuning is shared
    assert [claim["outcome"] for claim in found.to_dict()["claims"]] == ["inconclusive"] * 5
    with pytest.warns(FutureWarning, match="plain.*to_dict"):
        assert found.plain() == found.to_dict()
    found.path.unlink()
    assert str(probes.write_report(tmp_path / "out")) == str(found)
    assert found.path.exists()


@pytest.fixture
def dense_probe(bert, task, monkeypatch):
    """Probe whose arms train the tiny BERT by full fine-tuning, in two phases, and by LoRA."""
    settings = {"steps": 3, "batch_size": 4, "eval_every": 1, "eval_size": 16, "test_size": 16}
    settings |= {"observe": [observe.norms(every=1)]}
    methods = {"full": Full(), "neft": NeFT(num_neurons=4, tune_steps=2), "lora": LoRA(rank=1)}
    arms = [Arm(label=label, method=each, settings=settings, model=bert, task=task) for label, each in methods.items()]

    texts = dict.fromkeys(("title", "source", "question"), "")
    probe = Probe(
        name="dense",
        **texts,
        quick_budget=1,
        arms=lambda quick: arms,
        figures=lambda runs: [draw("update_norm", dict(runs))],
    )
    monkeypatch.setitem(probes.PROBES, "dense", probe)
    monkeypatch.setattr(sweep, "cpu_count", lambda: 1)
    return {arm.label: arm for arm in arms}


def test_reproduce_stores_no_copy_of_the_model(dense_probe, bert, task, tmp_path, monkeypatch):
    """Runs without adapters store tables and verdicts; runs with adapters also store their parameters."""
    out = tmp_path / "out"
    probes.reproduce(["dense"], True, 1, out)
    contents = json.loads((out / "probes.json").read_text())["probes"]["dense"]
    runs = {label: [Run.read(out / "runs" / folder) for folder in folders] for label, folders in contents.items()}
    copy = sum(parameter.nbytes for parameter in load(bert, task=task).parameters())
    assert sum(file.stat().st_size for file in out.rglob("*.safetensors")) < copy
    tuned = [phase for run in runs["neft"] for phase in run.parents]
    assert len(tuned) == 1
    for run in [*runs["full"], *runs["neft"], *tuned]:
        assert not list(run.path.glob("state/*"))
        assert not run.restorable
        for state in ("last", "best"):
            line = rf"^cannot read state/\w+.safetensors of run {run.id}: it was removed .+ overwrite=True$"
            with pytest.raises(ValueError, match=line):
                run.tensors(state)
            with pytest.raises(ValueError, match=line):
                run.restore(load(bert, task=task), state)
    for run in runs["lora"]:
        run.restore(load(bert, task=task))
    (out / "report.html").unlink()
    page = probes.write_report(out).path.read_text()
    assert all(run.id in page for run in runs["full"])

    def refuse(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(loop, "fit", refuse)
    written = {file: file.stat().st_mtime_ns for file in out.rglob("run.json")}
    probes.reproduce(["dense"], True, 1, out)
    assert {file: file.stat().st_mtime_ns for file in out.rglob("run.json")} == written


def test_findings_read_a_folder_with_former_labels(dense_probe, tmp_path, monkeypatch):
    out = tmp_path / "out"
    probes.reproduce(["dense"], True, 1, out)
    (out / probes.CONTENTS).write_text((out / probes.CONTENTS).read_text().replace('"lora"', '"low rank"'))
    monkeypatch.setitem(
        probes.PROBES, "dense", replace(probes.PROBES["dense"], former_labels={"low rank": "lora", "old": "full"})
    )
    recipes = probes.findings(out)["dense"].figures[0].chart.rows()[0][0].data["recipe"]
    assert set(recipes) == {"full", "neft", "lora"}


def test_former_labels_lead_to_labels_of_arms():
    for probe in probes.PROBES.values():
        labels = {arm.label for arm in probe.arms(False)}
        assert set(probe.former_labels.values()) <= labels
        assert not labels & probe.former_labels.keys()


@pytest.mark.parametrize("label", ["full", "neft"])
def test_train_on_a_run_with_removed_state_names_overwrite(label, dense_probe, bert, task, tmp_path):
    """The same call cannot restore the removed parameters; with overwrite=True it trains again."""
    arm = dense_probe[label]
    settings = {**arm.settings, "progress": False, "root": tmp_path, "device": "cpu"}
    run = loop.train(load(bert, task=task), task, arm.method, **settings)
    assert run.restorable
    remove_states(run)
    line = f"^cannot restore run {run.id}: its state was removed to save disk space. .+ overwrite=True$"
    with pytest.raises(StateRemoved, match=line) as caught:
        loop.train(load(bert, task=task), task, arm.method, **settings)
    assert caught.value.run.id == run.id
    again = loop.train(load(bert, task=task), task, arm.method, overwrite=True, **settings)
    assert again.id == run.id
    again.restore(load(bert, task=task))


def test_probes_with_measure_have_only_arms_with_adapters():
    dense = {"full", "lisa", "neft", "adapprox"}
    measured = [
        arm for probe in probes.PROBES.values() if probe.measure for arm in (*probe.arms(True), *probe.arms(False))
    ]
    assert measured
    assert not [arm.label for arm in measured if arm.method.name in dense]


@pytest.mark.parametrize(("name", "hint"), [("lore", "'lora'"), ("xyzzy", "adalora")])
def test_reproduce_with_unknown_probe_names_the_known_ones(name, hint, tmp_path):
    with pytest.raises(ValueError, match=f"unknown probe '{name}'.*{hint}"):
        probes.reproduce([name], True, None, tmp_path)


def test_findings_and_report_figure_accept_their_old_names():
    with pytest.warns(FutureWarning, match="Exhibit.*ReportFigure"):
        assert probes.Exhibit is probes.ReportFigure
    with pytest.warns(FutureWarning, match="exhibits.*figures"):
        found = Findings([], exhibits=[])
    with pytest.warns(FutureWarning, match="exhibits.*figures"):
        assert found.exhibits is found.figures


def test_write_report_without_contents_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no probes\.json"):
        probes.write_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        (probes.REPORT, "<html>mine</html>", FileExistsError),
        (probes.CONTENTS, '{"apollo": 11}', ValueError),
        (probes.CONTENTS, '{"quick": "yes", "probes": {}}', ValueError),
    ],
)
def test_reproduce_never_replaces_a_file_of_another_program(name, text, error, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(error, match=name) as caught:
        probes.reproduce(["lora"], True, 1, tmp_path)
    assert "\n" not in str(caught.value)
    assert (tmp_path / name).read_text(encoding="utf-8") == text
    assert [file.name for file in tmp_path.iterdir()] == [name]
