"""Rows of the readers of image models, MLX and GGUF."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from adapter_bits import draw
from contract.format_row import FormatRow, Written
from safetensors.numpy import save

OUT, IN, RANK = 6, 5, 2
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
FLAT = ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_unet_mid_block_attentions_0_proj_in")
DOTTED = ("text_encoder.text_model.encoder.layers.0.mlp.fc1", "unet.mid_block.attentions.0.proj_in")


def as_float64(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64)


def write(file: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(save(tensors, metadata))


def kohya(folder: Path, base: Path) -> Written:
    tensors, found = {}, {}
    for number, module in enumerate(FLAT):
        up, down = draw(number, OUT, RANK, 1, 1), draw(number, RANK, IN, 3, 3)
        tensors |= {f"{module}.lora_up.weight": up, f"{module}.lora_down.weight": down}
        found[module] = as_float64(up).reshape(OUT, RANK) @ as_float64(down).reshape(RANK, -1)
    write(folder / "adapter_model.safetensors", tensors)
    return found


def diffusers(folder: Path, base: Path) -> Written:
    tensors, found = {}, {}
    for number, module in enumerate(DOTTED):
        A, B = draw(number, RANK, IN), draw(number, OUT, RANK)
        tensors |= {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}
        found[module] = (3, 5)[number] / RANK * as_float64(B) @ as_float64(A)
    settings = {
        "text_encoder.r": RANK,
        "text_encoder.lora_alpha": 3,
        "unet.r": RANK,
        "unet.alpha_pattern": {"proj_in": 5},
    }
    write(folder / "adapter_model.safetensors", tensors, {"lora_adapter_metadata": json.dumps(settings)})
    return found


def mlx(folder: Path, base: Path) -> Written:
    tensors, found = {}, {}
    for number, module in enumerate((Q, V)):
        a, b = draw(number, IN, RANK), draw(number, RANK, OUT)
        tensors |= {f"{module}.lora_a": a, f"{module}.lora_b": b}
        found[module] = 7 * (as_float64(a) @ as_float64(b)).T
    write(folder / "adapter_model.safetensors", tensors)
    config = {
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {"rank": RANK, "scale": 7.0, "dropout": 0.0},
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return found


ROWS = {
    "read_kohya": FormatRow(kohya, "LoRA", modules=FLAT),
    "read_mlx": FormatRow(mlx, "LoRA"),
    "read_diffusers": FormatRow(diffusers, "LoRA", modules=DOTTED),
}
