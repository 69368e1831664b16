"""Null of an adapter: p-values are uniform without a pattern and small with one, and outliers are those planted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import peft
import pytest
import torch
from contract.format_rows import write
from peft_oracle import nested
from safetensors.numpy import save
from scipy.stats import kstest, median_abs_deviation, theilslopes
from test_inspect import plant
from tiny import tiny

import lorascope as ls
from lorascope.analysis.rank_use import random_spectra
from lorascope.cli.main import main
from lorascope.diagnosis.inspection import inspect
from lorascope.diagnosis.null import below_null, null_table, outliers
from lorascope.updates import LowRank
from lorascope.updates.fourier import Fourier, entries

LAYERS, OUT, IN, RANK = 8, 12, 10, 4


def adapter(folder: Path, seed: int, decay: float = 1.0, larger: dict[str, float] | None = None) -> ls.Adapter:
    """Write an adapter of normal factors, whose components decay by a factor, with some norms multiplied."""
    rng, tensors = np.random.default_rng(seed), {}
    for layer in range(LAYERS):
        for role in ("q_proj", "v_proj"):
            module = f"model.layers.{layer}.self_attn.{role}"
            size = (larger or {}).get(module, 1.0) * decay ** np.arange(RANK)
            tensors[f"{module}.lora_A.weight"] = rng.standard_normal((RANK, IN)).astype(np.float32)
            tensors[f"{module}.lora_B.weight"] = (rng.standard_normal((OUT, RANK)) * size).astype(np.float32)
    write(folder, {"peft_type": "LORA", "r": RANK, "lora_alpha": 3}, tensors)
    return ls.load(folder)


@pytest.mark.parametrize(("out", "inner", "rank"), [(12, 10, 4), (3, 10, 4), (12, 4, 4), (40, 2, 6)])
def testrandom_spectra_match_normal_factors(out: int, inner: int, rank: int) -> None:
    drawn = random_spectra((out, inner), rank, 2000, np.random.default_rng(0))
    rng = np.random.default_rng(1)
    direct = [
        LowRank(rng.standard_normal((out, rank)), rng.standard_normal((rank, inner))).singular_values()
        for _ in range(2000)
    ]
    for place in range(min(out, inner, rank)):
        assert kstest(drawn[:, place], [sigma[place] for sigma in direct]).pvalue > 0.01


def test_p_values_of_null_adapters_are_uniform(tmp_path: Path) -> None:
    p = []
    for seed in range(200):
        table = null_table(inspect(adapter(tmp_path / str(seed), seed)), draws=199, seed=1000 + seed)
        p.append(table.loc[seed % len(table)])  # one module each, because the modules of an adapter share the draws
    for name in ("effective_rank_p", "stable_rank_p"):
        values = np.array([row[name] for row in p])
        assert kstest(values, "uniform").pvalue > 0.01
        assert values * 200 == pytest.approx(np.round(values * 200))


def test_false_findings_of_null_adapters_are_rare(tmp_path: Path) -> None:
    tables = [null_table(inspect(adapter(tmp_path / str(seed), seed)), draws=199) for seed in range(100)]
    assert np.mean([below_null(table, "effective_rank").any() for table in tables]) <= 0.1  # 0.05 are expected
    assert np.mean([len(outliers(table)) / len(table) for table in tables]) <= 0.1


def test_planted_pattern_is_found(tmp_path: Path) -> None:
    table = null_table(inspect(adapter(tmp_path / "a", 0, decay=0.2)))
    assert below_null(table, "effective_rank").all()
    assert (table["effective_rank_p"] < 0.05).all()
    assert not below_null(null_table(inspect(adapter(tmp_path / "b", 0))), "effective_rank").any()


def test_planted_outlier_is_found(tmp_path: Path) -> None:
    module = "model.layers.3.self_attn.v_proj"
    found = outliers(null_table(inspect(adapter(tmp_path / "a", 0, larger={module: 30.0}))))
    assert found["module"].iloc[0] == module
    assert found["norm_z"].iloc[0] > 10


def test_trend_through_the_depth_is_no_outlier(tmp_path: Path) -> None:
    larger = {f"model.layers.{layer}.self_attn.{role}": 3.0**layer for layer in range(LAYERS)
              for role in ("q_proj", "v_proj")}  # fmt: skip
    flat, steep = (null_table(inspect(adapter(tmp_path / name, 0, larger=given)))["norm_z"]
                   for name, given in (("a", None), ("b", larger)))  # fmt: skip
    assert steep.to_numpy() == pytest.approx(flat.to_numpy(), abs=1e-3)


def test_norm_z_is_the_distance_from_the_line_of_theil_and_sen_in_robust_deviations(tmp_path: Path) -> None:
    table = null_table(inspect(adapter(tmp_path / "a", 3)))
    assert set(table["role"]) == {"q", "v"}
    norms = inspect(ls.load(tmp_path / "a")).modules.set_index("module")["update_norm"]
    for _, rows in table.groupby("role", observed=True):
        logs, layers = np.log10(norms[rows["module"]].to_numpy()), rows["layer"].to_numpy(np.float64)
        rest = logs - theilslopes(logs, layers).slope * layers
        expected = (rest - np.median(rest)) / median_abs_deviation(rest, scale="normal")
        assert len(rows) == LAYERS
        assert rows["norm_z"].to_numpy() == pytest.approx(expected, rel=1e-5)  # the constant has five digits


def test_outlier_has_a_robust_z_above_three_and_a_half_in_either_direction() -> None:
    """3.5 is the threshold of Iglewicz and Hoaglin (1993)."""
    table = pd.DataFrame({"module": list("abcdef"), "norm_z": [3.49, 3.51, -3.49, -3.6, np.nan, 0.0]})
    assert outliers(table)["module"].tolist() == ["d", "b"]


def test_benjamini_and_hochberg_by_hand() -> None:
    table = pd.DataFrame({"effective_rank_p": [0.04, 0.001, np.nan, 0.02, 0.5]})
    # Sorted: 0.001 <= 0.0125, 0.02 <= 0.025, 0.04 > 0.0375, 0.5 > 0.05.
    assert below_null(table, "effective_rank").tolist() == [False, True, False, True, False]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter(tmp_path / "a", 0, decay=0.2)
    assert main(["inspect", str(tmp_path / "a"), "--null"]) == 0
    shown = capsys.readouterr().out
    assert "lower in 16 of 16 modules" in shown
    assert "outliers" in shown
    assert main(["inspect", str(tmp_path / "a"), "--null", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["null"]) == 16
    assert main(["inspect", str(tmp_path / "a"), "--null", "--csv"]) == 0
    assert "effective_rank_p" in capsys.readouterr().out.splitlines()[0]
    assert main(["inspect", str(tmp_path / "a"), str(tmp_path / "a"), "--null"]) == 2
    assert "--null requires one adapter or run, got 2" in capsys.readouterr().err


def written(kind: str, folder: Path, config: dict[str, Any], factor: str, array: np.ndarray) -> tuple[Path, Path]:
    """Write an adapter of one module with one factor, and its base."""
    module, base = "model.layers.0.self_attn.q_proj", folder / "base"
    base.mkdir(parents=True)
    weight = np.random.default_rng(9).standard_normal((OUT, IN)).astype("f4")
    (base / "model.safetensors").write_bytes(save({f"{module}.weight": weight}))
    write(folder / "adapter", {"peft_type": kind} | config, {f"{module}.{factor}": array.astype("f4")})
    return folder / "adapter", base


def untrained(paths: tuple[Path, Path]) -> float:
    return null_table(inspect(ls.load(*paths)))["untrained_norm"].item()


def test_random_coefficients_have_the_norm_of_untrained_adapters(tmp_path: Path) -> None:
    rng, n = np.random.default_rng(0), 30
    settings = {"n_frequency": n, "scaling": 9.0, "random_loc_seed": 3}
    trained = written("FOURIERFT", tmp_path / "f", settings, "fourierft_spectrum", 5 * rng.standard_normal(n))
    places = entries((OUT, IN), n, 3)
    drawn = [Fourier(rng.standard_normal(n), places, (OUT, IN), 9.0).norm() for _ in range(2000)]
    assert untrained(trained) == pytest.approx(np.sqrt(np.mean(np.square(drawn))), rel=0.05)
    settings |= {"init_weights": True}
    assert untrained(written("FOURIERFT", tmp_path / "z", settings, "fourierft_spectrum", rng.standard_normal(n))) == 0
    kernel = rng.standard_normal((OUT // 2, IN // 2, 2))  # every value occurs twice in dW, divided by the inputs
    exact = np.sqrt(2 / (OUT + IN)) * np.sqrt(2 * kernel.size) / IN
    assert untrained(written("C3A", tmp_path / "c", {}, "c3a_kernel", kernel)) == pytest.approx(exact)
    for start, sigma in (("gaussian", 1.0), ("kaiming_uniform", np.sqrt(1 / (3 * IN))), (True, 0.0), ("new", np.nan)):
        paths = written("C3A", tmp_path / str(start), {"init_weights": start}, "c3a_kernel", kernel)
        assert untrained(paths) == pytest.approx(sigma * exact / np.sqrt(2 / (OUT + IN)), nan_ok=True)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("FourierFTConfig", {"n_frequency": 40}),
        ("C3AConfig", {"block_size": 4}),
        ("WaveFTConfig", {"n_frequency": 40, "init_weights": False}),
    ],
)
def test_untrained_norm_equals_that_of_new_peft_adapters(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = {f"h.{layer}.q": torch.nn.Linear(8, 12, bias=False) for layer in range(60)}
    model = peft.get_peft_model(nested(layers), getattr(peft, kind)(target_modules=["q"], **settings))
    (tmp_path / "base").mkdir()
    weights = {f"{name}.weight": np.ones((12, 8), "f4") for name in layers}
    (tmp_path / "base" / "model.safetensors").write_bytes(save(weights))
    model.save_pretrained(tmp_path / "adapter")
    item = inspect(ls.load(tmp_path / "adapter", tmp_path / "base"))
    table = null_table(item)
    expected = np.sqrt(np.mean(np.square(item.modules["update_norm"])))
    assert table["untrained_norm"].mean() == pytest.approx(expected, rel=0.05)


def test_start_that_is_not_known_is_stated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter(tmp_path / "a", 0)
    assert null_table(inspect(ls.load(tmp_path / "a")))["untrained_norm"].eq(0).all()
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": "pissa"}))
    assert main(["inspect", str(tmp_path / "a"), "--null"]) == 0
    assert "|dW| before training: unknown for this kind of start" in capsys.readouterr().out
    trained = written("C3A", tmp_path / "c", {}, "c3a_kernel", np.ones((6, 5, 2)))
    assert main(["inspect", str(trained[0]), "--null"]) == 0
    assert "|dW| before training: 0.330 (random coefficients)" in capsys.readouterr().out


def test_null_is_refused_where_it_would_not_be_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = plant(tmp_path / "a", {"model.layers.0.self_attn.q_proj": [1.0, 2.0]})
    assert main(["inspect", str(adapter), "--all", "--null"]) == 2
    assert "--null has no place on the screen of --all: add --json or --csv, or omit --all" in capsys.readouterr().err
    assert main(["inspect", str(adapter), "--all", "--null", "--json"]) == 0
    tiny("llama").save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    assert main(["inspect", base, "--base", base, "--null"]) == 2
    assert f"--null requires one adapter or run, got a whole model: {base}" in capsys.readouterr().err
