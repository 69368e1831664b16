"""Loading of HydraLoRA folders in the authors' layout, compared with sums over the experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tolerance import TINY, near

import lorascope as ls
from lorascope import export, plots
from lorascope.diagnosis import inspection
from lorascope.formats.peft_config import CONFIG, WEIGHTS
from lorascope.inputs import models

PREFIX = "base_model.model."
MODULES = {
    **{f"model.layers.{layer}.mlp.{name}_proj": (48, 32) for layer in (0, 10, 2) for name in ("gate", "up")},
    **{f"model.layers.{layer}.mlp.down_proj": (32, 48) for layer in (0, 10, 2)},
}
# The authors' fork of PEFT adds the number of heads to the configuration.
SETTINGS = {"peft_type": "LORA", "r": 4, "lora_alpha": 32, "lora_nums": 3, "base_model_name_or_path": "llama"}


def write(
    path: Path,
    heads: int = 3,
    without: str = "",
    dtype: torch.dtype = torch.float32,
    modules: Any = MODULES,
    **changes: Any,
) -> dict:
    """Write a folder and return its tensors; ``without`` names a tensor to omit from one module."""
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for module, (outer, inner) in modules.items():
        shapes = {"lora_A": (4, inner), "lora_route": (heads, inner)} | {f"lora_B{i}": (outer, 4) for i in range(heads)}
        for name, shape in shapes.items():
            tensors[f"{PREFIX}{module}.{name}.weight"] = torch.randn(shape, generator=draw).to(dtype)
    if without:
        del tensors[f"{PREFIX}model.layers.2.mlp.up_proj.{without}.weight"]
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / WEIGHTS)
    (path / CONFIG).write_text(json.dumps(SETTINGS | {"lora_nums": heads} | changes))
    return tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_update_is_the_mean_of_the_experts(tmp_path, dtype):
    tensors = write(tmp_path / "hydra", dtype=dtype)
    run = ls.load(tmp_path / "hydra")
    updates = run.updates()
    assert set(updates) == set(MODULES)
    for module, update in updates.items():
        A, *B = (tensors[f"{PREFIX}{module}.lora_{name}.weight"].double() for name in ("A", "B0", "B1", "B2"))
        expected = 8 * sum(head @ A for head in B) / 3
        assert update.dense() == near(expected, terms=12)
        assert (update.rank, update.exact) == (4, False)
        factors = run.factors()[module]
        assert factors.keys() == {"A", "B", "gates", "router"}
        assert np.array_equal(factors["B"], torch.stack(B).float().numpy())
        assert factors["gates"].tolist() == near([1 / 3] * 3)
        assert np.array_equal(factors["router"], tensors[f"{PREFIX}{module}.lora_route.weight"].float().numpy())


def test_representations_name_hydralora_and_uniform_gates(tmp_path):
    write(tmp_path / "hydra")
    run = ls.load(tmp_path / "hydra")
    assert run.ranks() == dict.fromkeys(run.updates(), 4)
    # by layer, not by the alphabet
    assert list(dict.fromkeys(run.modules["layer"])) == [0, 2, 10]
    assert not run.summary()["exact"].any()
    assert run.meta.parameters.trained == sum(
        4 * inner + 3 * 4 * outer + 3 * inner for outer, inner in MODULES.values()
    )
    assert run.meta.method["name"] == "hydralora"
    assert "HydraLoRA, rank 4" in repr(run)
    found = inspection.inspect(run)
    assert "9 of 9 modules depend on their input: their updates are evaluated at uniform gates" in found.findings
    assert found.modules["parameters"].sum() == run.meta.parameters.trained
    facts = dict(found.facts)
    assert facts["hydra"] == "HydraLoRA, rank 4, scale 8 (alpha 32)"
    assert plots.update_norm(run).caption.endswith("Updates of hydra at uniform gates.")
    config = export.rank_pattern(run)
    assert (config["r"], config["lora_alpha"], len(config["target_modules"])) == (
        4,
        32,
        3,
    )  # three roles in three layers
    with pytest.raises(ValueError, match="depends on its input"):
        export.rank_pattern(run, 0.5)


def test_single_expert_is_a_lora(tmp_path):
    tensors = write(tmp_path, heads=1)
    updates = ls.load(tmp_path).updates()
    assert set(updates) == set(MODULES)
    for module, update in updates.items():
        A, B = (tensors[f"{PREFIX}{module}.lora_{name}.weight"].double().numpy() for name in ("A", "B0"))
        assert update.exact
        assert update.dense() == near(8 * B @ A, terms=4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"without": "lora_B2"}, "router of .*up_proj must have 2 rows.*, got 3"),
        ({"r": 8}, "model.layers.0.mlp.up_proj must have rank 8 .*, got 4"),
        ({"use_dora": True}, "variant of LoRA not supported"),
    ],
)
def test_load_broken_folder_raises_one_line(tmp_path, change, reason):
    write(tmp_path, **change)
    with pytest.raises(ValueError, match=reason) as raised:
        ls.load(tmp_path)
    assert "\n" not in str(raised.value)


def test_at_gates_of_a_text_matches_the_model(tmp_path, llama):
    """In its base model, the adapter computes equation 3, with the gate weights of the text."""
    modules = {name: shape for name, shape in MODULES.items() if ".0." in name}
    tensors = write(tmp_path / "hydra", modules=modules, base_model_name_or_path=llama)
    run = ls.load(tmp_path / "hydra")
    base = models.load(llama)
    ids = torch.tensor([[4, 5, 6, 7]])
    inputs: dict[str, torch.Tensor] = {}
    name = "model.layers.0.mlp.up_proj"
    base.get_submodule(name).register_forward_hook(lambda _, given, y: inputs.update(x=given[0][0], y=y[0]))
    text = models.tokenizer(base).decode(ids[0])
    gates = ls.mean_gates(run, [text], base=base)
    assert set(gates) == set(modules)
    A, *B = (tensors[f"{PREFIX}{name}.lora_{part}.weight"] for part in ("A", "B0", "B1", "B2"))
    x = inputs["x"]
    by_token = torch.softmax(x @ tensors[f"{PREFIX}{name}.lora_route.weight"].T, -1)
    assert gates[name] == near(by_token.mean(0), 1, terms=TINY, growth=10)  # of logits as large
    added = 8 * sum(by_token[:, [head]] * (x @ A.T @ B[head].T) for head in range(3))
    plain = models.load(llama).get_submodule(name).weight
    assert inputs["y"].detach().numpy() == near(x @ plain.T + added, terms=TINY, growth=10)
    seen = ls.at_gates(run, gates, "mean gates on a text")
    expected = 8 * sum(float(gates[name][head]) * B[head].double() @ A.double() for head in range(3))
    assert seen.updates()[name].dense() == near(expected, terms=12)
    row = seen.summary().set_index("module").loc[name]
    assert row["update_norm"] == near(expected.norm(), terms=TINY)
    assert "at mean gates on a text." in plots.update_norm(seen).caption
    assert "mean gates on a text" in str(seen)
    routed = f"{len(modules)} of {len(modules)} modules depend on their input: their updates are evaluated at"
    assert f"{routed} mean gates on a text" in inspection.inspect(seen).findings
    assert ls.mean_gates(run, [text])[name] == near(gates[name], 1, terms=TINY, growth=10)
