"""Adapters of experts in one tensor, compared with PEFT's merged weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from merged import adapt, changes
from safetensors.numpy import load_file, save_file
from tolerance import TINY, near
from torch import nn

from lorascope.cli.main import main
from lorascope.diagnosis.inspection import inspect
from lorascope.files.whole_files import write_json
from lorascope.formats.peft_config import CONFIG, WEIGHTS
from lorascope.formats.peft_experts import LAYOUT
from lorascope.runs.loading import load

EXPERTS, HIDDEN, INNER = 3, 16, 24
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


def mixtral(**sizes: Any) -> nn.Module:
    torch.manual_seed(0)
    usual = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2, "num_local_experts": EXPERTS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    config = transformers.MixtralConfig(vocab_size=64, max_position_embeddings=40, **usual | heads | sizes)
    return transformers.MixtralForCausalLM(config)


def gpt_oss(inner: int = INNER) -> nn.Module:
    """Return a model with experts stored as (in, out), which PEFT treats as such."""
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": inner, "num_hidden_layers": 2, "num_local_experts": EXPERTS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "num_experts_per_tok": 2}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(vocab_size=64, **sizes | heads))


CASES: dict[str, dict[str, Any]] = {
    "both": {"target_parameters": [GATE_UP, DOWN], "r": 2, "lora_alpha": 6},
    "gate and up": {"target_parameters": [GATE_UP], "r": 2, "lora_alpha": 3},
    "down": {"target_parameters": [DOWN], "r": 3, "lora_alpha": 3, "use_rslora": True},
    "patterns": {
        "target_parameters": ["down_proj", "gate_up_proj"],
        "r": 2,
        "rank_pattern": {"experts.down_proj": 3, "layers.1.mlp.experts.gate_up_proj": 1},
        "alpha_pattern": {"down_proj": 5},
    },
    "other modules": {
        "target_modules": ["q_proj"],
        "target_parameters": [GATE_UP, DOWN, "mlp.gate.weight", "o_proj.weight"],
        "r": 2,
    },
}


BIASED = {"target_parameters": [GATE_UP, DOWN, f"{GATE_UP}_bias"], "r": 2, "rank_pattern": {"bias": 1, "down_proj": 3}}


@pytest.mark.parametrize(
    ("build", "case"),
    [*((build, case) for build in (mixtral, gpt_oss) for case in CASES.values()), (gpt_oss, BIASED)],
    ids=[*(f"{build} {case}" for build in ("mixtral", "gpt-oss") for case in CASES), "gpt-oss with biases"],
)
def test_updates_of_experts_equal_pefts_merged_weights(tmp_path: Path, build: Any, case: dict[str, Any]) -> None:
    base = build()
    if build is gpt_oss:
        names = [name.replace("mlp.gate.", "mlp.router.") for name in case["target_parameters"]]
        case = case | {"target_parameters": names}
    adapt(base, tmp_path, **{"target_modules": []} | case)
    expected = changes(base, tmp_path)
    whole = {}
    for name, change in expected.items():
        above, _, leaf = name.rpartition(".")
        if change.any() and change.ndim == 3:
            each = change.mT if build is gpt_oss else change
            whole |= {f"{above}.{number}.{leaf}": matrix for number, matrix in enumerate(each)}
        elif change.any():
            whole[name.removesuffix(".weight")] = change
    updates = load(tmp_path).updates()
    assert set(updates) == set(whole)
    for module, update in updates.items():
        assert update.dense() == near(whole[module], terms=update.rank + 2)


def qwen() -> nn.Module:
    """Return a model whose files have the weights of gate and up apart, by expert."""
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "moe_intermediate_size": INNER, "num_hidden_layers": 2, "num_experts": EXPERTS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "num_experts_per_tok": 2}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(vocab_size=64, **sizes | heads))


@pytest.mark.parametrize("build", [mixtral, gpt_oss, lambda: gpt_oss(HIDDEN), qwen])
def test_experts_are_compared_with_their_base(tmp_path: Path, build: Any) -> None:
    base = build()
    base.save_pretrained(tmp_path / "base")
    adapt(base, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=[GATE_UP, DOWN], r=2)
    merged = changes(base, tmp_path / "adapter")
    item = inspect(load(tmp_path / "adapter", tmp_path / "base"))
    table = item.run.summary().set_index("module")
    assert not [line for line in item.findings if "not in the base" in line]
    assert item.modules["neuron_median"].notna().all()
    for layer in (0, 1):
        for leaf in ("gate_up_proj", "down_proj"):
            name = f"model.layers.{layer}.mlp.experts.{leaf}"
            before = base.get_parameter(name).detach().double()
            for expert in range(EXPERTS):
                row = table.loc[f"model.layers.{layer}.mlp.experts.{expert}.{leaf}"]
                norm = (before + merged[name])[expert].norm()
                assert row["weight_norm"] == near(norm, terms=TINY)
                ratio = merged[name][expert].norm() / before[expert].norm()
                assert row["relative_update"] == near(ratio, terms=TINY)


@pytest.mark.parametrize("build", [mixtral, gpt_oss, qwen])
def test_doctor_finds_experts_in_the_base_and_in_the_merged_model(
    tmp_path: Path, build: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    base = build()
    base.save_pretrained(tmp_path / "base")
    names = [GATE_UP, DOWN, *(["mlp.router.weight"] if build is gpt_oss else ["mlp.gate.weight"])]
    adapt(base, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=names, r=2)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    folders = [str(tmp_path / "adapter"), "--base", str(tmp_path / "base")]
    capsys.readouterr()
    main(["doctor", *folders, "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["applied"] == told["modules"] == 2 * (2 + 2 * EXPERTS)
    code = main(["doctor", *folders, "--merged", str(tmp_path / "merged"), "--json"])
    told = json.loads(capsys.readouterr().out)
    verdicts = {each["module"]: each["verdict"] for each in told["modules"]}
    assert {"merged"} <= set(verdicts.values()) <= {"merged", "consistent"}
    assert code == (3 if "consistent" in verdicts.values() else 0)
    assert not told["findings"]


def test_experts_are_read_in_pefts_order(tmp_path: Path) -> None:
    """Experts are rows of A, but every second column of B: a worked example, and PEFT's own output for it."""
    A = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]], "f4")
    tensors = {"m.experts.lora_A.weight": A, "m.experts.lora_B.weight": np.array([[1, 2, 3, 4]], "f4")}
    save_file({f"base_model.model.{name}": value for name, value in tensors.items()}, tmp_path / WEIGHTS)
    write_json(tmp_path / CONFIG, {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": ["experts.w"]})
    updates = load(tmp_path).updates()
    assert {name: update.dense().tolist() for name, update in updates.items()} == {
        "m.experts.0.w": [[1, 3, 0]],
        "m.experts.1.w": [[4, 4, 6]],
    }


def test_experts_of_older_peft_are_transposed(tmp_path: Path) -> None:
    """PEFT 0.17 and 0.18 gave lora_A the outputs of (out, in) experts, and lora_B their inputs."""
    base = mixtral()
    base.save_pretrained(tmp_path / "base")
    adapt(base, tmp_path / "adapter", target_modules=[], target_parameters=[DOWN], r=2, lora_alpha=2)
    merged, tensors = changes(base, tmp_path / "adapter"), load_file(tmp_path / "adapter" / WEIGHTS)
    swapped = {}
    for name, B in tensors.items():
        if "lora_B" in name:
            A = tensors[name.replace("lora_B", "lora_A")]
            by_component = A.reshape(EXPERTS, 2, INNER).swapaxes(0, 1).reshape(-1, INNER)
            by_expert = B.reshape(HIDDEN, 2, EXPERTS).transpose(2, 1, 0).reshape(-1, HIDDEN)
            swapped |= {name: np.ascontiguousarray(by_component.T), name.replace("lora_B", "lora_A"): by_expert}
    save_file(swapped, tmp_path / "adapter" / WEIGHTS)
    run = load(tmp_path / "adapter", tmp_path / "base")
    assert len(run.updates()) == len(run.summary()) == 2 * EXPERTS
    for row in run.summary().to_dict("records"):
        layer, expert = row["layer"], int(row["module"].split(".")[-2])
        name = f"model.layers.{layer}.{DOWN}"
        change = merged[name][expert]
        assert run.updates()[row["module"]].dense() == near(change.T, terms=TINY)
        after = base.get_parameter(name).detach()[expert] + change
        assert row["weight_norm"] == near(after.norm(), terms=TINY)


def dense(folder: Path) -> dict[str, np.ndarray]:
    return {name: update.dense() for name, update in load(folder).updates().items()}


def test_unsloths_order_is_read_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapt(mixtral(), tmp_path, target_modules=[], target_parameters=[DOWN], r=2)
    assert not load(tmp_path).files.notes
    (tmp_path / "README.md").write_text("Trained 2x faster with Unsloth", encoding="utf-8")
    (note,) = load(tmp_path).files.notes
    assert "Unsloth is named in the files" in note
    assert f"{LAYOUT}=grouped_by_expert" in note
    for command in ("inspect", "doctor"):
        assert main([command, str(tmp_path)]) == 0
        assert "Unsloth is named in the files" in capsys.readouterr().out
    plain = dense(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    for name, B in tensors.items():
        if "lora_B" in name:  # from one order of the columns to the other
            tensors[name] = np.ascontiguousarray(B.reshape(len(B), 2, EXPERTS).swapaxes(1, 2).reshape(B.shape))
    save_file(tensors, tmp_path / WEIGHTS)
    scrambled = dense(tmp_path)
    monkeypatch.setenv(LAYOUT, "grouped_by_expert")
    assert len(plain) == 2 * EXPERTS
    for name, grouped in dense(tmp_path).items():
        assert (grouped == plain[name]).all()
        assert np.linalg.norm(scrambled[name] - grouped) > 0.5 * np.linalg.norm(grouped)


@pytest.mark.parametrize(("version", "warned"), [("0.18.1", True), (None, True), ("0.19.0", False), ("1.0", False)])
def test_square_experts_of_older_peft_have_a_caution(tmp_path: Path, version: str | None, warned: bool) -> None:
    adapt(mixtral(intermediate_size=HIDDEN), tmp_path, target_modules=[], target_parameters=[GATE_UP, DOWN])
    config = json.loads((tmp_path / CONFIG).read_text(encoding="utf-8"))
    write_json(tmp_path / CONFIG, config | {"peft_version": version})
    notes = [note for note in load(tmp_path).files.notes if "PEFT < 0.19" in note]
    assert len(notes) == warned
    assert all("model.layers.0.mlp.experts.down_proj and 1 more" in note for note in notes)


def test_every_expert_has_a_row_with_layer_and_role(tmp_path: Path) -> None:
    adapt(mixtral(), tmp_path, target_modules=["q_proj"], **CASES["patterns"])
    item = inspect(load(tmp_path))
    assert not [line for line in item.findings if "matches no module" in line]
    assert "12 of 14 modules are experts in one tensor, 3 per parameter" in item.findings
    table = item.modules.set_index("module")
    own = table.loc["model.layers.1.mlp.experts.2.down_proj"]
    assert (own["layer"], own["role"], own["rank"]) == (1, "ffn_out", 3)
    assert own["parameters"] == 3 * (HIDDEN + INNER)
    assert dict(table.groupby(["layer", "role"], observed=True).size()) == {
        (layer, role): count for layer in (0, 1) for role, count in (("q", 1), ("ffn_in", 3), ("ffn_out", 3))
    }
    stored = load_file(tmp_path / WEIGHTS)
    assert table["parameters"].sum() == sum(tensor.size for tensor in stored.values())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"r": 5}, r"experts.gate_up_proj must have rank 5 .*, got lora_A \(6, 16\) and lora_B \(48, 6\)"),
        ({"target_parameters": [GATE_UP]}, r"mlp.experts must have factors of each target parameter .*, got 2"),
        ({"target_parameters": "experts"}, "target_parameters"),
        ({"target_parameters": ["x.y"]}, "must have rank 2"),
    ],
)
def test_contradicting_configuration_raises(tmp_path: Path, edit: dict[str, Any], message: str) -> None:
    adapt(mixtral(), tmp_path, target_modules=[], target_parameters=[GATE_UP, DOWN], r=2)
    config = json.loads((tmp_path / CONFIG).read_text(encoding="utf-8"))
    write_json(tmp_path / CONFIG, config | edit)
    with pytest.raises(ValueError, match=message) as raised:
        load(tmp_path)
    assert "\n" not in str(raised.value)


def test_export_of_experts_raises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapt(mixtral(), tmp_path, target_modules=[], target_parameters=[GATE_UP, DOWN], r=2)
    assert main(["export", str(tmp_path), "--rank-pattern"]) == 2
    assert "experts in one tensor" in capsys.readouterr().err
