"""Number of experts for a corpus: the number of clusters by k-means on TF-IDF vectors, at the elbow of the error.

Source: HydraLoRA (arXiv 2404.19245), appendix B, equations 7 and 8.

The paper leaves these choices open:

- Vocabulary: the 5,000 most frequent words, without English stop words.
- K from 1 to 10, the best of ten initializations.
- Elbow: the K at which the error curve is farthest below its chord.
- DBSCAN (figure 7): five texts form a cluster. The radius is the elbow of the sorted distances to the fourth neighbor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix
from sklearn.cluster import DBSCAN, KMeans
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.neighbors import NearestNeighbors

from lorascope.array_types import Float

KMEANS, DENSITY = "k-means", "DBSCAN"
_DENSE = 5  # minimum number of texts in a DBSCAN neighborhood


def choose_num_experts(texts: Iterable[str], most: int = 10, seed: int = 0) -> int:
    """Choose the number of HydraLoRA heads (experts) for a corpus by :func:`cluster_selection`.

    Use it as ``HydraLoRA(num_experts=choose_num_experts(task.split("train")["text"]))``.

    Parameters
    ----------
    texts : iterable of str
        The training texts.
    most : int
        Largest number of clusters that is tried, at least 3, 10 by default. The result is always smaller.
    seed : int
        Seed of the random cluster centers, 0 by default.

    Raises
    ------
    ValueError
        The texts contain no words, or ``most`` is below 3.
    """
    selection = cluster_selection(texts, most, seed)
    return int(selection.loc[selection["chosen"], "k"].item())


def cluster_selection(texts: Iterable[str], most: int = 10, seed: int = 0) -> pd.DataFrame:
    """Select the head count: clusters of a corpus by k-means on TF-IDF vectors, at the elbow of the error (appendix B).

    Parameters
    ----------
    texts, most, seed
        See :func:`choose_num_experts`. At most as many clusters as distinct texts are tried. The largest K cannot be
        chosen itself, because both ends of the curve are on the chord.

    Returns
    -------
    DataFrame
        ``k, sse, distance, chosen``: the sum of squared distances to the centers, and the distance of the curve below
        its chord, with both axes scaled to [0, 1]. The K with the largest distance is chosen, or 1 if none is positive.

    Raises
    ------
    ValueError
        The texts contain no words, or ``most`` is below 3.
    """
    return _kmeans_selection(_vectors(texts), most, seed)


def repeated_selection(texts: Iterable[str], repetitions: int = 15, most: int = 10, sample: int = 1000) -> pd.DataFrame:
    """Repeat the choice of the head count on random samples of a corpus, by k-means and DBSCAN, to show its variation.

    Parameters
    ----------
    texts, most
        See :func:`cluster_selection`.
    repetitions : int
        Number of samples, 15 by default, each drawn without replacement and with its own seed.
    sample : int
        Texts per sample, 1000 by default; all texts if there are fewer.

    Returns
    -------
    DataFrame
        ``seed, texts, algorithm``, then the columns of :func:`cluster_selection`. DBSCAN has one row per sample.

    Raises
    ------
    ValueError
        ``repetitions`` is below 1, ``most`` is below 3, or the texts contain no words.
    """
    if repetitions < 1:
        raise ValueError(f"repetitions must be >= 1, got {repetitions}")
    corpus, tables = pd.Series(list(texts)), []
    for seed in range(repetitions):
        drawn_texts = corpus.sample(min(sample, len(corpus)), random_state=seed)
        vectors = _vectors(drawn_texts)
        dense = pd.DataFrame({"k": [density_clusters(vectors)], "sse": math.nan, "distance": math.nan, "chosen": True})
        for algorithm, selection in ((KMEANS, _kmeans_selection(vectors, most, seed)), (DENSITY, dense)):
            tables.append(selection.assign(seed=seed, texts=len(drawn_texts), algorithm=algorithm))
    return pd.concat(tables, ignore_index=True)[["seed", "texts", "algorithm", "k", "sse", "distance", "chosen"]]


def density_clusters(vectors: csr_matrix) -> int:
    """Count DBSCAN clusters of distinct texts with a word, as a head count; 0 if no five are near each other."""
    distinct = vectors[list({key: row for row, key in enumerate(_keys(vectors))}.values())]
    distinct = distinct[distinct.getnnz(1) > 0]
    # Each text is its own first neighbor, so the fifth one is the fourth nearest other text.
    near = NearestNeighbors(n_neighbors=min(_DENSE, distinct.shape[0])).fit(distinct).kneighbors(distinct)[0][:, -1]
    falling = np.sort(near)[::-1]
    radius = falling[chord_distance(falling).argmax()]
    if radius == 0:  # DBSCAN needs a radius above 0, which a single distinct text does not have
        return 1
    return int(DBSCAN(eps=radius, min_samples=_DENSE).fit_predict(distinct).max()) + 1


def _vectors(texts: Iterable[str]) -> csr_matrix:
    return TfidfVectorizer(max_features=5000, stop_words="english").fit_transform(texts)


def _keys(vectors: csr_matrix) -> list[bytes]:
    """Return a key per row that is the same for equal rows only."""
    return [row.indices.tobytes() + row.data.tobytes() for row in vectors]


def _kmeans_selection(vectors: csr_matrix, most: int, seed: int) -> pd.DataFrame:
    if most < 3:  # the elbow is never an end of the curve
        raise ValueError(f"most must be >= 3, got {most}")
    tried = np.arange(1, min(most, len(set(_keys(vectors)))) + 1)
    sse = np.array([KMeans(int(k), n_init=10, random_state=seed).fit(vectors).inertia_ for k in tried])
    distance = chord_distance(sse)
    return pd.DataFrame({"k": tried, "sse": sse, "distance": distance, "chosen": tried == tried[distance.argmax()]})


def chord_distance(curve: Float[np.ndarray, "k"]) -> Float[np.ndarray, "k"]:
    """Compute how far an error curve is below its chord, whose maximum gives the head count; axes scaled to [0, 1]."""
    across = np.linspace(0, 1, len(curve))
    fall = curve[0] - curve[-1]
    height = (curve - curve[-1]) / fall if fall > 0 else 1 - across
    return (1 - across - height) / math.sqrt(2)
