"""Importance of the components of a run's updates: the loss without each of them, and with a selection of them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn

from lorascope.adapters.activation_patching import Batch
from lorascope.adapters.delta import detach
from lorascope.array_types import Float
from lorascope.experiments.component_removal import (
    SvdTriple,
    ablation_loss_increases,
    attach_components,
    fill_plain,
)
from lorascope.experiments.trained_model import open_components, open_trained
from lorascope.export import RankBudget
from lorascope.inputs import models
from lorascope.inputs.tasks import Task
from lorascope.inputs.tokenization import EncodedRows
from lorascope.methods.alora import ALoRADelta
from lorascope.runs.result import Result
from lorascope.training.evaluation import evaluate
from lorascope.training.settings import Settings

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
    components = open_components(run, state)
    base, fitted, _ = open_trained(run, model, task, state)
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
    components = open_components(run, state)
    base, fitted, _ = open_trained(run, model, task, state)
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
        detach(base, join=False)
    return Losses(losses[0], losses[1], len(encoded))


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
