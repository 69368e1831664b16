"""LoRA: low-rank compared with full-rank updates.

Is LoRA as accurate as full fine-tuning, also on few examples, and does a larger rank help? Do the A's of two ranks
share their first direction, and do updates amplify directions of the base weight? Word counts are a baseline without a
neural network.

Source: LoRA (arXiv 2106.09685), section 5 (quality), section 7.2 with figures 3 and 4 (subspace similarity).

Departs:

- Much smaller tasks and models.
- The two runs of a pair never share a seed. With the same seed, a smaller random A equals the first rows of a larger
  one. The paper does not state whether the ranks of its figure 3 share an initialization.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lorascope.files.predictions import quantize_margins
from lorascope.papers.judging import truth_names
from lorascope.papers.judging.statistics import Accuracy, OfPairs, OfRun
from lorascope.papers.judging.study_statistics import Comparison, pair
from lorascope.papers.paper_study import PaperStudy
from lorascope.papers.planted_pairs import planted_arms
from lorascope.papers.probe import Arm, OwnArm, Probe, Scored, encoder_settings, factor_settings
from lorascope.runs.run import Run
from lorascope.updates.linalg import as_float64

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from lorascope.inputs.tasks import Task

FULL, LOW, HIGH = "full fine-tuning", "LoRA, rank 8", "LoRA, rank 64"
FEW_FULL, FEW_LOW = f"{FULL}, 100 examples", f"{LOW}, 100 examples"
WORDS = "TF-IDF, logistic regression"

# Only figures show these.
LOWER = {1: "LoRA, rank 1", 2: "LoRA, rank 2"}
MORE_FULL, MORE_LOW = f"{FULL}, 1,000 examples", f"{LOW}, 1,000 examples"
DIRECTIONS = "directions"
"""Kept table ``module, when, index, value``: first right singular vector of A, ``when`` is "start" or "end"."""

AMPLIFICATION = "amplification"
"""Kept table ``module, update, random``: norm of W between eight directions of the update, and between random ones."""


def arms() -> list[Arm | OwnArm]:
    """Return the registered arms of the LoRA paper: full fine-tuning and LoRA, also on few examples, and word counts.

    The lowest ranks and 1,000 examples are for figures.
    """
    from lorascope.methods import Full, LoRA

    few = encoder_settings(150)  # 24 epochs of 100 examples
    # With alpha equal to the rank, all ranks have the same scale.
    low = LoRA(rank=8, alpha=8.0, targets="all-linear")
    high = LoRA(rank=64, alpha=64.0, targets="all-linear")
    return [
        Arm(label=FULL, method=Full(), settings=encoder_settings()),
        Arm(label=LOW, method=low, settings=factor_settings()),
        Arm(label=HIGH, method=high, settings=factor_settings()),
        Arm(label=FEW_FULL, method=Full(), settings=few, vary=partial(_draw_examples, 100)),
        Arm(label=FEW_LOW, method=low, settings=few, vary=partial(_draw_examples, 100)),
        Arm(label=MORE_FULL, method=Full(), settings=few, vary=partial(_draw_examples, 1000)),
        Arm(label=MORE_LOW, method=low, settings=few, vary=partial(_draw_examples, 1000)),
        tfidf_arm(WORDS, "sentiment"),
        *(
            Arm(label=label, method=replace(low, rank=rank, alpha=float(rank)), settings=encoder_settings())
            for rank, label in LOWER.items()
        ),
    ]


PLANTED = (truth_names.RANK_2, truth_names.RANK_24)
"""Truths of LoRA's pair: its rank suffices where the update has rank 2, and not where it has rank 24."""
_EVERYWHERE: Any = {"targets": "all-linear"}


TEXT_LORA, TEXT_FULL = "LoRA, rank 8, sentiment", "full fine-tuning, sentiment"
SHORT = f"{TEXT_LORA}, 100 steps"
MORE_TEST_ROWS = 5000
"""Number of training rows that become test rows: a run of 300 steps reads 4,800 of the 8,316 that remain."""


def study_arms() -> list[Arm]:
    """Return the arms of LoRA's pair, whose alpha is four times the rank, and those on text."""
    from lorascope.methods import Full, LoRA

    students = {f"LoRA, rank {rank}": LoRA(rank=rank, alpha=4.0 * rank, **_EVERYWHERE) for rank in (1, 4, 16)}
    arms = planted_arms(students | {FULL: Full()}, PLANTED)
    # Rank 1 is known to be worse only where the update has a high rank.
    arms = [arm for arm in arms if arm.label != f"LoRA, rank 1, {truth_names.RANK_2}"]
    settings: dict[str, Any] = {"steps": 300, "batch_size": 16, "eval_every": 0, "eval_size": 1968, "observe": []}
    on_text = Arm(label=TEXT_FULL, method=Full(), settings=settings, vary=_with_large_test)
    lora = replace(on_text, label=TEXT_LORA, method=LoRA(rank=8, alpha=8.0, **_EVERYWHERE))
    return [*arms, on_text, lora, replace(lora, label=SHORT, settings=settings | {"steps": 100})]


def _with_large_test(arm: Arm, seed: int) -> Arm:
    return replace(arm, task=_large_test())


@cache
def _large_test() -> Task:
    from lorascope.inputs import tasks
    from lorascope.inputs.task_parts import enlarge_test

    return enlarge_test(tasks.load("sentiment"), MORE_TEST_ROWS)


JUDGED = {
    "pair.lora": pair("LoRA, rank 4", FULL, "LoRA, rank 1", truths=PLANTED, positive_truth=truth_names.RANK_24),
    "text.lora": Comparison(Accuracy(TEXT_LORA) - Accuracy(TEXT_FULL), positive=Accuracy(SHORT) - Accuracy(TEXT_FULL)),
}


def _draw_examples(number: int, arm: Arm, seed: int) -> Arm:
    from lorascope.inputs import tasks
    from lorascope.inputs.task_parts import subsample

    return replace(arm, task=subsample(tasks.load("sentiment"), number, seed))


def fit(task: Task) -> Any:
    """Fit the LoRA paper's TF-IDF baseline, a logistic regression on the train split, and return the pipeline."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    train = task.split("train")
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=1000))
    return model.fit(train["text"], train["label"])


def tfidf_correct(task: Task) -> pd.Series:
    """Return whether the LoRA paper's TF-IDF baseline classifies each test example correctly, in the split's order."""
    test = task.split("test")
    return pd.Series(fit(task).predict(test["text"]) == test["label"])


def tfidf_arm(label: str, task: str | Task) -> OwnArm:
    """Return the TF-IDF baseline of the LoRA paper on a task as a registered arm."""
    from lorascope.inputs import tasks
    from lorascope.inputs.tasks import Task

    method = {"name": "tfidf", "ngrams": [1, 2], "classifier": "logistic regression"}

    def score(seed: int) -> Scored:
        return _score(task if isinstance(task, Task) else tasks.load(task))

    return OwnArm(label=label, method=method, compute=score, task=task)


def _score(task: Task) -> Scored:
    model = fit(task)
    row: dict[str, Any] = {"trained_parameters": model[-1].coef_.size + model[-1].intercept_.size, "steps": 0}
    for split in ("validation", "test"):
        rows = task.split(split)
        labels = np.searchsorted(model.classes_, rows["label"])
        # Log-probabilities differ from logits by a constant per row, which cancels in margins.
        logits = model.predict_log_proba(rows["text"])
        nll = -logits[np.arange(len(rows)), labels]
        row |= {f"{split}_loss": float(nll.mean()), f"{split}_metric": float((logits.argmax(axis=1) == labels).mean())}
        if split == "validation":
            row |= {"validation_chance": float(np.bincount(labels).max() / len(labels))}
    return Scored(row, {"margin": quantize_margins(logits, labels)})


def direction_phi(low: pd.DataFrame, high: pd.DataFrame, when: str) -> float:
    """Compute LoRA's phi(1, 1) between the A's of two runs: squared cosine of first directions, mean over modules."""
    entries = low[low["when"] == when].merge(high[high["when"] == when], on=["module", "index"], suffixes=("_1", "_2"))
    # Vectors that were kept as float16 have only approximately norm 1.
    a, b = entries["value_1"].astype("float64"), entries["value_2"].astype("float64")
    products = pd.DataFrame({"module": entries["module"], "ab": a * b, "aa": a**2, "bb": b**2})
    sums = products.groupby("module")[["ab", "aa", "bb"]].sum()
    return float((sums["ab"] ** 2 / (sums["aa"] * sums["bb"])).mean())


def log_norm(table: pd.DataFrame, directions: str) -> float:
    """Compute, for LoRA's amplification, log10 of the norm of W between some directions, mean over modules."""
    return float(np.log10(table[directions].astype("float64")).mean())


CLAIMS = {
    "lora.parity": (Accuracy(LOW), Accuracy(FULL)),
    "lora.words": (Accuracy(LOW), Accuracy(WORDS)),
    "lora.direction": (
        OfPairs(partial(direction_phi, when="end"), DIRECTIONS, LOW, HIGH),
        OfPairs(partial(direction_phi, when="start"), DIRECTIONS, LOW, HIGH),
    ),
    "lora.rank": (Accuracy(HIGH), Accuracy(LOW)),
    "lora.lowdata": (Accuracy(FEW_LOW), Accuracy(FEW_FULL)),
    "lora.amplify": (
        OfRun(partial(log_norm, directions="update"), AMPLIFICATION, LOW),
        OfRun(partial(log_norm, directions="random"), AMPLIFICATION, LOW),
    ),
}


def keep_directions(run: Run) -> pd.DataFrame:
    """Return the kept table ``directions`` of the LoRA paper; see ``DIRECTIONS``."""
    tables = []
    for when, step in (("start", 0), ("end", None)):
        for module, factors in run.factors(step).items():
            # Only the first row of V^T is needed: phi(1, 1) compares one direction of each run.
            direction = np.linalg.svd(as_float64(factors["A"]), full_matrices=False)[2][0].astype(np.float16)
            index = np.arange(len(direction), dtype=np.uint16)
            tables.append(pd.DataFrame({"module": module, "when": when, "index": index, "value": direction}))
    return pd.concat(tables, ignore_index=True)


def keep_amplification(run: Run) -> pd.DataFrame:
    """Return the kept table ``amplification`` of the LoRA paper; see ``AMPLIFICATION``.

    The norm between k left and k right random directions is the root mean square over all directions,
    ``k |W| / sqrt(out * in)``, which is exact.
    """
    from lorascope.adapters.host_weights import host_weight, to_array
    from lorascope.inputs import models

    model, rows = models.load(run.meta.model), []
    for module, update in run.updates().items():
        weight = as_float64(to_array(host_weight(model.get_submodule(module))))
        left, sigma, right = update.svd()
        between, norm = np.linalg.norm(left.T @ weight @ right), np.linalg.norm(weight)
        rows.append((module, between, len(sigma) * norm / np.sqrt(weight.size)))
    return pd.DataFrame(rows, columns=["module", "update", "random"])


PROBE = Probe(
    name="lora",
    title="LoRA: low-rank compared with full-rank updates",
    source="Hu et al., LoRA, arXiv 2106.09685",
    question="Is LoRA of rank 8 as accurate as full fine-tuning, and does a larger rank learn the same subspace?",
    arms=arms,
    keep={
        (DIRECTIONS, LOW): keep_directions,
        (DIRECTIONS, HIGH): keep_directions,
        (AMPLIFICATION, LOW): keep_amplification,
    },
)

PAPER = PaperStudy(
    name="LoRA",
    authors="Hu et al.",
    question="Does LoRA cost nothing against full fine-tuning where the update has low rank, and more where it "
    "has not?",
)
run = PAPER.run
