"""How many kinds of text a corpus holds: k-means on TF-IDF vectors, and the elbow of its error.

Source: HydraLoRA (arXiv 2404.19245), appendix B, equations 7 and 8. It leaves open what is decided here: the 5,000
commonest words that are no English stop words, K from 1 to 10, the best of ten draws, and as elbow the K at which the
curve of the error lies farthest below its chord.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pandas as pd
from jaxtyping import Float
from sklearn.cluster import KMeans
from sklearn.feature_extraction.text import TfidfVectorizer


def choose_heads(texts: Iterable[str], most: int = 10, seed: int = 0) -> int:
    """Number of heads for a corpus: ``HydraLoRA(number=choose_heads(task.split("train")["text"]))``.

    Parameters as of :func:`cluster_selection`, whose choice it is.
    """
    found = cluster_selection(texts, most, seed)
    return int(found.loc[found["chosen"], "k"].item())


def cluster_selection(texts: Iterable[str], most: int = 10, seed: int = 0) -> pd.DataFrame:
    """The number of clusters in a corpus by k-means on TF-IDF vectors and the elbow of the error (appendix B).

    Parameters
    ----------
    texts : iterable of str
    most : int
        Largest K that is tried; of fewer distinct texts their number.
    seed : int
        Of the random centres; of ten draws the best counts.

    Returns
    -------
    DataFrame
        ``k, sse, distance, chosen``: the sum of squared distances to the centres, and how far the curve, both axes
        brought to [0, 1], lies below its chord; the K where it lies deepest is chosen.

    Raises
    ------
    ValueError
        There are no words.
    """
    vectors = TfidfVectorizer(max_features=5000, stop_words="english").fit_transform(texts)
    tried = np.arange(1, min(most, len({(row.indices.tobytes(), row.data.tobytes()) for row in vectors})) + 1)
    sse = np.array([KMeans(int(k), n_init=10, random_state=seed).fit(vectors).inertia_ for k in tried])
    distance = chord_distance(sse)
    return pd.DataFrame({"k": tried, "sse": sse, "distance": distance, "chosen": tried == tried[distance.argmax()]})


def chord_distance(curve: Float[np.ndarray, "k"]) -> Float[np.ndarray, "k"]:
    """How far a falling curve lies below the line from its first point to its last, both axes brought to [0, 1]."""
    across = np.linspace(0, 1, len(curve))
    fall = curve[0] - curve[-1]
    height = (curve - curve[-1]) / fall if fall > 0 else 1 - across
    return (1 - across - height) / math.sqrt(2)
