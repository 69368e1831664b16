"""Loading of PEFT adapters, compared with PEFT itself, and of broken folders."""

from __future__ import annotations

import json
import math
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from planted import manifest
from safetensors.torch import load_file, save_file
from tiny import tiny
from tolerance import TINY, near

import lorascope
from lorascope.files.whole_files import write_json
from lorascope.formats.peft_config import CONFIG, WEIGHTS
from lorascope.runs.adapter import Adapter
from lorascope.runs.loading import load
from lorascope.runs.writer import RunWriter
from lorascope.schema.records import Factors, Record

ATTENTION = ["q_proj", "v_proj"]


def adapted(model: Any, **config: Any) -> Any:
    """Wrap a model by PEFT, without its warnings about saved embeddings, Conv1D and old names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(**config))


def save(path: Path, family: str = "llama", head: str | None = None, dtype: torch.dtype | None = None, **config: Any):
    """Save an adapter with random factors, and return the adapted model."""
    model = adapted(tiny(family, head), **config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.to(dtype or torch.float32).save_pretrained(path)
    return model


def deltas(model: Any) -> dict[str, np.ndarray]:
    """Return PEFT's own updates as (out, in)."""
    found = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            update = module.get_delta_weight("default").detach().float()
            stored_as_in_out = getattr(module, "fan_in_fan_out", False) or hasattr(module, "embedding_dim")
            is_table = isinstance(module.get_base_layer(), torch.nn.Embedding)
            found[name] = (update.T if stored_as_in_out or is_table else update.flatten(1)).numpy()
    return found


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    save(tmp_path / "adapter", target_modules=ATTENTION, r=4, lora_alpha=6)
    return tmp_path / "adapter"


CASES: dict[str, dict[str, Any]] = {
    "alpha": {"target_modules": ATTENTION, "r": 4, "lora_alpha": 12},
    "patterns": {
        "target_modules": ATTENTION,
        "r": 4,
        "rank_pattern": {"layers.0.self_attn.q_proj": 7, "v_proj": 2},
        "alpha_pattern": {"^model.layers.1.self_attn.q_proj": 32, r".*\.0\..*v_proj": 3},
    },
    "rslora": {"target_modules": ATTENTION, "r": 9, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"v_proj": 4}},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"], "r": 3, "lora_alpha": 5},
    "transposed": {"family": "gpt2", "target_modules": ["c_attn", "c_proj", "wte"], "r": 3, "fan_in_fan_out": True},
    "convolution": {"family": "vit", "target_modules": ["projection", "q_proj"], "r": 3},
    "bfloat16": {"target_modules": ATTENTION, "r": 4, "dtype": torch.bfloat16},
    "float16": {"target_modules": ATTENTION, "r": 4, "dtype": torch.float16},
    "encoder-decoder": {"family": "t5", "target_modules": ["q", "wo"], "r": 2},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_updates_match_peft(tmp_path: Path, case: dict[str, Any]) -> None:
    expected = deltas(save(tmp_path, **case))
    run = load(tmp_path)
    updates = run.updates()
    assert set(updates) == set(expected)
    assert len(expected) >= 3
    # PEFT rounds the product back to the dtype it is stored in; the factors themselves are exact.
    dtype = case.get("dtype", torch.float32)
    for module, update in updates.items():
        assert update.dense() == near(
            expected[module], dtype=dtype, terms=1 if dtype != torch.float32 else update.rank + 1
        )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_table_and_summary_match_the_dense_update(tmp_path: Path, case: dict[str, Any]) -> None:
    save(tmp_path, **case)
    run = load(tmp_path)
    summary = run.summary().set_index("module")
    table = run.table[run.table["module"] != ""].pivot(index="module", columns="quantity", values="value")
    assert run.table["step"].isna().all()
    for module, update in run.updates().items():
        sigma = np.linalg.svd(update.dense(), compute_uv=False)
        shares = sigma[sigma > 1e-9] / sigma[sigma > 1e-9].sum()
        expected = {
            "update_norm": np.linalg.norm(update.dense()),
            "stable_rank": np.sum(sigma**2) / sigma[0] ** 2,
            "effective_rank": math.exp(-np.sum(shares * np.log(shares))),
        }
        for quantity, value in expected.items():
            assert summary.loc[module, quantity] == near(value, terms=TINY)
            assert table.loc[module, quantity] == near(value, terms=TINY)
        assert summary.loc[module, "rank"] == table.loc[module, "rank"] == update.rank == run.ranks()[module]
    assert table["weight_norm"].isna().all()
    assert table["relative_update"].isna().all()


def test_modules_are_ordered_by_layer(tmp_path: Path) -> None:
    model = tiny("llama", num_hidden_layers=12)
    adapted(model, target_modules=["v_proj", "q_proj"]).save_pretrained(tmp_path)
    run = load(tmp_path)
    expected = [(layer, role) for layer in range(12) for role in ("q", "v")]
    assert list(zip(run.modules["layer"], run.modules["role"], strict=True)) == expected
    assert list(run.summary()["module"]) == list(run.ranks()) == list(run.updates()) == list(run.modules["module"])


def test_lora_config_recreates_the_adapter(tmp_path: Path) -> None:
    save(tmp_path, **CASES["patterns"])
    config = load(tmp_path).lora_config()
    again = adapted(tiny("llama"), **config)
    run = load(tmp_path)
    found = {
        name: (module.r["default"], module.scaling["default"])
        for name, module in again.base_model.model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert found == {name: (update.rank, update.scale) for name, update in run.updates().items()}


def test_load_shards_matches_one_file(adapter: Path) -> None:
    whole = load(adapter)
    expected = {name: update.dense() for name, update in whole.updates().items()}
    tensors = load_file(adapter / WEIGHTS)
    (adapter / WEIGHTS).unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, chosen in enumerate((names[:3], names[3:])):
        shard = f"adapter_model-{number + 1:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in chosen}, adapter / shard)
        weight_map |= dict.fromkeys(chosen, shard)
    write_json(adapter / f"{WEIGHTS}.index.json", {"weight_map": weight_map})
    run = load(adapter)
    assert {name: update.dense().tolist() for name, update in run.updates().items()} == {
        name: dense.tolist() for name, dense in expected.items()
    }
    (adapter / "adapter_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="missing 1 of 2 shards, such as adapter_model-00002"):
        load(adapter)


def test_adapter_run_rejects_steps_snapshots_and_restore(adapter: Path) -> None:
    run = lorascope.load(adapter)
    assert isinstance(run, Adapter)
    assert run.meta.source == str(adapter)
    assert run.parents == []
    assert not run.finished
    assert "adapter  LoRA, rank 4" in repr(run)
    assert "4 modules" in repr(run)
    assert "<table>" in run._repr_html_()
    factors = run.factors()["model.layers.0.self_attn.q_proj"]
    assert {name: array.shape for name, array in factors.items()} == {"A": (4, 32), "B": (32, 4)}
    for call in (
        lambda: run.factors(step=3),
        lambda: run.updates(state="best"),
        lambda: run.summary(state="best"),
        lambda: run.ranks("best"),
    ):
        with pytest.raises(ValueError, match="adapter 'adapter'") as raised:
            call()
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=f"unknown snapshot 'x' in adapter {run.id}; expected one of none"):
        run.snapshot("x")
    assert not {"restore", "save", "tensors"} & set(dir(run))  # PEFT loads it, and its folder can be copied


def test_id_depends_only_on_the_content(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "copy")
    assert load(adapter).id == load(tmp_path / "copy").id
    tensors = load_file(adapter / WEIGHTS)
    first = next(iter(tensors))
    save_file(tensors | {first: tensors[first] + 1e-3}, tmp_path / "copy" / WEIGHTS)
    assert load(adapter).id != load(tmp_path / "copy").id


def test_tensors_that_are_not_factors_are_listed_as_others(tmp_path: Path) -> None:
    save(
        tmp_path,
        family="bert",
        target_modules=["query"],
        modules_to_save=["classifier"],
        bias="lora_only",
        lora_bias=True,
    )
    files = load(tmp_path).files
    assert len(files.parts) == 2
    assert {name for name in files.others if name.startswith("classifier")} == {"classifier.weight", "classifier.bias"}
    assert sum(name.endswith(".bias") for name in files.others) == 5


def test_load_names_with_the_adapter_name(adapter: Path) -> None:
    expected = load(adapter).summary()
    tensors = {
        name.replace(".weight", ".default.weight"): value for name, value in load_file(adapter / WEIGHTS).items()
    }
    save_file(tensors, adapter / WEIGHTS)
    assert load(adapter).summary().equals(expected)


@pytest.mark.parametrize(
    ("family", "targets", "transposed"),
    [("gpt2", ["c_attn", "c_proj", "wte"], True), ("llama", ["q_proj", "down_proj", "embed_tokens"], False)],
)
def test_load_with_base_gives_relative_updates(
    tmp_path: Path, family: str, targets: list[str], transposed: bool
) -> None:
    model = save(tmp_path / "adapter", family=family, target_modules=targets, r=3, fan_in_fan_out=transposed)
    tiny(family).save_pretrained(tmp_path / "base")
    summary = load(tmp_path / "adapter", base=tmp_path / "base").summary().set_index("module")
    for name, dense in deltas(model).items():
        weight = model.base_model.model.get_submodule(name).get_base_layer().weight.detach().double().numpy()
        if transposed or name.endswith("embed_tokens"):
            weight = weight.T
        norm = np.linalg.norm(weight)
        assert summary.loc[name, "relative_update"] == near(np.linalg.norm(dense) / norm, terms=TINY)
        assert summary.loc[name, "weight_norm"] == near(np.linalg.norm(weight + dense), terms=TINY)


@pytest.mark.parametrize("head", ["base", "causal"])
def test_load_with_base_matches_names_with_other_prefixes(tmp_path: Path, head: str) -> None:
    save(tmp_path / "adapter", head=head, target_modules=["q_proj"], r=2)
    tiny("llama", "base").save_pretrained(tmp_path / "bare")
    tiny("llama").save_pretrained(tmp_path / "whole")
    bare, whole = (load(tmp_path / "adapter", tmp_path / name).summary() for name in ("bare", "whole"))
    assert bare["relative_update"].notna().all()
    assert bare["relative_update"].equals(whole["relative_update"])


def test_load_with_another_base_raises(tmp_path: Path) -> None:
    save(tmp_path / "adapter", target_modules=["q_proj"], r=2)
    tiny("llama", hidden_size=16).save_pretrained(tmp_path / "narrow")
    with pytest.raises(ValueError, match=r"must have shape \(32, 32\), got \(16, 16\)"):
        load(tmp_path / "adapter", tmp_path / "narrow").summary()
    tiny("bert").save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"cannot use .*bert as the base of .*adapter"):
        load(tmp_path / "adapter", tmp_path / "bert")
    with pytest.raises(FileNotFoundError, match="it has no safetensors file"):
        load(tmp_path / "adapter", tmp_path)


def test_nan_in_one_factor_affects_only_its_module(adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    tensors[name][3, 1] = float("nan")
    save_file(tensors, adapter / WEIGHTS)
    summary = load(adapter).summary().set_index("module")
    broken = summary["update_norm"].isna()
    assert list(summary.index[broken]) == ["model.layers.1.self_attn.v_proj"]
    assert summary.loc[broken, ["stable_rank", "effective_rank"]].isna().all(axis=None)


def test_load_header_length_with_pickle_bytes_succeeds(adapter: Path) -> None:
    expected = load(adapter).summary()
    data = (adapter / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length < 0x0480
    (adapter / WEIGHTS).write_bytes(
        (0x0480).to_bytes(8, "little") + data[8 : 8 + length].ljust(0x0480) + data[8 + length :]
    )
    assert load(adapter).summary().equals(expected)


def configured(adapter: Path, **changes: Any) -> None:
    file = adapter / CONFIG
    write_json(file, json.loads(file.read_text(encoding="utf-8")) | changes)


def stored(adapter: Path, change: Any) -> None:
    save_file(change(load_file(adapter / WEIGHTS)), adapter / WEIGHTS)


def cut(file: Path, share: float = 0.7) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])


def rename(adapter: Path, name: str) -> None:
    (adapter / WEIGHTS).rename(adapter / name)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
BROKEN: dict[str, tuple[Any, str]] = {
    "dora": (lambda a: configured(a, use_dora=True), "q_proj has lora_A and lora_B but no lora_magnitude_vector"),
    "adalora": (lambda a: configured(a, peft_type="ADALORA"), "q_proj has lora_A and lora_B but no lora_E"),
    "loha": (lambda a: configured(a, peft_type="LOHA"), "weights must include one of hada_w1_a, .*, got .*lora_A"),
    "unknown": (lambda a: configured(a, peft_type="NEXT"), "type of adapter must be one of LORA, .*, got NEXT$"),
    "vera": (lambda a: configured(a, peft_type="VERA"), "VERA weights must include vera_lambda_b"),
    "fourier": (lambda a: configured(a, peft_type="FOURIERFT"), "FOURIERFT weights must include fourierft_spectrum"),
    "magnitude": (
        lambda a: stored(a, lambda t: t | {f"{Q0}.lora_magnitude_vector": torch.ones(32)}),
        "q_proj has lora_magnitude_vector, but adapter_config.json lacks use_dora",
    ),
    "variant": (
        lambda a: stored(a, lambda t: t | {f"{Q0}.lora_diag": torch.ones(4)}),
        "q_proj has lora_diag, but adapter_config.json lacks kasa_config",
    ),
    "rank": (lambda a: configured(a, r=8), "must have rank 8 .*, got 4 and 4"),
    "experts": (lambda a: configured(a, r=3, target_parameters=["x"]), "q_proj.x must have rank 3 .* per expert"),
    "foreign": (lambda a: stored(a, lambda t: {"weight": torch.ones(2)}), "must .* lora_A and lora_B, got weight"),
    "empty": (lambda a: stored(a, lambda t: {}), "must .* lora_A and lora_B, got no tensor"),
    "no type": (lambda a: write_json(a / CONFIG, {"r": 4}), "adapter_config.json"),
    "no object": (lambda a: write_json(a / CONFIG, [1]), "adapter_config.json"),
    "config cut": (lambda a: cut(a / CONFIG), "adapter_config.json"),
    "weights cut": (lambda a: cut(a / WEIGHTS), "is truncated"),
    "header cut": (lambda a: cut(a / WEIGHTS, 0.01), "as safetensors: its header"),
    "nothing": (lambda a: (a / WEIGHTS).write_bytes(b""), "as safetensors: its header"),
    "no header": (
        lambda a: (a / WEIGHTS).write_bytes((9).to_bytes(8, "little") + b"{oops! no"),
        "cannot read .*adapter_model.safetensors",
    ),
    "list": (
        lambda a: (a / WEIGHTS).write_bytes((9).to_bytes(8, "little") + b"[1, 2, 3]"),
        "cannot read .*adapter_model.safetensors",
    ),
    "entry": (
        lambda a: (a / WEIGHTS).write_bytes((9).to_bytes(8, "little") + b'{"x": {}}'),
        "the header's entry for x: .*`dtype`",
    ),
    "pickle": (lambda a: rename(a, "adapter_model.bin"), r"pickles are never loaded; convert it: python -c"),
    "hidden pickle": (lambda a: (a / WEIGHTS).write_bytes(pickle.dumps({"a": 1})), "it is a pickle"),
    "zipped pickle": (lambda a: torch.save({"a": 1}, a / WEIGHTS), "it is a pickle"),
    "pointer": (
        lambda a: (a / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n"),
        "Git LFS pointer",
    ),
    "no weights": (lambda a: (a / WEIGHTS).unlink(), "has adapter_config.json but no adapter_model.safetensors"),
    "index": (
        lambda a: (rename(a, "x"), write_json(a / f"{WEIGHTS}.index.json", {})),
        "cannot read .*index.json: .*`weight_map`",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), BROKEN.values(), ids=BROKEN)
def test_load_broken_adapter_raises_one_line(adapter: Path, spoil: Any, message: str) -> None:
    spoil(adapter)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        load(adapter)
    assert "\n" not in str(raised.value)
    assert str(adapter) in str(raised.value)


def test_suggested_pickle_conversion_works(adapter: Path) -> None:
    expected = load(adapter).summary()
    torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="convert it: ") as raised:
        load(adapter)
    command = str(raised.value).partition("convert it: ")[2]
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True)
    assert load(adapter).summary().equals(expected)


def test_load_other_folder_raises_with_a_hint(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing: the path does not exist"):
        load(tmp_path / "missing")
    assert load(adapter / WEIGHTS).summary().equals(load(adapter).summary())
    (tmp_path / "model").mkdir()
    write_json(tmp_path / "model" / "config.json", {})
    with pytest.raises(ValueError, match="whole model"):
        load(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"recipe\.json, run\.json, adapter_config\.json"):
        load(tmp_path / "empty")


MODULE = {"module": "h.0.q", "stack": "", "layer": 0, "role": "q", "out_features": 3, "in_features": 3, "tied": ""}
META = {
    "schema": 1,
    "id": "0123456789ab",
    "label": "LoRA, rank 2",
    "model": "m",
    "task": "t",
    "method": {"name": "lora"},
    "recipe": {"name": "lora"},
    "settings": {"steps": 9, "batch_size": 4},
    "seed": 0,
    "parents": [],
    "parameters": {"trained": 12},
    "test": {},
    "modules": [MODULE],
    "states": {"last": {"step": 9, "ranks": {"h.0.q": 2}}},
}


def write_run(path: Path, status: str = "done", **meta: Any) -> Path:
    writer = RunWriter(path, manifest(**META | meta))
    writer.collect(
        9, [Record("update_norm", 2.0, "h.0.q"), Factors("h.0.q", {"A": np.eye(2, 3), "B": np.eye(3, 2)}, 1.0)]
    )
    writer.finish(status)
    return path


def test_load_run_folder(tmp_path: Path) -> None:
    run = load(write_run(tmp_path / "run"))
    assert run.finished
    assert run.summary()["update_norm"].item() == pytest.approx(math.sqrt(2))
    with pytest.raises(ValueError, match="base must be None for a run, got"):
        load(tmp_path / "run", base=tmp_path)


def test_load_folder_of_phases_opens_the_last_phase(tmp_path: Path) -> None:
    write_run(tmp_path / "1-search", id="first")
    write_run(tmp_path / "2-retrain", id="second", parents=["../1-search"])
    recipe = {"id": "0" * 12, "phases": ["1-search", "2-retrain"], "status": "done"}
    write_json(tmp_path / "recipe.json", recipe)
    run = load(tmp_path)
    assert run.id == "second"
    assert [parent.id for parent in run.parents] == ["first"]
    write_json(tmp_path / "recipe.json", recipe | {"status": "running"})
    with pytest.raises(ValueError, match=r"is running, in phase 2-retrain"):
        load(tmp_path)
    write_json(tmp_path / "recipe.json", recipe | {"phases": []})
    with pytest.raises(ValueError, match=r"cannot read .*recipe\.json: .*phases"):
        load(tmp_path)


def edited(run: Path, **changes: Any) -> None:
    write_json(run / "run.json", json.loads((run / "run.json").read_text(encoding="utf-8")) | changes)


SPOILED: dict[str, tuple[Any, str]] = {
    "cut description": (lambda run: cut(run / "run.json"), "cannot read .*run.json"),
    "a list": (lambda run: write_json(run / "run.json", [1]), "cannot read .*run.json"),
    "no schema": (lambda run: write_json(run / "run.json", {"id": "a"}), "cannot read schema of .*run.json"),
    "few keys": (
        lambda run: write_json(run / "run.json", {"schema": 1}),
        "cannot read .*run.json: .*missing required field",
    ),
    "odd schema": (lambda run: edited(run, schema="new"), "cannot read schema of .*run.json"),
    "newer": (lambda run: edited(run, schema=99), "schema must be <= 1, got 99; update lorascope"),
    "cut table": (lambda run: cut(run / "records.parquet"), "checksum differs from run.json"),
    "cut factors": (
        lambda run: cut(run / "snapshots/step-000009.safetensors"),
        "checksum differs from run.json",
    ),
    "no table": (lambda run: (run / "records.parquet").unlink(), "cannot read records.parquet"),
    "other checksum": (lambda run: edited(run, checksums={"records.parquet": "0"}), "checksum differs"),
    "unfinished": (
        lambda run: edited(run, status="running", states={}, checksums={}),
        "cannot read state .* is running",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILED.values(), ids=SPOILED)
def test_load_broken_run_raises_one_line(tmp_path: Path, spoil: Any, message: str) -> None:
    run = write_run(tmp_path / "run")
    spoil(run)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        load(run).summary()
    assert "\n" not in str(raised.value)
