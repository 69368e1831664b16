"""TF-IDF baseline: a text classifier without a neural network, on the same splits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from lorascope.files.predictions import quantize_margins
from lorascope.inputs import tasks
from lorascope.inputs.tasks import Task
from lorascope.probes.base import OwnArm, Scored


def fit(task: Task) -> Any:
    """Fit logistic regression on TF-IDF features (unigrams and bigrams) of the train split; return the pipeline."""
    train = task.split("train")
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=1000))
    return model.fit(train["text"], train["label"])


def tfidf_correct(task: Task) -> pd.Series:
    """Return whether each example of the test split is classified correctly, in the order of the split."""
    test = task.split("test")
    return pd.Series(fit(task).predict(test["text"]) == test["label"])


def tfidf_arm(label: str, task: str | Task) -> OwnArm:
    """Return the baseline on a task as a registered arm."""
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
        logits = model.predict_log_proba(rows["text"])
        nll = -logits[np.arange(len(rows)), labels]
        row |= {f"{split}_loss": float(nll.mean()), f"{split}_metric": float((logits.argmax(axis=1) == labels).mean())}
        if split == "validation":
            row |= {"validation_chance": float(np.bincount(labels).max() / len(labels))}
    return Scored(row, {"margin": quantize_margins(logits, labels)})
