"""How many kinds of text a corpus holds: k-means on TF-IDF vectors, and the elbow of its error.

Source: HydraLoRA (arXiv 2404.19245), appendix B, equations 7 and 8. It leaves open what is decided here: the 5,000
commonest words that are no English stop words, K from 1 to 10, the best of ten draws, and as elbow the K at which the
curve of the error lies farthest below its chord. It sets DBSCAN beside it (figure 7) without its two settings: here
five texts make a cluster, within the radius at the elbow of the sorted distances from each text to the fourth nearest
other one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.sparse import csr_matrix
from sklearn.cluster import DBSCAN, KMeans
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.neighbors import NearestNeighbors

from lorascope.schema.deprecation import old_names

KMEANS, DENSITY = "k-means", "DBSCAN"
_DENSE = 5  # texts that make a cluster


def choose_num_experts(texts: Iterable[str], most: int = 10, seed: int = 0) -> int:
    """Number of heads for a corpus: ``HydraLoRA(num_experts=choose_num_experts(task.split("train")["text"]))``.

    Parameters and errors as of :func:`cluster_selection`, whose choice it is: always fewer than ``most``.
    """
    found = cluster_selection(texts, most, seed)
    return int(found.loc[found["chosen"], "k"].item())


def cluster_selection(texts: Iterable[str], most: int = 10, seed: int = 0) -> pd.DataFrame:
    """The number of clusters in a corpus by k-means on TF-IDF vectors and the elbow of the error (appendix B).

    Parameters
    ----------
    texts : iterable of str
    most : int
        Largest K that is tried, 3 or more; of fewer distinct texts their number. It cannot be chosen itself: both ends
        of the curve lie on the chord.
    seed : int
        Of the random centres; of ten draws the best counts.

    Returns
    -------
    DataFrame
        ``k, sse, distance, chosen``: the sum of squared distances to the centres, and how far the curve, both axes
        brought to [0, 1], lies below its chord; the K where it lies deepest is chosen, and 1 where it nowhere does.

    Raises
    ------
    ValueError
        There are no words, or ``most`` is below 3.
    """
    return _kmeans_selection(_vectors(texts), most, seed)


def repeated_selection(texts: Iterable[str], repetitions: int = 15, most: int = 10, sample: int = 1000) -> pd.DataFrame:
    """The same choice on random samples of the corpus, by k-means and by DBSCAN: does it depend on the sample?

    Parameters
    ----------
    texts : iterable of str
    repetitions : int
        Samples, each drawn without replacement and by a seed of its own, as the centres are.
    most : int
        Largest K that k-means tries, 3 or more; it cannot be chosen itself.
    sample : int
        Texts of a sample; of fewer all.

    Returns
    -------
    DataFrame
        ``seed, texts, algorithm``, then the columns of :func:`cluster_selection`; DBSCAN has one row a sample, its
        number of clusters as ``k``.

    Raises
    ------
    ValueError
        Fewer than one repetition, ``most`` is below 3, or there are no words.
    """
    if repetitions < 1:
        raise ValueError(f"repetitions {repetitions} draws no sample: it must be 1 or more")
    corpus, parts = pd.Series(list(texts)), []
    for seed in range(repetitions):
        drawn = corpus.sample(min(sample, len(corpus)), random_state=seed)
        vectors = _vectors(drawn)
        dense = pd.DataFrame({"k": [density_clusters(vectors)], "sse": math.nan, "distance": math.nan, "chosen": True})
        for algorithm, found in ((KMEANS, _kmeans_selection(vectors, most, seed)), (DENSITY, dense)):
            parts.append(found.assign(seed=seed, texts=len(drawn), algorithm=algorithm))
    return pd.concat(parts, ignore_index=True)[["seed", "texts", "algorithm", "k", "sse", "distance", "chosen"]]


def density_clusters(vectors: csr_matrix) -> int:
    """Number of clusters by DBSCAN among the distinct texts that have a word; 0 where no five are near each other."""
    distinct = vectors[list({key: row for row, key in enumerate(_keys(vectors))}.values())]
    distinct = distinct[distinct.getnnz(1) > 0]
    near = NearestNeighbors(n_neighbors=min(_DENSE, distinct.shape[0])).fit(distinct).kneighbors(distinct)[0][:, -1]
    falling = np.sort(near)[::-1]
    radius = falling[chord_distance(falling).argmax()]
    if radius == 0:  # a single distinct text
        return 1
    return int(DBSCAN(eps=radius, min_samples=_DENSE).fit_predict(distinct).max()) + 1


def _vectors(texts: Iterable[str]) -> csr_matrix:
    return TfidfVectorizer(max_features=5000, stop_words="english").fit_transform(texts)


def _keys(vectors: csr_matrix) -> list[bytes]:
    """What is the same for equal rows alone."""
    return [row.indices.tobytes() + row.data.tobytes() for row in vectors]


def _kmeans_selection(vectors: csr_matrix, most: int, seed: int) -> pd.DataFrame:
    if most < 3:
        raise ValueError(
            f"most {most} leaves no elbow to find: both ends of the curve are none, so it must be 3 or more"
        )
    tried = np.arange(1, min(most, len(set(_keys(vectors)))) + 1)
    sse = np.array([KMeans(int(k), n_init=10, random_state=seed).fit(vectors).inertia_ for k in tried])
    distance = chord_distance(sse)
    return pd.DataFrame({"k": tried, "sse": sse, "distance": distance, "chosen": tried == tried[distance.argmax()]})


def chord_distance(curve: Float[np.ndarray, "k"]) -> Float[np.ndarray, "k"]:
    """How far a falling curve lies below the line from its first point to its last, both axes brought to [0, 1]."""
    across = np.linspace(0, 1, len(curve))
    fall = curve[0] - curve[-1]
    height = (curve - curve[-1]) / fall if fall > 0 else 1 - across
    return (1 - across - height) / math.sqrt(2)


if not TYPE_CHECKING:  # type checkers should not see the old names
    __getattr__ = old_names(__name__, {"choose_heads": "choose_num_experts"})
