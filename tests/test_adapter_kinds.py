"""Loading of AdaLoRA, DoRA and loralib adapters, compared with PEFT and loralib."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_loading import deltas, save
from tiny import inputs, tiny
from tolerance import TINY, near

from lorascope.cli.main import main
from lorascope.diagnosis.inspection import inspect
from lorascope.files.whole_files import write_json
from lorascope.formats.peft_config import CONFIG, WEIGHTS
from lorascope.runs.loading import load

QV = ["q_proj", "v_proj"]


def adalora(path: Path, masked: dict[str, list[bool]] | None = None, **config: Any) -> Any:
    """Save an AdaLoRA adapter of random factors; ``masked`` marks the components of a module that are kept."""
    settings = {"init_r": 5, "target_r": 2, "lora_alpha": 12, "total_step": 9} | config
    model = peft.get_peft_model(tiny("llama"), peft.AdaLoraConfig(target_modules=QV, **settings))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        for module, kept in (masked or {}).items():
            E = model.base_model.model.get_submodule(module).lora_E["default"]
            E.mul_(torch.tensor(kept, dtype=E.dtype)[:, None])
    if masked is not None:
        model.peft_config["default"].rank_pattern = {f"{name}.lora_E": kept for name, kept in masked.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a module of rank 0 looks to PEFT as if it were sharded
        model.save_pretrained(path)
    return model


MASK = {
    "model.layers.0.self_attn.q_proj": [True, False, True, True, False],
    "model.layers.0.self_attn.v_proj": [False] * 5,
    "model.layers.1.self_attn.q_proj": [True] * 5,
    "model.layers.1.self_attn.v_proj": [False, False, False, False, True],
}


@pytest.mark.parametrize("masked", [None, MASK], ids=["before its allocation ends", "with its mask"])
def test_adalora_updates_match_peft(tmp_path: Path, masked: dict[str, list[bool]] | None) -> None:
    expected = deltas(adalora(tmp_path, masked))
    run = load(tmp_path)
    assert run.files.kind == "AdaLoRA"
    for module, update in run.updates().items():
        assert update.dense() == near(expected[module], terms=5 + 2)
    assert set(run.updates()) == set(expected)
    ranks = {name: sum(kept) for name, kept in masked.items()} if masked else dict.fromkeys(expected, 5)
    assert run.ranks() == ranks
    again = load(tmp_path).factors()["model.layers.1.self_attn.q_proj"]
    assert {name: array.shape for name, array in again.items()} == {"A": (5, 32), "B": (32, 5), "diagonal": (5,)}


@pytest.mark.parametrize("alpha", [0, -3])
def test_adalora_alpha_of_zero_or_less_is_the_initial_rank(tmp_path: Path, alpha: int) -> None:
    expected = deltas(adalora(tmp_path, lora_alpha=alpha))
    updates = load(tmp_path).updates()
    assert set(updates) == set(expected)
    for module, update in updates.items():
        assert update.dense() == near(expected[module], terms=5 + 2)


def test_adalora_rank_excludes_masked_components(tmp_path: Path) -> None:
    adalora(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    for module, kept in MASK.items():
        tensors[f"base_model.model.{module}.lora_E"] *= torch.tensor(kept)[:, None]
    save_file(tensors, tmp_path / WEIGHTS)
    run = load(tmp_path)
    modules = inspect(run).modules.set_index("module")
    assert dict(modules["rank"]) == run.ranks() == {name: sum(kept) for name, kept in MASK.items()}
    assert not modules["dead"].any()
    assert run.meta.parameters.trained == sum(tensor.numel() for tensor in tensors.values())


def test_adalora_new_adapter_has_all_components(tmp_path: Path) -> None:
    model = peft.get_peft_model(
        tiny("llama"), peft.AdaLoraConfig(target_modules=QV, init_r=5, target_r=2, total_step=9)
    )
    model.save_pretrained(tmp_path)
    assert not any(tensor.any() for name, tensor in load_file(tmp_path / WEIGHTS).items() if "lora_E" in name)
    assert set(load(tmp_path).ranks().values()) == {5}


@pytest.mark.parametrize("stored", ["all", "some", "none"])
def test_adalora_stopped_early_has_the_ranks_of_its_mask(tmp_path: Path, stored: str) -> None:
    """PEFT's allocator masks at steps 4 and 8 of 20; its configuration has the mask, a part of it or none."""
    settings = {"init_r": 5, "target_r": 2, "total_step": 20, "tinit": 2, "tfinal": 5, "deltaT": 4}
    model = peft.get_peft_model(tiny("llama"), peft.AdaLoraConfig(target_modules=QV, **settings))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = inputs(tiny("llama"))
    for step in range(1, 9):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    mask = model.peft_config["default"].rank_pattern
    first = next(iter(mask))
    model.peft_config["default"].rank_pattern = {"all": mask, "some": {first: mask[first]}, "none": None}[stored]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a module of rank 0 looks to PEFT as if it were sharded
        model.save_pretrained(tmp_path)
    expected = {name.removesuffix(".lora_E.default"): sum(kept) for name, kept in mask.items()}
    assert len(set(expected.values())) > 1
    assert load(tmp_path).ranks() == dict(inspect(load(tmp_path)).modules.set_index("module")["rank"]) == expected


def test_adalora_with_another_configuration_raises(tmp_path: Path) -> None:
    adalora(tmp_path, MASK)
    told = json.loads((tmp_path / CONFIG).read_text(encoding="utf-8"))
    write_json(tmp_path / CONFIG, told | {"rank_pattern": None})
    with pytest.raises(ValueError, match=r"q_proj must have rank 5 .*, got 3 and 3"):
        load(tmp_path)


DORA: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": [*QV, "down_proj"], "r": 4, "lora_alpha": 6},
    "transposed": {"family": "gpt2", "target_modules": ["c_attn", "c_proj"], "r": 3, "fan_in_fan_out": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"], "r": 3},
    "convolution": {"family": "vit", "target_modules": ["projection"], "r": 3},
    "bfloat16": {"target_modules": QV, "r": 4, "dtype": torch.bfloat16},
}


def dora(path: Path, **case: Any) -> Any:
    """Save a DoRA adapter whose magnitudes differ from its base, and the base next to it."""
    family = case.get("family", "llama")
    model = save(path / "adapter", use_dora=True, **case)
    tiny(family).save_pretrained(path / "base")
    return model


def whole_update(layer: Any) -> np.ndarray:
    """Return the change (out, in) of a weight when PEFT merges a DoRA layer."""
    before = layer.get_base_layer().weight.detach().double().clone()
    layer.double().merge()
    change = layer.get_base_layer().weight.detach() - before
    table = isinstance(layer.get_base_layer(), torch.nn.Embedding)
    return (change.T if table or getattr(layer, "fan_in_fan_out", False) else change.flatten(1)).numpy()


@pytest.mark.parametrize("case", DORA.values(), ids=DORA)
def test_dora_update_is_complete_only_with_its_base(tmp_path: Path, case: dict[str, Any]) -> None:
    model = dora(tmp_path, **case)
    bound = {"dtype": torch.bfloat16, "terms": 2} if "dtype" in case else {"terms": TINY}
    direction = deltas(model)
    alone = load(tmp_path / "adapter")
    assert alone.files.kind == "DoRA"
    for module, update in alone.updates().items():
        assert update.dense() == near(direction[module], **bound)
    both = load(tmp_path / "adapter", tmp_path / "base")
    summary = both.summary().set_index("module")
    for module, update in both.updates().items():
        layer = model.base_model.model.get_submodule(module)
        expected = whole_update(layer.to(torch.float32))
        assert update.dense() == near(expected, **bound)
        assert summary.loc[module, "update_norm"] == near(np.linalg.norm(expected), **bound)
    assert len(both.updates()) == len(direction) >= 1


def test_dora_inspection_reports_a_missing_base(tmp_path: Path) -> None:
    dora(tmp_path, **DORA["linear"])
    alone, both = (inspect(load(tmp_path / "adapter", base)) for base in (None, tmp_path / "base"))
    assert any("the norm of B A only" in finding for finding in alone.findings)
    assert not any("direction" in finding for finding in both.findings)
    assert alone.modules["effective_rank"].notna().all()
    assert both.modules["effective_rank"].isna().all()
    whole = inspect(load(tmp_path / "adapter", tmp_path / "base"), spectra=True).modules
    assert whole["effective_rank"].notna().all()
    assert (whole["effective_rank"] > whole["rank"]).all()


def test_dora_with_another_configuration_raises(tmp_path: Path) -> None:
    dora(tmp_path, **DORA["linear"])
    file = tmp_path / "adapter" / CONFIG
    told = json.loads(file.read_text(encoding="utf-8"))
    write_json(file, told | {"use_dora": False})
    with pytest.raises(ValueError, match=r"has lora_magnitude_vector, but .* lacks use_dora"):
        load(tmp_path / "adapter")
    write_json(file, told)
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    save_file({k: v for k, v in tensors.items() if "magnitude" not in k}, tmp_path / "adapter" / WEIGHTS)
    with pytest.raises(ValueError, match="has lora_A and lora_B but no lora_magnitude_vector"):
        load(tmp_path / "adapter")


def merged_linear(A: torch.Tensor, B: torch.Tensor, enabled: list[bool]) -> torch.Tensor:
    """Return the update of loralib's MergedLinear as its code computes it: a grouped convolution, then zeros."""
    n = sum(enabled)
    product = torch.nn.functional.conv1d(A[None], B[:, :, None], groups=n)[0]
    rows = torch.tensor(enabled).repeat_interleave(len(B) // n)
    whole = torch.zeros(len(rows), A.shape[1])
    whole[rows] = product
    return whole


@pytest.mark.parametrize("enabled", [[True, False, True], [False, True, False], [True, True, True]])
def test_loralib_updates_with_configuration_match_loralib(tmp_path: Path, enabled: list[bool]) -> None:
    draw, n = torch.Generator().manual_seed(0), sum(enabled)
    tensors = {
        f"transformer.h.{layer}.attn.c_attn.lora_{name}": torch.randn(shape, generator=draw)
        for layer in (0, 1)
        for name, shape in {"A": (4 * n, 8), "B": (8 * n, 4)}.items()
    }
    save_file(tensors, tmp_path / "gpt2_lora.safetensors")
    write_json(tmp_path / CONFIG, {"peft_type": "LORA", "r": 4, "lora_alpha": 32, "enable_lora": enabled})
    run = load(tmp_path)
    assert run.ranks() == dict.fromkeys(["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"], 4 * n)
    for module, update in run.updates().items():
        A, B = (tensors[f"{module}.lora_{name}"] for name in "AB")
        assert update.dense() == near(8 * merged_linear(A, B, enabled), terms=4 + 1)
    assert run.summary()["effective_rank"].notna().all()


def test_loralib_without_configuration_reports_unknown_alpha(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = torch.Generator().manual_seed(0)
    A, B = torch.randn(4, 8, generator=draw), torch.randn(6, 4, generator=draw)
    name = "roberta.encoder.layer.0.attention.self.query"
    save_file(
        {f"{name}.lora_A": A, f"{name}.lora_B": B, "classifier.out_proj.weight": torch.ones(2)},
        tmp_path / "l.safetensors",
    )
    run = load(tmp_path)
    assert run.summary()["update_norm"].item() == near((B @ A).norm(), terms=TINY)
    assert main(["inspect", str(tmp_path)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "rank 4, alpha not saved" in told
    assert "no adapter_config.json, so alpha is unknown: |dW| is the norm of B A, without the factor alpha / r" in told


@pytest.mark.parametrize("name", ["lora.pt", "pytorch_model_lora.bin"])
def test_loralib_pickle_raises_with_a_conversion(tmp_path: Path, name: str) -> None:
    import subprocess
    import sys

    torch.save({"h.0.q.lora_A": torch.ones(2, 3), "h.0.q.lora_B": torch.ones(3, 2)}, tmp_path / name)
    for given in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match="pickles are never loaded; convert it: python") as raised:
            load(given)
    command = str(raised.value).partition("convert it: ")[2]
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True)
    assert load(tmp_path).ranks() == {"h.0.q": 2}


def test_adapter_file_has_the_configuration_next_to_it(tmp_path: Path) -> None:
    save(tmp_path, target_modules=QV, lora_alpha=32)
    folder = load(tmp_path).summary()
    assert load(tmp_path / WEIGHTS).summary().equals(folder)
    (tmp_path / WEIGHTS).rename(tmp_path / "renamed.safetensors")
    alone = load(tmp_path / "renamed.safetensors").summary()  # which adapter the configuration describes is not known
    assert (alone["update_norm"] * 32 / alone["rank"]).to_numpy() == pytest.approx(folder["update_norm"].to_numpy())


def test_modules_to_save_are_measured_with_a_base(tmp_path: Path) -> None:
    model = save(tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"])
    tiny("llama").save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    head = next(name for name in tensors if name.endswith("lm_head.weight"))
    before = model.base_model.model.lm_head.original_module.weight.detach()
    save_file(tensors | {head: before * 1.25}, tmp_path / "adapter" / WEIGHTS)
    alone, both = (inspect(load(tmp_path / "adapter", base)) for base in (None, tmp_path / "base"))
    assert "saved as full weights, 2,048 parameters, not measured without a base: lm_head" in alone.findings
    norm = float(before.norm()) / 4
    assert f"saved as full weights: lm_head, 2,048 parameters, |dW| {norm:.3g} (25% of |W|)" in both.findings


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (67, 64, "lm_head, 2,144 parameters, |dW| 0 (0% of |W|), without 3 new rows"),
        (1, 64, "lm_head, 32 parameters, not measured: it is 1 x 32, in the base 64 x 32"),
    ],
)
def test_modules_to_save_of_another_size_are_compared_only_with_a_smaller_vocabulary(
    tmp_path: Path, ours: int, theirs: int, message: str
) -> None:
    save(tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"])
    tiny("llama").save_pretrained(tmp_path / "base")
    for file, rows in ((tmp_path / "adapter" / WEIGHTS, ours), (tmp_path / "base/model.safetensors", theirs)):
        tensors = load_file(file)
        head = next(name for name in tensors if name.endswith("lm_head.weight"))
        save_file(tensors | {head: torch.ones(rows, 32)}, file, metadata={"format": "pt"})
    found = inspect(load(tmp_path / "adapter", tmp_path / "base"))
    (line,) = (line for line in found.findings if "lm_head" in line)
    assert line == f"saved as full weights: {message}"


@pytest.mark.parametrize("use_dora", [False, True])
def test_inspect_with_quantized_base_fails(tmp_path: Path, use_dora: bool, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "adapter", target_modules=QV, use_dora=use_dora)
    tiny("llama").save_pretrained(tmp_path / "base")
    file = tmp_path / "base/model.safetensors"
    tensors = load_file(file)
    weight = "model.layers.0.self_attn.q_proj.weight"
    scales = tensors[weight].abs().amax(1)  # as bitsandbytes stores eight bits
    packed = {weight: (tensors[weight] / scales[:, None] * 127).round().to(torch.int8)}
    save_file(tensors | packed | {weight.replace("weight", "SCB"): scales}, file, metadata={"format": "pt"})
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "adapter"), "--base", str(tmp_path / "base")]) == 2
    told = capsys.readouterr().err
    must = f"{weight} must be stored as one of F64, F32, F16, BF16, F8_E4M3, F8_E5M2"
    assert f"{must}, got I8; use the weights before quantization" in told
    assert len(told.splitlines()) == 1
