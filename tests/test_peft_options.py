"""Options of PEFT's LoRA, compared with the weights that PEFT merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from merged import adapt, changes
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from peft.tuners.lora.variants import QALoraLinearVariant
from safetensors.torch import load_file, save_file
from tiny import tiny
from tolerance import TINY, near
from torch import nn

from lorascope.cli.main import main
from lorascope.diagnosis.doctor import diagnose
from lorascope.diagnosis.inspection import inspect
from lorascope.diagnosis.runtimes.runtime import apply_adapter
from lorascope.files.safetensors_io import read_json
from lorascope.files.whole_files import write_json
from lorascope.formats.peft_config import CONFIG, WEIGHTS
from lorascope.runs.adapter import Adapter
from lorascope.runs.loading import load

QV = ["q_proj", "v_proj"]


def configure(folder: Path, **changes: Any) -> None:
    """Change the configuration of an adapter."""
    write_json(folder / CONFIG, read_json(folder / CONFIG, dict[str, Any]) | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"init_lora_weights": "pissa"}, "initialized by pissa: PEFT subtracts the leading singular components"),
        ({"init_lora_weights": "pissa_niter_16"}, "initialized by pissa_niter_16"),
        ({"init_lora_weights": "olora"}, "QR decomposition"),
        ({"init_lora_weights": "corda"}, "calibration data"),
        ({"init_lora_weights": "loftq"}, "quantized"),
        ({"alora_invocation_tokens": [3, 4]}, "Activated LoRA: the update applies only from the invocation tokens"),
        ({"use_dora": False}, None),
        ({"init_lora_weights": "gaussian"}, None),
        ({"init_lora_weights": False}, None),
    ],
)
def test_cautions_are_shown_by_inspect_and_doctor(
    tmp_path: Path, changes: dict[str, Any], words: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    adapt(tiny("llama"), tmp_path, target_modules=QV)
    configure(tmp_path, **changes)
    notes = load(tmp_path).files.notes
    assert len(notes) == (words is not None)
    for command in ("inspect", "doctor"):
        assert main([command, str(tmp_path)]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert all(note in shown for note in notes)
        assert words is None or words in shown


class Layers(nn.Module):
    """A model with nn.MultiheadAttention, convolutions and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2))
        self.line, self.image, self.volume = nn.Conv1d(3, 4, 2), nn.Conv2d(3, 4, 3), nn.Conv3d(3, 4, 2)
        self.table = nn.Embedding(9, 8)


def require_equal(base: nn.Module, folder: Path, names: dict[str, str] | None = None) -> Adapter:
    """Compare every update with PEFT's change of the weight; ``names`` maps modules to parameters."""
    base.eval()
    folder.with_name("base").mkdir()
    save_file(
        {name: value.clone() for name, value in base.state_dict().items()},
        folder.with_name("base") / "model.safetensors",
    )
    run, merged = load(folder, folder.with_name("base")), changes(base, folder)
    changed = {name for name, change in merged.items() if change.any()}
    assert len(run.updates()) == len(changed)
    for module, update in run.updates().items():
        change = merged[(names or {}).get(module, f"{module}.weight")].flatten(1)
        expected = change.T if run.files.parts[module].transposed else change
        assert update.dense() == near(expected, terms=TINY)
        assert run.summary().set_index("module").loc[module, "update_norm"] == near(change.norm(), terms=TINY)
    assert apply_adapter(run.files, run.base, "peft").findings == ()
    return run


BLOCKS = BdLoraConfig(
    target_modules_bd_a=["o_proj"], target_modules_bd_b=["0.self_attn.q"], nblocks=2, match_strict=False
)
OPTIONS: dict[str, tuple[nn.Module, dict[str, Any]]] = {
    "BD-LoRA": (tiny("llama"), {"target_modules": ["q_proj", "o_proj"], "r": 4, "use_bdlora": BLOCKS}),
    "KaSA": (tiny("llama"), {"target_modules": [*QV, "up_proj"], "r": 3, "kasa_config": KasaConfig()}),
    "VeLoRA": (tiny("llama"), {"target_modules": QV, "r": 3, "velora_config": VeloraConfig()}),
    "MonteCLoRA": (tiny("llama"), {"target_modules": QV, "r": 3, "monteclora_config": MontecloraConfig()}),
    "convolution": (Layers(), {"target_modules": ["line", "image", "volume"], "r": 2}),
    "DoRA": (Layers(), {"target_modules": ["line", "image", "volume", "table"], "r": 2, "use_dora": True}),
}


@pytest.mark.parametrize(("base", "config"), OPTIONS.values(), ids=OPTIONS)
def test_updates_equal_pefts_change(tmp_path: Path, base: nn.Module, config: dict[str, Any]) -> None:
    adapt(base, tmp_path / "adapter", **config)
    require_equal(base, tmp_path / "adapter")


def test_kasa_without_a_base_has_the_trained_product(tmp_path: Path) -> None:
    base, config = OPTIONS["KaSA"]
    adapt(base, tmp_path, **config)
    run, name = load(tmp_path), "model.layers.0.self_attn.q_proj"
    A, B, diagonal = (
        load_file(tmp_path / WEIGHTS)[f"base_model.model.{name}.lora_{part}"].double()
        for part in ("A.weight", "B.weight", "diag")
    )
    assert run.updates()[name].dense() == near(8 / 3 * B @ diagonal.diag() @ A, terms=TINY)
    assert any("add --base DIR" in note for note in run.files.notes)


def test_qalora_equals_pefts_forward_pass(tmp_path: Path) -> None:
    """PEFT applies QALoRA only to GPTQ bases, so the layer of PEFT is prepared by hand."""
    group = 4
    model = adapt(tiny("llama"), tmp_path, target_modules=["q_proj"], r=3, lora_alpha=5, use_qalora=True)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    settings = model.peft_config["default"]
    settings.qalora_group_size = group
    QALoraLinearVariant.init(layer, "default", settings)
    factors = {name: getattr(layer, f"lora_{name}")["default"].weight.detach() for name in "AB"}
    stored = {f"base_model.model.q_proj.lora_{name}.weight": value for name, value in factors.items()}
    save_file(stored, tmp_path / WEIGHTS)
    configure(tmp_path, qalora_group_size=group)
    run = load(tmp_path)
    columns = QALoraLinearVariant.forward(layer, "default", torch.eye(32), torch.zeros(32, 32)).T
    assert run.files.kind == "QALoRA"
    assert run.updates()["q_proj"].dense() == near(columns, terms=TINY)
    assert run.summary()["update_norm"].item() == near(columns.norm(), terms=TINY)


def test_attention_has_its_two_projections(tmp_path: Path) -> None:
    base, settings = Layers(), {"r": 2, "rank_pattern": {"layers.1.self_attn": 3}, "alpha_pattern": {"self_attn": 5}}
    adapt(base, tmp_path / "adapter", target_modules=["self_attn"], **settings)
    names = {f"layers.{number}.self_attn.in_proj": f"layers.{number}.self_attn.in_proj_weight" for number in (0, 1)}
    run = require_equal(base, tmp_path / "adapter", names)
    assert run.ranks() == {
        f"layers.{number}.self_attn.{leaf}": 2 + number for number in (0, 1) for leaf in ("in_proj", "out_proj")
    }
    table = run.summary()
    assert list(table["role"]) == ["o", "qkv"] * 2
    assert table["relative_update"].notna().all()
    assert not {"unmatched"} & {finding.cause for finding in diagnose(run)}


def test_tied_head_is_counted_once(tmp_path: Path) -> None:
    base = tiny("llama", tie_word_embeddings=True)
    adapt(base, tmp_path / "adapter", target_modules=["embed_tokens"], ensure_weight_tying=True)
    base.save_pretrained(tmp_path / "base")
    run, change = load(tmp_path / "adapter", tmp_path / "base"), changes(base, tmp_path / "adapter")
    (update,) = run.updates().values()
    # PEFT merges the update of both names into the one weight; before merging, each name has it once.
    assert update.dense() == near(change["model.embed_tokens.weight"].T / 2, terms=TINY)
    (note,) = run.files.notes
    assert note.startswith("lm_head is tied to model.embed_tokens: their update is one, and is counted once")
    assert not diagnose(run)


def test_two_updates_of_a_tied_weight_are_both_counted(tmp_path: Path) -> None:
    base = tiny("llama", tie_word_embeddings=True)
    adapt(base, tmp_path / "adapter", target_modules=["embed_tokens", "lm_head"])
    base.save_pretrained(tmp_path / "base")
    run = load(tmp_path / "adapter", tmp_path / "base")
    assert list(run.updates()) == ["model.embed_tokens", "lm_head"]
    assert [finding.cause for finding in diagnose(run)] == ["tied-twice"]


@pytest.mark.parametrize("use_dora", [False, True])
def test_replicated_layers_are_compared_with_their_source(tmp_path: Path, use_dora: bool) -> None:
    base = tiny("llama")
    stack = [0, 1, 1]
    adapted = adapt(
        base, tmp_path / "adapter", target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]], use_dora=use_dora
    )
    base.save_pretrained(tmp_path / "base")
    run = load(tmp_path / "adapter", tmp_path / "base")
    table = run.summary().set_index("module")
    for place, source in enumerate(stack):
        module, weight = f"model.layers.{place}.self_attn.q_proj", f"model.layers.{source}.self_attn.q_proj.weight"
        before = base.get_parameter(weight).detach()
        layer = adapted.base_model.model.get_submodule(module)
        layer.get_base_layer().weight = nn.Parameter(before.clone())  # the copies share it: merge one at a time
        layer.merge()
        change = layer.get_base_layer().weight.detach() - before
        assert run.updates()[module].dense() == near(change, terms=TINY)
        assert table.loc[module, "relative_update"] == near(change.norm() / before.norm(), terms=TINY)
    (note,) = run.files.notes
    assert "a stack of 3 copies of base layers (0, 1, 1)" in note
    configure(tmp_path / "adapter", layer_replication=[[0, 2]])
    with pytest.raises(ValueError, match="must be < 2, the layers of layer_replication, got 2"):
        load(tmp_path / "adapter")


WEIGHTS_BESIDE: dict[str, tuple[str, dict[str, Any], dict[str, Any], str, str]] = {
    "saved": ("llama", {}, {"modules_to_save": ["lm_head"]}, "lm_head", "saved as full weights: {}, 2,048 parameters"),
    "tokens": (
        "llama",
        {},
        {"trainable_token_indices": [9, 1]},
        "model.embed_tokens",
        "rows of single tokens: {}, 64 p",
    ),
    "tokens by module": (
        "llama",
        {},
        {"trainable_token_indices": {"lm_head": [5, 2, 7]}},
        "lm_head",
        "rows of single tokens: {}, 96 parameters",
    ),
    "tied tokens": (
        "llama",
        {"tie_word_embeddings": True},
        {"trainable_token_indices": [9, 1]},
        "model.embed_tokens",
        "rows of single tokens: {}, 64 parameters",
    ),
}


@pytest.mark.parametrize(("family", "sizes", "config", "module", "line"), WEIGHTS_BESIDE.values(), ids=WEIGHTS_BESIDE)
def test_whole_weights_are_measured_as_pefts_change(
    tmp_path: Path, family: str, sizes: dict[str, Any], config: dict[str, Any], module: str, line: str
) -> None:
    base = tiny(family, **sizes)
    base.save_pretrained(tmp_path / "base")
    adapt(base, tmp_path / "adapter", target_modules=["q_proj"], **config)
    change = changes(base, tmp_path / "adapter")[f"{module}.weight"]
    before = base.get_submodule(module).weight.detach()[change.any(1)].norm()
    found = inspect(load(tmp_path / "adapter", tmp_path / "base")).findings
    norm = float(change.norm())
    expected = f"{line.format(module)}"
    (shown,) = (each for each in found if each.startswith(expected))
    assert shown.endswith(f"|dW| {norm:.3g} ({100 * norm / float(before):.3g}% of |W|)")
    (alone,) = (each for each in inspect(load(tmp_path / "adapter")).findings if module in each)
    assert alone.endswith(f"not measured without a base: {module}")


def test_copies_of_the_base_are_named(tmp_path: Path) -> None:
    base = tiny("llama")
    base.save_pretrained(tmp_path / "base")
    adapt(base, tmp_path / "adapter", target_modules=["embed_tokens", "lm_head"])
    alone, both = (inspect(load(tmp_path / "adapter", each)).findings for each in (None, tmp_path / "base"))
    assert "copies of base weights, 4,096 parameters, equal to the base: lm_head and 1 more" in both
    assert "saved with their base weight, 4,096 parameters, not measured without a base: lm_head and 1 more" in alone


def test_biases_are_counted(tmp_path: Path) -> None:
    base = tiny("bert")
    adapt(base, tmp_path / "only", target_modules=["query"], bias="lora_only")
    base.save_pretrained(tmp_path / "base")
    change = [c for name, c in changes(base, tmp_path / "only").items() if name.endswith("bias")]
    norm = sum(float(each.square().sum()) for each in change) ** 0.5
    query = "bert.encoder.layer.0.attention.self.query"
    known = inspect(load(tmp_path / "only", tmp_path / "base")).findings
    assert f"biases, 64 parameters, |db| {norm:.3g}: {query} and 1 more" in known
    assert f"biases, 64 parameters, not measured: {query} and 1 more" in inspect(load(tmp_path / "only")).findings
    adapt(base, tmp_path / "update", target_modules=["query"], lora_bias=True)
    merged = changes(base, tmp_path / "update")
    norm = sum(float(change.square().sum()) for name, change in merged.items() if name.endswith("bias")) ** 0.5
    line = f"bias updates (lora_bias), 64 parameters, norm {norm:.3g}: {query} and 1 more"
    assert line in inspect(load(tmp_path / "update")).findings


def test_rows_of_tokens_that_contradict_the_configuration_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapt(tiny("llama"), tmp_path, target_modules=["q_proj"], trainable_token_indices=[9, 1])
    configure(tmp_path, trainable_token_indices=[1])
    assert main(["inspect", str(tmp_path)]) == 2
    assert "must be those of trainable_token_indices (1), got 2 rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 3}}, "must have rank 8 and 3 blocks"),
        ({"use_bdlora": {"target_modules_bd_a": "q_proj"}}, "target_modules_bd_a"),
        (
            {"use_bdlora": {"target_modules_bd_b": ["q_proj"], "nblocks": 2}},
            r"got lora_A \(8, 32\) and lora_B \(32, 8\)",
        ),
        ({"use_qalora": True, "qalora_group_size": 10**7}, r"lora_A of .* each <= \d+, .* got shape \(8, 320000000\)"),
        ({"use_qalora": True, "qalora_group_size": 0}, "qalora_group_size"),
        ({"kasa_config": {"beta": 1}}, "has lora_A and lora_B but no lora_diag"),
        ({"layer_replication": [[0, 10**9]]}, "layer_replication must have <= 10000 layers"),
        ({"layer_replication": [[-1, 2]]}, "layer_replication"),
        ({"layer_replication": 3}, "layer_replication"),
        ({"r": 1, "target_parameters": ["q_proj.x"], "lora_alpha": "2"}, "lora_alpha"),
    ],
)
def test_contradicting_options_are_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    adapt(tiny("llama"), tmp_path, target_modules=["q_proj"])
    configure(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as raised:
        load(tmp_path)
    assert "\n" not in str(raised.value)
    assert main(["inspect", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_too_many_experts_are_refused(tmp_path: Path) -> None:
    names = (f"base_model.model.m.experts.lora_{name}.weight" for name in "AB")
    save_file(dict(zip(names, (torch.ones(10_001, 1), torch.ones(1, 10_001)), strict=True)), tmp_path / WEIGHTS)
    write_json(tmp_path / CONFIG, {"peft_type": "LORA", "r": 1, "target_parameters": ["experts.w"]})
    with pytest.raises(ValueError, match=r"m\.experts\.w must have <= 10000 experts, got 10001"):
        load(tmp_path)
