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
    """Return all questions in a random order that a hash of their text fixes.

    Returns
    -------
    DataFrame
        Columns text, label, group (the question), cluster, split and draw. Split and draw equal those of the sentence
        in the task "sentiment", so that no sentence is in two splits. All questions about the sentences of an article
        belong to one cluster.
    """
    sentences = sources.sentiment()
    digests = [splits.digest(text) for text in sentences["text"]]
    known = splits.assign(digests).assign(cluster=sources.clusters(sentences))
    exchanged = pd.Series([int(each[32:48], 16) % 2 == 1 for each in digests])
    words = [text.split() for text in sentences["text"]]
    halves = [
        " ".join([*line[len(line) // 2 :], *line[: len(line) // 2]] if swap else line)
        for line, swap in zip(words, exchanged, strict=True)
    ]
    asked = {
        "sentiment": (sentences["text"], sentences["label"]),
        "domain": (sentences["text"], sentences["group"]),
        "strength": (sentences["text"], _choose(sentences["rating"].abs() > _STRONG, "strong", "weak")),
        "order": (pd.Series(halves), _choose(exchanged, "exchanged", "as written")),
    }
    parts = [
        known.assign(text=f"{question}: " + text, label=label, group=question)
        for question, (text, label) in asked.items()
    ]
    parts[-1] = parts[-1][[len(line) >= _SHORTEST for line in words]]
    table = pd.concat(parts, ignore_index=True)[["text", "label", "group", "cluster", "split", "draw"]]
    table = table.assign(digest=table["text"].map(splits.digest)).sort_values(["digest", *table.columns])
    place = table.groupby(["split", "group"]).cumcount()
    return table[(table["split"] != "test") | (place < TEST_ROWS)].drop(columns="digest").reset_index(drop=True)


def _choose(condition: pd.Series, true: str, false: str) -> pd.Series:
    return condition.map({True: true, False: false})
