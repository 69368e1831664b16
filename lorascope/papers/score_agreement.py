"""Importance scores: correlation with the loss increase when a component is removed.

Probe of importance scores: their agreement with each other and with the loss increase on removal of a component.

A singular value decomposition turns the updates of one trained LoRA into P Lambda Q, so that all scores refer to the
same components. AdaLoRA's score is accumulated at zero learning rate, ALoRA's is its ablation on one batch, and
AutoLoRA's is alpha after training only the logits. The truth is the loss increase when a component, or a module, is
removed, on examples that no score used. The same truth on other examples is the best agreement a score can reach, and a
random score is the control.

Departs:

- No paper compares these scores.
- Each score was designed for adapters trained by the same method, not for a finished LoRA.

Figures of importance scores.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lorascope import plots
from lorascope.analysis.score_agreement import correlate, spearman
from lorascope.papers.figures.gallery_figure import GalleryFigure, own_labels
from lorascope.papers.judging.statistics import Constant, OfRun
from lorascope.papers.lora import LOW
from lorascope.papers.probe import Probe
from lorascope.runs.run import Run

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from torch import Tensor

    from lorascope.papers.setups import component_scores

SCORES = "scores"
"""Kept table ``module, component, score, value``: scores and loss increases of the components of a run."""
HALVES = ("loss increase", "loss increase, other half")
ADALORA, AUTOLORA, ALORA, SIZE = "AdaLoRA importance", "AutoLoRA alpha", "ALoRA importance", "singular value"


def correlation(table: pd.DataFrame, score: str) -> float:
    """Compute Spearman's correlation of a score and the loss increase on both halves together, over components."""
    wide = table[table["component"] >= 0].pivot(index=["module", "component"], columns="score", values="value")
    truth = wide[list(HALVES)].mean(axis=1)
    return float(spearman(np.column_stack([wide[score], truth]))[0, 1])


def with_truth(score: str) -> OfRun:
    """Return the correlation of a score with the loss increase."""
    return OfRun(partial(correlation, score=score), SCORES, LOW)


CLAIMS = {
    "agreement.adalora": (with_truth(ADALORA), Constant(0.0)),
    "agreement.autolora": (with_truth(AUTOLORA), Constant(0.0)),
    "agreement.size.adalora": (with_truth(ADALORA), with_truth(SIZE)),
    "agreement.size.autolora": (with_truth(AUTOLORA), with_truth(SIZE)),
    "agreement.size.alora": (with_truth(ALORA), with_truth(SIZE)),
}


# The stored tables use these names of scores, so they must not change.
TRUTH, AGAIN, CHANCE = "loss rise", "loss rise, other text", "random"  # prose: ok
SIZES = (32, 16, 59, 4)
"""Examples per batch, batches for the scores, batches for each truth, and batches on which components are removed.

Removal is by far the most expensive part.
"""
_SCORES = {"AdaLoRA": "AdaLoRA importance", "ALoRA": "ALoRA importance", "AutoLoRA": "AutoLoRA alpha"}
_SIZE, KEPT = "singular value", "AutoLoRA kept"


def measure(run: Run) -> pd.DataFrame:
    """Compute all scores and both truths for a trained LoRA.

    Returns
    -------
    DataFrame
        ``run, module, component, score, value``; component -1 is the whole module.
    """
    import torch

    from lorascope.adapters.delta import attached_deltas, detach
    from lorascope.experiments import component_removal
    from lorascope.inputs import models, tasks
    from lorascope.methods.autolora import retained_mask
    from lorascope.papers.setups import component_scores

    task = tasks.load(run.task)
    model = models.load(run.meta.model, task)
    run.restore(model)
    state = {name: component_removal.canonical(delta.update()) for name, delta in attached_deltas(model).items()}
    detach(model)
    model.requires_grad_(False)
    task = task.fit(model)
    rows, seeing, judging, removed = SIZES
    tokens = models.tokenizer(model)

    def batches(split: str, number: int) -> list[dict[str, Tensor]]:
        # The first examples are a random sample, because a task orders its rows by hash.
        encoded = task.encode(tokens, task.split(split).head(number * rows))
        return [encoded.batch(range(at, at + rows)) for at in range(0, len(encoded) - rows + 1, rows)]

    seen, unseen = batches("validation", seeing), batches("test", 2 * judging)

    def loss(batch: dict[str, Tensor]) -> Tensor:
        return model(**batch).loss

    halves = {
        TRUTH: component_removal.ablation_loss_increases(model, loss, state, unseen[0::2], removed),
        AGAIN: component_removal.ablation_loss_increases(model, loss, state, unseen[1::2], removed),
    }
    found: component_scores.Rows = {
        score: {name: increase[:-1] for name, increase in increases.items()} for score, increases in halves.items()
    }
    found[_SIZE] = {name: sigma for name, (_, sigma, _) in state.items()}
    found |= component_scores.adalora_scores(model, loss, state, seen)
    found |= component_scores.alora_scores(model, loss, state, seen[0])
    found |= component_scores.autolora_scores(model, loss, state, seen)
    draw = np.random.default_rng(run.seed)
    found[CHANCE] = {name: draw.random(len(sigma)) for name, (_, sigma, _) in state.items()}
    modules = {score: {name: values.sum() for name, values in each.items()} for score, each in found.items()}
    # The last entry of an increase belongs to the removal of the whole module.
    modules |= {
        score: {name: increase[-1] for name, increase in increases.items()} for score, increases in halves.items()
    }
    # Alpha sums to one in every module, so modules are compared by the alpha of the retained components.
    alphas = found[_SCORES["AutoLoRA"]]
    retained = {name: retained_mask(torch.from_numpy(alpha)).numpy() for name, alpha in alphas.items()}
    modules[_SCORES["AutoLoRA"]] = {name: alpha[retained[name]].sum() for name, alpha in alphas.items()}
    modules[KEPT] = {name: mask.sum() for name, mask in retained.items()}
    parts = [
        pd.DataFrame({"module": name, "component": np.arange(np.size(values)), "score": score, "value": values})
        for score, each in found.items()
        for name, values in each.items()
    ]
    whole = [(name, -1, score, value) for score, each in modules.items() for name, value in each.items()]
    parts.append(pd.DataFrame(whole, columns=["module", "component", "score", "value"]))
    return pd.concat(parts, ignore_index=True).assign(run=run.id).astype({"value": "float64"})


def keep_scores(run: Run) -> pd.DataFrame:
    """Return the kept table ``scores``, of ``measure`` without the random score; see ``papers.score_agreement``.

    Component -1 is the whole module.
    """
    found = measure(run)
    found = found[found["score"] != CHANCE].assign(component=lambda rows: rows["component"].astype("int16"))
    score = found["score"].replace(dict(zip((TRUTH, AGAIN), HALVES, strict=True)))
    value = found["value"].astype("float32")
    return found.assign(score=score, value=value)[["module", "component", "score", "value"]].reset_index(drop=True)


PROBE = Probe(
    name="agreement",
    title="Importance scores: agreement with each other and with ablation",
    source="Zhang et al., AdaLoRA, arXiv 2303.10512; Liu et al., ALoRA, arXiv 2403.16187; Zhang et al., AutoLoRA, "
    "arXiv 2403.09113",
    question="Do three importance scores order the components of a trained adapter by loss increase on removal?",
    keep={(SCORES, LOW): keep_scores},
)


HEADING = "Importance scores"


_TRUTH = "loss increase on removal"


def _component_scores(runs: Mapping[str, Sequence[Any]]) -> pd.DataFrame:
    """Return the kept scores of the components of each run, without those of whole modules."""
    found = pd.concat(run.tables[SCORES].assign(run=run.id) for run in runs[LOW])
    return found[found["component"] >= 0]


def _correlate_with_truth(runs: Mapping[str, Sequence[Any]]) -> pd.DataFrame:
    """Correlate every score with the loss increase on both halves of the text together, as the claims do.

    The correlation between the halves is how well the loss increase can be measured at all.
    """
    scores = _component_scores(runs)
    halves = scores["score"].isin(HALVES)
    component = ["run", "module", "component"]
    truth = scores[halves].groupby(component, sort=False, observed=True)["value"].mean().reset_index()
    found = correlate(pd.concat([scores[~halves], truth.assign(score=_TRUTH)]))
    between = correlate(scores[halves])
    between = between[between["first"] < between["second"]]
    return pd.concat([found, between.assign(first="one half with the other", second=_TRUTH)])


_SHARED: dict[str, Any] = {"arms": own_labels(LOW), "seeds": None, "scores_only": True, "table": SCORES}

FIGURES = [
    GalleryFigure(
        name="against-truth",
        alt="Rank correlation of every score with the loss increase on removal of a component",
        draw=lambda runs: plots.against_truth(_correlate_with_truth(runs), _TRUTH, "components"),
        **_SHARED,
    ),
    GalleryFigure(
        name="agreement",
        alt="Rank correlation of every pair of scores",
        draw=lambda runs: plots.agreement(correlate(_component_scores(runs)), "components"),
        **_SHARED,
    ),
]
