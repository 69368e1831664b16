"""Four questions about every bundled sentence, as one task: the first word of a text names its question.

======== ============================================================ =====================
question answer                                                       sentences
======== ============================================================ =====================
sentiment negative or positive                                        all
domain    tweets, movies, products or news                            all
strength  strong if the mean rating is further than 2 from zero       all
order     whether the halves are as written or exchanged              of 8 words or more
======== ============================================================ =====================
"""

from __future__ import annotations

import pandas as pd

from lorascope.inputs import sources, splits

TEST_ROWS = 1900
"""Number of test rows per question."""
RULE = (
    "split of the sentence; order from the third number of its hash; test rows of each question with the smallest "
    f"hash of the text, {TEST_ROWS} per question"
)
_STRONG, _SHORTEST = 2.0, 8


def ask() -> pd.DataFrame:
    """Return all questions about the bundled sentences in a random order that a hash of their text fixes.

    Returns
    -------
    DataFrame
        Columns text, label, group (the question), cluster, split and draw. Split and draw equal those of the sentence
        in the task "sentiment", so that no sentence is in two splits. All questions about the sentences of an article
        belong to one cluster.
    """
    sentences = sources.sentiment()
    texts = sentences["text"]
    digests = texts.map(splits.digest_text)
    frame = splits.assign(digests).assign(cluster=sources.clusters(sentences))
    is_exchanged = pd.Series([int(digest[32:48], 16) % 2 == 1 for digest in digests])
    strength = _choose(sentences["rating"].abs() > _STRONG, "strong", "weak")
    order = _choose(is_exchanged, "exchanged", "as written")
    words = texts.map(str.split)
    ordered_texts = pd.Series(map(_join_words, words, is_exchanged))
    is_long = words.map(len) >= _SHORTEST
    questions = [
        frame.assign(text="sentiment: " + texts, label=sentences["label"], group="sentiment"),
        frame.assign(text="domain: " + texts, label=sentences["group"], group="domain"),
        frame.assign(text="strength: " + texts, label=strength, group="strength"),
        frame.assign(text="order: " + ordered_texts, label=order, group="order")[is_long],
    ]
    table = pd.concat(questions, ignore_index=True)[["text", "label", "group", "cluster", "split", "draw"]]
    table = table.assign(digest=table["text"].map(splits.digest_text)).sort_values(["digest", *table.columns])
    position = table.groupby(["split", "group"]).cumcount()
    return table[(table["split"] != "test") | (position < TEST_ROWS)].drop(columns="digest").reset_index(drop=True)


def _join_words(words: list[str], is_exchanged: bool) -> str:
    """Return a text of these words, with its halves exchanged if wanted."""
    half = len(words) // 2
    return " ".join([*words[half:], *words[:half]] if is_exchanged else words)


def _choose(condition: pd.Series, true: str, false: str) -> pd.Series:
    return condition.map({True: true, False: false})
