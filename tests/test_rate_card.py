"""Rate card of planted sweeps: worked losses, diverged runs and missing facts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted import plant

import lorascope as ls
from lorascope.analysis.rate_card import rate_card

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
    with pytest.raises(ValueError, match="must have a rank"):
        rate_card(plant_sweep(tmp_path / "full", 1, rank=None))
    bare = plant(tmp_path, "bare", {("loss", ""): {9: 1.0}}, recipe={"name": "lora", "rank": 2})
    with pytest.raises(ValueError, match="validation loss"):
        rate_card([bare])
