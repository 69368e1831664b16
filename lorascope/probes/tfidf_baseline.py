"""What a text classifier without any network reaches on the same split: the yardstick of every accuracy here."""

from __future__ import annotations

import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from lorascope.inputs.tasks import Task


def tfidf_correct(task: Task) -> pd.Series:
    """Train TF-IDF (words and pairs of words) with logistic regression; is each row of the test split told right?"""
    train, test = task.split("train"), task.split("test")
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=1000))
    model.fit(train["text"], train["label"])
    return pd.Series(model.predict(test["text"]) == test["label"])


def tfidf_accuracy(task: Task) -> dict[str, float]:
    """Test accuracy of ``tfidf_correct``: "all" first, then the task's groups."""
    right, test = tfidf_correct(task), task.split("test")
    found = {"all": float(right.mean())}
    if "group" in test:
        found |= {str(group): float(part.mean()) for group, part in right.groupby(test["group"])}
    return found
