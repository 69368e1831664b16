"""Adapters that PEFT itself writes for tiny models, and the update of each module when PEFT merges them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D


def nested(layers: Mapping[str, nn.Module]) -> nn.Module:
    """Build a module whose submodules have these paths, as in a model of transformers."""
    root = nn.Module()
    for path, layer in layers.items():
        *parents, name = path.split(".")
        place = root
        for part in parents:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        place.add_module(name, layer)
    return root


def matrix(module: nn.Module, weight: torch.Tensor) -> np.ndarray:
    """Return a weight, or its change, as (out, in)."""
    flat = weight.detach().double().reshape(len(weight), -1).numpy()
    return flat.T if isinstance(module, Conv1D | nn.Embedding) else flat


def write_with_peft(
    folder: Path, config: Any, layers: Mapping[str, nn.Module], base: Path | None = None, size: float = 0.5
) -> dict[str, np.ndarray]:
    """Save an adapter with random parameters, and the base if it has a path; return the update of each module.

    The update is the difference of the merged and the base weight, both in float64.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nested(layers)
        for parameter in model.parameters():
            parameter.data.normal_()
        if base is not None:
            base.mkdir(parents=True, exist_ok=True)
            stored = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
            save_file(stored, base / "model.safetensors")
    return merged_change(folder, config, model, list(layers), size)


def merged_change(folder: Path, config: Any, model: nn.Module, names: list[str], size: float) -> dict[str, np.ndarray]:
    """Save an adapter of a model with random parameters; return the merged minus the base weight of each module."""
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers that PEFT does not expect, or optional compilers
        torch.manual_seed(1)
        before = {name: model.get_submodule(name).weight.detach().double().clone() for name in names}
        tuned = get_peft_model(model, config)
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=size)
        tuned.save_pretrained(folder)
        merged = tuned.double().merge_and_unload()
        after = {name: merged.get_submodule(name) for name in names}
    return {name: matrix(layer, layer.weight - before[name]) for name, layer in after.items()}
