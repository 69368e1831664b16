"""Adapters cut to a budget, summed and written for PEFT, with PEFT's merge and numpy's SVD as oracles."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file
from tiny import tiny
from tolerance import TINY, near
from torch import nn
from transformers import AutoModelForCausalLM

from lorascope import export, load
from lorascope.cli.main import main

FAMILIES = {
    "llama": {"target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"v_proj": 3},
              "alpha_pattern": {"q_proj": 20}},
    "llama, rsLoRA": {"target_modules": ["q_proj"], "use_rslora": True},
    "llama, embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "gpt2": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
}  # fmt: skip


def write(folder: Path, name: str, seed: int = 0, out: str = "adapter", **options: Any) -> Path:
    """Write a base and an adapter with drawn factors, and return the folder of the adapter."""
    family = name.split(",")[0]
    if not (folder / "base").exists():
        tiny(family).save_pretrained(folder / "base")
    torch.manual_seed(seed)
    given: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8} | FAMILIES[name] | options
    config = peft.LoraConfig(**given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), config)
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                nn.init.normal_(parameter)
        adapted.save_pretrained(folder / out)
    return folder / out


def by_peft(folder: Path, adapter: Path) -> dict[str, np.ndarray]:
    """Return the change of every weight in PEFT's merge, in float64."""
    base = AutoModelForCausalLM.from_pretrained(folder / "base").double()
    before = {name: weight.detach().clone() for name, weight in base.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(base, str(adapter), autocast_adapter_dtype=False).double()
        merged = model.merge_and_unload()
    changes = {name: (weight.detach() - before[name]).numpy() for name, weight in merged.named_parameters()}
    return {name: change for name, change in changes.items() if change.any()}


def best_of_rank(matrix: np.ndarray, rank: int) -> np.ndarray:
    U, sigma, Vt = np.linalg.svd(matrix)
    return (U[:, :rank] * sigma[:rank]) @ Vt[:rank]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("budget", [None, 0.5])
def test_written_adapter_is_the_best_of_its_ranks(name: str, budget: float | None, tmp_path: Path) -> None:
    source = write(tmp_path, name)
    before = by_peft(tmp_path, source)
    out = export.to_peft(load(source), tmp_path / "out", budget=budget)
    ranks, after = load(out).ranks(), by_peft(tmp_path, out)
    adapted = {f"{module}.weight" for module in ranks}
    assert {weight for weight in after} == adapted
    total = sum(load(source).ranks().values())
    assert sum(ranks.values()) == (total if budget is None else round(budget * total))
    for weight, change in after.items():
        expected = best_of_rank(before[weight], ranks[weight.removesuffix(".weight")])
        assert change == near(expected, dtype=torch.float32, terms=TINY)
    if budget is None:
        assert after.keys() == before.keys()


def test_kept_components_are_the_largest_of_all_modules(tmp_path: Path) -> None:
    source = write(tmp_path, "llama")
    before = by_peft(tmp_path, source)
    sigma = np.sort(np.concatenate([np.linalg.svd(change, compute_uv=False)[:4] for change in before.values()]))
    found = load(export.to_peft(load(source), tmp_path / "out", budget=7)).spectra
    assert np.sort(np.concatenate(list(found.values()))) == pytest.approx(sigma[-7:], rel=1e-5)


def test_head_is_written_again(tmp_path: Path) -> None:
    source = write(tmp_path, "llama", modules_to_save=["lm_head"])
    out = export.to_peft(load(source), tmp_path / "out", budget=0.5)
    head = "base_model.model.lm_head.weight"
    before, after = (load_file(folder / "adapter_model.safetensors")[head] for folder in (source, out))
    assert np.array_equal(after, before)
    assert json.loads((out / "adapter_config.json").read_text())["modules_to_save"] == ["lm_head"]


@pytest.mark.filterwarnings("ignore")
def test_sum_is_exact_and_its_cut_is_the_best(tmp_path: Path) -> None:
    folders = [write(tmp_path, "llama", seed, f"adapter{seed}", **options)
               for seed, options in enumerate([{}, {"target_modules": ["q_proj"], "r": 2}])]  # fmt: skip
    one, other = (by_peft(tmp_path, folder) for folder in folders)
    expected = {weight: 0.5 * change - 2 * other.get(weight, 0) for weight, change in one.items()}
    opened = [load(folder) for folder in folders]
    out = export.sum_adapters(opened, tmp_path / "sum", [0.5, -2])
    assert load(out).ranks()["model.layers.0.self_attn.q_proj"] == 6
    assert load(out).ranks()["model.layers.0.self_attn.v_proj"] == 3
    for weight, change in by_peft(tmp_path, out).items():
        assert change == near(expected[weight], dtype=torch.float32, terms=TINY)
    cut = export.sum_adapters(opened, tmp_path / "cut", [0.5, -2], budget=0.5)
    ranks = load(cut).ranks()
    for weight, change in by_peft(tmp_path, cut).items():
        best = best_of_rank(expected[weight], ranks[weight.removesuffix(".weight")])
        assert change == near(best, dtype=torch.float32, terms=TINY)


def test_interference_matches_the_dense_updates(tmp_path: Path) -> None:
    folders = [write(tmp_path, "llama", seed, f"adapter{seed}") for seed in range(2)]
    opened = [load(folder) for folder in folders]
    one, other = (np.concatenate([update.dense().ravel() for update in each.updates().values()]) for each in opened)
    (row,) = export.interference(opened).to_dict("records")
    assert row["shared"] == 6
    assert row["cosine"] == pytest.approx(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
    assert row["energy"] == pytest.approx(np.sum((one + other) ** 2) / (np.sum(one**2) + np.sum(other**2)))
    (weighted,) = export.interference(opened, [1, -0.5]).to_dict("records")
    assert weighted["cosine"] == row["cosine"]
    assert weighted["energy"] == pytest.approx(np.sum((one - 0.5 * other) ** 2) / (one @ one + 0.25 * other @ other))
    (same,) = export.interference([opened[0], opened[0]]).to_dict("records")
    assert (same["cosine"], same["energy"]) == (pytest.approx(1), pytest.approx(2))


def test_sum_of_adapters_that_name_different_bases_warns(tmp_path: Path) -> None:
    first, other = (write(tmp_path / name, "llama", out="adapter") for name in ("first", "other"))
    for folder, base in ((first, "org/one"), (other, "org/two")):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))
    with pytest.warns(UserWarning, match=r"different bases, org/one \(adapter\), org/two \(adapter\): their sum is"):
        export.sum_adapters([load(first), load(other)], tmp_path / "sum")


def test_adapters_that_cannot_be_summed_are_refused(tmp_path: Path) -> None:
    plain = load(write(tmp_path, "llama"))
    headed = load(write(tmp_path, "llama", out="headed", modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match=r"cannot sum adapter headed: it contains further weights, such as a head$"):
        export.sum_adapters([plain, headed], tmp_path / "sum")
    for weights in ([1, 2, 3], [math.nan, 1], [1, math.inf], [0, 0]):
        with pytest.raises(ValueError, match=r"^weights must be 2 finite numbers, one per adapter and not all 0, got"):
            export.sum_adapters([plain, plain], tmp_path / "sum", weights)
    with pytest.raises(ValueError, match=r"^a sum needs at least two adapters, got 1$"):
        export.sum_adapters([plain], tmp_path / "sum", [1])
    other = load(write(tmp_path / "other", "gpt2"))
    assert not set(plain.ranks()) & set(other.ranks())
    dora = load(write(tmp_path, "llama", out="dora", use_dora=True))
    with pytest.raises(ValueError, match="without its magnitude"):
        export.to_peft(dora, tmp_path / "cut", budget=0.5)
    assert not (tmp_path / "sum").exists()


def test_run_is_cut_to_a_budget(train_once: Any, tmp_path: Path) -> None:
    from examples import EXAMPLES

    run, _ = train_once("lora", EXAMPLES["lora"])
    chosen = export.select_components(run, 0.5)
    cut = load(export.to_peft(run, tmp_path / "cut", budget=0.5))
    assert cut.ranks() == {module: rank for module, rank in chosen.ranks.items() if rank}
    whole = run.updates()
    error = sum(np.sum((whole[module].dense() - update.dense()) ** 2) for module, update in cut.updates().items())
    lost = sum(row["energy"] - row["energy_kept"] for row in chosen.modules.to_dict("records") if row["kept"])
    assert error == pytest.approx(lost, rel=1e-4)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(write(tmp_path, "llama"))
    out = tmp_path / "out"
    assert main(["export", source, "--peft", str(out), "--budget", "0.5"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert main(["export", source, source, "--peft", str(tmp_path / "sum"), "--weights", "1", "0.5"]) == 0
    shown = capsys.readouterr().out.replace("\n#  ", "")
    assert "6 shared modules, cosine 1.000, energy of the sum / sum of energies 1.800" in shown
    assert main(["export", source, str(out), "--peft", str(tmp_path / "other"), "--weights", "1", "-0.25"]) == 0
    whole, cut, total = (load(path).updates() for path in (source, out, tmp_path / "other"))
    assert set(total) == set(whole) >= set(cut) != set()
    for module, update in whole.items():
        expected = update.dense() - (0.25 * cut[module].dense() if module in cut else 0)
        assert total[module].dense() == near(expected, terms=TINY)
    assert main(["export", source, source]) == 2
    assert main(["export", source, source, "--rank-pattern"]) == 2
    assert "several adapters require --peft DIR" in capsys.readouterr().err
    assert main(["export", source, source, "--peft", str(tmp_path / "less"), "--weights", "-1", "0.5"]) == 0
    assert main(["export", source, source, "--peft", str(tmp_path / "none"), "--weights", "--json"]) == 2
    assert "argument --weights must not be empty" in capsys.readouterr().err
    assert main(["export", source, "--peft", str(tmp_path / "w"), "--weights", "2"]) == 2
    assert "--weights requires several adapters" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (
            ["--budget", "0.5", "--by", "ablation", "--model", "m", "--task", "t"],
            "--by, --model and --task require one",
        ),
        (["--state", "best"], "--state requires one run"),
    ],
)
def test_sum_rejects_options_of_one_adapter(words, reason, tmp_path, capsys):
    assert main(["export", "a", "b", "--peft", str(tmp_path / "sum"), *words]) == 2
    assert reason in capsys.readouterr().err


def test_state_of_a_run_is_not_ignored_by_other_formats(tmp_path, capsys):
    assert main(["export", "a", "--kohya", str(tmp_path / "a.safetensors"), "--state", "best"]) == 2
    assert "--state requires one run, with --rank-pattern, --peft or --summary" in capsys.readouterr().err
