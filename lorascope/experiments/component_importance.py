"""Importance of the components of a run's updates: the loss without each of them, and with a selection of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from lorascope.adapters.activation_patching import Batch
from lorascope.adapters.delta import detach
from lorascope.adapters.host_weights import host_weight
from lorascope.array_types import Float
from lorascope.experiments.component_removal import (
    SvdTriple,
    ablation_loss_increases,
    attach_components,
    fill_plain,
    svd_of_update,
)
from lorascope.export import RankBudget, base_of
from lorascope.export.peft_folder import require_all_recorded
from lorascope.formats.stored_update import plain_name
from lorascope.inputs import models, tasks
from lorascope.inputs.classifier_head import fit_head, weights_hash
from lorascope.inputs.tasks import Task
from lorascope.inputs.tokenization import EncodedRows
from lorascope.methods.alora import ALoRADelta
from lorascope.methods.method import task_head
from lorascope.runs.adapter import Adapter
from lorascope.runs.lora_config import exact_products
from lorascope.runs.result import Result
from lorascope.runs.run import Run
from lorascope.training.evaluation import evaluate
from lorascope.training.settings import Settings
from lorascope.training.state import load_tensors

__all__ = ["component_importance", "pruned_losses"]

BATCH = 32


class Losses(NamedTuple):
    """Losses that check component importance: mean with all and with the retained ones, and number of examples."""

    before: float
    after: float
    texts: int


def component_importance(
    run: Result,
    model: str | Path,
    task: str | Path | Task,
    *,
    state: str = "last",
    rows: int = 256,
    exact_rows: int = 64,
) -> dict[str, Float[np.ndarray, "_"]]:
    """Compute the importance of each component, the loss increase on its removal, for ``export.select_components``.

    Uses every other row of the validation split, so that ``pruned_losses`` can use the rows between them.

    Parameters
    ----------
    run : Run
        Run whose updates are products of two factors.
    model : str or path
        Its base model; see ``models.load``.
    task : str, path or Task
        See ``tasks.load``.
    state : {"last", "best"}
        Saved parameters, default "last".
    rows : int
        Maximum number of examples, default 256.
    exact_rows : int
        Number of examples on which components are really removed, default 64. The first-order part of the loss
        increase, which varies most between examples, is averaged over all ``rows``. 0 computes only the first-order
        part; ``rows`` or more removes components on all examples.

    Returns
    -------
    dict module -> array (k,)
        Loss increases in nats, one per nonzero singular value, the largest singular value first.

    Raises
    ------
    ValueError
        The model is not the base, an update is not a product of two factors, or trained parameters were not saved.
    """
    if exact_rows < 0:
        raise ValueError(f"exact_rows must be an integer >= 0, got {exact_rows}")
    base, fitted, components = _open_trained(run, model, task, state)
    encoded = _validation_half(run, base, fitted, 0, rows)
    size = min(BATCH, len(encoded))
    # Only full batches, so that every row has the same weight in the mean.
    starts = range(0, len(encoded) - size + 1, size)
    batches = [encoded.batch(range(start, start + size)) for start in starts]

    def loss(batch: Batch) -> Tensor:
        return base(**batch).loss

    # Round up to whole batches.
    removed = min(-(-exact_rows // size), len(batches))
    increases = ablation_loss_increases(base, loss, components, batches, removed)
    # The last entry belongs to the whole module.
    return {name: rise[:-1] for name, rise in increases.items()}


def pruned_losses(
    run: Result, cut: RankBudget, model: str | Path, task: str | Path | Task, *, state: str = "last", rows: int = 256
) -> Losses:
    """Check component importance by the loss of the run's model with all components and with only those in ``cut``.

    Uses at most ``rows`` validation rows that ``component_importance`` does not use; see it for the other parameters.
    """
    base, fitted, components = _open_trained(run, model, task, state)
    encoded = _validation_half(run, base, fitted, 1, rows)
    retained = {}
    for name, (P, sigma, Q) in components.items():
        mask = cut.kept[name][: len(sigma)]
        retained[name] = SvdTriple(P[:, mask], sigma[mask], Q[mask])
    losses = []
    for triples in (components, retained):
        nonzero = {name: triple for name, triple in triples.items() if len(triple.sigma)}
        attach_components(base, nonzero, ALoRADelta, fill_plain)
        losses.append(evaluate(base, encoded).loss)
        detach(base)
    return Losses(losses[0], losses[1], len(encoded))


def _open_trained(
    run: Result, name: str | Path, task: str | Path | Task, state: str
) -> tuple[nn.Module, Task, dict[str, SvdTriple]]:
    """Return the base with all trained parameters except adapters, the fitted task, and the updates."""
    products = exact_products(run, run.updates(state=state))
    components = {module: svd_of_update(update) for module, update in products.items()}
    if not components:
        raise ValueError(f"{run.reference} has no low-rank updates, whose components could be removed")
    if not isinstance(task, Task):
        task = tasks.load(task)
    base = models.load(name, task, base_of(run)[1])
    if isinstance(run, Adapter) or run.meta.w0_hash is None:
        if isinstance(run, Adapter):
            stored = _adapter_weights(run)
        else:  # a recording of another trainer
            require_all_recorded(run, state)
            stored = {other: torch.tensor(array) for other, array in cast(Run, run).tensors(state).items()}
        _load_other_weights(run, stored, base, str(name))
        _check_hosts(run, components, base, str(name))
    else:
        fit_head(base, run.meta.labels)
        if weights_hash(base) != run.meta.w0_hash:
            raise ValueError(
                f"model must be {run.meta.model}, the base of {run.reference}, got {name} with different weights"
            )
        cast(Run, run).restore(base, state)
        detach(base)
    base.requires_grad_(False)
    return base, task.fit(base), components


def _check_hosts(run: Result, components: Mapping[str, SvdTriple], base: nn.Module, name: str) -> None:
    """Raise ValueError if names or shapes show that a model is not the base; its weights were not recorded."""
    modules = dict(base.named_modules())
    for module, (P, _, Q) in components.items():
        if module not in modules:
            raise ValueError(f"model must be the base of {run.label}, got {name}: it has no {module}")
        shapes = (len(P), Q.shape[1]), tuple(host_weight(modules[module]).shape)
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"model must be the base of {run.label}, got {name}: {module} has shape {shapes[1]}, not {shapes[0]}"
            )


def _load_other_weights(run: Result, stored: Mapping[str, Tensor], base: nn.Module, name: str) -> None:
    """Load the parameters that trained in addition to the factors, usually a classifier head."""
    untrained = sorted(models.missing(base) - stored.keys())
    if untrained:
        raise ValueError(f"cannot measure the loss: neither {run.label} nor {name} has weights for {untrained[0]}")
    parameters = dict(base.named_parameters(remove_duplicate=False))
    for other, tensor in stored.items():
        if other in parameters and parameters[other].shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)} in {run.label} and {tuple(parameters[other].shape)} in {name}"
            fix = "Pass the base model in the size of training (were tokens added?)"
            if other in task_head(base):
                fix = "Pass a task with the labels of the adapter"
            raise ValueError(f"cannot load {other}: it has shape {shapes}. {fix}")
    # A tied weight is loaded under its first name, and the second one must agree with it.
    tied = stored.keys() & parameters.keys() - dict(base.named_parameters()).keys()
    load_tensors(base, {other: tensor for other, tensor in stored.items() if other not in tied})
    for other in sorted(tied):
        if not torch.equal(parameters[other], stored[other].to(parameters[other])):
            raise ValueError(
                f"cannot load {other}: it is tied in {name}, but is separate in {run.label}. Pass an untied base"
            )


def _adapter_weights(run: Adapter) -> dict[str, Tensor]:
    """Return the parameters in an adapter folder other than the factors, by their names in the base."""
    if biased := [name for name in run.files.others if name.endswith(".lora_B.bias")]:
        raise ValueError(
            f"cannot measure components of {run.label}: {biased[0]} (lora_bias) is not part of any component"
        )
    tensors = {}
    for file in run.files.files:
        for name in file:
            other = plain_name(name)
            if other in run.files.others:
                # PEFT saves an adapted embedding with the adapter, as its base layer.
                tensors[other.replace(".base_layer.", ".")] = torch.tensor(file[name])
    return tensors


def _validation_half(run: Result, model: nn.Module, task: Task, which: int, rows: int) -> EncodedRows:
    """Encode every other row of the validation split, which is ordered by a hash, truncated as in the training."""
    if rows < 1:
        raise ValueError(f"rows must be an integer >= 1, got {rows}")
    split = task.split("validation")
    texts = split.iloc[which::2].head(rows)
    if texts.empty:
        raise ValueError(f"the validation split of {task.name} must have at least 2 rows, got {len(split)}")
    # The folder of an adapter does not record how the training truncated its texts.
    max_length = run.meta.settings.get("max_length", Settings.max_length)
    return task.encode(models.processor(model), texts, max_length)


def __dir__() -> list[str]:
    return __all__
