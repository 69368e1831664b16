"""PiSSA and OLoRA exported as plain LoRA on the original base, with PEFT's own loading as the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file, save_file
from test_adapter_export import best_of_rank
from test_adapter_export import write as plain_adapter
from test_residual_starts import CASES, ROUNDING, base_model, opened, write
from tolerance import near
from torch import Tensor, nn

import lorascope as ls
from lorascope.cli.main import main
from lorascope.runs.loading import load

pytestmark = pytest.mark.filterwarnings("ignore")
EMBEDDING = {"init_lora_weights": "pissa", "target_modules": ["embed_tokens", "q_proj"]}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(24).reshape(2, 12)).logits.double()


def with_adapter(folder: Path, adapter: str, dtype: str = "float32") -> Tensor:
    """Return the logits of the original base with an adapter that PEFT loads."""
    return logits(peft.PeftModel.from_pretrained(base_model(folder, dtype), str(folder / adapter)))


def changes(folder: Path) -> dict[str, np.ndarray]:
    """Return the change of every weight in PEFT's merge of the original adapter, in float64."""
    base, merged = (load_file(folder / name / "model.safetensors") for name in ("base", "merged"))
    return {name: (merged[name].double() - weight.double()).numpy() for name, weight in base.items()}


@pytest.mark.parametrize(
    ("family", "dtype", "options"),
    [*CASES.values(), ("llama", "float32", EMBEDDING)],
    ids=[*CASES, "PiSSA, embedding"],
)
def test_export_with_a_base_gives_the_logits_of_peft(
    family: str, dtype: str, options: dict[str, Any], tmp_path: Path
) -> None:
    write(tmp_path, family, dtype, options, size=0.3)
    folders = [str(tmp_path / name) for name in ("adapter", "base", "out")]
    assert main(["export", folders[0], "--base", folders[1], "--peft", folders[2]]) == 0
    config = peft.PeftConfig.from_pretrained(folders[2])
    assert config.init_lora_weights is True
    assert config.use_dora == options.get("use_dora", False)
    plain, expected = logits(base_model(tmp_path, dtype)), with_adapter(tmp_path, "adapter", dtype)
    change, found = expected - plain, with_adapter(tmp_path, "out", dtype) - expected
    assert change.norm() > 5e-4 * plain.norm()
    # PEFT rounds the residual and outputs to the dtype of the base, and its decomposition is in float32 of torch.
    assert found.norm() < 1e-3 * change.norm() + 16 * ROUNDING[dtype] * plain.norm()
    assert found.norm() < 0.2 * change.norm()


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_cut_of_the_change_is_the_best_of_its_ranks(start: str, tmp_path: Path) -> None:
    write(tmp_path, "llama", "float32", {"init_lora_weights": start}, size=0.3)
    ls.export.to_peft(opened(tmp_path), tmp_path / "out", budget=0.5)
    before = changes(tmp_path)
    updates = load(tmp_path / "out").updates()
    assert sum(update.rank for update in updates.values()) == 24
    for module, update in updates.items():
        expected = best_of_rank(before[f"{module}.weight"], update.rank)
        assert np.linalg.norm(update.dense() - expected) < 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("format", "out"), [("mlx", "mlx"), ("kohya", "a.safetensors"), ("diffusers", "b.safetensors")]
)
def test_other_formats_get_the_change_from_the_base(format: str, out: str, tmp_path: Path) -> None:
    write(tmp_path, *CASES["PiSSA, patterns" if format == "diffusers" else "OLoRA"], size=0.3)
    component = None if format == "mlx" else "text_encoder"
    adapter = opened(tmp_path)
    ls.export.convert(adapter, tmp_path / out, format, component=component)
    ends = {name.replace(".", "_"): update.dense() for name, update in load(tmp_path / out).updates().items()}
    for module, update in adapter.updates().items():
        (found,) = (dense for name, dense in ends.items() if name.endswith(module.replace(".", "_")))
        assert found == near(update.dense(), terms=64)


def test_sum_with_a_plain_lora_adds_the_changes(tmp_path: Path) -> None:
    write(tmp_path, *CASES["PiSSA"], size=0.3)
    other = load(plain_adapter(tmp_path, "llama", out="other"))
    ls.export.sum_adapters([opened(tmp_path), other], tmp_path / "sum", [1, 0.5])
    first, second = opened(tmp_path).updates(), other.updates()
    for module, update in load(tmp_path / "sum").updates().items():
        terms = [first[module].dense()] if module in first else []
        terms += [0.5 * second[module].dense()] if module in second else []
        assert update.dense() == near(sum(terms), terms=64)


def test_refusals_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, *CASES["PiSSA"])
    capsys.readouterr()
    adapter, base, out = (str(tmp_path / name) for name in ("adapter", "base", "out"))

    def refusal(*words: str) -> str:
        assert main(["export", adapter, *words, "--peft", out]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert not Path(out).exists()
        return message

    assert "pissa changes the base model while PEFT loads it; pass --base DIR" in refusal()
    module = "model.layers.1.mlp.up_proj"
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weight = weights.pop(f"{module}.weight")
    for number, changed in enumerate((weights, weights | {f"{module}.weight": weight * torch.nan})):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        assert f"the initial product of {module} does not follow from the base" in refusal("--base", str(folder))
    config = Path(adapter) / "adapter_config.json"
    config.write_text(config.read_text().replace('"pissa"', '"pissa_niter_4"'))
    assert "pissa_niter_4 changes the base model while PEFT loads it; save it with" in refusal("--base", base)


def test_way_of_peft_gives_the_same_change(tmp_path: Path) -> None:
    """PEFT itself converts by the saved start, as factors [B, -B_0] and [A, A_0]."""
    options = {"init_lora_weights": "pissa"}
    write(tmp_path, "llama", "float32", options, size=0.0)
    (tmp_path / "adapter").rename(tmp_path / "start")
    trained = peft.PeftModel.from_pretrained(base_model(tmp_path), str(tmp_path / "start"), is_trainable=True)
    torch.manual_seed(0)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * parameter.data.abs().mean() * torch.randn_like(parameter)
    trained.save_pretrained(str(tmp_path / "adapter"))
    start = tmp_path / "start"
    trained.save_pretrained(str(tmp_path / "theirs"), path_initial_model_for_weight_conversion=str(start))
    ls.export.to_peft(opened(tmp_path), tmp_path / "out")
    ours, theirs = (load(tmp_path / name).updates() for name in ("out", "theirs"))
    assert ours.keys() == theirs.keys()
    for module, update in theirs.items():
        assert ours[module].rank == update.rank == 8
        error = opened(tmp_path).files.parts[module].start.factors.error  # type: ignore[attr-defined]
        assert np.linalg.norm(ours[module].dense() - update.dense()) < error < 1e-2 * update.norm()
    files = [load_arrays(tmp_path / name / "adapter_model.safetensors") for name in ("out", "theirs")]
    assert {key: array.shape for key, array in files[0].items()} == {key: a.shape for key, a in files[1].items()}
