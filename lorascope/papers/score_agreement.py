"""Importance scores: agreement with each other and with the loss increase on removal of a component.

Do three importance scores order the components of a trained adapter by the loss increase on their removal? A singular
value decomposition turns the updates of one trained LoRA into P Lambda Q, so that all scores refer to the same
components. AdaLoRA's score is accumulated at zero learning rate, ALoRA's is its ablation on one batch, and AutoLoRA's
is alpha after training only the logits. The truth is the loss increase when a component, or a module, is removed, on
examples that no score used. The same truth on other examples is the best agreement a score can reach. Controls are a
correlation of 0, and the singular value as a score.

Departs:

- No paper compares these scores.
- Each score was designed for adapters trained by the same method, not for a finished LoRA.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lorascope.analysis.score_agreement import spearman
from lorascope.papers.judging.statistics import Constant, OfRun
from lorascope.papers.lora import LOW
from lorascope.papers.probe import Probe
from lorascope.runs.run import Run

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from torch import Tensor, nn

    from lorascope.adapters.activation_patching import Loss
    from lorascope.experiments.component_removal import SvdTriple

SCORES = "scores"
"""Kept table ``module, component, score, value``: scores and loss increases of the components of a run.

Component -1 is the whole module.
"""
HALVES = ("loss increase", "loss increase, other half")
ADALORA, AUTOLORA, ALORA, SIZE = "AdaLoRA importance", "AutoLoRA alpha", "ALoRA importance", "singular value"
RETAINED = "AutoLoRA kept"
EXAMPLES, SCORED, JUDGED, REMOVED = 32, 16, 59, 4
"""Examples per batch, batches for the scores, batches for each truth, and batches on which components are removed.

Removal is by far the most expensive part.
"""
Rows = dict[str, dict[str, np.ndarray]]
"""Name of a score -> module -> value of each component."""


def truth_correlation(table: pd.DataFrame, score: str) -> float:
    """Compute the agreement of a score and the loss increase on both halves: Spearman's correlation of components."""
    wide = table[table["component"] >= 0].pivot(index=["module", "component"], columns="score", values="value")
    truth = wide[list(HALVES)].mean(axis=1)
    return float(spearman(np.column_stack([wide[score], truth]))[0, 1])


def with_truth(score: str) -> OfRun:
    """Return the agreement of a score with the loss increase: their correlation."""
    return OfRun(partial(truth_correlation, score=score), SCORES, LOW)


CLAIMS = {
    "agreement.adalora": (with_truth(ADALORA), Constant(0.0)),
    "agreement.autolora": (with_truth(AUTOLORA), Constant(0.0)),
    "agreement.size.adalora": (with_truth(ADALORA), with_truth(SIZE)),
    "agreement.size.autolora": (with_truth(AUTOLORA), with_truth(SIZE)),
    "agreement.size.alora": (with_truth(ALORA), with_truth(SIZE)),
}


def keep_scores(run: Run) -> pd.DataFrame:
    """Return the kept table ``SCORES`` on score agreement: a LoRA's scores, and loss increases on two text halves."""
    import torch

    from lorascope.adapters.delta import attached_deltas, detach
    from lorascope.experiments import component_removal
    from lorascope.inputs import models, tasks
    from lorascope.methods.autolora import retained_mask

    task = tasks.load(run.task)
    model = models.load(run.meta.model, task)
    run.restore(model)
    state = {name: component_removal.svd_of_update(delta.update()) for name, delta in attached_deltas(model).items()}
    detach(model)
    model.requires_grad_(False)
    task = task.fit(model)
    tokens = models.tokenizer(model)

    def batches(split: str, number: int) -> list[dict[str, Tensor]]:
        # The first examples are a random sample, because a task orders its rows by hash.
        encoded = task.encode(tokens, task.split(split).head(number * EXAMPLES))
        return [encoded.batch(range(i, i + EXAMPLES)) for i in range(0, len(encoded) - EXAMPLES + 1, EXAMPLES)]

    def loss(batch: dict[str, Tensor]) -> Tensor:
        return model(**batch).loss

    validation, test = batches("validation", SCORED), batches("test", 2 * JUDGED)
    components: Rows = {}
    modules: dict[str, dict[str, float]] = {}
    for half, of_half in zip(HALVES, (test[0::2], test[1::2]), strict=True):
        increases = component_removal.ablation_loss_increases(model, loss, state, of_half, REMOVED)
        components[half] = {name: increase[:-1] for name, increase in increases.items()}
        # The last entry belongs to the removal of the whole module.
        modules[half] = {name: increase[-1] for name, increase in increases.items()}
    components[SIZE] = {name: sigma for name, (_, sigma, _) in state.items()}
    components |= adalora_scores(model, loss, state, validation)
    components |= alora_scores(model, loss, state, validation[0])
    components |= autolora_scores(model, loss, state, validation)
    # The score of a module is the sum of its components, unless its removal was measured.
    for score, rows in components.items():
        modules.setdefault(score, {name: values.sum() for name, values in rows.items()})
    # Alpha sums to one in every module, so modules are compared by the alpha of the retained components.
    modules[RETAINED] = {}
    for name, alpha in components[AUTOLORA].items():
        mask = retained_mask(torch.from_numpy(alpha)).numpy()
        modules[AUTOLORA][name], modules[RETAINED][name] = alpha[mask].sum(), mask.sum()
    tables = []
    for score, rows in components.items():
        for name, values in rows.items():
            table = pd.DataFrame({"module": name, "component": range(len(values)), "score": score, "value": values})
            tables.append(table)
    whole = [(name, -1, score, value) for score, rows in modules.items() for name, value in rows.items()]
    tables.append(pd.DataFrame(whole, columns=["module", "component", "score", "value"]))
    return pd.concat(tables, ignore_index=True).astype({"component": "int16", "value": "float32"})


def adalora_scores(model: nn.Module, loss: Loss, state: Mapping[str, SvdTriple], batches: Sequence[Any]) -> Rows:
    """Compute AdaLoRA's scores, whose agreement is studied: importance, sensitivity, uncertainty and gradient norm.

    The averages run over the batches at zero learning rate, with AdaLoRA's default betas.
    """
    import torch

    from lorascope.adapters.delta import detach
    from lorascope.experiments.component_removal import attach_components, fill_svd
    from lorascope.methods import adalora

    deltas = attach_components(model, state, adalora.AdaLoRADelta, fill_svd)
    weights = [weight for delta in deltas.values() for weight in (delta.B, delta.diagonal, delta.A)]
    sensitivity, uncertainty, total = ([torch.zeros_like(weight) for weight in weights] for _ in range(3))
    default = adalora.AdaLoRA()
    for batch in batches:
        gradients = torch.autograd.grad(loss(batch), weights)
        with torch.no_grad():
            adalora.smooth(sensitivity, uncertainty, weights, list(gradients), (default.beta1, default.beta2))
            torch._foreach_add_(total, gradients)  # the gradient norm is of the mean over all batches
    detach(model)
    rows: Rows = {name: {} for name in (ADALORA, "AdaLoRA sensitivity", "AdaLoRA uncertainty", "gradient norm")}
    for number, name in enumerate(deltas):
        # Each module has three weights in a row: P (as B), lambda (as diagonal) and Q (as A).
        triple = slice(3 * number, 3 * number + 3)
        mean, spread, (dP, dlambda, dQ) = sensitivity[triple], uncertainty[triple], total[triple]
        rows[ADALORA][name] = adalora.importance_terms(mean, spread).sum(0)[0].numpy()
        rows["AdaLoRA sensitivity"][name] = mean[1][:, 0].numpy()
        rows["AdaLoRA uncertainty"][name] = spread[1][:, 0].numpy()
        squares = dP.square().sum(0) + dlambda[:, 0].square() + dQ.square().sum(1)
        rows["gradient norm"][name] = (squares.sqrt() / len(batches)).numpy()
    return rows


def alora_scores(model: nn.Module, loss: Loss, state: Mapping[str, SvdTriple], batch: Any) -> Rows:
    """Compute ALoRA's score, whose agreement is studied, and its two terms; higher means more important."""
    from lorascope.adapters.ablation import ablation_scores
    from lorascope.adapters.delta import detach
    from lorascope.experiments.component_removal import attach_components, fill_plain
    from lorascope.methods import alora

    attach_components(model, state, alora.ALoRADelta, fill_plain)
    losses = ablation_scores(model, loss, batch)
    detach(model)
    return {
        ALORA: {name: alora.importance_score(losses.full, losses.without[name], losses.only[name]) for name in state},
        "ALoRA, without": {name: losses.full - losses.without[name] for name in state},
        "ALoRA, alone": {name: losses.only[name] for name in state},
    }


def autolora_scores(model: nn.Module, loss: Loss, state: Mapping[str, SvdTriple], batches: Sequence[Any]) -> Rows:
    """Compute AutoLoRA's score, whose agreement is studied: alpha after training only the logits for two epochs."""
    import torch

    from lorascope.adapters.delta import detach
    from lorascope.experiments.component_removal import attach_components, fill_plain
    from lorascope.methods import autolora

    def fill(delta: Any, P: Tensor, sigma: Tensor, Q: Tensor) -> None:
        fill_plain(delta, P, sigma * len(sigma), Q)  # leaves the update unchanged at the initial alpha = 1/k

    deltas = attach_components(model, state, autolora.AutoLoRADelta, fill)
    # Only the logits train, so that alpha scores the components as they are.
    logits = [delta.logits.requires_grad_() for delta in deltas.values()]
    optimizer = torch.optim.Adam(logits, lr=1e-2, betas=autolora.BETAS)
    for batch in (*batches, *batches):
        for logit, gradient in zip(logits, torch.autograd.grad(loss(batch), logits), strict=True):
            logit.grad = gradient
        optimizer.step()
    detach(model)
    return {AUTOLORA: {name: delta.alpha.detach().numpy() for name, delta in deltas.items()}}


_TRUTH = "loss increase on removal"


PROBE = Probe(
    name="agreement",
    title="Importance scores: agreement with each other and with ablation",
    source="Zhang et al., AdaLoRA, arXiv 2303.10512; Liu et al., ALoRA, arXiv 2403.16187; Zhang et al., AutoLoRA, "
    "arXiv 2403.09113",
    question="Do three importance scores order the components of a trained adapter by loss increase on removal?",
    keep={(SCORES, LOW): keep_scores},
)
