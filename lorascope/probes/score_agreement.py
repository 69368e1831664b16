"""Probe of importance scores: their agreement with each other and with the loss increase on removal of a component.

A singular value decomposition turns the updates of one trained LoRA into P Lambda Q, so that all scores refer to the
same components. AdaLoRA's score is accumulated at zero learning rate, ALoRA's is its ablation on one batch, and
AutoLoRA's is alpha after training only the logits. The truth is the loss increase when a component, or a module, is
removed, on examples that no score used. The same truth on other examples is the best agreement a score can reach, and a
random score is the control.

Departs:

- No paper compares these scores.
- Each score was designed for adapters trained by the same method, not for a finished LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lorascope import plots
from lorascope.adapters.delta import attached_deltas, detach
from lorascope.analysis.score_agreement import correlate
from lorascope.experiments import component_removal
from lorascope.inputs import models, tasks
from lorascope.methods.autolora import retained_mask
from lorascope.probes import component_scores
from lorascope.probes.base import Findings, Probe, ReportFigure, register
from lorascope.probes.claims import Claim
from lorascope.probes.lora import LOW
from lorascope.probes.lora import arms as lora_arms
from lorascope.runs.run import Run

# The stored tables use these names of scores, so they must not change.
TRUTH, AGAIN, CHANCE = "loss rise", "loss rise, other text", "random"  # prose: ok
FULL_SIZES, QUICK_SIZES = (32, 16, 59, 4), (4, 16, 8, 1)
"""Examples per batch, batches for the scores, batches for each truth, and batches on which components are removed.

Removal is by far the most expensive part.
"""
_SCORES = {"AdaLoRA": "AdaLoRA importance", "ALoRA": "ALoRA importance", "AutoLoRA": "AutoLoRA alpha"}
_SIZE, KEPT = "singular value", "AutoLoRA kept"
LABELS = {
    TRUTH: "loss increase",
    AGAIN: "loss increase, other examples",
    KEPT: "AutoLoRA retained",
    "ALoRA, without": "ALoRA, component removed",
    "ALoRA, alone": "ALoRA, only component",  # prose: ok
}
"""Name of a score in the stored tables -> name in the figures, where they differ."""
_SOURCE = "this project; assumed by the paper"


def _score_claims(name: str) -> tuple[Claim, Claim]:
    measured = f"Spearman correlation of {_SCORES[name]} with the loss increase on removal, over components"
    return (
        Claim(
            sentence=f"{name}'s score predicts the loss increase on removal of a component better than chance.",
            statistic=measured,
            control="the same for a random score",
            margin=0.1,
            source=_SOURCE,
        ),
        Claim(
            sentence=f"{name}'s score predicts the loss increase better than the singular value does.",
            statistic=measured,
            control="the same for the singular value of the component",
            margin=0.05,
            source=_SOURCE,
        ),
    )


CLAIMS = {name: _score_claims(name) for name in _SCORES}


def arms(quick: bool) -> list[Any]:
    """Return the arm of LoRA, rank 8, from the LoRA probe."""
    return [arm for arm in lora_arms(quick) if arm.label == LOW]


def measure(run: Run) -> pd.DataFrame:
    """Compute all scores and both truths for a trained LoRA.

    Returns
    -------
    DataFrame
        ``run, module, component, score, value``; component -1 is the whole module.
    """
    task = tasks.load(run.task)
    model = models.load(run.meta.model, task)
    run.restore(model)
    state = {name: component_removal.canonical(delta.update()) for name, delta in attached_deltas(model).items()}
    detach(model)
    model.requires_grad_(False)
    task = task.fit(model)
    rows, seeing, judging, removed = FULL_SIZES if run.meta.settings["steps"] > 100 else QUICK_SIZES
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
    return pd.concat(
        [_long_rows(run, found, np.arange), _long_rows(run, modules, lambda n: np.full(n, -1))], ignore_index=True
    )


def _long_rows(run: Run, rows: Mapping[str, Mapping[str, Any]], number: Callable[[int], np.ndarray]) -> pd.DataFrame:
    parts = [
        pd.DataFrame({"module": name, "component": number(np.size(values)), "score": score, "value": np.ravel(values)})
        for score, found in rows.items()
        for name, values in found.items()
    ]
    return pd.concat(parts, ignore_index=True).assign(run=run.id).astype({"value": "float64"})


def judge(runs: Mapping[str, Sequence[Run]], measured: Mapping[str, pd.DataFrame]) -> Findings:
    """Compare the correlation of every score with the truth to that of a random score and of the singular value."""
    table = pd.concat(measured.values(), ignore_index=True)
    table["score"] = table["score"].replace(LABELS)
    seeds = {run.id: run.seed for found in runs.values() for run in found}
    whole = table["component"] == -1
    levels = {"components": correlate(table[~whole]), "modules": correlate(table[whole])}
    found = levels["components"]
    truth = (
        found[found["second"] == LABELS[TRUTH]]
        .assign(seed=found["run"].map(seeds))
        .set_index(["first", "seed"])["value"]
    )
    verdicts = []
    for name, score in _SCORES.items():
        for claim, control in zip(CLAIMS[name], (CHANCE, _SIZE), strict=True):
            verdicts.append(claim.judge(truth[score].to_dict(), truth[control].to_dict()))
    figures = []
    for level, cells in levels.items():
        figures.append(ReportFigure(plots.against_truth(cells, LABELS[TRUTH], level), *_AGAINST, "against_truth"))
        figures.append(ReportFigure(plots.agreement(cells, level), *_MATRIX, "agreement"))
    notes = [
        f"Scores use the validation split, and the truths use two halves of the test split. '{LABELS[AGAIN]}' is the "
        "truth on the other half; no score can be expected to agree better with the first half.",
        "Components were removed on a few batches. The first-order part of their effect, which varies most between "
        "examples, was computed on the whole half.",
        "ALoRA's score is itself an ablation on one batch: its agreement shows how informative one batch is.",
        "For a module, AutoLoRA's alpha is summed over the retained components, the other scores over all components. "
        "The truths remove the whole module.",
    ]
    return Findings(verdicts, figures, notes=notes)


_AGAINST = (
    "A dot shows the rank correlation of a score with the loss increase on removal: 1 means the same order, 0 "
    "no relation. The truth on the other half is the ceiling, the random score the floor.",
    "Rank correlation ignores size: a correct order can hide that one component matters a hundred times more. Removing "
    "components one at a time misses redundant ones; remove several to see them.",
)
_MATRIX = (
    "A cell shows the rank correlation of the scores in its row and column. A block of cells near 1 is a group of "
    "scores with the same information.",
    "Agreement between scores does not make them right: check the row of the loss increase. Each number is a mean over "
    "seeds, with its bootstrap interval in the data.",
)

PROBE = register(
    Probe(
        name="agreement",
        title="Importance scores: agreement with each other and with ablation",
        source="Zhang et al., AdaLoRA, arXiv 2303.10512; Liu et al., ALoRA, arXiv 2403.16187; Zhang et al., AutoLoRA, "
        "arXiv 2403.09113",
        question="Do three importance scores order the components of a trained adapter by loss increase on removal?",
        quick_budget=220,
        arms=arms,
        judge=judge,
        measure=measure,
        measure_cost=90,
    )
)
