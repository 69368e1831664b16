"""TF-IDF baseline: test accuracy of a text classifier without a neural network, on the same split."""

from __future__ import annotations

import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from lorascope.inputs.tasks import Task


def tfidf_correct(task: Task) -> pd.Series:
    """Train logistic regression on TF-IDF features (unigrams and bigrams), and test it.

    Returns
    -------
    Series of bool
        Whether each example of the test split is classified correctly, in the order of the split.
    """
    train, test = task.split("train"), task.split("test")
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=1000))
    model.fit(train["text"], train["label"])
    return pd.Series(model.predict(test["text"]) == test["label"])


def tfidf_accuracy(task: Task) -> dict[str, float]:
    """Compute the test accuracy of the TF-IDF baseline: "all" first, then each group of the task."""
    right, test = tfidf_correct(task), task.split("test")
    found = {"all": float(right.mean())}
    if "group" in test:
        found |= {str(group): float(part.mean()) for group, part in right.groupby(test["group"])}
    return found
