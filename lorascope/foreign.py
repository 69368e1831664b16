"""Updates that PEFT's layers make, read off the layers themselves: PEFT need not be installed."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from torch import Tensor, nn

from lorascope.fourier import Fourier
from lorascope.hosts import host_weight, to_array
from lorascope.update import Dense, LowRank


def is_peft_layer(module: nn.Module) -> bool:
    """Does PEFT wrap another layer here?"""
    return hasattr(module, "base_layer") and hasattr(module, "adapter_layer_names")


def peft_update(layer: Any) -> LowRank | Dense | None:
    """The update of a PEFT layer's active adapters together; None if it has none or they are switched off.

    LoRA and AdaLoRA give their factors, FourierFT its coefficients. Whatever else PEFT has, multiplicative methods and
    DoRA included, gives the difference that merging a copy of the layer makes in float64.
    """
    tables = [getattr(layer, name) for name in layer.adapter_layer_names]
    active = [adapter for adapter in layer.active_adapters if any(adapter in table for table in tables)]
    if layer.disable_adapters or not active:
        return None
    if len(active) == 1 and active[0] in getattr(layer, "fourierft_spectrum", ()):
        return _frequencies(layer, active[0])
    parts = [part for part in (_factors(layer, adapter) for adapter in active) if part is not None]
    if len(parts) < len(active):
        return _merged_difference(layer, active)
    if len(parts) == 1:
        return parts[0]
    return LowRank(np.hstack([part.scale * part.B for part in parts]), np.vstack([part.A for part in parts]))


def _factors(layer: Any, adapter: str) -> LowRank | None:
    """B, A and scale of plain LoRA and of AdaLoRA; None for any other adapter."""
    if adapter in getattr(layer, "lora_variant", ()):
        return None
    if adapter in getattr(layer, "lora_embedding_A", ()):
        B, A = layer.lora_embedding_B[adapter], layer.lora_embedding_A[adapter]
    elif adapter in getattr(layer, "lora_A", ()):
        B, A = layer.lora_B[adapter], layer.lora_A[adapter]
    else:
        return None
    scale = float(layer.scaling[adapter])
    if isinstance(A, nn.Linear):
        B, A = B.weight, A.weight
    elif adapter in getattr(layer, "lora_E", ()):
        A = A * layer.lora_E[adapter]
        scale /= float(layer.ranknum[adapter]) + 1e-5
    return LowRank(to_array(B), to_array(A), scale) if isinstance(A, Tensor) else None


def _frequencies(layer: Any, adapter: str) -> Fourier:
    """Coefficients, entries and scale of FourierFT."""
    outer, inner = host_weight(layer.get_base_layer()).shape
    coefficients, entries = to_array(layer.fourierft_spectrum[adapter]), to_array(layer.indices[adapter])
    return Fourier(coefficients, entries, (outer, inner), float(layer.fourierft_scaling[adapter]))


def _merged_difference(layer: Any, active: list[str]) -> Dense:
    twin = copy.deepcopy(layer).double()
    if twin.merged:
        twin.unmerge()
    before = to_array(host_weight(twin.get_base_layer()))
    twin.merge(adapter_names=active)
    return Dense(to_array(host_weight(twin.get_base_layer())) - before)
