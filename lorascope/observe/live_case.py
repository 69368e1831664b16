"""Evidence about a training in progress, measured on the model and the optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lorascope.adapters.delta import Delta
from lorascope.adapters.host_weights import shared_copies
from lorascope.adapters.peft_layers import PeftDelta, has_peft_layers
from lorascope.diagnosis.case import TrainedModule, component_evidence
from lorascope.diagnosis.training_case import TrainingEvidence
from lorascope.methods.method import Step, trained_parameters
from lorascope.observe.trainable import TrainedTensors, tile_sums, unreadable_adapters
from lorascope.schema.module_table import parse
from lorascope.updates import Update, change_norms, effective_rank, spectra


class LiveModel:
    """Live measurements of a model in training, as evidence about a case; W_0 is measured once."""

    def __init__(self, step: Step) -> None:
        self.trained = TrainedTensors(step)
        names = set(self.trained.parameter_of.values()) & step.base.keys()
        dense_names = [name for name in names if step.base[name].is_floating_point()]
        sums = self.trained.copy_updates([tile_sums(step.base[name]) for name in dense_names])
        self._base_norms = {name: math.sqrt(math.fsum(tiles)) for name, tiles in zip(dense_names, sums, strict=True)}

    @torch.no_grad()
    @shared_copies()
    def measure(
        self, step: Step, losses: Mapping[int, float], moving_steps: int, initial: Mapping[str, Update]
    ) -> TrainingEvidence:
        """Return the evidence at a step; ``initial`` are the initial updates that are not zero."""
        optimized = {id(p): p for p in trained_parameters(step.optimizer)}
        used = [p for p in optimized.values() if p.requires_grad]
        adapted = self.trained.deltas
        return TrainingEvidence(
            modules=[*self._adapted_modules(initial), *self._dense_modules(step)],
            losses=losses,
            steps=step.finished,
            moving_steps=moving_steps,
            learning_rate=step.values.get("lr", (0, None))[1],
            masks_components=any(map(_masks_components, adapted.values())),
            expects_adapters=bool(adapted or has_peft_layers(step.model)) and not unreadable_adapters(step.model),
            tied=[pair for pair in _tied(step) if set(pair) <= adapted.keys()],
            unoptimized=[name for name, delta in adapted.items() if _is_left_out(delta, optimized.keys())],
            has_gradient=any(p.grad is not None and bool(p.grad.any()) for p in used),
        )

    def _adapted_modules(self, initial: Mapping[str, Update]) -> Iterator[TrainedModule]:
        self.trained.copy_updates()
        updates = {name: update for name, update in self.trained.updates().items() if self.trained.is_frozen(name)}
        products = {name: update for name, update in updates.items() if update.low_rank is not None}
        sigmas = dict(zip(products, spectra(list(products.values())), strict=True))
        started = [name for name in updates if name in initial]
        changes = dict(zip(started, change_norms((updates[name], initial[name]) for name in started), strict=True))
        for module, update in updates.items():
            norm, rank = update.norm(), self.trained.deltas[module].rank
            moved = changes.get(module, norm)
            scale, used, empty = component_evidence(update)
            yield self._row(
                module,
                rank=rank,
                update_norm=norm,
                moved=moved,
                adapted=bool(rank),
                scale=scale,
                used=used,
                empty=empty,
                effective_rank=effective_rank(sigmas[module]) if module in sigmas else math.nan,
            )

    def _dense_modules(self, step: Step) -> Iterator[TrainedModule]:
        dense = {label: p.detach() for label, p in self.trained.tensors().items() if label in self.trained.modules}
        bases = [step.base[self.trained.parameter_of[label]] for label in dense]
        sums = self.trained.copy_updates([tile_sums(p, W0) for p, W0 in zip(dense.values(), bases, strict=True)])
        for label, tiles in zip(dense, sums, strict=True):
            moved = math.sqrt(math.fsum(tiles))
            yield self._row(label, rank=None, update_norm=moved, moved=moved)

    def _row(self, module: str, rank: int | None, update_norm: float, **fields: Any) -> TrainedModule:
        location, norm = parse(module), self._base_norms.get(self.trained.parameter_of[module], math.nan)
        relative = update_norm / norm if norm else math.nan
        measured = {"weight_norm": norm, "relative_update": relative, "update_norm": update_norm}
        return TrainedModule(module, location.stack, location.layer, location.role, rank, **measured | fields)


def _masks_components(delta: Delta | PeftDelta) -> bool:
    """Return whether components of an adapter are switched off by a vector, as in AdaLoRA."""
    return bool(getattr(delta.layer, "lora_E", ())) if isinstance(delta, PeftDelta) else "diagonal" in delta.factors()


def _is_left_out(delta: Delta | PeftDelta, optimized: Any) -> bool:
    """Return whether an adapter has trainable parameters, of which the optimizer contains none."""
    layer: nn.Module = delta.layer if isinstance(delta, PeftDelta) else delta
    parameters = list(layer.named_parameters())
    if isinstance(delta, PeftDelta):
        prefixes = tuple(f"{name}." for name in delta.layer.adapter_layer_names)
        parameters = [(name, p) for name, p in parameters if name.startswith(prefixes)]
    trainable = [p for _, p in parameters if p.requires_grad]
    return bool(trainable) and not any(id(p) in optimized for p in trainable)


def _tied(step: Step) -> Iterator[tuple[str, str]]:
    """Yield the pairs of names of one weight."""
    for module, tied in zip(step.modules["module"], step.modules["tied"], strict=True):
        yield from ((module, other) for other in filter(None, tied.split(",")))
