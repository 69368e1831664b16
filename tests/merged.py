"""PEFT's own change of the base weights: merged minus base, in float64."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn


def adapt(model: nn.Module, folder: Path, seed: int = 1, **config: Any) -> Any:
    """Save an adapter of random factors in ``folder``, and return the model with it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad:
                    drawn = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(drawn if "lora_" in name else parameter + 0.1 * drawn)
        adapted.save_pretrained(folder)
    return adapted


def changes(base: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Return merged minus base by parameter, for an adapter that PEFT loads from ``folder``."""
    before = {name: value.detach().double() for name, value in base.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
        after = loaded.double().merge_and_unload().state_dict()
    return {name: after[name] - value for name, value in before.items()}
