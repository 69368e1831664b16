"""Do the allocators' scores agree, and do they know what removing a component costs?

One trained LoRA is brought to the form P Lambda Q by the exact singular value decomposition of its updates, so that all
scores speak of the same components of the same state. AdaLoRA's score is accumulated at zero learning rate, ALoRA's is
its ablation on one batch, AutoLoRA's is alpha after training the logits alone. The truth is the rise of the loss with a
component, or a module, taken out, on text that no score has seen; on other such text once more, it says how well any
score could do. A random score is the control.

Departs: no paper compares these scores. Each was made for the state its own method is in, not for a finished LoRA.
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
from lorascope.probes.base import Exhibit, Findings, Probe, register
from lorascope.probes.claims import Claim
from lorascope.probes.lora import LOW
from lorascope.probes.lora import arms as lora_arms
from lorascope.runs.run import Run

TRUTH, AGAIN, CHANCE = "loss rise", "loss rise, other text", "random"
# Rows of a batch, batches that scores see, batches of each of the two truths, and how many of these components are
# removed on, by far the dearest.
FULL_SIZES, QUICK_SIZES = (32, 16, 59, 4), (4, 16, 8, 1)
_SCORES = {"AdaLoRA": "AdaLoRA importance", "ALoRA": "ALoRA importance", "AutoLoRA": "AutoLoRA alpha"}
_SIZE, KEPT = "singular value", "AutoLoRA kept"
_SOURCE = "this project; what the paper takes for granted"


def _score_claims(name: str) -> tuple[Claim, Claim]:
    measured = f"Spearman correlation over components of {_SCORES[name]} with the rise of the loss"
    return (
        Claim(
            sentence=f"{name}'s score knows which components the model needs.",
            statistic=measured,
            control="that of a random score",
            margin=0.1,
            source=_SOURCE,
        ),
        Claim(
            sentence=f"{name}'s score knows it better than the size of the component does.",
            statistic=measured,
            control="that of the singular value",
            margin=0.05,
            source=_SOURCE,
        ),
    )


CLAIMS = {name: _score_claims(name) for name in _SCORES}


def arms(quick: bool) -> list[Any]:
    """The LoRA of rank 8 that the LoRA probe trains."""
    return [arm for arm in lora_arms(quick) if arm.label == LOW]


def measure(run: Run) -> pd.DataFrame:
    """All scores and truths of a trained LoRA.

    Returns
    -------
    DataFrame
        ``run, module, component, score, value``; component -1 is the module as a whole.
    """
    task = tasks.load(run.meta["task"])
    model = models.load(run.meta["model"], task)
    run.restore(model)
    state = {name: component_removal.canonical(delta.update()) for name, delta in attached_deltas(model).items()}
    detach(model)
    model.requires_grad_(False)
    task = task.fit(model)
    rows, seeing, judging, removed = FULL_SIZES if run.meta["settings"]["steps"] > 100 else QUICK_SIZES
    tokens = models.tokenizer(model)

    def batches(split: str, number: int) -> list[dict[str, Tensor]]:
        # From the beginning: a task's rows stand in the order of a hash.
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
        score: {name: rise[:-1] for name, rise in rises.items()} for score, rises in halves.items()
    }
    found[_SIZE] = {name: sigma for name, (_, sigma, _) in state.items()}
    found |= component_scores.adalora_scores(model, loss, state, seen)
    found |= component_scores.alora_scores(model, loss, state, seen[0])
    found |= component_scores.autolora_scores(model, loss, state, seen)
    draw = np.random.default_rng(run.meta["seed"])
    found[CHANCE] = {name: draw.random(len(sigma)) for name, (_, sigma, _) in state.items()}
    modules = {score: {name: values.sum() for name, values in each.items()} for score, each in found.items()}
    modules |= {score: {name: rise[-1] for name, rise in rises.items()} for score, rises in halves.items()}
    # alpha sums to one in every module: what tells modules apart is how much of it stays.
    alphas = found[_SCORES["AutoLoRA"]]
    stay = {name: retained_mask(torch.from_numpy(alpha)).numpy() for name, alpha in alphas.items()}
    modules[_SCORES["AutoLoRA"]] = {name: alpha[stay[name]].sum() for name, alpha in alphas.items()}
    modules[KEPT] = {name: those.sum() for name, those in stay.items()}
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
    """Correlation of every score with the truth, against a random score and against the size of a component."""
    table = pd.concat(measured.values(), ignore_index=True)
    seeds = {run.id: run.meta["seed"] for found in runs.values() for run in found}
    whole = table["component"] == -1
    levels = {"components": correlate(table[~whole]), "modules": correlate(table[whole])}
    found = levels["components"]
    truth = found[found["second"] == TRUTH].assign(seed=found["run"].map(seeds)).set_index(["first", "seed"])["value"]
    verdicts = []
    for name, score in _SCORES.items():
        for claim, control in zip(CLAIMS[name], (CHANCE, _SIZE), strict=True):
            verdicts.append(claim.judge(truth[score].to_dict(), truth[control].to_dict()))
    exhibits = []
    for level, cells in levels.items():
        exhibits.append(Exhibit(plots.against_truth(cells, TRUTH, level), *_AGAINST, "against_truth"))
        exhibits.append(Exhibit(plots.agreement(cells, level), *_MATRIX, "agreement"))
    notes = [
        f"Scores were taken on the validation split, truths on two halves of the test split. '{AGAIN}' is the same "
        "truth on other text: no score can be expected to agree better with the first.",
        "Components were removed on some batches; their effect to first order, which differs most from text to text, "
        "is that on the whole half.",
        "ALoRA's score is itself an ablation, of one batch: its agreement says how far one batch goes.",
        "Of modules, AutoLoRA's alpha is the mass that its threshold keeps, and sums of the others stand for a module.",
    ]
    return Findings(verdicts, exhibits, notes=notes)


_AGAINST = (
    "Each dot is how alike a score and the true loss order components (or modules): 1 alike, 0 not at all. The row of "
    "the other text is the ceiling, the random score the floor.",
    "Order alone counts: a score may order all alike and not know that the first costs a hundred times the second. "
    "Removal one by one does not see components that stand in for each other.",
)
_MATRIX = (
    "A cell is the rank correlation of the scores of its row and column. A block of bright cells is a group of scores "
    "that say the same in other words.",
    "Agreement among scores is no evidence that they are right: look at the row of the loss. The number is a mean over "
    "seeds, its bootstrap interval is in the data.",
)

PROBE = register(
    Probe(
        name="agreement",
        title="Importance: do the scores agree, and with what?",
        source="Zhang et al., AdaLoRA, arXiv 2303.10512; Liu et al., ALoRA, arXiv 2403.16187; Zhang et al., AutoLoRA, "
        "arXiv 2403.09113",
        question="On one trained adapter, do three importance scores order its components as their removal does?",
        quick_budget=220,
        arms=arms,
        judge=judge,
        measure=measure,
        measure_cost=90,
    )
)
