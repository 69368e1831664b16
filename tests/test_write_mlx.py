"""Writer of folders of mlx-lm: its layers' arithmetic gives PEFT's update, and the way back gives the same folder."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_bits import bits, draw, peft_folder, same_updates, stored_as
from safetensors.numpy import load_file
from test_adapter_export import write as peft_adapter
from test_mlx import EXPERTS
from test_mlx import write as mlx_folder
from transformers import AutoModelForCausalLM

import lorascope as ls
from lorascope.cli.main import main

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
PAIR = (draw(1, 6, 2), draw(2, 2, 5))


def write(folder: Path, modules: Any = None, **options: Any) -> Path:
    adapter = ls.load(peft_folder(folder / "peft", modules or {Q: PAIR}, **options))
    return ls.export.convert(adapter, folder / "mlx", "mlx")


def layer(folder: Path, module: str, x: np.ndarray) -> np.ndarray:
    """Compute what mlx-lm's LoRALinear adds: scale * (x @ lora_a) @ lora_b."""
    tensors = load_file(folder / "adapters.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())["lora_parameters"]
    a, b = tensors[f"{module}.lora_a"], tensors[f"{module}.lora_b"]
    assert a.shape[1] == b.shape[0] == config["rank"]
    return config["scale"] * ((x.astype(np.float64) @ a) @ b)


def test_arithmetic_of_the_layer_gives_the_update(tmp_path: Path) -> None:
    x = draw(3, 4, 5)
    assert layer(write(tmp_path), Q, x) == pytest.approx(1.5 * x.astype(float) @ PAIR[1].T @ PAIR[0].T)


def test_configuration_names_the_modules_inside_a_layer(tmp_path: Path) -> None:
    folder = write(tmp_path, {Q: PAIR, V: PAIR, "lm_head": PAIR}, revision="main")
    assert json.loads((folder / "adapter_config.json").read_text()) == {
        "model": "org/base",
        "fine_tune_type": "lora",
        "num_layers": -1,
        "lora_parameters": {
            "rank": 2,
            "scale": 1.5,
            "dropout": 0.0,
            "keys": ["self_attn.q_proj", "self_attn.v_proj", "lm_head"],
        },
        "revision": "main",
    }


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"target_modules": ["q_proj", "embed_tokens"]},
                                     {"use_rslora": True}])  # fmt: skip
def test_way_back_gives_the_same_peft_folder(options: dict[str, Any], tmp_path: Path) -> None:
    source = peft_adapter(tmp_path, "llama", **{"rank_pattern": {}, "alpha_pattern": {}} | options)
    direct = ls.export.convert(ls.load(source), tmp_path / "direct", "peft")
    folder = ls.export.convert(ls.load(source, tmp_path / "base"), tmp_path / "mlx", "mlx")
    assert same_updates(ls.load(folder), ls.load(source))
    back = ls.export.convert(ls.load(folder), tmp_path / "back", "peft")
    stored = bits(source / "adapter_model.safetensors")
    copy = stored.pop("base_model.model.model.embed_tokens.base_layer.weight", None)
    assert bits(back / "adapter_model.safetensors") == stored
    assert (copy is None) == ("target_modules" not in options)
    assert (back / "adapter_config.json").read_bytes() == (direct / "adapter_config.json").read_bytes()
    if copy is not None:
        with pytest.raises(
            ValueError, match=r"embed_tokens.base_layer.weight; pass --base DIR to compare it with the b"
        ):
            ls.export.convert(ls.load(source), tmp_path / "unknown", "mlx")
    assert bits(ls.export.convert(ls.load(back), tmp_path / "again", "mlx") / "adapters.safetensors") == bits(
        folder / "adapters.safetensors"
    )


@pytest.mark.filterwarnings("ignore")
def test_logits_of_peft_are_the_same_after_the_way_back(tmp_path: Path) -> None:
    import peft

    source = peft_adapter(tmp_path, "llama", rank_pattern={"v_proj": 3}, alpha_pattern={"v_proj": 6, "q_proj": 32})
    folder = ls.export.convert(ls.load(source), tmp_path / "mlx", "mlx")
    back = ls.export.convert(ls.load(folder), tmp_path / "back", "peft")
    found = []
    for adapter in (source, back):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.PeftModel.from_pretrained(base, str(adapter)).double().eval()
        with torch.no_grad():
            found.append(model(torch.arange(6)[None]).logits)
    assert torch.allclose(found[0], found[1], rtol=1e-12, atol=1e-12)


def test_smaller_ranks_are_filled_and_powers_of_two_folded(tmp_path: Path) -> None:
    """Worked: scales 8/4 and 16/2 = 8; lora_b of the second is 4 times B^T, with two rows of zeros."""
    wide = (draw(3, 6, 4), draw(4, 4, 5))
    modules = {Q: wide, V: PAIR, "model.layers.2.self_attn.q_proj": wide}
    options = {"r": 4, "lora_alpha": 8, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 16}}
    folder = write(tmp_path, modules, **options)
    tensors = load_file(folder / "adapters.safetensors")
    assert np.array_equal(tensors[f"{V}.lora_b"], np.vstack([4 * PAIR[0].T, np.zeros((2, 6), np.float32)]))
    assert np.array_equal(tensors[f"{V}.lora_a"], np.hstack([PAIR[1].T, np.zeros((5, 2), np.float32)]))
    read, source = ls.load(folder).updates(), ls.load(tmp_path / "peft").updates()
    assert all(np.array_equal(read[module].dense(), source[module].dense()) for module in modules)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_dtypes_are_kept(dtype: str, tmp_path: Path) -> None:
    source = peft_folder(tmp_path / "peft", {Q: PAIR})
    stored_as(source / "adapter_model.safetensors", dtype)
    folder = ls.export.convert(ls.load(source), tmp_path / "mlx", "mlx")
    back = ls.export.convert(ls.load(folder), tmp_path / "back", "peft")
    assert bits(back / "adapter_model.safetensors") == bits(source / "adapter_model.safetensors")


def test_experts_of_mlx_are_one_module_each_in_peft(tmp_path: Path) -> None:
    from test_mlx import write as mlx_folder

    a, b = draw(1, 3, 2, 5), draw(2, 3, 6, 2)
    source = ls.load(mlx_folder(tmp_path / "mlx", {f"{EXPERTS}.lora_a": a, f"{EXPERTS}.lora_b": b}))
    back = ls.load(ls.export.convert(source, tmp_path / "peft", "peft"))
    assert same_updates(back, source)
    assert back.files.config["task_type"] == "CAUSAL_LM"
    with pytest.raises(ValueError, match=r"experts.0.up_proj is an expert$"):
        ls.export.convert(back, tmp_path / "again", "mlx")


def test_cut_and_sum_equal_the_peft_folder(tmp_path: Path) -> None:
    source = ls.load(peft_adapter(tmp_path, "llama"))
    cut = ls.load(ls.export.convert(source, tmp_path / "cut", "mlx", budget=0.5)).updates()
    expected = ls.load(ls.export.convert(source, tmp_path / "peft", "peft", budget=0.5)).updates()
    assert cut.keys() == expected.keys()
    assert all(np.array_equal(cut[module].dense(), update.dense()) for module, update in expected.items())
    total = ls.load(ls.export.sum_adapters([source, source], tmp_path / "sum", [2, -1], format="mlx")).updates()
    for module, update in source.updates().items():
        assert total[module].dense() == pytest.approx(update.dense(), abs=1e-5)


WIDE = (draw(3, 6, 3), draw(4, 3, 5))
TABLE = {"model.embed_tokens.token_adapter.trainable_tokens_delta": draw(3, 1, 4)}
REFUSED = {
    "scale": ({"modules": {Q: PAIR, "model.layers.1.self_attn.q_proj": PAIR, V: WIDE}, "rank_pattern": {"v_proj": 3}},
              f"{V} has scale 1, and MLX has one scale for all modules, here 1.5: only a power of two times that"),
    "underflow": ({"modules": {Q: PAIR, "model.layers.1.self_attn.q_proj": PAIR, V: (PAIR[0] * 1e-38, PAIR[1])},
                   "alpha_pattern": {"v_proj": 3 * 2.0**-20}}, f"{V} has scale 1.43051e-06, and MLX has one scale"),
    "zero": ({"modules": {Q: PAIR, "model.layers.1.self_attn.q_proj": PAIR, V: PAIR},
              "alpha_pattern": {"v_proj": 0}}, f"{V} has scale 0, and MLX has one scale"),
    "head": ({"more": {"lm_head.weight": draw(3, 4, 5)}, "modules_to_save": ["lm_head"]},
             "only PEFT folders have further weights, such as lm_head.weight"),
    "tokens": ({"more": TABLE, "trainable_token_indices": [3]}, "further weights, such as model.embed_tokens.token"),
    "image": ({"modules": {"down_blocks.0.to_q": PAIR}},
              "down_blocks.0.to_q is not named like a layer of a language model, model.layers.0. ..."),
    "GPT-2": ({"modules": {"transformer.h.0.attn.c_attn": PAIR}}, "is not named like a layer of a language model"),
    "convolution": ({"modules": {"model.layers.0.conv": (draw(1, 6, 2, 1), draw(2, 2, 5, 3))}},
                    "model.layers.0.conv is a convolution"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_lost_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        write(tmp_path, **options)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "mlx").exists()


def test_magnitudes_of_an_embedding_are_refused(tmp_path: Path) -> None:
    """PEFT has one per column of the table, MLX one per row."""
    dora = {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"], "rank_pattern": {}, "alpha_pattern": {}}
    source = ls.load(peft_adapter(tmp_path, "llama", **dora), tmp_path / "base")
    with pytest.raises(ValueError, match=r"embed_tokens is an embedding with one magnitude per column"):
        ls.export.convert(source, tmp_path / "mlx", "mlx")
    stored = {"model.embed_tokens.lora_a": draw(1, 5, 2), "model.embed_tokens.lora_b": draw(2, 2, 6)}
    folder = mlx_folder(tmp_path / "own", stored | {"model.embed_tokens.m": draw(3, 5)}, fine_tune_type="dora")
    with pytest.raises(ValueError, match=r"the magnitudes of model.embed_tokens belong to the inputs"):
        ls.export.convert(ls.load(folder), tmp_path / "peft", "peft")


def test_dora_of_some_modules_is_refused(tmp_path: Path) -> None:
    stored = {
        f"{name}.lora_{side}": draw(1, 5, 2) if side == "a" else draw(2, 2, 6) for name in (Q, V) for side in "ab"
    }
    folder = mlx_folder(tmp_path / "own", stored | {f"{Q}.m": draw(3, 6)}, fine_tune_type="dora")
    for format in ("mlx", "peft"):
        with pytest.raises(ValueError, match=f"{V} has no magnitude, unlike other modules, and DoRA is for all"):
            ls.export.convert(ls.load(folder), tmp_path / "out", format)


def test_sum_refuses_each_adapter_that_changes_its_base(tmp_path: Path) -> None:
    plain = ls.load(peft_folder(tmp_path / "a", {Q: PAIR}))
    started = ls.load(peft_folder(tmp_path / "b", {Q: PAIR}, init_lora_weights="pissa"))
    with pytest.raises(ValueError, match="pissa changes the base model while PEFT loads it"):
        ls.export.sum_adapters([plain, started], tmp_path / "sum")
    invoked = ls.load(peft_folder(tmp_path / "c", {Q: PAIR}, alora_invocation_tokens=[1]))
    with pytest.raises(ValueError, match="cannot sum a and c: they differ in alora_invocation_tokens"):
        ls.export.sum_adapters([plain, invoked], tmp_path / "sum")


def test_tokens_and_heads_stay_in_peft(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a", {Q: PAIR}, TABLE, trainable_token_indices=[3])
    out = ls.export.convert(ls.load(folder), tmp_path / "out", "peft")
    assert bits(out / "adapter_model.safetensors") == bits(folder / "adapter_model.safetensors")
    assert json.loads((out / "adapter_config.json").read_text())["trainable_token_indices"] == [3]
    biased = peft_folder(tmp_path / "b", {Q: PAIR}, {f"{Q}.lora_B.bias": draw(3, 6)}, lora_bias=True)
    with pytest.raises(ValueError, match=r"the bias of the factors \(lora_bias\) of model.layers.0.self_attn.q_proj"):
        ls.export.convert(ls.load(biased), tmp_path / "c", "peft")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = str(peft_folder(tmp_path / "a", {Q: PAIR})), tmp_path / "out"
    assert main(["export", source, "--mlx", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert (
        main(["export", source, source, "--mlx", str(tmp_path / "sum"), "--weights", "1", "0.5", "--budget", "2"]) == 0
    )
    assert main(["export", source, "--mlx", str(out)]) == 2
    assert f"cannot create {out}: it exists" in capsys.readouterr().err
