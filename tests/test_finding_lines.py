"""Findings in the representation of a result: its largest update, used rank, missing records and a next call."""

from __future__ import annotations

import html
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lorascope as ls
from lorascope.runs.finding_lines import RECORDED_BY
from lorascope.schema.records import QUANTITIES

NAMES = tuple(ls.examples().index)


def shown_lines(run: Any) -> dict[str, str]:
    """Return the lines that represent a result, by key."""
    return {line[:8].strip(): line[8:] for line in repr(run).splitlines()}


@pytest.mark.parametrize("name", NAMES)
def test_largest_layer_and_role_agree_with_the_summary(name):
    run = ls.example(name)
    modules = run.summary()
    energy = modules["update_norm"] ** 2
    shares = []
    for column in ("layer", "role"):
        sums = energy.groupby(modules[column]).sum()
        shares += [sums.idxmax(), round(100 * sums.max() / energy.sum())]
    largest = modules.loc[energy.idxmax(), "module"]
    expected = "layer {} has {}% of |dW|², role {} {}%".format(*shares)
    assert shown_lines(run)["largest"] == f"{expected}; most in {largest}"


@pytest.mark.parametrize("name", NAMES)
def test_used_rank_is_the_mean_effective_rank_of_adapted_modules(name):
    run = ls.example(name)
    adapted = run.summary().dropna(subset="rank")
    if adapted.empty:
        assert "rank" not in shown_lines(run)
        return
    used, ranks = re.match(r"([\d.]+) of ([\d.]+) per module \(effective rank\)", shown_lines(run)["rank"]).groups()
    assert float(used) == pytest.approx(adapted["effective_rank"].fillna(0).mean(), rel=0.01)
    assert float(ranks) == pytest.approx(adapted["rank"].mean(), rel=0.01)
    zeros = int((adapted["rank"] == 0).sum())
    assert (f"{zeros} of {len(adapted)} modules have rank 0" in shown_lines(run)["rank"]) == bool(zeros)


def test_each_observer_is_named_with_a_quantity_that_it_records():
    assert RECORDED_BY.keys() <= set(dir(ls.observe))  # which registers the quantities of all observers
    for name, quantity in RECORDED_BY.items():
        assert f"ls.observe.{name}()" in QUANTITIES[quantity].recorded_by


def test_observers_that_recorded_nothing_are_missing():
    missing = {name: shown_lines(ls.example(name))["missing"] for name in ("lora", "full", "neft")}
    assert missing["lora"].startswith("records of gradients, memory, neurons, utilization: ls.plots.available(run)")
    assert missing["full"].startswith("records of gradients, memory, utilization: ")
    assert missing["neft"].startswith("records of gradients, memory: ")


def test_representation_opens_no_snapshot_but_the_last(tmp_path: Path):
    shutil.copytree(ls.example("lora").path, tmp_path / "run")
    (tmp_path / "run" / "snapshots" / "step-000100.safetensors").write_bytes(b"broken")
    assert shown_lines(ls.load(tmp_path / "run"))["missing"] == shown_lines(ls.example("lora"))["missing"]


def test_adapters_and_series_miss_the_training_and_the_base_weights():
    assert shown_lines(ls.example("adapter"))["missing"].startswith("the training history, the base weights: ")
    assert shown_lines(ls.example("checkpoints"))["missing"].startswith("the losses, the base weights: ")


@pytest.mark.parametrize("name", NAMES)
def test_next_line_and_the_call_of_missing_records_can_be_pasted(name):
    run = ls.example(name)
    lines = shown_lines(run)
    for code in (lines["next"], lines["missing"].partition(": ")[2]):
        assert eval(code, {"ls": ls, run.kind: run}) is not None


def test_allocated_ranks_are_the_next_figure():
    assert shown_lines(ls.example("adalora"))["next"] == "ls.plots.rank_allocation(run)"
    assert shown_lines(ls.example("lora"))["next"] == "ls.plots.update_norm_heat(run)"


def test_run_without_norms_shows_only_what_is_missing_and_the_next_call(write: Any):
    lines = shown_lines(write("a", {("loss", ""): {1: 2.0}}))
    assert lines.keys() == {"run", "model", "steps", "folder", "missing", "next"}
    assert lines["next"] == "ls.plots.available(run)"


def test_shares_of_large_norms_are_finite(write: Any):
    run = write("a", {("update_norm", "h.0.q"): {9: 3e200}, ("update_norm", "h.1.up"): {9: 4e200}})
    assert shown_lines(run)["largest"] == "layer 1 has 64% of |dW|², role ffn_in 64%; most in h.1.up"


@pytest.mark.parametrize(("norm", "words"), [(0.0, "zero in all 4 modules"), (np.inf, "not finite in 4 modules")])
def test_zero_or_infinite_update_has_diagnose_as_its_next_call(write: Any, norm: float, words: str):
    modules = ("h.0.q", "h.0.up", "h.1.q", "h.1.up")
    run = write("a", {("update_norm", module): {9: norm} for module in modules})
    assert words in shown_lines(run)["largest"]
    assert shown_lines(run)["next"] == "ls.diagnose(run)"


def test_html_has_the_same_lines():
    run = ls.example("adalora")
    page = html.unescape(run._repr_html_())
    for text in shown_lines(run).values():
        assert text in page
    assert page.count("<tr>") == len(repr(run).splitlines())
