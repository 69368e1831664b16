"""Updates of PEFT layers, read from the layers themselves, so that PEFT need not be installed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lorascope.adapters.host_weights import host_kind, host_weight, to_array
from lorascope.updates import Dense, Update, from_factors

# Results of ``_is_mergeable`` by layer and adapters, because each trial copies the layer.
_TRIED: WeakKeyDictionary[Any, dict[tuple[str, ...], bool]] = WeakKeyDictionary()


class PeftDelta:
    """Adapters of a PEFT layer, active or not, with the interface of a ``Delta``.

    ``retained`` is the number of components that AdaLoRA's allocator retains, None if it has not decided yet.
    """

    resized = False

    def __init__(self, layer: Any, names: Sequence[str], retained: int | None = None) -> None:
        self.layer, self.names, self.retained = layer, names, retained

    @property
    def rank(self) -> int:
        """Number of components of the update that PEFT would save."""
        if self.retained is not None:
            return self.retained
        return self.update().rank

    def update(self) -> Update:
        """Return a copy of the update in numpy."""
        return _update_of(self.layer, self.names)

    def factors(self) -> dict[str, Tensor]:
        """Return the factors of the update; empty for a dense update."""
        scaled = _factors_of(self.layer, self.names)
        if scaled is None:
            return {}
        return scaled.factors

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters of the adapters, by their names in the layer."""
        tables = set(self.layer.adapter_layer_names)
        for name, parameter in self.layer.named_parameters():
            # The layer also has the parameters of its base layer, and of other adapters.
            table, *adapter = name.split(".")[:2]
            if table in tables and adapter and adapter[0] in self.names:
                yield name, parameter


def unwrap_peft_model(model: Any) -> Any:
    """Return the base model of a ``PeftModel``, with its PEFT layers still wrapped; other models are unchanged."""
    if hasattr(model, "get_base_model"):
        return model.get_base_model()
    return model


def unwrap_peft_layer(module: Any) -> Any:
    """Return the module inside a PEFT layer, or its copy if PEFT trains one (``modules_to_save``)."""
    if is_peft_layer(module):
        return unwrap_peft_layer(module.base_layer)
    if hasattr(module, "original_module"):
        copies = getattr(module, "modules_to_save", {})
        for name in module.active_adapters:
            if name in copies:
                return unwrap_peft_layer(copies[name])
        return unwrap_peft_layer(module.original_module)
    return module


def unwrapped_parameters(model: Any) -> dict[str, nn.Parameter]:
    """Return all parameters without those that PEFT layers add, by their names without PEFT; shared ones once."""
    names: dict[nn.Parameter, str] = {}
    for path, module in _unwrapped_modules(unwrap_peft_model(model), ""):
        for name, parameter in module.named_parameters(recurse=False):
            names.setdefault(parameter, f"{path}.{name}".lstrip("."))
    return dict(zip(names.values(), names, strict=True))


def _unwrapped_modules(module: Any, path: str) -> Iterator[tuple[str, nn.Module]]:
    module = unwrap_peft_layer(module)
    yield path, module
    for name, child in module.named_children():
        yield from _unwrapped_modules(child, f"{path}.{name}".lstrip("."))


def retained_components(model: Any) -> dict[str, int]:
    """Return the number of components that AdaLoRA's PEFT layers retain; empty before its first decision.

    PEFT masks components only at some steps, and between them the optimizer trains all components. The weights
    therefore do not show which ones are retained.
    """
    counts = {}
    for config in getattr(model, "peft_config", {}).values():
        for name, mask in (getattr(config, "rank_pattern", None) or {}).items():
            module, is_diagonal, _ = name.partition(".lora_E")
            if is_diagonal:
                counts[module] = sum(mask)
    return counts


def is_peft_layer(module: nn.Module) -> bool:
    """Return whether a module is a PEFT layer around another layer."""
    return hasattr(module, "base_layer") and hasattr(module, "adapter_layer_names")


def name_without_peft(path: str) -> str:
    """Return the module name of a PEFT layer in the base model: PEFT puts adapters of tokens below their module."""
    return path.removesuffix(".token_adapter")


def has_peft_layers(model: nn.Module) -> bool:
    """Return whether a model contains a PEFT layer."""
    return any(map(is_peft_layer, model.modules()))


def peft_layers(model: nn.Module, names: Sequence[str] | None = None) -> Iterator[tuple[str, Any, list[str]]]:
    """Yield the PEFT layers with adapters among ``names``, by default the active ones: name, layer, its adapters."""
    for name, module in model.named_modules():
        if is_peft_layer(module):
            adapter_names = active_adapters(module) if names is None else adapters_among(module, names)
            if adapter_names:
                yield name_without_peft(name), module, adapter_names


def unreadable_adapters(model: nn.Module) -> dict[str, str]:
    """Return the modules whose PEFT adapters do not make an update of a matrix, with their class names."""
    kinds = {}
    for name, layer, adapter_names in peft_layers(model):
        if not is_readable(layer, adapter_names):
            kinds[name] = host_kind(unwrap_peft_layer(layer))
    return kinds


def active_adapters(layer: Any) -> list[str]:
    """Return the names of the adapters that change a PEFT layer's output; empty if they are disabled."""
    if layer.disable_adapters:
        return []
    return adapters_among(layer, layer.active_adapters)


def adapters_among(layer: Any, names: Sequence[str]) -> list[str]:
    """Return those of the names that a PEFT layer has an adapter of."""
    if getattr(layer, "tied_adapter", None) is not None:
        return []  # the embedding has the same adapter, which counts there
    present: set[str] = set()
    for table in layer.adapter_layer_names:
        present.update(getattr(layer, table))
    return [adapter for adapter in names if adapter in present]


def is_readable(layer: Any, names: Sequence[str]) -> bool:
    """Return whether adapters of a PEFT layer make an update of one matrix, from their factors or by merging.

    This is False for norms, grouped convolutions, and several experts in one tensor. For packed (quantized) weights it
    is True only with plain LoRA or AdaLoRA.
    """
    if hasattr(layer, "parameter_name"):
        return False
    host = unwrap_peft_layer(layer)
    weight = getattr(host, "weight", None)
    mergeable = isinstance(weight, nn.Parameter) and weight.ndim > 1 and weight.is_floating_point()
    if mergeable:
        return getattr(host, "groups", 1) == 1 and _is_mergeable(layer, tuple(names))
    return all(_is_product(layer, adapter) for adapter in names)


def _is_mergeable(layer: Any, names: tuple[str, ...]) -> bool:
    """Return whether the update can be read from factors or merged; aLoRA's, for one, depends on the text."""
    results = _TRIED.setdefault(layer, {})
    if names not in results:
        results[names] = False
        with suppress(NotImplementedError, ValueError):
            _update_of(layer, names)
            results[names] = True
    return results[names]


def _is_product(layer: Any, adapter: str) -> bool:
    """Return whether an adapter is plain LoRA or AdaLoRA."""
    # PEFT calls DoRA and aLoRA variants of LoRA.
    with_factors = {*getattr(layer, "lora_A", ()), *getattr(layer, "lora_embedding_A", ())}
    return adapter in with_factors and adapter not in getattr(layer, "lora_variant", ())


def peft_update(layer: Any) -> Update | None:
    """Return the total update of a PEFT layer's active adapters; None without one that is enabled and readable."""
    active = active_adapters(layer)
    if active and is_readable(layer, active):
        return _update_of(layer, active)
    return None


def _update_of(layer: Any, names: Sequence[str]) -> Update:
    """Return the total update of adapters of a PEFT layer.

    LoRA and AdaLoRA updates are read from their factors, and FourierFT updates from their coefficients. All other
    adapters, including DoRA and multiplicative ones, are merged into a copy of the layer in float64: the update is the
    difference of the weights.
    """
    if (scaled := _factors_of(layer, names)) is not None:
        return from_factors({name: to_array(factor) for name, factor in scaled.factors.items()}, scaled.scale)
    # PEFT merges in place.
    twin = copy.deepcopy(layer).double()
    if twin.merged:  # the weight already contains the update
        twin.unmerge()
    before = to_array(host_weight(twin.get_base_layer()))
    twin.merge(adapter_names=list(names))
    return Dense(to_array(host_weight(twin.get_base_layer())) - before)


class ScaledFactors(NamedTuple):
    """Factors of a PEFT layer's update by name, and its scale."""

    factors: dict[str, Tensor]
    scale: float


def _factors_of(layer: Any, names: Sequence[str]) -> ScaledFactors | None:
    """Return factors and scale of one FourierFT adapter, or of LoRA and AdaLoRA adapters; None for other adapters."""
    if len(names) == 1 and names[0] in getattr(layer, "fourierft_spectrum", ()):
        spectrum, entries = layer.fourierft_spectrum[names[0]], layer.indices[names[0]]
        shape = torch.tensor(host_weight(layer.get_base_layer()).shape)
        factors = {"coefficients": spectrum, "entries": entries, "shape": shape}
        return ScaledFactors(factors, float(layer.fourierft_scaling[names[0]]))
    adapters = []
    for name in names:
        scaled = _lora_factors(layer, name)
        if scaled is None:
            return None
        adapters.append(scaled)
    if len(adapters) == 1:
        return adapters[0]
    A = torch.cat([factors["A"] for factors, _ in adapters])
    B = torch.cat([scale * factors["B"] for factors, scale in adapters], 1)
    return ScaledFactors({"A": A, "B": B}, 1.0)


def _lora_factors(layer: Any, adapter: str) -> ScaledFactors | None:
    """Return factors and scale of plain LoRA or AdaLoRA; None for any other adapter."""
    if not _is_product(layer, adapter):
        return None
    if adapter in getattr(layer, "lora_embedding_A", ()):
        B, A = layer.lora_embedding_B[adapter], layer.lora_embedding_A[adapter]
    else:
        B, A = layer.lora_B[adapter], layer.lora_A[adapter]
    scale = float(layer.scaling[adapter])
    if isinstance(A, nn.Linear):
        B, A = B.weight, A.weight
    elif isinstance(A, nn.Conv1d | nn.Conv2d | nn.Conv3d) and B.groups == 1:  # B has kernel size 1
        B, A = B.weight.flatten(1), A.weight.flatten(1)
    elif adapter in getattr(layer, "lora_E", ()):
        A = A * layer.lora_E[adapter]
        scale /= float(layer.ranknum[adapter]) + 1e-5  # as in PEFT
    if not isinstance(A, Tensor):  # grouped convolutions, among others
        return None
    return ScaledFactors({"A": A, "B": B}, scale)
