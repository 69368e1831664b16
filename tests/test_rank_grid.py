"""Ranks as text, by role and layer."""

from __future__ import annotations

import pandas as pd

from lorascope.runs.rank_grid import rank_grid


def modules(*rows: tuple[str, str, int | None, str]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["module", "stack", "layer", "role"]).astype({"layer": "Int64"})


def test_grid_has_a_row_per_role_and_a_column_per_layer() -> None:
    table = modules(
        ("head", "", None, "head"), ("a", "", 0, "q"), ("b", "", 1, "q"), ("c", "", 1, "v"), ("d", "", 0, "k")
    )
    assert rank_grid(table, {"head": 8, "a": 8, "b": 16, "c": 4}, {"a": 3, "b": 16, "head": 1}) == [
        "layer       -       0         1",
        "head   8 -> 1",
        "q              8 -> 3  16 -> 16",
        "v                        4 -> 0",
    ]
    assert rank_grid(table, {"a": 8, "c": 4}) == ["layer  0  1", "q      8", "v         4"]


def test_experts_of_one_layer_share_a_cell() -> None:
    table = modules(("a", "", 0, "ffn_in"), ("b", "", 0, "ffn_in"))
    assert rank_grid(table, {"a": 1, "b": 2}) == ["layer      0", "ffn_in  1, 2"]


def test_many_layers_are_in_blocks_that_fit_a_line() -> None:
    table = modules(*((f"m{layer}", "", layer, "q") for layer in range(40)))
    lines = rank_grid(table, {f"m{layer}": 8 for layer in range(40)}, {f"m{layer}": 3 for layer in range(40)})
    assert max(map(len, lines)) <= 96
    numbers = [int(word) for line in lines if line.startswith("layer") for word in line.split()[1:]]
    assert numbers == list(range(40))
    assert sum(line.count("8 -> 3") for line in lines) == 40
