"""Tests of parts of a task and of the identity of its test rows."""

from __future__ import annotations

import hashlib
import re

import pandas as pd
import pytest

from lorascope.inputs import task_parts, tasks


@pytest.fixture(scope="module")
def whole() -> tasks.Task:
    numbers = range(400)
    return tasks.from_frame(
        pd.DataFrame(
            {
                "text": [f"text number {number}" for number in numbers],
                "label": [f"label {number % 5}" for number in numbers],
                "group": [f"group {number % 3}" for number in numbers],
                "cluster": [f"article {number // 4}" for number in numbers],
            }
        ),
        "numbers",
    )


def texts(task: tasks.Task, split: str = "train") -> list[str]:
    return task.split(split)["text"].to_list()


@pytest.mark.parametrize("count", [1, 3, 7])
def test_random_parts_of_a_seed_are_a_partition_of_train(whole, count):
    parts = [task_parts.random_part(whole, number, count, 7) for number in range(1, count + 1)]
    assert sorted(text for part in parts for text in texts(part)) == sorted(texts(whole))
    sizes = [len(texts(part)) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    pd.testing.assert_frame_equal(parts[-1].split("test"), whole.split("test"))


def test_every_part_has_another_hash(whole):
    parts = [
        whole, task_parts.random_part(whole, 1, 3, 0), task_parts.random_part(whole, 2, 3, 0),
        task_parts.random_part(whole, 1, 3, 1), task_parts.random_part(whole, 1, 4, 0),
        task_parts.enlarge_test(whole, 10), task_parts.enlarge_test(whole, 11),
    ]  # fmt: skip
    assert len({part.hash for part in parts}) == len({part.name for part in parts}) == len(parts)
    assert all(re.fullmatch("[0-9a-f]{64}", part.hash) for part in parts)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda task: task_parts.random_part(task, 4, 3, 0), "from 1 to 3, got 4"),
        (lambda task: task_parts.enlarge_test(task, 0), r"from 1 to \d+, got 0: numbers"),
    ],
)
def test_part_that_does_not_exist_raises_one_line(whole, call, expected):
    with pytest.raises(ValueError, match=expected):
        call(whole)


def test_identity_of_the_test_rows_follows_their_order(whole):
    found, test = task_parts.identify_test_rows(whole), whole.split("test")
    assert list(found) == ["task_hash", "row", "text", "label", "group", "cluster"]
    assert set(found["task_hash"]) == {whole.hash}
    assert found["row"].tolist() == list(range(len(test)))
    assert found["text"][3] == hashlib.sha256(test["text"][3].encode()).hexdigest()[:12]
    pd.testing.assert_frame_equal(found[["label", "group", "cluster"]], test[["label", "group", "cluster"]])


def test_rows_without_clusters_are_separate_clusters():
    lines = tasks.from_frame(pd.DataFrame({"text": [f"line {number}" for number in range(60)]}))
    found = task_parts.identify_test_rows(lines)
    assert found["cluster"].is_unique
    assert set(found["label"]) == set(found["group"]) == {""}


@pytest.mark.real
def test_published_sentences_of_the_test_split_are_in_3318_clusters():
    found = task_parts.identify_test_rows(tasks.load("sentiment"))
    assert (len(found), found["cluster"].nunique()) == (3852, 3318)
    assert found.loc[found["group"].isin(["tweets", "movies"]), "cluster"].is_unique


def test_enlarged_test_split_gets_the_training_rows_with_the_largest_draw(whole):
    enlarged = task_parts.enlarge_test(whole, 30)
    before, after = whole.split("train"), enlarged.split("train")
    assert len(after) == len(before) - 30
    assert len(enlarged.split("test")) == len(whole.split("test")) + 30
    moved = set(before["text"]) - set(after["text"])
    draws = whole.table.set_index("text")["draw"]
    assert draws[list(moved)].min() >= draws[list(after["text"])].max()
    assert enlarged.split("validation").equals(whole.split("validation"))
    assert enlarged.hash not in (whole.hash, task_parts.enlarge_test(whole, 29).hash)
    for number in (0, len(before)):
        with pytest.raises(ValueError, match=f"number must be from 1 to {len(before) - 1}, got {number}"):
            task_parts.enlarge_test(whole, number)
