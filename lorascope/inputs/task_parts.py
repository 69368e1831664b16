"""Parts of a task, which are tasks with their own hashes, and the identity of its test rows."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from lorascope.array_types import Bool, Int
from lorascope.inputs.tasks import Task


def random_part(task: Task, number: int, count: int, seed: int) -> Task:
    """Return a part of a task: one of ``count`` random parts of its train split, and all of validation and test.

    The parts of a seed have no row in common and together are the train split.

    Raises
    ------
    ValueError
        The number of the part is not from 1 to ``count``.
    """
    if not 1 <= number <= count:
        raise ValueError(f"number must be from 1 to {count}, got {number}")
    is_in_part = _shuffled_positions(task, seed) % count == number - 1
    name = f"random part {number} of {count}, draw {seed}"
    return _select_train(task, is_in_part, name, ["part", number, count, seed])


def enlarge_test(task: Task, number: int) -> Task:
    """Return a task whose ``number`` training rows with the largest ``draw``, a random sample, are test rows.

    Raises
    ------
    ValueError
        The train split has no more rows than that, or ``number`` is below 1.
    """
    train = task.table[task.table["split"] == "train"]
    if not 1 <= number < len(train):
        raise ValueError(f"number must be from 1 to {len(train) - 1}, got {number}: {task.name}")
    table = task.table.copy()
    table.loc[train["draw"].nlargest(number).index, "split"] = "test"
    enlarged = replace(task, table=table, hashed=None)  # the rule below is in the hash
    return _select(enlarged, np.ones(len(table), bool), f"{number} more test rows", ["enlarge test", number])


def identify_test_rows(task: Task) -> pd.DataFrame:
    """Return the part of a task's test rows that the evidence keeps, which is enough to recognize them.

    Returns
    -------
    DataFrame
        ``task_hash, row, text, label, group, cluster``, in the order of ``task.split("test")``. ``row`` counts from 0;
        ``text`` is the first 12 hex digits of the SHA-256 of the text. Label and group are "" if there are none; a row
        of a task without clusters is a separate cluster.
    """
    test = task.split("test")
    column = "prompt" if "prompt" in test else "text"
    texts = [hashlib.sha256(text.encode()).hexdigest()[:12] for text in test[column]]
    columns = {"task_hash": task.hash, "row": range(len(test)), "text": texts}
    defaults = {"label": "", "group": "", "cluster": list(map(str, range(len(test))))}
    return pd.DataFrame(columns | {name: test.get(name, default) for name, default in defaults.items()})


def _shuffled_positions(task: Task, seed: int) -> Int[np.ndarray, "rows"]:
    """Return the position of each training row in a random order, from 0.

    The order comes from hashes, because random generators of numpy may differ between its versions.
    """
    count = int((task.table["split"] == "train").sum())
    keys = [hashlib.sha256(f"{seed} {row}".encode()).digest() for row in range(count)]
    positions = np.empty(count, dtype=np.int64)
    positions[sorted(range(count), key=keys.__getitem__)] = np.arange(count)
    return positions


def _select_train(task: Task, train_mask: Bool[np.ndarray, "rows"], name: str, rule: list[Any]) -> Task:
    """Return the task with some of its training rows, and all others."""
    mask = (task.table["split"] != "train").to_numpy(copy=True)
    mask[~mask] = train_mask
    return _select(task, mask, name, rule)


def _select(task: Task, mask: Bool[np.ndarray, "table_rows"], name: str, rule: list[Any]) -> Task:
    """Return the task with some rows of its table; its hash is of the ``rule`` that selects them."""
    digest = hashlib.sha256(json.dumps([task.hash, *rule]).encode()).hexdigest()
    return replace(task, name=f"{task.name}, {name}", table=task.table[mask].reset_index(drop=True), hash=digest)
