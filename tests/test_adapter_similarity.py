"""Comparison of adapters: every number is checked against dense matrices, for any rank, method and factorization."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_hydralora_files import write as write_hydra

from lorascope import plots
from lorascope.analysis import adapter_similarity
from lorascope.analysis.leading_directions import chance_angle
from lorascope.charts.marks import Rule
from lorascope.cli.main import main
from lorascope.files.safetensors_io import write_tensors
from lorascope.files.whole_files import write_json
from lorascope.formats.peft_config import CONFIG, WEIGHTS
from lorascope.formats.stored_update import PREFIX
from lorascope.runs.adapter import Adapter
from lorascope.runs.loading import load
from lorascope.updates import Dense, Fourier, LowRank

LAYER = "model.layers.{}.self_attn.{}_proj".format
SHAPE = (20, 12)
Factors = Mapping[str, tuple[np.ndarray, np.ndarray]]


def drawn(seed: int, ranks: Mapping[str, int]) -> Factors:
    """Return random B and A of each module."""
    draw = np.random.default_rng(seed)
    return {m: (draw.standard_normal((SHAPE[0], r)), draw.standard_normal((r, SHAPE[1]))) for m, r in ranks.items()}


def write(folder: Path, factors: Factors, alpha: float = 2.0) -> Path:
    """Write a LoRA folder whose rank pattern matches the factors."""
    tensors = {
        f"{PREFIX}{module}.lora_{name}.weight": np.ascontiguousarray(array, "f4")
        for module, (B, A) in factors.items()
        for name, array in {"B": B, "A": A}.items()
    }
    patterns = {f"^{module}": len(A) for module, (_, A) in factors.items()}
    write_tensors(folder / WEIGHTS, tensors, {})
    write_json(folder / CONFIG, {"peft_type": "LORA", "r": 1, "lora_alpha": alpha, "rank_pattern": patterns})
    return folder


RANKS = {
    "a": {LAYER(0, "q"): 3, LAYER(0, "v"): 3, LAYER(1, "q"): 3},
    "b": {LAYER(0, "q"): 6, LAYER(1, "q"): 2, LAYER(1, "v"): 4},
    "c": {LAYER(1, "v"): 5},
}


@pytest.fixture
def three(tmp_path: Path) -> dict[str, Adapter]:
    """Return adapters of different ranks that share some modules."""
    return {name: load(write(tmp_path / name, drawn(ord(name), ranks))) for name, ranks in RANKS.items()}


def whole(run: Adapter) -> np.ndarray:
    """Return the update of all modules as one vector."""
    updates = run.updates()
    names = sorted({module for ranks in RANKS.values() for module in ranks})
    return np.concatenate([(updates[n].dense() if n in updates else np.zeros(SHAPE)).ravel() for n in names])


def angle(one: np.ndarray, other: np.ndarray, k: int) -> float:
    """Compute the mean principal angle of the first k singular vectors of two matrices, on both sides."""
    (U1, _, V1), (U2, _, V2) = np.linalg.svd(one), np.linalg.svd(other)
    cosines = [U1[:, :k].T @ U2[:, :k], V1[:k] @ V2[:k].T]
    return float(np.mean([np.degrees(np.arccos(np.linalg.svd(c, compute_uv=False))) for c in cosines]))


def test_matrix_matches_dense_vectors(three: dict[str, Adapter]) -> None:
    shared = adapter_similarity.compare_modules(three)
    table = adapter_similarity.compare_adapters(three, shared).set_index(["one", "other"])
    for one in three:
        for other in three:
            x, y, row = whole(three[one]), whole(three[other]), table.loc[(one, other)]
            assert row["norm_ratio"] == pytest.approx(np.linalg.norm(x) / np.linalg.norm(y))
            assert row["cosine"] == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-12)
            assert row["shared"] == len(RANKS[one].keys() & RANKS[other].keys())
    common = [LAYER(0, "q"), LAYER(1, "q")]
    held = three["a"].updates(), three["b"].updates()
    angles = {m: angle(*(side[m].dense() for side in held), k) for m, k in zip(common, (3, 2), strict=True)}
    assert dict(shared.set_index("module")["angle"])[common[0]] == pytest.approx(angles[common[0]])
    assert table.loc[("b", "a"), "angle"] == pytest.approx(np.mean(list(angles.values())))
    assert table.loc[("a", "b"), "chance"] == pytest.approx(
        np.mean([chance_angle(side, k) for k in (3, 2) for side in SHAPE])
    )
    assert np.isnan(table.loc[("a", "c"), "angle"])
    assert table.loc[("a", "c"), "cosine"] == 0


def test_moved_fractions_match_hand_computed_ones(three: dict[str, Adapter]) -> None:
    table = adapter_similarity.compare_adapters(three, adapter_similarity.compare_modules(three)).set_index(
        ["one", "other"]
    )
    # Adapter a has a third of its rank in each of q0, v0, q1; adapter b has 6, 2 and 4 twelfths in q0, q1, v1.
    assert table.loc[("a", "b"), "rank_moved"] == pytest.approx((1 / 6 + 1 / 3 + 1 / 6 + 1 / 3) / 2)
    assert table.loc[("a", "c"), ["rank_moved", "energy_moved"]].tolist() == pytest.approx([1, 1])
    assert table.loc[("b", "b"), ["rank_moved", "energy_moved"]].tolist() == pytest.approx([0, 0])
    squares = [{m: u.norm() ** 2 for m, u in three[name].updates().items()} for name in "ab"]
    shares = [{m: value / sum(found.values()) for m, value in found.items()} for found in squares]
    moved = sum(abs(shares[0].get(m, 0) - shares[1].get(m, 0)) for m in shares[0].keys() | shares[1].keys()) / 2
    assert table.loc[("a", "b"), "energy_moved"] == pytest.approx(moved)


def test_comparison_does_not_depend_on_the_factorization(tmp_path: Path, three: dict[str, Adapter]) -> None:
    factors, draw = drawn(ord("b"), RANKS["b"]), np.random.default_rng(9)
    gauges = {module: draw.standard_normal((len(A), len(A))) for module, (_, A) in factors.items()}
    again = {module: (B @ gauges[module], np.linalg.solve(gauges[module], A)) for module, (B, A) in factors.items()}
    other = three | {"b": load(write(tmp_path / "again", again))}
    tables = [
        adapter_similarity.compare_adapters(runs, adapter_similarity.compare_modules(runs)) for runs in (three, other)
    ]
    for column in ("norm_ratio", "cosine", "angle", "rank_moved", "energy_moved"):
        np.testing.assert_allclose(tables[0][column], tables[1][column], rtol=1e-4, atol=1e-4)
    same = {"one": three["b"], "two": other["b"]}
    row = adapter_similarity.compare_adapters(same, adapter_similarity.compare_modules(same)).iloc[1]
    assert row["cosine"] == pytest.approx(1)
    assert row["angle"] == pytest.approx(0, abs=1e-2)


def test_inner_of_all_update_kinds_matches_dense_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    thin = [LowRank(draw.standard_normal((20, r)), draw.standard_normal((r, 12)), 0.5) for r in (2, 5)]
    places = np.stack([draw.permutation(20)[:9], draw.permutation(12)[:9]])
    waves = Fourier(draw.standard_normal(9), places, SHAPE, 30.0)
    updates = [*thin, Dense(draw.standard_normal(SHAPE)), waves]
    matrices = [update.dense() for update in updates]

    def never(self: Any) -> None:
        raise AssertionError("formed the product of factors")

    monkeypatch.setattr(LowRank, "dense", never)
    for one, first in zip(updates, matrices, strict=True):
        for other, second in zip(updates, matrices, strict=True):
            assert one.inner(other) == pytest.approx(np.vdot(first, second))


def test_zero_and_nan_updates_are_compared_where_defined(tmp_path: Path) -> None:
    factors = drawn(0, RANKS["a"])
    spoiled = dict(factors) | {LAYER(0, "q"): (np.full((20, 3), np.nan), factors[LAYER(0, "q")][1])}
    none = {module: (0 * B, A) for module, (B, A) in factors.items()}
    runs = {name: load(write(tmp_path / name, f)) for name, f in {"x": factors, "n": spoiled, "z": none}.items()}
    shared = adapter_similarity.compare_modules(runs)
    table = adapter_similarity.compare_adapters(runs, shared).set_index(["one", "other"])
    kept = [m for m in factors if m != LAYER(0, "q")]
    norms = [np.sqrt(sum(runs["x"].updates()[m].norm() ** 2 for m in names)) for names in (kept, factors)]
    assert table.loc[("n", "x"), "cosine"] == pytest.approx(norms[0] / norms[1])
    assert table.loc[("n", "x"), "angle"] == pytest.approx(0, abs=1e-4)
    assert table.loc[("z", "x"), "norm_ratio"] == 0
    assert table.loc[("x", "z"), ["norm_ratio", "cosine", "angle"]].isna().all()


def test_adapters_of_two_models_raise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, c = (write(tmp_path / name, drawn(0, RANKS["c"])) for name in "ac")
    write(c, {LAYER(1, "v"): (np.ones((8, 1)), np.ones((1, 8)))})
    assert main(["inspect", str(a), str(c)]) == 2
    assert "model.layers.1.self_attn.v_proj is (20, 12) in a and (8, 8) in c" in capsys.readouterr().err
    assert main(["inspect", str(a), str(a)]) == 2
    assert "duplicate adapter or run" in capsys.readouterr().err


def printed(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run ``lorascope inspect`` and return what it prints."""
    assert main(["inspect", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_inspect_prints_the_matrix(three: dict[str, Adapter], capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed(capsys, *(run.path for run in three.values())).splitlines()
    table = adapter_similarity.compare_adapters(three, adapter_similarity.compare_modules(three)).set_index(
        ["one", "other"]
    )
    assert [line.split()[:3] for line in shown[1:4]] == [["a", "a", "LoRA"], ["b", "b", "LoRA"], ["c", "c", "LoRA"]]
    assert shown[5].split("  ")[0] == "|dW|, row over column"
    ratio, cosine = (
        f"{abs(table.loc[('a', 'b'), name]):{form}}" for name, form in (("norm_ratio", ".3g"), ("cosine", ".2f"))
    )
    row = shown[7].split()
    assert (row[2], row[6].lstrip("-")) == (ratio, cosine)
    assert shown[13].split() == ["a", "0", f"{table.loc[('a', 'b'), 'angle']:.0f}", "-", "a", "0", "50", "100"]
    assert max(map(len, shown)) <= 80
    assert "random: " in shown[-2]


@pytest.mark.parametrize("count", [2, 6, 7, 15])
def test_inspect_of_any_number_of_adapters_fits_80_columns(
    tmp_path: Path, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "an-adapter-with-a-name-that-somebody-made-of-all-its-settings"
    paths = [write(tmp_path / f"{long}-{n}", drawn(n, {LAYER(0, "q"): 2}), alpha=10.0**n) for n in range(count)]
    shown = printed(capsys, *paths).splitlines()
    assert max(map(len, shown)) <= 80
    assert len({line[0] for line in shown[1 : count + 1]}) == count


def test_inspect_as_json_and_csv_has_all_comparisons(
    three: dict[str, Adapter], capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [run.path for run in three.values()]
    items = json.loads(printed(capsys, *paths, "--json"))
    assert [item["name"] for item in items] == ["a", "b", "c"]
    assert [row["other"] for row in items[1]["compared"]] == ["a", "c"]
    assert items[0]["compared"][1]["angle"] is None
    assert [row["module"] for row in items[0]["compared_modules"]] == [LAYER(0, "q"), LAYER(1, "q")]
    table = pd.read_csv(io.StringIO(printed(capsys, *paths, "--csv")))
    assert table["module"].isna().sum() == 9
    assert set(table["module"].dropna()) == {LAYER(0, "q"), LAYER(1, "q"), LAYER(1, "v")}


def test_labels_of_folders_with_the_same_name_are_their_paths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [write(tmp_path / name / "final", drawn(0, RANKS["c"])) for name in "xy"]
    assert [item["label"] for item in json.loads(printed(capsys, *paths, "--json"))] == list(map(str, paths))


def test_figure_shows_every_pair_once_with_its_chance_level(three: dict[str, Adapter]) -> None:
    charts = plots.adapter_pairs(three).panels
    table = adapter_similarity.compare_adapters(three, adapter_similarity.compare_modules(three))
    table = table.set_index(table["one"] + " / " + table["other"]).loc[["a / b", "a / c", "b / c"]]
    shown = ("norm_ratio", "cosine", "angle", "rank_moved")
    for chart, column in zip(charts, shown, strict=True):
        assert chart.marks[-1].columns() == {"x": column, "y": "pair"}
        assert chart.data["pair"].tolist() == table.index.tolist()
        np.testing.assert_array_equal(chart.data[column], table[column])
    assert charts[2].marks[0].columns() == {"x": "chance", "y": "pair"}
    np.testing.assert_array_equal(charts[2].data["chance"], table["chance"])
    assert [chart.marks[0].x for chart in charts if isinstance(chart.marks[0], Rule)] == [1, 0, 0]
    assert charts[0].caption.endswith("the allocations equal. 1 run.")
    with pytest.raises(ValueError, match=r"adapter_pairs.*got 1"):
        plots.adapter_pairs(three["a"])


def test_pairs_of_one_label_without_seeds_are_named_by_their_runs(three) -> None:
    runs = [three["a"], three["b"]]
    chart = plots.adapter_pairs({"mine": runs, "theirs": three["c"]}).panels[0]
    first, second = (f"mine, run {run.id}" for run in runs)
    assert list(chart.data["pair"]) == [f"{first} / {second}", f"{first} / theirs", f"{second} / theirs"]


def test_inspect_lists_notes_on_special_adapters_below_the_matrix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    factors = drawn(0, RANKS["a"])
    plain, bare = (write(tmp_path / name, factors) for name in ("plain", "bare"))
    write_json(bare / CONFIG, {"peft_type": "LORA", "r": 3})
    (bare / CONFIG).unlink()
    spoiled = {LAYER(0, "q"): (np.full((20, 3), np.nan), factors[LAYER(0, "q")][1])}
    broken = write(tmp_path / "broken", dict(factors) | spoiled)
    empty = write(tmp_path / "empty", {module: (0 * B, A) for module, (B, A) in factors.items()})
    shown = printed(capsys, plain, bare, broken, empty).splitlines()
    assert max(map(len, shown)) <= 80
    below = " ".join(" ".join(shown[shown.index("", 6) :]).split())
    assert (
        "b no adapter_config.json, so alpha is unknown: |dW| is the norm of B A, without the factor alpha / r" in below
    )
    assert f"c 1 of 3 modules contains NaN or infinity: {LAYER(0, 'q')}" in below
    assert "d all 3 modules have a zero update" in below
    assert not any(line.startswith("a ") for line in shown[-6:])
    assert "zero update" not in printed(capsys, plain, bare)
    write_hydra(tmp_path / "hydra")
    assert "depend on their input" in printed(capsys, tmp_path / "hydra", plain)
