"""One row per reader of adapters: a folder in its format, and the update of each module by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from contract.format_row import FormatRow, Written
from contract.format_rows_imagefiles import ROWS as IMAGE_FILES
from contract.format_rows_imagefiles import as_float64
from contract.format_rows_peftlora import ROWS as PEFT_LORA
from contract.format_rows_pefttypes import ROWS as PEFT_TYPES
from safetensors.numpy import save

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
OUT, IN, RANK = 6, 5, 2


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def write(folder: Path, config: dict[str, Any] | None, tensors: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    stored = {f"base_model.model.{name}": np.ascontiguousarray(array) for name, array in tensors.items()}
    (folder / "adapter_model.safetensors").write_bytes(save(stored))


def factors() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return B and A of both modules."""
    return {module: (draw(number, OUT, RANK), draw(number, RANK, IN)) for number, module in enumerate((Q, V))}


def stored_factors() -> dict[str, np.ndarray]:
    pairs = factors().items()
    return {f"{m}.lora_{n}.weight": x for m, (B, A) in pairs for n, x in (("A", A), ("B", B))}


def lora(folder: Path, base: Path) -> Written:
    write(folder, {"peft_type": "LORA", "r": RANK, "lora_alpha": 3}, stored_factors())
    return {module: 3 / RANK * as_float64(B) @ as_float64(A) for module, (B, A) in factors().items()}


def weights() -> dict[str, np.ndarray]:
    return {module: draw(10 + number, OUT, IN) for number, module in enumerate((Q, V))}


def write_base(base: Path) -> None:
    base.mkdir(parents=True)
    stored = {f"{module}.weight": W for module, W in weights().items()}
    (base / "model.safetensors").write_bytes(save(stored))


def dora(folder: Path, base: Path) -> Written:
    write_base(base)
    magnitude = {f"{module}.lora_magnitude_vector": draw(5, OUT) for module in (Q, V)}
    write(folder, {"peft_type": "LORA", "r": RANK, "lora_alpha": 3, "use_dora": True}, stored_factors() | magnitude)
    found = {}
    for module, (B, A) in factors().items():
        direction = as_float64(weights()[module]) + 3 / RANK * as_float64(B) @ as_float64(A)
        unit = direction / np.linalg.norm(direction, axis=1, keepdims=True)
        found[module] = as_float64(draw(5, OUT))[:, None] * unit - as_float64(weights()[module])
    return found


def adalora(folder: Path, base: Path) -> Written:
    pairs = factors().items()
    tensors = {f"{m}.lora_{n}": x for m, (B, A) in pairs for n, x in (("A", A), ("B", B), ("E", draw(7, RANK, 1)))}
    write(folder, {"peft_type": "ADALORA", "init_r": RANK, "lora_alpha": 3}, tensors)
    scale = 3 / (RANK + 1e-5)
    return {module: scale * as_float64(B) @ (as_float64(draw(7, RANK, 1)) * as_float64(A)) for module, (B, A) in pairs}


def fourier(folder: Path, base: Path) -> Written:
    write_base(base)
    n = 4
    config = {"peft_type": "FOURIERFT", "n_frequency": n, "scaling": 9.0, "random_loc_seed": 3}
    write(folder, config, {f"{module}.fourierft_spectrum": draw(number, n) for number, module in enumerate((Q, V))})
    import torch  # PEFT draws the entries with torch

    places = torch.randperm(OUT * IN, generator=torch.Generator().manual_seed(3))[:n].numpy()
    found = {}
    for number, module in enumerate((Q, V)):
        spectrum = np.zeros(OUT * IN)
        spectrum[places] = draw(number, n)
        found[module] = 9.0 * np.fft.ifft2(spectrum.reshape(OUT, IN)).real
    return found


def hydra(folder: Path, base: Path) -> Written:
    tensors, found = {}, {}
    for number, module in enumerate((Q, V)):
        A, experts = draw(number, RANK, IN), [draw(20 + expert, OUT, RANK) for expert in range(3)]
        tensors |= {f"{module}.lora_A.weight": A, f"{module}.lora_route.weight": draw(number, 3, IN)}
        tensors |= {f"{module}.lora_B{expert}.weight": B for expert, B in enumerate(experts)}
        found[module] = 3 / RANK * as_float64(np.mean([as_float64(B) for B in experts], 0)) @ as_float64(A)
    write(folder, {"peft_type": "LORA", "r": RANK, "lora_alpha": 3}, tensors)
    return found


def merged(folder: Path, base: Path) -> Written:
    tensors, found = {}, {}
    for number, module in enumerate((Q, V)):
        A, B = draw(number, 2 * RANK, IN), draw(number, 2 * OUT, RANK)  # of three outputs, the second is not adapted
        tensors |= {f"{module}.lora_A": A, f"{module}.lora_B": B}
        first, last = (
            as_float64(B[i * OUT : (i + 1) * OUT]) @ as_float64(A[i * RANK : (i + 1) * RANK]) for i in range(2)
        )
        found[module] = 3 / RANK * np.vstack([first, np.zeros((OUT, IN)), last])
    write(folder, {"peft_type": "LORA", "r": RANK, "lora_alpha": 3, "enable_lora": [True, False, True]}, tensors)
    return found


def vera(folder: Path, base: Path) -> Written:
    write_base(base)
    A, B = draw(1, RANK, IN), draw(2, OUT, RANK)
    tensors = {}
    for number, module in enumerate((Q, V)):
        tensors |= {f"{module}.vera_lambda_b": draw(number, OUT), f"{module}.vera_lambda_d": draw(number, RANK)}
    write(folder, {"peft_type": "VERA", "r": RANK, "projection_prng_key": 0}, tensors)
    file = folder / "adapter_model.safetensors"
    stored = {f"base_model.model.{name}": array for name, array in tensors.items()}
    file.write_bytes(save(stored | {"base_model.vera_A": A, "base_model.vera_B": B}))
    return {
        module: (as_float64(draw(number, OUT))[:, None] * as_float64(B))
        @ (as_float64(draw(number, RANK))[:, None] * as_float64(A))
        for number, module in enumerate((Q, V))
    }


ROWS = {
    "read_adapter": FormatRow(lora, "LoRA"),
    "read_dora": FormatRow(dora, "DoRA"),
    "read_adalora": FormatRow(adalora, "AdaLoRA"),
    "read_fourier": FormatRow(fourier, "FourierFT"),
    "read_hydra": FormatRow(hydra, "HydraLoRA", exact=False),
    "read_loralib": FormatRow(merged, "LoRA"),
    "read_vera": FormatRow(vera, "VeRA"),
    **PEFT_LORA,
    **PEFT_TYPES,
    **IMAGE_FILES,
}
