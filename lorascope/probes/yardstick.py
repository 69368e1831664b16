"""What a text classifier without any network reaches on the same split: the yardstick of every accuracy here."""

from __future__ import annotations

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from lorascope.tasks import Task


def tfidf_accuracy(task: Task) -> dict[str, float]:
    """Test accuracy of TF-IDF (words and pairs of words) with logistic regression.

    Parameters
    ----------
    task : Task
        Texts with labels.

    Returns
    -------
    dict group -> accuracy
        "all" first, then the task's groups.
    """
    train, test = task.split("train"), task.split("test")
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=1000))
    model.fit(train["text"], train["label"])
    right = test.assign(right=model.predict(test["text"]) == test["label"])
    found = {"all": float(right["right"].mean())}
    if "group" in right:
        found |= {str(group): float(part["right"].mean()) for group, part in right.groupby("group")}
    return found
