"""What the components of a run's updates are worth on its task: the loss without each, and with some of them alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorascope.adapters.activation_patching import Batch
from lorascope.adapters.delta import detach
from lorascope.adapters.host_weights import host_weight
from lorascope.experiments.component_removal import (
    Triple,
    ablation_loss_increases,
    attach_components,
    canonical,
    fill_plain,
)
from lorascope.inputs import models, tasks
from lorascope.inputs.classifier_head import fit_head, weights_hash
from lorascope.inputs.tasks import Task
from lorascope.inputs.tokenization import EncodedRows
from lorascope.methods.alora import ALoRADelta
from lorascope.methods.base import task_head
from lorascope.runs.export import RankBudget, base_of
from lorascope.runs.export.peft_folder import refuse_unkept
from lorascope.runs.formats.peft_lora import PREFIX
from lorascope.runs.loading import AdapterRun
from lorascope.runs.run import Run
from lorascope.runs.summary import exact_products
from lorascope.schema.deprecation import old_names
from lorascope.training.evaluation import evaluate
from lorascope.training.state import load_tensors

BATCH = 32


class Losses(NamedTuple):
    """Mean loss with all components and with those kept, and the number of texts that it was measured on."""

    before: float
    after: float
    texts: int


def component_importance(
    run: Run, model: str | Path, task: str | Path | Task, *, state: str = "last", rows: int = 256, exact_rows: int = 64
) -> dict[str, Float[np.ndarray, "_"]]:
    """Rise of the loss with each component of each module taken out; scores for ``export.select_components``.

    Measured on the first half of the validation split, so that ``pruned_losses`` can be on the other.

    Parameters
    ----------
    run : Run
        Its updates are products of two factors.
    model : str or path
        Its base: see ``models.load``.
    task : str, path or Task
        See ``tasks.load``.
    state : {"last", "best"}
    rows : int
        Texts at most.
    exact_rows : int
        On so many of them components are really taken out; what that does to first order, by which texts differ most,
        is taken from all. 0 is first order alone, ``rows`` or more removal alone.

    Returns
    -------
    dict module -> array (k,)
        Nats, one for each singular value other than 0, the largest first.

    Raises
    ------
    ValueError
        The model is not the run's base, the run holds an update that is no product, or what trained beside the updates
        was not kept.
    """
    base, fitted, parts = _open_trained(run, model, task, state)
    encoded = _validation_half(base, fitted, 0, rows)
    size = min(BATCH, len(encoded))
    batches = [encoded.batch(range(at, at + size)) for at in range(0, len(encoded) - size + 1, size)]

    def loss(batch: Batch) -> Tensor:
        return base(**batch).loss

    removed = min(-(-exact_rows // size), len(batches))
    return {name: rise[:-1] for name, rise in ablation_loss_increases(base, loss, parts, batches, removed).items()}


def pruned_losses(
    run: Run, cut: RankBudget, model: str | Path, task: str | Path | Task, *, state: str = "last", rows: int = 256
) -> Losses:
    """Loss of the run's model and of the same with the components of ``cut`` alone, on validation text.

    On the second half of the validation split, of which ``component_importance`` has seen nothing; ``rows`` of it at
    most. Parameters as there.
    """
    base, fitted, parts = _open_trained(run, model, task, state)
    encoded = _validation_half(base, fitted, 1, rows)
    masks = {name: cut.kept[name][: len(sigma)] for name, (_, sigma, _) in parts.items()}
    chosen = {name: (P[:, masks[name]], sigma[masks[name]], Q[masks[name]]) for name, (P, sigma, Q) in parts.items()}
    before, after = (_mean_loss(base, some, encoded) for some in (parts, chosen))
    return Losses(before, after, len(encoded))


def _mean_loss(model: nn.Module, state: Mapping[str, Triple], encoded: EncodedRows) -> float:
    attach_components(model, {name: triple for name, triple in state.items() if len(triple[1])}, ALoRADelta, fill_plain)
    found = evaluate(model, encoded).loss
    detach(model)
    return found


def _open_trained(
    run: Run, name: str | Path, task: str | Path | Task, state: str
) -> tuple[nn.Module, Task, dict[str, Triple]]:
    """The base with all that was trained but the adapters, the task in its form, and the updates."""
    if isinstance(run, AdapterRun) and run.files.kind == "DoRA":
        raise ValueError(
            f"{run.label} is DoRA, whose magnitudes no component holds: a loss of components is not its own"
        )
    parts = {module: canonical(update) for module, update in exact_products(run, run.updates(state=state)).items()}
    task = task if isinstance(task, Task) else tasks.load(task)
    base = models.load(name, task, base_of(run)[1])
    if isinstance(run, AdapterRun) or run.meta["w0_hash"] is None:
        held = _adapter_weights(run) if isinstance(run, AdapterRun) else _recorded_weights(run, state)
        _load_other_weights(run, held, base, str(name))
        _check_hosts(run, parts, base, str(name))
    else:
        fit_head(base, run.meta["labels"])
        if weights_hash(base) != run.meta["w0_hash"]:
            raise ValueError(f"{name} has other weights than {run.meta['model']}, the base of run {run.id}")
        run.restore(base, state)
        detach(base)
    base.requires_grad_(False)
    return base, task.fit(base), parts


def _recorded_weights(run: Run, state: str) -> dict[str, Tensor]:
    """What a recording of another's training keeps beside the factors."""
    refuse_unkept(run, state)
    return {name: torch.tensor(array) for name, array in run.tensors(state).items()}


def _check_hosts(run: Run, parts: Mapping[str, Triple], base: nn.Module, name: str) -> None:
    """Raise a ValueError where a base whose weights nobody noted cannot be the one, by its names and shapes."""
    modules = dict(base.named_modules())
    for module, (P, _, Q) in parts.items():
        if module not in modules:
            raise ValueError(f"{name} has no {module}, which {run.label} adapts: it is another model")
        shapes = (len(P), Q.shape[1]), tuple(host_weight(modules[module]).shape)
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{module} is {shapes[0]} in {run.label} and {shapes[1]} in {name}: another model, or a resized one"
            )


def _load_other_weights(run: Run, stored: Mapping[str, Tensor], base: nn.Module, name: str) -> None:
    """Put what was trained beside the factors into the base, which is a head as a rule."""
    untrained = sorted(models.missing(base) - stored.keys())
    if untrained:
        raise ValueError(f"neither {run.label} nor {name} holds {untrained[0]}: with a random head a loss says nothing")
    places = dict(base.named_parameters(remove_duplicate=False))
    for other, tensor in stored.items():
        if other in places and places[other].shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)} in {run.label} and {tuple(places[other].shape)} in {name}"
            labels = "for this task: the task has other labels than the adapter"
            resized = "(tokens added?): give the base in this size"
            raise ValueError(f"{other} is {shapes} {labels if other in task_head(base) else resized}")
    tied = stored.keys() & places.keys() - dict(base.named_parameters()).keys()
    load_tensors(base, {other: tensor for other, tensor in stored.items() if other not in tied})
    if apart := [other for other in sorted(tied) if not torch.equal(places[other], stored[other].to(places[other]))]:
        raise ValueError(f"{apart[0]} has weights of its own in {run.label}, but is tied in {name}: give it untied")


def _adapter_weights(run: AdapterRun) -> dict[str, Tensor]:
    """What an adapter's folder holds beside the factors, under the names of the base."""
    if biased := [name for name in run.files.others if name.endswith(".lora_B.bias")]:
        raise ValueError(f"{run.label} holds {biased[0]} (lora_bias), which no component is: its loss is not measured")
    held = {name.removeprefix(PREFIX): (file, name) for file in run.files.files for name in file}
    found = {other: held[other] for other in run.files.others}
    # PEFT saves an embedding that it adapts with the adapter.
    return {other.replace(".base_layer.", "."): torch.tensor(file[name]) for other, (file, name) in found.items()}


def _validation_half(model: nn.Module, task: Task, which: int, rows: int) -> EncodedRows:
    """Every other row of the validation split, which stands in the order of a hash."""
    chosen = task.split("validation").iloc[which::2].head(rows)
    if chosen.empty:
        raise ValueError(f"the validation split of {task.name} has one row: components need one, their loss another")
    return task.encode(models.processor(model), chosen)


if not TYPE_CHECKING:  # type checkers should not see the old names
    __getattr__ = old_names(__name__, {"losses": "pruned_losses", "rises": "component_importance"})
