"""Writer of LoRA files of diffusers: its own files are written again bit by bit, and PEFT applies what they contain."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from adapter_bits import bits, draw, peft_folder, read_header, same_updates, stored_as
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch import nn

import lorascope as ls
from lorascope.cli.main import main
from lorascope.files.safetensors_io import TensorFile
from lorascope.files.typed_tensors import TypedTensor, safetensors_bytes

FOLDER = Path(__file__).parent / "fixtures" / "diffusers"
BASE = load_file(FOLDER / "base" / "unet" / "diffusion_pytorch_model.safetensors")
MERGED = load_file(FOLDER / "dense.safetensors")
Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
FC = "text_model.encoder.layers.0.mlp.fc1"
PAIR = (draw(1, 6, 2), draw(2, 2, 5))


def settings(file: Path) -> dict[str, object]:
    return json.loads(read_header(file)["lora_adapter_metadata"])


@pytest.mark.parametrize("name", ["metadata", "dora"])
def test_file_of_diffusers_is_written_again_bit_by_bit(name: str, tmp_path: Path) -> None:
    source = FOLDER / f"{name}.safetensors"
    out = ls.export.convert(ls.load(source), tmp_path / "out.safetensors", "diffusers")
    assert bits(out) == bits(source)
    assert same_updates(ls.load(out), ls.load(source))
    theirs, ours = settings(source), settings(out)
    assert {key: ours[f"unet.{key}"] for key in ("r", "lora_alpha", "use_dora")} == {
        key: theirs[f"unet.{key}"] for key in ("r", "lora_alpha", "use_dora")
    }


@pytest.mark.parametrize("name", ["metadata", "dora", "plain", "old", "bare"])
def test_peft_folder_between_returns_the_same_file(name: str, tmp_path: Path) -> None:
    direct = ls.export.convert(ls.load(FOLDER / f"{name}.safetensors"), tmp_path / "direct", "diffusers")
    folder = ls.export.convert(ls.load(FOLDER / f"{name}.safetensors"), tmp_path / "peft", "peft")
    back = ls.export.convert(ls.load(folder), tmp_path / "back", "diffusers")
    files = [each / "pytorch_lora_weights.safetensors" for each in (direct, back)]
    assert bits(files[0]) == bits(files[1])
    assert settings(files[0]) == settings(files[1])
    again = ls.export.convert(ls.load(files[1]), tmp_path / "again", "peft")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (again / file).read_bytes() == (folder / file).read_bytes()


class Named(nn.Module):
    """Layers of the base by their dotted names."""

    def __init__(self) -> None:
        super().__init__()
        for key, weight in BASE.items():
            here: nn.Module = self
            *parents, leaf = key.removesuffix(".weight").split(".")
            for parent in parents:
                if parent not in here._modules:
                    here.add_module(parent, nn.Module())
                here = here.get_submodule(parent)
            sides = weight.shape[1], weight.shape[0]
            layer = (
                nn.Conv2d(*sides, weight.shape[2], bias=False) if weight.ndim == 4 else nn.Linear(*sides, bias=False)
            )
            layer.weight.data = weight.clone()
            here.add_module(leaf, layer)


@pytest.mark.parametrize("name", ["metadata", "dora"])
def test_configuration_of_the_header_loads_into_peft_as_in_diffusers(name: str, tmp_path: Path) -> None:
    """diffusers passes the entries of a component to ``LoraConfig``, and its tensors to PEFT."""
    folder = ls.export.convert(ls.load(FOLDER / f"{name}.safetensors"), tmp_path / "peft", "peft")
    out = ls.export.convert(ls.load(folder), tmp_path / "out.safetensors", "diffusers")
    keywords = {key.removeprefix("unet."): value for key, value in settings(out).items()}
    model = Named()
    peft.inject_adapter_in_model(peft.LoraConfig(**keywords), model)
    tensors = {key.removeprefix("unet."): tensor for key, tensor in load_file(out).items()}
    assert not peft.set_peft_model_state_dict(model, tensors).unexpected_keys
    for module in model.double().modules():
        if hasattr(module, "merge"):
            module.merge()
    merged = {key.replace(".base_layer", ""): tensor for key, tensor in model.state_dict().items()}
    for key, change in MERGED.items():
        file, module = key.split("/")
        if file == name:
            found = merged[f"{module}.weight"] - BASE[f"{module}.weight"]
            assert torch.allclose(found.float(), change, atol=1e-5)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_dtypes_are_kept(dtype: str, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a", {Q: PAIR})
    stored_as(folder / "adapter_model.safetensors", dtype)
    out = ls.export.convert(ls.load(folder), tmp_path / "out.safetensors", "diffusers")
    own = {
        key.removeprefix("base_model.model."): each for key, each in bits(folder / "adapter_model.safetensors").items()
    }
    assert bits(out) == {f"unet.{key}": each for key, each in own.items()}
    assert {each[0] for each in own.values()} == {dtype}


def test_components_are_configured_separately(tmp_path: Path) -> None:
    """Two PEFT folders of one pipeline: written with their components, read together."""
    unet = ls.export.convert(ls.load(peft_folder(tmp_path / "u", {Q: PAIR})), tmp_path / "u.safetensors", "diffusers")
    assert list(ls.load(unet).updates()) == [f"unet.{Q}"]
    encoder = ls.load(peft_folder(tmp_path / "t", {FC: PAIR}, lora_alpha=8))
    text = ls.export.convert(encoder, tmp_path / "t.safetensors", "diffusers", component="text_encoder_2")
    assert settings(text)["text_encoder_2.lora_alpha"] == 8
    both = tmp_path / "both.safetensors"
    tensors = {key: TypedTensor.read(file, key) for file in map(TensorFile, (unet, text)) for key in file}
    header = json.dumps(settings(unet) | settings(text))
    both.write_bytes(safetensors_bytes(tensors, {"lora_adapter_metadata": header}))
    again = ls.export.convert(ls.load(both), tmp_path / "again.safetensors", "diffusers")
    assert same_updates(ls.load(again), ls.load(both))
    assert settings(again) == settings(unet) | settings(text)
    with pytest.raises(ValueError, match=r"a folder has one model, and it adapts text_encoder_2 and unet$"):
        ls.export.convert(ls.load(both), tmp_path / "peft", "peft")


def test_cut_and_sum_equal_the_peft_folder(tmp_path: Path) -> None:
    source = ls.load(FOLDER / "metadata.safetensors")
    cut = ls.export.convert(source, tmp_path / "cut.safetensors", "diffusers", budget=0.5)
    folder = ls.export.convert(source, tmp_path / "cut", "peft", budget=0.5)
    assert same_updates(ls.load(cut), ls.load(folder), "unet.")
    total = ls.export.sum_adapters([source, source], tmp_path / "sum", [2, -1], format="diffusers")
    for module, update in ls.load(total).updates().items():
        assert update.dense() == pytest.approx(source.updates()[module].dense(), abs=1e-5)


REFUSED = {
    "component": ({FC: PAIR}, {}, {}, f"{FC} belongs to is not known; pass --component, one of unet, transformer"),
    "head": ({Q: PAIR}, {"proj_out.weight": draw(3, 2, 2)}, {"modules_to_save": ["proj_out"]},
             "only PEFT folders have further weights, such as proj_out.weight"),
    "bias": ({Q: PAIR}, {f"{Q}.base_layer.bias": draw(3, 6)}, {"bias": "lora_only"}, "have further weights, such as"),
    "replication": ({"layers.0.q": PAIR}, {}, {"layer_replication": [[0, 1]]}, "only PEFT has layer_replication"),
    "invocation": ({Q: PAIR}, {}, {"alora_invocation_tokens": [1, 2]}, "only PEFT has alora_invocation_tokens"),
    "initialization": ({Q: PAIR}, {}, {"init_lora_weights": "pissa"}, "pissa changes the base model while PEFT"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_what_would_be_lost_is_refused_in_one_line(name: str, format: str, tmp_path: Path) -> None:
    modules, more, config, message = REFUSED[name]
    adapter = ls.load(peft_folder(tmp_path / "a", modules, more, **config))
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        ls.export.convert(adapter, tmp_path / "out.safetensors", format)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out.safetensors").exists()


def test_names_of_the_authors_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    tensors = {f"diffusion_model.blocks.0.q.lora_{side}.weight": each for side, each in zip("BA", PAIR, strict=True)}
    save_file(tensors, file)
    with pytest.raises(ValueError, match="has a name of the model's authors; pass the base model, --base DIR"):
        ls.export.convert(ls.load(file), tmp_path / "out", "diffusers")
    flat = {f"lora_unet_blocks_0_q.lora_{side}.weight": each for side, each in zip(("up", "down"), PAIR, strict=True)}
    save_file(flat, file)
    for format in ("diffusers", "peft"):
        with pytest.raises(ValueError, match="has underscores instead of dots; pass the base model of the adapter"):
            ls.export.convert(ls.load(file), tmp_path / "out", format)


def test_existing_file_is_kept_and_interrupted_writing_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = ls.load(FOLDER / "metadata.safetensors")
    out = tmp_path / "out.safetensors"
    out.write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match=r"cannot create .*out.safetensors: it exists"):
        ls.export.convert(adapter, out, "diffusers")
    assert out.read_text(encoding="utf-8") == "mine"

    def fail(path: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    for name in ("other.safetensors", "folder"):
        with pytest.raises(OSError, match="No space left"):
            ls.export.convert(adapter, tmp_path / name, "diffusers")
    assert [each.name for each in tmp_path.iterdir()] == ["out.safetensors"]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = str(FOLDER / "metadata.safetensors"), tmp_path / "out"
    assert main(["export", source, "--diffusers", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert bits(out / "pytorch_lora_weights.safetensors") == bits(FOLDER / "metadata.safetensors")
    assert main(["export", source, source, "--diffusers", str(tmp_path / "sum"), "--budget", "0.5"]) == 0
    text = peft_folder(tmp_path / "t", {FC: PAIR})
    assert main(["export", str(text), "--kohya", str(tmp_path / "k.safetensors"), "--component", "text_encoder"]) == 0
    assert main(["export", str(text), "--kohya", str(tmp_path / "l.safetensors"), "--component", "vae"]) == 2
    assert "component must be one of unet, transformer" in capsys.readouterr().err
    assert main(["export", str(text), "--peft", str(tmp_path / "p"), "--component", "text_encoder"]) == 2
    assert "--component requires --kohya or --diffusers" in capsys.readouterr().err
    assert main(["export", source, "--peft", str(tmp_path / "p"), "--mlx", str(tmp_path / "m")]) == 2
    assert np.all([not (tmp_path / name).exists() for name in ("p", "m", "l.safetensors")])


def test_run_is_exported_as_peft_first(train_once: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from examples import EXAMPLES

    run, _ = train_once("lora", EXAMPLES["lora"])
    assert main(["export", str(run.path), "--diffusers", str(tmp_path / "out")]) == 2
    assert "only adapters are summed or converted, got run" in capsys.readouterr().err
