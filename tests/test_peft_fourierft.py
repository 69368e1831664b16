"""Loading of PEFT FourierFT adapters, compared with PEFT itself."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_loading import write_run
from tiny import tiny
from tolerance import TINY, rounding

import lorascope as ls
from lorascope.analysis import initial_update
from lorascope.diagnosis.inspection import inspect
from lorascope.files.whole_files import write_json
from lorascope.formats.peft_config import CONFIG, WEIGHTS
from lorascope.runs.loading import load
from lorascope.updates import Fourier


def save(path: Path, family: str = "llama", dtype: torch.dtype | None = None, **config: Any) -> dict[str, np.ndarray]:
    """Save an adapter and its base in a folder, and return PEFT's own updates as (out, in)."""
    base = tiny(family)
    base.save_pretrained(path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, peft.FourierFTConfig(**config)).to(dtype or torch.float32)
        model.save_pretrained(path / "adapter")
    found = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            found[name] = module.get_delta_weight("default").detach().float().numpy()
    return found


QV = ["q_proj", "v_proj"]
CASES: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": QV, "n_frequency": 50},
    "all places": {"target_modules": ["q_proj"], "n_frequency": 1024, "scaling": 30.0},
    "seed": {"target_modules": QV, "n_frequency": 33, "random_loc_seed": 5},
    "large seed": {"target_modules": QV, "n_frequency": 33, "random_loc_seed": 2**33 + 5},
    "pattern": {
        "target_modules": QV,
        "n_frequency": 20,
        "n_frequency_pattern": {"layers.1.self_attn.q_proj": 44, "v_proj": 7},
    },
    "feed-forward": {"target_modules": ["up_proj", "down_proj"], "n_frequency": 60},
    "transposed": {"family": "gpt2", "target_modules": ["c_attn", "c_fc"], "n_frequency": 40, "fan_in_fan_out": True},
    "zeros": {"target_modules": QV, "n_frequency": 9, "init_weights": True},
    "bfloat16": {"target_modules": QV, "n_frequency": 50, "dtype": torch.bfloat16},
    "head": {"family": "bert", "target_modules": ["query"], "n_frequency": 50, "task_type": "SEQ_CLS"},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_updates_and_norms_match_peft(tmp_path, case):
    expected = save(tmp_path, **case)
    run = load(tmp_path / "adapter", base=tmp_path / "base")
    assert initial_update.lacks_initial_update(run) != case.get("init_weights", False)
    updates, summary = run.updates(), run.summary().set_index("module")
    assert set(updates) == set(expected)
    assert len(expected) >= 2
    tolerance = rounding(torch.bfloat16) if case.get("dtype") == torch.bfloat16 else rounding(terms=TINY)
    for module, update in updates.items():
        size = max(float(np.abs(expected[module]).max()), 1e-9)
        assert isinstance(update, Fourier)
        assert "matrix" not in vars(update)
        assert update.dense() == pytest.approx(expected[module], abs=tolerance * size)
        norm = np.linalg.norm(expected[module])
        assert summary.loc[module, "update_norm"] == pytest.approx(norm, rel=tolerance, abs=1e-12)
        assert run.spectra[module][0] == pytest.approx(np.linalg.norm(expected[module], 2), rel=tolerance, abs=1e-12)
        if tolerance < 1e-4 and norm:
            assert summary.loc[module, "rank"] == np.linalg.matrix_rank(update.dense())


@pytest.fixture
def adapter(tmp_path) -> Path:
    save(tmp_path, **CASES["plain"])
    return tmp_path / "adapter"


def test_spectra_are_computed_only_on_access(adapter, monkeypatch):
    def never(self):
        raise AssertionError("computed a matrix or a decomposition")

    with monkeypatch.context() as patch:
        patch.setattr(Fourier, "singular_values", never)
        patch.setattr(Fourier, "matrix", property(never))
        run = ls.load(named(adapter))
        summary = run.summary()
        assert summary["update_norm"].gt(0).all()
        assert summary[["stable_rank", "effective_rank"]].isna().all(axis=None)
        assert run.table["value"].notna().sum() == 2 * len(summary)
        inspect(run)
    assert run.spectra.keys() == set(summary["module"])


def named(adapter: Path) -> Path:
    """Set the base model in the configuration to the base's folder."""
    configured(adapter, base_model_name_or_path=str(adapter.parent / "base"))
    return adapter


def configured(adapter: Path, **changes: Any) -> None:
    write_json(adapter / CONFIG, json.loads((adapter / CONFIG).read_text(encoding="utf-8")) | changes)


def test_base_in_the_configuration_gives_the_shapes(adapter):
    run = load(named(adapter))
    assert run.base is None
    assert run.summary()["weight_norm"].isna().all()
    given = load(adapter, base=adapter.parent / "base").summary()
    assert run.summary()["update_norm"].tolist() == given["update_norm"].tolist()
    weights = load_file(adapter.parent / "base" / "model.safetensors")
    for row in given.itertuples():
        W = weights[f"{row.module}.weight"].double().numpy()
        expected = np.linalg.norm(W + run.updates()[row.module].dense())
        assert row.weight_norm == pytest.approx(expected)


def test_representations_name_fourierft(adapter):
    run = load(adapter, base=adapter.parent / "base")
    assert "adapter  FourierFT, rank" in repr(run)
    assert "4 modules, 200 parameters" in repr(run)
    found = inspect(run)
    assert found.facts[0] == ("adapter", "FourierFT, 50 coefficients, scale 150")
    assert found.modules["parameters"].tolist() == [50] * 4
    assert run.factors()["model.layers.0.self_attn.q_proj"].keys() == {"coefficients", "entries", "shape"}
    with pytest.raises(ValueError, match="is not a product B A"):
        run.lora_config()


def test_load_does_not_import_torch(adapter):
    code = (
        "import sys, lorascope as ls; "
        f"run = ls.load({str(adapter)!r}, base={str(adapter.parent / 'base')!r}); "
        "assert run.summary()['update_norm'].gt(0).all(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_inspect_command_requires_the_base(adapter, capsys):
    from lorascope.cli.main import main

    assert main(["inspect", str(adapter), "--base", str(adapter.parent / "base")]) == 0
    assert "50 coefficients" in capsys.readouterr().out
    assert main(["inspect", str(adapter)]) == 2
    assert "stores no shapes" in capsys.readouterr().err


def suggested(capsys, *words: str) -> list[str]:
    """Return the arguments of the command that ``inspect`` suggests next."""
    from lorascope.cli.main import main

    assert main(["inspect", *words]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("next"))
    return shlex.split(line.removeprefix("next"))[1:]


def test_plot_suggested_by_inspect_succeeds(adapter, capsys, monkeypatch):
    from lorascope.cli.main import main

    monkeypatch.chdir(adapter.parent)
    words = suggested(capsys, "adapter", "--base", "base")
    assert words == ["plot", "spectrum", "adapter", "--base", "base", "-o", "spectrum.pdf"]
    assert main(words) == 0
    assert Path("spectrum.pdf").stat().st_size
    assert main([word for word in words if word not in ("--base", "base")]) == 2
    named(adapter)
    assert "--base" not in suggested(capsys, "adapter")
    assert "--base" not in suggested(capsys, "adapter", "--base", "base")


def test_inspect_suggests_a_command_with_long_folder_names(tmp_path, capsys, monkeypatch):
    save(tmp_path / ("a b" * 20), **CASES["plain"])
    monkeypatch.chdir(tmp_path)
    adapter = next(tmp_path.glob("*/adapter"))
    paths = [str(path.relative_to(tmp_path)) for path in (adapter, adapter.parent / "base")]
    words = suggested(capsys, paths[0], "--base", paths[1])
    assert words == ["plot", "spectrum", paths[0], "--base", paths[1], "-o", "spectrum.pdf"]


def test_base_without_an_adapter_fails(tmp_path, capsys):
    from lorascope.cli.main import main

    run = write_run(tmp_path / "run")
    for words in (["plot", "spectrum", f"one={run}"], ["inspect", str(run)], ["export", str(run), "--rank-pattern"]):
        assert main([*words, "--base", "base"]) == 2
        assert f"--base requires an adapter, got only runs: {run}" in capsys.readouterr().err


def test_base_applies_only_to_adapters_next_to_a_run(adapter, tmp_path, capsys):
    from lorascope.cli.main import main

    run, base = str(write_run(tmp_path / "run")), str(adapter.parent / "base")
    for words in ([str(adapter), run], [run, str(adapter)]):
        assert main(["inspect", *words, "--base", base, "--json"]) == 0
        told = {item["name"]: item for item in json.loads(capsys.readouterr().out)}
        assert told["adapter"]["facts"]["base"].endswith(f"(read from {base})")
        assert all(row["relative_update"] > 0 for row in told["adapter"]["modules"])
        assert told["run"]["modules"][0]["update_norm"] == pytest.approx(2**0.5)
    assert main(["plot", "update_norm", str(adapter), "--control", run, "--base", base, "-o", f"{tmp_path}/x.csv"]) == 0


def test_export_table_requires_the_base(adapter, tmp_path, capsys):
    from lorascope.cli.main import main

    words, base = ["export", str(adapter), "--summary", "--table"], adapter.parent / "base"
    assert main([*words, str(tmp_path / "x.json")]) == 2
    assert "stores no shapes" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "x.json"), "--base", str(base)]) == 0
    rows = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert [row["update_norm"] for row in rows] == load(adapter, base=base).summary()["update_norm"].tolist()


def test_inspect_spectra_shows_ranks(adapter, capsys):
    from lorascope.cli.main import main

    words = ["inspect", str(adapter), "--base", str(adapter.parent / "base"), "--json"]
    told = []
    for more in ([], ["--spectra"]):
        assert main([*words, *more]) == 0
        told.append(json.loads(capsys.readouterr().out)["modules"])
    assert all(row["effective_rank"] is row["stable_rank"] is row["energy_rank"] is None for row in told[0])
    for row in told[1]:
        sigma = np.linalg.svd(load(*words[1:4:2]).updates()[row["module"]].dense(), compute_uv=False)
        share = sigma / sigma.sum()
        share = share[share > 1e-12]
        assert row["effective_rank"] == pytest.approx(np.exp(-(share * np.log(share)).sum()))
        assert row["stable_rank"] == pytest.approx((sigma**2).sum() / sigma[0] ** 2)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.fourierft_spectrum"


def stored(adapter: Path, **changes: torch.Tensor) -> None:
    save_file(load_file(adapter / WEIGHTS) | changes, adapter / WEIGHTS)


BROKEN: dict[str, tuple[Any, str]] = {
    "no shapes": (
        lambda a: configured(a, base_model_name_or_path="org/model"),
        "stores no shapes: pass its base model, org/model, as base= or --base DIR$",
    ),
    "no base": (
        lambda a: configured(a, base_model_name_or_path=None),
        "stores no shapes: pass its base model, as base= or --base DIR$",
    ),
    "length": (lambda a: stored(a, **{Q0: torch.ones(49)}), "q_proj must have 50 coefficients .*, got 49"),
    "another base": (lambda a: (tiny("bert").save_pretrained(a.parent / "base"),), "as the base: it has no weight of"),
    "small base": (
        lambda a: tiny("llama", hidden_size=4, num_attention_heads=2, num_key_value_heads=2).save_pretrained(
            a.parent / "base"
        ),
        "must have <= 4 x 4 coefficients .*, got 50",
    ),
    "nothing": (
        lambda a: save_file({"weight": torch.ones(2)}, a / WEIGHTS),
        "must include fourierft_spectrum, got weight",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), BROKEN.values(), ids=BROKEN)
def test_load_broken_adapter_raises_one_line(adapter, spoil, message):
    spoil(named(adapter))
    with pytest.raises(ValueError, match=message) as raised:
        load(adapter)
    assert "\n" not in str(raised.value)
