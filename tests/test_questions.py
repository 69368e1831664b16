"""Tests of the mixture of four questions: its labels, its splits and its clusters."""

from __future__ import annotations

import hashlib

import pandas as pd
import pytest

from lorascope.inputs import questions, sources, tasks

DOMAINS = list(sources.DOMAINS)


def sentences(count: int = 1200) -> pd.DataFrame:
    """Return sentences of 5 to 10 words in all domains; every seventh repeats an earlier one of its domain."""
    rows = []
    for number in range(count):
        same = number - 4 if number % 7 == 6 else number
        words = [f"Word{same}", *(f"w{place}" for place in range(1, 5 + same % 6))]
        domain = DOMAINS[number % 4]
        rating = [0.6, -1.9, 2.0, 2.1, -3.0][same % 5]
        name = f"{number // 12}_{number}" if domain in ("news", "products") else str(number)
        label = "positive" if rating > 0 else "negative"
        rows.append({"text": "  ".join(words), "label": label, "id": name, "rating": rating, "group": domain})
    return pd.DataFrame(rows)


@pytest.fixture
def made(monkeypatch) -> pd.DataFrame:
    """Replace the bundled sentences, of which 30 test rows per question are kept, and return them."""
    rows = sentences()
    monkeypatch.setattr(sources, "sentiment", lambda: rows)
    monkeypatch.setattr(questions, "TEST_ROWS", 30)
    return rows


def asked(made: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the mixture next to the sentences that they are about."""
    table = tasks.load("sentiment/mixture").table
    rest = table["text"].str.partition(": ")[2]
    # A sentence starts with the only word that is written in upper case, also if its halves are exchanged.
    return table.assign(rest=rest, first=rest.str.extract(r"(Word\d+)", expand=False)).merge(
        made.assign(first=made["text"].str.split().str[0]).drop_duplicates("first"), on="first", suffixes=("", "_of")
    )


def test_first_word_names_the_question(made):
    task = tasks.load("sentiment/mixture")
    assert task.groups == ("domain", "order", "sentiment", "strength")
    assert (task.table["text"].str.partition(": ")[0] == task.table["group"]).all()
    assert len(task.labels) == 10
    assert task.kind == "classification"


def test_labels_answer_the_question(made):
    found = asked(made)
    expected = {"sentiment": found["label_of"], "domain": found["group_of"]}
    expected["strength"] = (found["rating"].abs() > 2).map({True: "strong", False: "weak"})
    halves = found["text_of"].str.split().str.join(" ") == found["rest"]
    expected["order"] = halves.map({True: "as written", False: "exchanged"})
    for group, labels in expected.items():
        rows = found["group"] == group
        assert rows.sum() > 100
        assert found.loc[rows, "label"].to_list() == labels[rows].to_list()
        assert found.loc[rows, "label"].nunique() == (4 if group == "domain" else 2)


def test_order_asks_about_halves_of_at_least_eight_words(made):
    found = asked(made)
    found = found[found["group"] == "order"]
    assert found["rest"].str.split().str.len().min() == 8
    swapped = found[found["label"] == "exchanged"]
    for text, whole in zip(swapped["rest"], swapped["text_of"], strict=True):
        words = whole.split()
        assert text.split() == words[len(words) // 2 :] + words[: len(words) // 2]
    bits = [
        int(hashlib.sha256(" ".join(text.split()).casefold().encode()).hexdigest()[32:48], 16) % 2
        for text in found["text_of"]
    ]
    assert (found["label"] == "exchanged").to_list() == [bit == 1 for bit in bits]


def test_all_questions_about_a_sentence_are_in_its_split_and_cluster(made):
    whole, found = tasks.load("sentiment").table, asked(made)
    splits = dict(zip(whole["text"], zip(whole["split"], whole["draw"], strict=True), strict=True))
    assert [splits[text] for text in found["text_of"]] == list(zip(found["split"], found["draw"], strict=True))
    assert (found.groupby("first")["split"].nunique() == 1).all()
    known = whole.groupby("text")["cluster"].agg(set).to_dict()
    assert all(cluster in known[text] for cluster, text in zip(found["cluster"], found["text_of"], strict=True))
    articles = whole.loc[whole["cluster"].str.startswith("news"), "cluster"]
    assert articles.str.fullmatch(r"news/\d+").all()
    assert articles.duplicated().any()


def test_every_question_has_as_many_test_rows_and_all_others(made):
    table = tasks.load("sentiment/mixture").table
    sizes = table.groupby(["split", "group"]).size()
    assert sizes["test"].to_dict() == dict.fromkeys(("domain", "order", "sentiment", "strength"), 30)
    whole = tasks.load("sentiment").table
    for split in ("train", "validation"):
        rows = whole[whole["split"] == split]
        assert sizes[split]["sentiment"] == sizes[split]["domain"] == sizes[split]["strength"] == len(rows)
        assert sizes[split]["order"] == (rows["text"].str.split().str.len() >= 8).sum()


def test_mixture_depends_on_neither_order_nor_index_of_the_sentences(made, monkeypatch):
    first = tasks.load("sentiment/mixture")
    shuffled = made.sample(frac=1, random_state=0)
    monkeypatch.setattr(sources, "sentiment", lambda: shuffled.reset_index(drop=True))
    second = tasks.load("sentiment/mixture")
    assert second.hash == first.hash
    pd.testing.assert_frame_equal(second.table, first.table)


def test_domains_are_the_labels_of_the_same_texts(made):
    whole, task = tasks.load("sentiment"), tasks.load("sentiment/domains")
    assert task.labels == tuple(sorted(DOMAINS))
    assert task.groups == ()
    for name, rows in whole.splits.items():
        assert sorted(zip(task.split(name)["text"], task.split(name)["label"], strict=True)) == sorted(
            zip(rows["text"], rows["group"], strict=True)
        )


@pytest.mark.real
def test_published_mixture_has_1900_test_rows_per_question():
    test = tasks.load("sentiment/mixture").split("test")
    assert test.groupby("group").size().to_dict() == dict.fromkeys(("domain", "order", "sentiment", "strength"), 1900)
    assert set(test["cluster"]) <= set(tasks.load("sentiment").split("test")["cluster"])
