"""Rate card of planted sweeps: worked losses, diverged runs and missing facts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted import plant

import lorascope as ls
from lorascope.analysis.rate_card import compares_rates, rate_card
from lorascope.cli import sweep as command
from lorascope.experiments import grid
from lorascope.experiments.sweep import SweepResult, run_grid
from lorascope.papers.setups import planted_teacher

# Final validation losses of three seeds by rank and learning rate; all begin at 2.
LOSSES = {
    (2, 1e-3): (1.50, 1.52, 1.51),
    (2, 3e-3): (1.20, 1.26, 1.22),
    (2, 1e-2): (1.19, 1.24, 1.23),
    (2, 3e-2): (1.30, 3.00, 1.32),
    (8, 1e-3): (1.10, 1.12, 1.11),
    (8, 3e-3): (1.40, 1.43, 1.41),
    (8, 1e-2): (np.nan, 2.50, 2.60),
    (8, 3e-2): (1.30, 1.30, 1.30),
}


def plant_sweep(folder: Path, seeds: int, **recipe: Any) -> list[ls.Run]:
    runs = []
    for (rank, lr), losses in LOSSES.items():
        for seed, loss in enumerate(losses[:seeds]):
            fields = {"name": "lora", "rank": rank} | recipe
            values = {("eval_loss", ""): {0: 2.0, 9: loss}}
            settings = {"steps": 9, "lr": lr}
            runs.append(plant(folder, f"{rank}-{lr}-{seed}", values, seed=seed, recipe=fields, settings=settings))
    return runs


def test_card_has_the_best_rate_of_each_rank_and_the_rates_that_are_not_worse(tmp_path: Path) -> None:
    card = rate_card(plant_sweep(tmp_path, 3)).set_index("rank")
    assert card["best_lr"].to_dict() == {2: 1e-2, 8: 1e-3}
    assert card["loss"].to_dict() == pytest.approx({2: 1.22, 8: 1.11})
    # At rank 2 the differences of 3e-3 are 0.01, 0.02 and -0.01.
    assert card[["low_lr", "high_lr"]].loc[2].tolist() == [3e-3, 1e-2]
    assert card[["low_lr", "high_lr"]].loc[8].tolist() == [1e-3, 1e-3]
    assert card["at_end"].to_dict() == {2: False, 8: True}


def test_edge_of_stability_is_below_the_first_rate_that_diverged(tmp_path: Path) -> None:
    card = rate_card(plant_sweep(tmp_path, 3)).set_index("rank")
    assert card["stable_lr"].to_dict() == {2: 1e-2, 8: 3e-3}  # rank 8 recovers at 3e-2


def test_two_seeds_have_no_interval_and_missing_facts_are_named(tmp_path: Path) -> None:
    card = rate_card(plant_sweep(tmp_path / "two", 2))
    assert card[["low_lr", "high_lr"]].isna().all(axis=None)
    with pytest.raises(ValueError, match="got two of lora with rank nan"):
        rate_card(plant_sweep(tmp_path / "full", 1, rank=None))
    bare = plant(tmp_path, "bare", {("loss", ""): {9: 1.0}}, recipe={"name": "lora", "rank": 2})
    with pytest.raises(ValueError, match="validation loss"):
        rate_card([bare])


def test_sweep_prints_the_card_of_runs_that_differ_in_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = plant_sweep(tmp_path, 3)
    swept = SweepResult([], {number: Path(str(run.path)) for number, run in enumerate(runs)})
    command._print_rates(swept)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[1:4] == [
        "rank best rate not worse stable up to loss",
        "2 0.01 0.003 to 0.01 0.01 1.22",
        "8 0.001* 0.001 0.003 1.11",
    ]
    assert command._rates(swept)["best_lr"].tolist() == [1e-2, 1e-3]


def test_full_fine_tuning_has_a_row_without_a_rank(tmp_path: Path) -> None:
    runs = plant_sweep(tmp_path, 3, rank=None)[:9]
    card = rate_card(runs)
    assert card["rank"].isna().tolist() == [True]
    assert card["best_lr"].tolist() == [1e-2]


def test_runs_of_one_rate_or_of_several_settings_have_no_card(tmp_path: Path) -> None:
    runs = plant_sweep(tmp_path, 2)
    assert compares_rates(runs)
    assert not compares_rates(runs[:2])
    assert not compares_rates([*runs, runs[0]])
    assert not compares_rates([])


def test_card_of_a_sweep_includes_the_runs_that_broke(tmp_path: Path) -> None:
    """At rate 1e30 the product of the factors overflows after the first step, so this run of the sweep fails."""
    methods = [ls.LoRA(rank=4, targets="all-linear", lr=lr) for lr in (1e-2, 1e30)]
    settings = {"steps": 12, "batch_size": 16, "eval_every": 0, "eval_size": 64, "test_size": 32}
    source = {"model": planted_teacher.base(), "task": planted_teacher.task(0), "method": methods, "seeds": 1}
    swept = run_grid(grid.read(source | {"root": str(tmp_path), "settings": settings}), 1, progress=False)
    assert list(swept.failures) == list(swept.broken) == [1]
    (row,) = command._rates(swept).to_dict("records")
    assert (row["best_lr"], row["stable_lr"], row["at_end"]) == (1e-2, 1e-2, True)
