"""Base weights W_0 of a model in training, and the marker of a model that was trained before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from lorascope.adapters.delta import adapters, attached_deltas
from lorascope.adapters.peft_layers import (
    has_peft_layers,
    unreadable_adapters,
    unwrap_peft_model,
    unwrapped_parameters,
)
from lorascope.adapters.quantization import quantize_blocks
from lorascope.files.memory_errors import is_out_of_memory
from lorascope.inputs.classifier_head import draw_new_weights, fit_head, weights_hash
from lorascope.inputs.computation import set_dtype
from lorascope.inputs.tasks import Task
from lorascope.methods.method import Method
from lorascope.observe.trainable import trained_ids
from lorascope.schema import module_table
from lorascope.training.master_weights import train_in_float32
from lorascope.training.settings import Settings

_MARKER = "_lorascope_trained"


class Base(Mapping[str, Tensor]):
    """Base weights W_0 as a read-only mapping from parameter names to tensors, without adapters.

    Trained parameters are copies; all others are the model's own tensors.
    """

    def __init__(self, model: nn.Module) -> None:
        adapter_ids: set[int] = set()
        for delta in attached_deltas(model).values():
            adapter_ids.update(map(id, delta.parameters()))
        self._live = {name: p for name, p in unwrapped_parameters(model).items() if id(p) not in adapter_ids}
        self.kept: dict[str, Tensor] = {}
        self._peft = has_peft_layers(model)

    def capture(self, optimizer: torch.optim.Optimizer) -> None:
        """Copy the parameters that the optimizer is about to change."""
        trained = trained_ids(optimizer, self._peft)
        for name, parameter in self._live.items():
            if id(parameter) in trained and name not in self.kept:
                self.kept[name] = parameter.detach().clone()

    def restore(self) -> None:
        """Reset the model's parameters to W_0."""
        with torch.no_grad():
            for name, tensor in self.kept.items():
                self._live[name].copy_(tensor)

    def __getitem__(self, name: str) -> Tensor:
        return self.kept[name] if name in self.kept else self._live[name].detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._live)

    def __len__(self) -> int:
        return len(self._live)


class TrainingMarker(NamedTuple):
    """Marker that ``train`` leaves on a model: id of the recipe that it ran, base weights W_0, quantization."""

    recipe: str
    w0_hash: str
    base: Base
    quantize: str | None = None

    def attach(self, model: nn.Module, recipe: str) -> None:
        """Attach the marker to a model, for this recipe."""
        setattr(model, _MARKER, self._replace(recipe=recipe))


def convert_weights(model: nn.Module, dtype: str | None, quantize: str | None, device: str) -> None:
    """Convert the weights of a fresh model to a dtype and move it to a device.

    Those of a model that was trained before stay as they are. A model to be quantized is not moved, because
    ``prepare_model`` moves its quantized layers one after the other, so that the device never has all wide weights.
    """
    if hasattr(model, _MARKER):
        model.to(device)
        return
    set_dtype(model, dtype)
    if quantize is None:
        model.to(device)


def prepare_model(
    model: nn.Module, task: Task, seed: int, quantize: str | None = None, device: str = "cpu"
) -> TrainingMarker:
    """Prepare a model and its base weights for a first training, or return the marker of an earlier one.

    The hash of the base weights is that before they are quantized, because devices differ in rounding.
    """
    marker = getattr(model, _MARKER, None)
    if marker is not None and marker.quantize != quantize:
        raise ValueError(f"quantize must be {marker.quantize!r}, as this model is, got {quantize!r}; load a fresh one")
    if marker is not None:
        return marker
    reject_adapted(model)
    # A fitted head is new, so its weights are drawn after it has the right size, and the hash leaves them out.
    fit_head(model, task.head_labels)
    draw_new_weights(model, seed)
    w0_hash = weights_hash(model)
    if quantize is not None:
        quantize_blocks(model, quantize, device)
        model.to(device)
        marker = TrainingMarker("", w0_hash, Base(model), quantize)
        # Also if the training does not begin, because the model is quantized now.
        marker.attach(model, "")
        return marker
    return TrainingMarker("", w0_hash, Base(model))


def begin_training(
    method: Method, model: nn.Module, base: Base, settings: Settings
) -> tuple[torch.optim.Optimizer, pd.DataFrame]:
    """Attach a method, copy the base weights that it trains, and return its optimizer and the module table."""
    attach_method(method, model)
    # After it, because adapted parts of fused weights have rows as well.
    modules = module_table.describe(model)
    optimizer = method.optimizer(model, settings.lr, settings.head_lr, settings.weight_decay)
    settings.set_adam(optimizer, type(method).__name__)
    train_in_float32(optimizer)
    base.capture(optimizer)
    return optimizer, modules


def attach_method(method: Method, model: nn.Module) -> None:
    """Attach a method.

    Raise a ValueError if memory is too small for its hyperparameters, or if it changed a base weight: a model keeps W_0
    until it trains.
    """
    before = [(name, parameter, parameter._version) for name, parameter in model.named_parameters()]
    try:
        method.attach(model)
    except (MemoryError, RuntimeError, TypeError) as error:
        if not is_out_of_memory(error):
            raise
        fix = "reduce its sizes, or target fewer modules"
        raise ValueError(f"cannot attach {method.label()}: not enough memory; {fix}") from error
    for name, parameter, version in before:
        if parameter._version != version:
            raise ValueError(
                f"attach of {type(method).__name__} must not change base weights, but changed {name}; keep the change "
                "in the Delta, as PiSSA does"
            )


def reject_adapted(model: nn.Module) -> None:
    """Raise a ValueError if a model already has adapters of lorascope or PEFT: its weights are not base weights."""
    bare_model = unwrap_peft_model(model)
    if attached := adapters(bare_model) | unreadable_adapters(bare_model):
        raise ValueError(
            f"cannot train a model that already has adapters ({next(iter(attached))} ...); load a fresh one"
        )
