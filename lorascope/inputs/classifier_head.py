"""Classifier heads: fit a head to the labels of a task, and initialize new weights from the seed of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lorascope.inputs.models import missing, note_missing, set_labels
from lorascope.schema import module_table


def fit_head(model: Any, labels: Sequence[str] | None) -> None:
    """Fit a classifier's head in place: replace its last Linear if its size is not the number of labels.

    The new weights are added to ``models.missing``. Without labels, the task uses the language model head, which stays.
    """
    if labels is None:
        return
    description = module_table.describe(model)
    name = description.loc[description["role"] == "head", "module"].iloc[-1]
    head: nn.Linear = model.get_submodule(name)
    if head.out_features != len(labels):
        fresh = nn.Linear(head.in_features, len(labels), bias=head.bias is not None)
        fresh.to(head.weight.device, head.weight.dtype)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, fresh)
        note_missing(model, [f"{name}.{parameter}" for parameter, _ in fresh.named_parameters()])
    model.config.num_labels = len(labels)
    model.num_labels = len(labels)
    set_labels(model.config, labels)


def draw_new_weights(model: nn.Module, seed: int) -> None:
    """Initialize the weights that the checkpoint lacked, such as a classifier's head, from a seed.

    Matrices are normal, biases are zero, and norm weights are one. Each tensor has its own generator, so that an
    additional new weight does not change the others.
    """
    spread = getattr(model.config, "initializer_range", 0.02)
    parameters = dict(model.named_parameters())
    for name in sorted(missing(model)):
        parameter = parameters[name]
        key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little") >> 1
        generator = torch.Generator().manual_seed(key)
        with torch.no_grad():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def weights_hash(model: nn.Module) -> str:
    """Return the SHA-256 of all parameters and persistent buffers, except new weights such as a classifier's head."""
    digest, new, persistent = hashlib.sha256(), missing(model), model.state_dict(keep_vars=True)
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in persistent)
    for name, tensor in sorted((*model.named_parameters(), *buffers)):
        if name not in new:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
