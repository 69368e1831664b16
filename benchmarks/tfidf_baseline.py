"""Baseline accuracy of word counts on the bundled sentences: logistic regression on TF-IDF of one and two words.

Run ``python benchmarks/tfidf_baseline.py``; it prints a table and writes ``data/sentiment_tfidf.csv``. A trained model
that does not outperform this baseline has learned nothing about sentences.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from lorascope.inputs import tasks

TABLE = Path(__file__).resolve().parents[1] / "data" / "sentiment_tfidf.csv"


def tfidf_correct(task: tasks.Task) -> pd.Series:
    """Return whether the baseline, fitted on the train split, classifies each test example correctly."""
    train, test = task.split("train"), task.split("test")
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=1000))
    model.fit(train["text"], train["label"])
    return pd.Series(model.predict(test["text"]) == test["label"])


def baseline_accuracies() -> pd.DataFrame:
    """Compute the test accuracy of one model for all domains, and of one model per domain.

    Returns
    -------
    DataFrame
        Columns domain, test_rows, majority (fraction of the more frequent label), joint, own, and standard_error (of
        joint).
    """
    whole = tasks.load("sentiment")
    test = whole.split("test")
    joint = tfidf_correct(whole)
    rows = []
    for domain in ("all", *whole.groups):
        mine = np.ones(len(test), bool) if domain == "all" else (test["group"] == domain).to_numpy()
        share = joint[mine].mean()
        rows.append(
            {
                "domain": domain,
                "test_rows": mine.sum(),
                "majority": test["label"][mine].value_counts(normalize=True).max(),
                "joint": share,
                "own": joint.mean() if domain == "all" else tfidf_correct(tasks.load(f"sentiment/{domain}")).mean(),
                "standard_error": np.sqrt(share * (1 - share) / mine.sum()),
            }
        )
    return pd.DataFrame(rows).round(4)


if __name__ == "__main__":
    table = baseline_accuracies()
    table.to_csv(TABLE, index=False)
    print(table.to_string(index=False))
