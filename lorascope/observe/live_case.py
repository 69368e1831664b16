"""Evidence about a training in progress, measured on the model and the optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lorascope.adapters.delta import Delta, frozen_parameters
from lorascope.adapters.host_weights import shared_copies
from lorascope.adapters.peft_layers import PeftDelta, has_peft_layers, unreadable_adapters
from lorascope.diagnosis.case import TrainedModule, component_evidence
from lorascope.diagnosis.training_case import TrainingEvidence
from lorascope.methods.method import Step, trained_parameters
from lorascope.observe.trainable import TrainedTensors, changes_since, tied_pairs, tile_sums
from lorascope.schema.module_table import parse
from lorascope.updates import Update, effective_rank, spectra


class LiveModel:
    """Live measurements of a model in training, as evidence about a case; W_0 is measured once."""

    def __init__(self, step: Step) -> None:
        self.trained = TrainedTensors(step)
        sums = {}
        for name in set(self.trained.parameter_of.values()) & step.base.keys():
            if step.base[name].is_floating_point():  # the integers of a quantized weight have no norm
                sums[name] = tile_sums(step.base[name])
        self._base_squares = self.trained.total(sums)

    @torch.no_grad()
    @shared_copies()
    def measure(
        self, step: Step, losses: Mapping[int, float], moving_steps: int, initial: Mapping[str, Update]
    ) -> TrainingEvidence:
        """Return the evidence at a step; ``initial`` are the initial updates that are not zero."""
        optimized = set(trained_parameters(step.optimizer))
        adapted = self.trained.deltas
        return TrainingEvidence(
            modules=[*self._adapted_modules(initial), *self._dense_modules(step)],
            losses=losses,
            steps=step.finished,
            moving_steps=moving_steps,
            learning_rate=step.values.get("lr", (0, None))[1],
            masks_components=any(map(_masks_components, adapted.values())),
            expects_adapters=bool(adapted or has_peft_layers(step.model)) and not unreadable_adapters(step.model),
            tied=[pair for pair in tied_pairs(step.modules) if set(pair) <= adapted.keys()],
            unoptimized=[name for name, delta in adapted.items() if _is_left_out(delta, optimized)],
            has_gradient=any(map(_has_gradient, optimized)),
            frozen=frozen_parameters(adapted),
        )

    def _adapted_modules(self, initial: Mapping[str, Update]) -> Iterator[TrainedModule]:
        self.trained.copy_updates()
        updates = self.trained.frozen_updates()
        products = {name: update for name, update in updates.items() if update.low_rank is not None}
        sigmas = dict(zip(products, spectra(list(products.values())), strict=True))
        changes = changes_since(updates, initial)
        for module, update in updates.items():
            norm, rank = update.norm(), self.trained.deltas[module].rank
            moved = changes.get(module, norm)
            scale, used, empty = component_evidence(update)
            components = {"adapted": bool(rank), "scale": scale, "used": used, "empty": empty}
            effective = effective_rank(sigmas[module]) if module in sigmas else math.nan
            yield self._row(module, rank, norm, moved=moved, effective_rank=effective, **components)

    def _dense_modules(self, step: Step) -> Iterator[TrainedModule]:
        sums = {}
        for label, tensor in self.trained.tensors().items():
            if label in self.trained.modules:
                sums[label] = tile_sums(tensor, step.base[self.trained.parameter_of[label]])
        for label, total in self.trained.total(sums).items():
            moved = math.sqrt(total)
            yield self._row(label, rank=None, update_norm=moved, moved=moved)

    def _row(self, module: str, rank: int | None, update_norm: float, **fields: Any) -> TrainedModule:
        location = parse(module)
        norm = math.sqrt(self._base_squares.get(self.trained.parameter_of[module], math.nan))
        relative = update_norm / norm if norm else math.nan
        measured = {"weight_norm": norm, "relative_update": relative, "update_norm": update_norm}
        return TrainedModule(module, location.stack, location.layer, location.role, rank, **measured | fields)


def _masks_components(delta: Delta | PeftDelta) -> bool:
    """Return whether components of an adapter are switched off by a vector, as in AdaLoRA."""
    if isinstance(delta, PeftDelta):
        return bool(getattr(delta.layer, "lora_E", ()))
    return "diagonal" in delta.factors()


def _is_left_out(delta: Delta | PeftDelta, optimized: set[nn.Parameter]) -> bool:
    """Return whether an adapter has trainable parameters, of which the optimizer contains none."""
    trainable = {parameter for _, parameter in delta.named_parameters() if parameter.requires_grad}
    return bool(trainable) and trainable.isdisjoint(optimized)


def _has_gradient(parameter: nn.Parameter) -> bool:
    """Return whether a parameter trains and has a gradient that is not zero."""
    return parameter.requires_grad and parameter.grad is not None and bool(parameter.grad.any())
