"""Comparison of adapters that different writers wrote: tensors bit by bit, ranks, scales and updates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from lorascope.files.safetensors_io import TensorFile
from lorascope.files.typed_tensors import TypedTensor, safetensors_bytes


def bits(file: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return dtype, shape and bytes of every tensor."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    return {
        name: (each["dtype"], tuple(each["shape"]), content[8 + length :][slice(*each["data_offsets"])])
        for name, each in header.items()
    }


def read_header(file: Path) -> dict[str, str]:
    """Return the metadata of a file."""
    with safe_open(file, "np") as opened:
        return dict(opened.metadata())


def same_updates(one: Any, other: Any, prefix: str = "") -> bool:
    """Return whether two adapters have exactly the same ranks and updates; the names of one have a prefix."""
    ours, theirs = one.updates(), other.updates()
    return {f"{prefix}{module}" for module in theirs} == set(ours) and all(
        ours[f"{prefix}{module}"].rank == update.rank
        and np.array_equal(ours[f"{prefix}{module}"].dense(), update.dense())
        for module, update in theirs.items()
    )


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def as_bfloat16(values: np.ndarray) -> np.ndarray:
    """Return the values rounded to bfloat16 (toward zero), in float32."""
    return (values.view("<u4") & np.uint32(0xFFFF0000)).view("<f4")


def peft_folder(
    folder: Path, modules: dict[str, tuple[np.ndarray, np.ndarray]], more: Any = None, **config: Any
) -> Path:
    """Write a PEFT folder with factors B and A, and further tensors."""
    folder.mkdir(parents=True)
    tensors = {f"base_model.model.{name}.lora_B.weight": B for name, (B, _) in modules.items()}
    tensors |= {f"base_model.model.{name}.lora_A.weight": A for name, (_, A) in modules.items()}
    tensors |= {f"base_model.model.{name}": each for name, each in (more or {}).items()}
    (folder / "adapter_model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    settings = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 2, "lora_alpha": 3, "bias": "none"}
    settings |= {"target_modules": list(modules)} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def stored_as(file: Path, dtype: str) -> None:
    """Rewrite a file of float32 with its tensors in float16 or bfloat16."""
    opened = TensorFile(file)
    tensors = {name: TypedTensor(np.array(opened[name]), dtype) for name in opened}
    file.write_bytes(safetensors_bytes(tensors, {"format": "pt"}))
