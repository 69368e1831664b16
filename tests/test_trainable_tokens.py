"""TRAINABLE_TOKENS of PEFT: new rows of an embedding or a head, compared with PEFT's own merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny
from transformers import AutoModelForCausalLM

from lorascope.cli.main import main
from lorascope.diagnosis.merge import MergeCheck, check_merge
from lorascope.diagnosis.runtimes.runtime import apply_adapter
from lorascope.formats.pretrained_weights import PretrainedWeights
from lorascope.runs.adapter import Adapter
from lorascope.runs.loading import load_adapter

pytestmark = pytest.mark.filterwarnings("ignore")
TABLE = "model.embed_tokens"
# family, targets, whether head and embedding are tied, modules with an own update
CASES: dict[str, tuple[str, list[str], bool, list[str]]] = {
    "embedding": ("llama", ["embed_tokens"], False, [TABLE]),
    "embedding and head": ("llama", ["embed_tokens", "lm_head"], False, [TABLE, "lm_head"]),
    "head": ("llama", ["lm_head"], False, ["lm_head"]),
    "tied": ("llama", ["embed_tokens"], True, [TABLE]),
    "tied GPT-2": ("gpt2", ["wte"], True, ["transformer.wte"]),
}


def model_of(folder: Path, dtype: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=getattr(torch, dtype))


def write(folder: Path, family: str, targets: list[str], is_tied: bool, dtype: str = "float32") -> None:
    """Write a base, an adapter whose rows are drawn, and PEFT's merge of both."""
    tiny(family, tie_word_embeddings=is_tied).to(getattr(torch, dtype)).save_pretrained(folder / "base")
    config = peft.TrainableTokensConfig(target_modules=targets, token_indices=[60, 3, 5])
    adapted = peft.get_peft_model(model_of(folder, dtype), config)
    torch.manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(folder / "adapter")
    loaded = peft.PeftModel.from_pretrained(model_of(folder, dtype), str(folder / "adapter"))
    loaded.merge_and_unload().save_pretrained(folder / "merged")


def opened(folder: Path) -> Adapter:
    return load_adapter(folder / "adapter", folder / "base")


def checked(folder: Path, merged: str = "merged") -> MergeCheck:
    return check_merge(opened(folder), PretrainedWeights(folder / merged))


def stored_name(module: str, names: Any) -> str:
    return next(name for name in names if f"{module}.weight".endswith(name))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "targets", "is_tied", "modules"), CASES.values(), ids=CASES)
def test_update_equals_the_merge_by_peft(
    family: str, targets: list[str], is_tied: bool, modules: list[str], dtype: str, tmp_path: Path
) -> None:
    write(tmp_path, family, targets, is_tied, dtype)
    adapter = opened(tmp_path)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    assert list(adapter.updates()) == modules
    for module, update in adapter.updates().items():
        name = stored_name(module, before)
        change = (after[name].double() - before[name].double()).numpy()
        if module != "lm_head":
            change = change.T
        rounding = 2.0**-8 * float(after[name].abs().max()) if dtype == "bfloat16" else 0.0  # of the merge
        assert update.dense() == pytest.approx(change, rel=0, abs=rounding + 1e-9)
        assert update.rank == adapter.ranks()[module] == np.linalg.matrix_rank(change) == 3
        assert update.norm() == pytest.approx(np.linalg.norm(update.dense()), rel=1e-9)
    assert adapter.files.parts[modules[0]].size == 3 * 32
    assert any("is tied to" in note for note in adapter.files.notes) == is_tied
    application = apply_adapter(adapter.files, adapter.base, "peft")
    assert (application.findings, application.applied) == ((), len(modules))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "targets", "is_tied", "modules"), CASES.values(), ids=CASES)
def test_merge_by_peft_is_proved(
    family: str, targets: list[str], is_tied: bool, modules: list[str], dtype: str, tmp_path: Path
) -> None:
    write(tmp_path, family, targets, is_tied, dtype)
    check = checked(tmp_path)
    assert [(module.module, module.verdict) for module in check.modules] == [(name, "merged") for name in modules]
    assert check.findings == ()
    assert check.is_conclusive
    assert [module.verdict for module in checked(tmp_path, "base").modules] == ["not merged"] * len(modules)


def test_merge_into_other_rows_is_a_finding(tmp_path: Path) -> None:
    write(tmp_path, *CASES["embedding"][:3])
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    weights[f"{TABLE}.weight"] = weights[f"{TABLE}.weight"].roll(1, 0)
    save_file(weights, tmp_path / "merged" / "model.safetensors", {"format": "pt"})
    assert [module.verdict for module in checked(tmp_path).modules] == ["wrong adapter"]


def test_last_row_of_a_repeated_token_counts(tmp_path: Path) -> None:
    write(tmp_path, *CASES["embedding"][:3])
    configure(tmp_path, token_indices=[5, 3, 5])
    rows = load_file(tmp_path / "adapter" / "adapter_model.safetensors").popitem()[1].double()
    W = load_file(tmp_path / "base" / "model.safetensors")[f"{TABLE}.weight"].double()
    expected = W.clone()
    expected[3], expected[5] = rows[1], rows[2]
    update = opened(tmp_path).updates()[TABLE].dense().T
    assert update == pytest.approx((expected - W).numpy(), abs=1e-12)
    assert opened(tmp_path).ranks() == {TABLE: 2}


def test_more_tokens_than_columns_have_a_dense_update(tmp_path: Path) -> None:
    write(tmp_path, *CASES["embedding"][:3])
    tokens = list(range(50))
    configure(tmp_path, token_indices=tokens)
    drawn = torch.randn(50, 32)
    save_file(
        {f"base_model.model.{TABLE}.trainable_tokens_delta": drawn}, tmp_path / "adapter" / "adapter_model.safetensors"
    )
    W = load_file(tmp_path / "base" / "model.safetensors")[f"{TABLE}.weight"].double()
    change = (drawn.double() - W[:50]).numpy()
    adapter = opened(tmp_path)
    update = adapter.updates()[TABLE].dense().T
    assert update[:50] == pytest.approx(change, abs=1e-12)
    assert not update[50:].any()
    assert adapter.ranks() == {TABLE: 32}
    assert adapter.measures[TABLE]["update_norm"] == pytest.approx(np.linalg.norm(change), rel=1e-9)


def configure(folder: Path, **changes: Any) -> None:
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"token_indices": [3]}, "must have shape (1, 32), got (3, 32)"),
        ({"token_indices": []}, "must have shape (0, 32), got (3, 32)"),
        (
            {"token_indices": [3, 5, 64]},
            "token_indices must be < 64, the rows of model.embed_tokens in the base, got 64",
        ),
        ({"token_indices": [3, 5, -1]}, "at `$.token_indices[2]`: -1"),
        ({"token_indices": "3"}, "token_indices"),
    ],
)
def test_spoiled_configuration_is_reported_in_one_line(
    changes: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, *CASES["embedding"][:3])
    configure(tmp_path, **changes)
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "adapter"), "--base", str(tmp_path / "base")]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1


def test_tied_head_with_other_rows_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PEFT 0.21 gives a tied head other rows if both are targets, and its merge differs from its model."""
    write(tmp_path, "llama", ["embed_tokens", "lm_head"], True)
    assert main(["inspect", str(tmp_path / "adapter"), "--base", str(tmp_path / "base")]) == 2
    assert "the base has no weight of lm_head, and no other module has its rows" in capsys.readouterr().err


def test_base_is_required(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, *CASES["embedding"][:3])
    configure(tmp_path, base_model_name_or_path="org/base")
    assert main(["inspect", str(tmp_path / "adapter")]) == 2
    assert "TRAINABLE_TOKENS changes the weights of its base: pass its base model, org/base" in capsys.readouterr().err


def test_merge_of_tuned_norms_is_proved(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(
        model_of(tmp_path, "float32"), peft.LNTuningConfig(target_modules=["input_layernorm"])
    )
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert {module.verdict for module in checked(tmp_path).modules} == {"merged"}
    assert checked(tmp_path).is_conclusive
    assert {module.verdict for module in checked(tmp_path, "base").modules} == {"not merged"}
