"""Examples of the package: what they contain, that they load without torch, and that their script makes them again."""

from __future__ import annotations

import html
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import lorascope as ls
from lorascope.runs.examples import FOLDER

ROOT = Path(__file__).parents[1]
NAMES = tuple(ls.examples().index)
SINGLE = [
    (name, row.figure)
    for name in NAMES
    for row in ls.plots.available(ls.example(name)).itertuples()
    if row.drawable and row.runs == 1
]
# Quantity that an example is for.
RECORDS = {
    "lora": "update_norm",
    "full": "shuffled_sensitivity_out",
    "adalora": "planted_rank",
    "alora": "importance",
    "hydralora": "gate_information",
    "fourierft": "coefficient_importance",
    "neft": "selected",
}


def test_list_states_size_description_and_making_of_every_folder():
    table = ls.examples()
    assert set(table.index) == {path.name for path in FOLDER.iterdir() if path.is_dir()}
    assert list(table.columns) == ["kB", "description", "made"]
    assert (table["made"].str.contains(r"; \d+ steps on .*, seed \d$")).all()
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert 1000 * table["kB"].sum() == pytest.approx(sum(file.stat().st_size for file in files), rel=0.01)
    assert table["kB"].sum() < 3000


def test_list_is_displayed_whole():
    table = ls.examples()
    shown = html.unescape(table._repr_html_())
    for text in [*table["description"], *table["made"]]:
        assert text in repr(table)
        assert text in shown


@pytest.mark.parametrize(("name", "quantity"), RECORDS.items())
def test_run_is_finished_and_has_the_records_that_it_is_for(name, quantity):
    run = ls.example(name)
    assert run.finished
    assert run.meta.method["name"] == name
    assert quantity in set(run.table["quantity"])
    losses = run.table.query("quantity == 'eval_loss'").sort_values("step")["value"]
    assert losses.iloc[-1] < losses.iloc[0] - 0.1


def test_adalora_has_a_history_of_ranks():
    ranks = ls.example("adalora").table.query("quantity == 'rank'")
    sums = ranks.groupby("step")["value"].sum()
    assert len(sums) > 5
    assert sums.iloc[0] == 2 * sums.iloc[-1]


def test_adapters_and_series_are_peft_folders():
    assert {ls.example(name).kind for name in ("adapter", "adapter_seed_1")} == {"adapter"}
    assert len(ls.example("checkpoints").update_steps()) == 4
    assert len(list(FOLDER.rglob("adapter_config.json"))) == 6


def test_files_name_no_folder_of_the_machine_that_made_them():
    for file in [*FOLDER.rglob("*.json"), *FOLDER.rglob("*.md")]:
        text = file.read_text(encoding="utf-8")
        assert "/root" not in text
        assert "/home" not in text
        assert "/tmp" not in text


def test_unknown_example_is_rejected_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"unknown example 'adalor'.*'adalora'"):
        ls.example("adalor")


def test_all_examples_load_without_torch_in_a_second():
    code = (
        "import sys, time; start = time.process_time(); import lorascope as ls\n"
        "for name in ls.examples().index: ls.example(name)\n"
        "print(time.process_time() - start, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    seconds, *imported = printed.split()
    assert imported == ["False", "False"]
    assert float(seconds) < 1


@pytest.mark.parametrize(("name", "figure"), SINGLE)
def test_figure_that_is_offered_for_an_example_is_drawn(name, figure):
    getattr(ls.plots, figure)(ls.example(name)).mpl()


@pytest.mark.parametrize("figure", ["subspace_similarity", "adapter_pairs", "factor_embedding"])
def test_figure_of_two_adapters_is_drawn(figure):
    adapters = {"seed 0": ls.example("adapter"), "seed 1": ls.example("adapter_seed_1")}
    getattr(ls.plots, figure)(adapters).mpl()


@pytest.mark.slow
@pytest.mark.numbers
def test_script_makes_an_example_again(tmp_path):
    spec = importlib.util.spec_from_file_location("write_examples", ROOT / "data" / "write_examples.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    run, kept = script.train_run("lora", tmp_path / "lora", tmp_path), ls.example("lora")
    assert run.id == kept.id
    columns = [name for name in run.table if name != "value"]
    pd.testing.assert_frame_equal(run.table[columns], kept.table[columns])
    is_seconds = run.table["quantity"].str.contains("seconds")
    values = run.table["value"].where(~is_seconds, 0)
    np.testing.assert_allclose(values, kept.table["value"].where(~is_seconds, 0), rtol=1e-3, atol=1e-5)
