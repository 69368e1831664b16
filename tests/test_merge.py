"""Check of merged models: PEFT's own merges are sound, and every seeded fault is named."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from planted import plant_spectra
from safetensors.torch import load_file, save_file
from tiny import tiny
from transformers import AutoModelForCausalLM

from lorascope.cli.main import main
from lorascope.diagnosis.merge import MergeCheck, check_merge
from lorascope.files.small_floats import round_to_dtype
from lorascope.formats.pretrained_weights import PretrainedWeights
from lorascope.runs.loading import load_adapter

LORA = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "o_proj"]}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Weights = dict[str, torch.Tensor]


def loaded(folder: Path, dtype: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])


def write(folder: Path, family: str = "llama", dtype: str = "float32", size: float = 0.01, config: Any = None) -> Path:
    """Write a base and an adapter with drawn factors, whose update is about ``size`` of the weights."""
    torch.manual_seed(0)
    tiny(family).to(DTYPES[dtype]).save_pretrained(folder / "base")
    adapted = peft.get_peft_model(loaded(folder / "base", dtype), config or peft.LoraConfig(**LORA))
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "magnitude" not in name and "lora_A" not in name:
            torch.nn.init.normal_(parameter, std=size)
    adapted.save_pretrained(folder / "adapter")
    return folder


def by_peft(folder: Path, dtype: str, adapter: str = "adapter", out: str = "merged", **options: Any) -> Path:
    """Merge with PEFT, and return the folder of the merged model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(loaded(folder / "base", dtype), str(folder / adapter))
        model.merge_and_unload(**options).save_pretrained(folder / out)
    return folder / out


def checked(folder: Path, merged: str = "merged") -> MergeCheck:
    return check_merge(load_adapter(folder / "adapter", folder / "base"), PretrainedWeights(folder / merged))


def verdicts(check: MergeCheck) -> set[str]:
    return {each.verdict for each in check.modules}


SOUND: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *((f"{dtype}, safe_merge={safe}, size {size:g}", {"dtype": dtype, "size": size}, {"safe_merge": safe})
      for dtype in DTYPES for safe in (False, True) for size in (0.5, 0.01)),
    ("rsLoRA", {"config": peft.LoraConfig(**LORA | {"use_rslora": True})}, {}),
    ("rank_pattern", {"config": peft.LoraConfig(**LORA | {"rank_pattern": {"q_proj": 2}})}, {}),
    ("alpha_pattern", {"config": peft.LoraConfig(**LORA | {"alpha_pattern": {"q_proj": 2}}), "dtype": "bfloat16"}, {}),
    ("Conv1D", {"family": "gpt2", "config": peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn"],
                                                            fan_in_fan_out=True)}, {}),
    ("DoRA", {"config": peft.LoraConfig(**LORA | {"use_dora": True})}, {}),
    ("DoRA, bfloat16", {"config": peft.LoraConfig(**LORA | {"use_dora": True}), "dtype": "bfloat16"}, {}),
    ("AdaLoRA", {"config": peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=9)}, {}),
    ("VeRA", {"config": peft.VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])}, {}),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("given", "options"), [pytest.param(*row, id=name) for name, *row in SOUND])
def test_merge_of_peft_is_sound(given: dict[str, Any], options: dict[str, Any], tmp_path: Path) -> None:
    """Whether it is proved as well depends on the order in which torch sums on this processor."""
    write(tmp_path, **given)
    by_peft(tmp_path, given.get("dtype", "float32"), **options)
    check = checked(tmp_path)
    assert check.findings == ()
    assert check.modules
    assert verdicts(check) <= {"merged", "consistent"}


def by_numpy(folder: Path, dtype: str, safe: bool = False) -> None:
    """Merge with the sums of numpy and the roundings of torch."""
    weights = load_file(folder / "base" / "model.safetensors")
    factors = load_file(folder / "adapter" / "adapter_model.safetensors")
    for name in [name for name in factors if "lora_A" in name]:
        A, B = (factors[name.replace("lora_A", side)].float().numpy() for side in ("lora_A", "lora_B"))
        d = torch.from_numpy((B @ A) * np.float32(3.0))  # 12 / 4
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        W = weights[f"{module}.weight"].float()
        weights[f"{module}.weight"] = (W + (d.to(DTYPES[dtype]).float() if safe else d)).to(DTYPES[dtype])
    shutil.copytree(folder / "base", folder / "merged")
    save_file(weights, folder / "merged" / "model.safetensors")


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_weights_are_proved(dtype: str, safe: bool, tmp_path: Path) -> None:
    write(tmp_path, dtype=dtype, size=0.5)
    by_numpy(tmp_path, dtype, safe)
    check = checked(tmp_path)
    assert verdicts(check) == {"merged"}
    assert check.is_conclusive


@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_in_another_order_is_consistent(dtype: str, tmp_path: Path) -> None:
    """A merge in float64, as another device would round it, is within one unit in the last place."""
    write(tmp_path, dtype=dtype, size=0.5)
    adapter = load_adapter(tmp_path / "adapter", tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    for module, update in adapter.updates().items():
        W = weights[f"{module}.weight"]
        weights[f"{module}.weight"] = (W.double() + torch.from_numpy(update.dense())).to(W.dtype)
    shutil.copytree(tmp_path / "base", tmp_path / "merged")
    save_file(weights, tmp_path / "merged" / "model.safetensors")
    check = checked(tmp_path)
    assert check.findings == ()
    assert verdicts(check) <= {"merged", "consistent"}


def changed_config(**config: Any) -> Callable[[Path, str], None]:
    """Return a fault: the adapter is merged with another configuration."""

    def fault(folder: Path, dtype: str) -> None:
        shutil.copytree(folder / "adapter", folder / "other")
        file = folder / "other" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | config), encoding="utf-8")
        by_peft(folder, dtype, "other")

    return fault


def changed_weights(change: Callable[[Weights, Weights], Weights]) -> Callable[[Path, str], None]:
    """Return a fault: the weights of a sound merge are changed, given those of the base."""

    def fault(folder: Path, dtype: str) -> None:
        file = by_peft(folder, dtype) / "model.safetensors"
        save_file(change(load_file(file), load_file(folder / "base" / "model.safetensors")), file)

    return fault


def changed_adapter(change: Callable[[Weights], Weights]) -> Callable[[Path, str], None]:
    """Return a fault: an adapter with other tensors is merged."""

    def fault(folder: Path, dtype: str) -> None:
        shutil.copytree(folder / "adapter", folder / "other")
        file = folder / "other" / "adapter_model.safetensors"
        save_file(change(load_file(file)), file)
        by_peft(folder, dtype, "other")

    return fault


def twice(merged: Weights, base: Weights) -> Weights:
    return {name: (2 * W.float() - base[name].float()).to(W.dtype) if W.dtype == torch.float32
            else W for name, W in merged.items()}  # fmt: skip


def merged_again(folder: Path, dtype: str) -> None:
    by_peft(folder, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(loaded(folder / "merged", dtype), str(folder / "adapter"))
        model.merge_and_unload().save_pretrained(folder / "merged")


def not_merged(folder: Path, dtype: str) -> None:
    shutil.copytree(folder / "base", folder / "merged")


def one_layer_missing(merged: Weights, base: Weights) -> Weights:
    return {name: base[name].clone() if ".layers.1." in name else W for name, W in merged.items()}


def swapped_layers(tensors: Weights) -> Weights:
    swap = {".layers.0.": ".layers.1.", ".layers.1.": ".layers.0."}
    return {next((name.replace(old, new) for old, new in swap.items() if old in name), name): tensor
            for name, tensor in tensors.items()}  # fmt: skip


def another_seed(tensors: Weights) -> Weights:
    torch.manual_seed(9)
    return {name: torch.randn_like(tensor) * tensor.std() for name, tensor in tensors.items()}


def negative(tensors: Weights) -> Weights:
    return {name: -tensor if "lora_B" in name else tensor for name, tensor in tensors.items()}


def transposed(merged: Weights, base: Weights) -> Weights:
    own = [name for name in merged if name.endswith(("q_proj.weight", "o_proj.weight"))]
    return merged | {name: (base[name].float() + (merged[name].float() - base[name].float()).T).to(base[name].dtype)
                     for name in own}  # fmt: skip


def through(dtype: torch.dtype) -> Callable[[Weights, Weights], Weights]:
    return lambda merged, base: {name: W.to(dtype).to(W.dtype) for name, W in merged.items()}


def another_weight(merged: Weights, base: Weights) -> Weights:
    return merged | {name: W + 0.1 for name, W in merged.items() if "layers.0.mlp.up_proj" in name}


BIG = {"size": 0.5}
FAULTS: list[tuple[str, dict[str, Any], Callable[[Path, str], None], set[str]]] = [
    *((f"not merged, {dtype}, {size:g}", {"dtype": dtype, "size": size}, not_merged, {"merge-not-merged"})
      for dtype in DTYPES for size in (0.5, 0.01)),
    *((f"merged twice, {dtype}, {size:g}", {"dtype": dtype, "size": size}, merged_again, {"merge-wrong-scale"})
      for dtype in DTYPES for size in (0.5, 0.01)),
    ("alpha doubled", BIG, changed_config(lora_alpha=24), {"merge-wrong-scale"}),
    ("alpha of a third", BIG | {"dtype": "bfloat16"}, changed_config(lora_alpha=4), {"merge-wrong-scale"}),
    ("alpha of a third, small", {"dtype": "bfloat16"}, changed_config(lora_alpha=4), {"merge-wrong-scale"}),
    ("rsLoRA instead", BIG, changed_config(use_rslora=True), {"merge-wrong-scale"}),
    ("subtracted", BIG | {"dtype": "float16"}, changed_adapter(negative), {"merge-wrong-scale"}),
    ("a layer missing", BIG | {"dtype": "bfloat16"}, changed_weights(one_layer_missing), {"merge-not-merged"}),
    ("layers swapped", BIG, changed_adapter(swapped_layers), {"merge-another-module"}),
    ("layers swapped, bfloat16", BIG | {"dtype": "bfloat16"}, changed_adapter(swapped_layers),
     {"merge-another-module"}),
    ("another adapter", BIG, changed_adapter(another_seed), {"merge-wrong-adapter"}),
    ("transposed", BIG, changed_weights(transposed), {"merge-wrong-adapter"}),
    ("through bfloat16", BIG, changed_weights(through(torch.bfloat16)), {"merge-rounded", "merge-other-weights"}),
    ("through float16", BIG, changed_weights(through(torch.float16)), {"merge-rounded", "merge-other-weights"}),
    ("another weight changed", BIG, changed_weights(another_weight), {"merge-other-weights"}),
    ("a target fewer", BIG, changed_config(target_modules=["q_proj"]), {"merge-not-merged"}),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("given", "fault", "causes"), [pytest.param(*row, id=name) for name, *row in FAULTS])
def test_fault_is_named(
    given: dict[str, Any], fault: Callable[[Path, str], None], causes: set[str], tmp_path: Path
) -> None:
    write(tmp_path, **given)
    fault(tmp_path, given.get("dtype", "float32"))
    check = checked(tmp_path)
    assert {finding.cause for finding in check.findings} == causes, check.modules


def test_scale_is_measured(tmp_path: Path) -> None:
    write(tmp_path, size=0.5)
    changed_config(use_rslora=True)(tmp_path, "float32")
    (finding,) = checked(tmp_path).findings
    assert finding.evidence == {"modules": 4, "factor": 2.0}  # alpha / 2 instead of alpha / 4


def test_owner_of_an_update_is_named(tmp_path: Path) -> None:
    write(tmp_path, size=0.5)
    changed_adapter(swapped_layers)(tmp_path, "float32")
    (finding,) = checked(tmp_path).findings
    owner = "model.layers.0.self_attn.q_proj (that of model.layers.1.self_attn.q_proj) and 3 more"
    assert owner in finding.message


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, size=0.5)
    by_numpy(tmp_path, "float32")
    words = ["doctor", str(tmp_path / "adapter"), "--merged", str(tmp_path / "merged")]
    assert main(words) == 2
    assert "--merged requires the model before the merge: --base DIR" in capsys.readouterr().err
    words += ["--base", str(tmp_path / "base")]
    assert main(words) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out == "adapter 4 modules: 4 merged, bit by bit; other tensors: 17 equal to the base"
    not_merged_folder = tmp_path / "none"
    shutil.copytree(tmp_path / "base", not_merged_folder)
    words[3] = str(not_merged_folder)
    assert main(words) == 1
    assert "4 of 4 modules: the weight equals the weight of the base" in capsys.readouterr().out
    assert main([*words, "--json"]) == 1
    assert {row["verdict"] for row in json.loads(capsys.readouterr().out)["modules"]} == {"not merged"}


def test_merge_that_cannot_be_proved_has_its_own_exit_code(tmp_path: Path) -> None:
    write(tmp_path, config=peft.LoraConfig(**LORA | {"use_dora": True}))
    by_peft(tmp_path, "float32")
    words = ["--base", str(tmp_path / "base"), "--merged", str(tmp_path / "merged")]
    assert main(["doctor", str(tmp_path / "adapter"), *words]) == 3


def test_rounding_to_bfloat16_matches_torch() -> None:
    drawn = np.random.default_rng(0).normal(size=10_000).astype(np.float32) * 10.0 ** np.arange(-5, 5).repeat(1000)
    values = drawn.astype(np.float32)
    assert np.array_equal(round_to_dtype(values, "BF16"), torch.from_numpy(values).bfloat16().float().numpy())


def without_adapter(change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path, str], None]:
    """Return a fault of the weight ``up_proj`` of layer 0, to which no adapter belongs; None removes it."""

    def changed(merged: Weights, base: Weights) -> Weights:
        found = {name: change(W) if "layers.0.mlp.up_proj" in name else W for name, W in merged.items()}
        return {name: W for name, W in found.items() if W is not None}

    return changed_weights(changed)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "causes"),
    [
        (lambda W: W.float(), set()),
        (lambda W: W.float() + 0.1, {"merge-other-weights"}),
        (lambda W: None, {"merge-other-weights"}),
        (lambda W: W[:2], {"merge-other-weights"}),
    ],
    ids=["another dtype", "another dtype, changed", "missing", "another shape"],
)
def test_weights_without_adapter_are_all_compared(
    change: Callable[[torch.Tensor], torch.Tensor | None], causes: set[str], tmp_path: Path
) -> None:
    write(tmp_path, dtype="bfloat16", size=0.5)
    without_adapter(change)(tmp_path, "bfloat16")
    assert {finding.cause for finding in checked(tmp_path).findings} == causes


def another(folder: Path, name: str, family: str, **sizes: int) -> None:
    shutil.rmtree(folder / name)
    tiny(family, **sizes).save_pretrained(folder / name)


MODULES = {f"model.layers.{layer}.self_attn.{role}_proj" for layer in range(2) for role in "qo"}
WIDE = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}
OTHERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "base of another architecture": (lambda folder: another(folder, "base", "bert"), "not in the base"),
    "base of other sizes": (lambda folder: another(folder, "base", "llama", **WIDE), "32 x 32, in the base 64 x 64"),
    "merged model of another architecture": (
        lambda folder: another(folder, "merged", "bert"),
        "not in the merged model",
    ),
    "merged model of other sizes": (
        lambda folder: another(folder, "merged", "llama", **WIDE),
        "32 x 32, in the merged model 64 x 64",
    ),
}


@pytest.mark.parametrize("start", [True, "pissa"])
@pytest.mark.parametrize(("change", "reason"), OTHERS.values(), ids=OTHERS)
def test_another_model_is_a_finding(
    change: Callable[[Path], None], reason: str, start: bool | str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if start == "pissa" and "in the base 64" in reason and hasattr(check_merge, "__wrapped__"):
        pytest.skip("the check of the type of the updates reads one, which raises")
    write(tmp_path, config=peft.LoraConfig(**LORA, init_lora_weights=start))
    by_peft(tmp_path, "float32")
    change(tmp_path)
    capsys.readouterr()
    folders = [str(tmp_path / name) for name in ("adapter", "base", "merged")]
    assert main(["doctor", folders[0], "--base", folders[1], "--merged", folders[2], "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    (finding,) = content["findings"]
    assert (finding["id"], finding["evidence"]) == ("LS309", {"modules": 4, "of": 4})
    assert {(row["module"], row["verdict"], row["note"]) for row in content["modules"]} == {
        (module, "misfit", reason) for module in MODULES
    }
    assert content["tensors"] == []
    assert f"4 of 4 modules do not fit: model.layers.0.self_attn.q_proj ({reason}) and 3 more" == finding["message"]


def test_merged_model_without_some_modules_is_compared(tmp_path: Path) -> None:
    write(tmp_path)
    by_peft(tmp_path, "float32")
    another(tmp_path, "merged", "llama", num_hidden_layers=1)
    check = checked(tmp_path)
    misfits = {module.module for module in check.modules if module.verdict == "misfit"}
    assert misfits == {module for module in MODULES if ".1." in module}
    assert {finding.id for finding in check.findings} == {"LS306", "LS307", "LS309"}


def test_untrained_dora_is_found_with_and_without_its_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the base, the rounding of its magnitudes gives an update that is not exactly zero."""
    torch.manual_seed(0)
    tiny("llama").save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(**LORA, use_dora=True)
    peft.get_peft_model(loaded(tmp_path / "base", "float32"), config).save_pretrained(tmp_path / "adapter")
    for words in ([], ["--base", str(tmp_path / "base")]):
        assert main(["doctor", str(tmp_path / "adapter"), *words, "--json"]) == 1
        assert [each["id"] for each in json.loads(capsys.readouterr().out)["findings"]] == ["LS003"]


def test_merge_of_a_run_or_for_a_runtime_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, base = write(tmp_path), ["--base", str(tmp_path / "base"), "--merged", str(tmp_path / "base")]
    run = plant_spectra(tmp_path / "runs").path
    capsys.readouterr()
    assert main(["doctor", str(run), *base]) == 2
    assert capsys.readouterr().err == f"lorascope: --merged requires an adapter, got a run: {run}\n"
    assert main(["doctor", str(folder / "adapter"), *base, "--runtime", "vllm"]) == 2
    assert capsys.readouterr().err == "lorascope: --merged and --runtime cannot be combined: run doctor twice\n"
