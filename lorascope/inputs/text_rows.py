"""Rows on which an instrument measures: those of the task, and text of other origin on which behavior should stay."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from torch import nn

from lorascope.inputs import models, tasks
from lorascope.inputs.tasks import Task
from lorascope.inputs.tokenization import EncodedRows, Tokens

FEWEST_ROWS = 32
_BUNDLED = "sentiment"


class TextRows(NamedTuple):
    """Rows of one split, encoded for a model, and as a table."""

    encoded: EncodedRows
    table: pd.DataFrame


def encode_rows(model: nn.Module, task: Task, split: str, rows: int, max_length: int) -> TextRows:
    """Encode the first rows of a split of a task that fits the model's head.

    Raises
    ------
    ValueError
        There are fewer than 32 rows, or the tokenizer is that of a model with a larger vocabulary.
    """
    table = task.split(split).head(rows)
    if len(table) < FEWEST_ROWS:
        raise ValueError(
            f"cannot measure on {task.name}: intervals need at least {FEWEST_ROWS} rows, got {len(table)} of its "
            f"{split} split"
        )
    # Text that the training did not read may be longer than the positions of the model.
    length = int(min(max_length, models.count_positions(model)))
    encoded = task.encode(models.processor(model), table, length)
    if isinstance(encoded, Tokens):
        _require_vocabulary(model, encoded)
    return TextRows(encoded, table)


def _require_vocabulary(model: nn.Module, encoded: Tokens) -> None:
    """Raise a ValueError if a token is not in the model's embedding, which is an index error in the forward pass."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    size = len(embedding.weight)
    largest = max(itertools.chain.from_iterable(encoded.tokens["input_ids"]), default=0)
    if largest >= size:
        raise ValueError(
            f"cannot read the rows with the tokenizer of {type(model).__name__}: it has a token {largest}, but the "
            f"model has embeddings of {size} tokens. Save the model with its own tokenizer"
        )


def load_keep(keep: str | Path | Task | None, task: Task, model: nn.Module) -> Task:
    """Return text on which an adapter should not change the model's behavior, in a form for the model without labels.

    Parameters
    ----------
    keep : str, path, Task or None
        See ``tasks.load``; by default the bundled sentences of all domains but that of the task.
    task : Task
        Task that the adapter learned.
    model : Module
        Model that reads the rows.

    Raises
    ------
    ValueError
        No text was passed, and there is no default for this task.
    """
    if keep is None:
        keep = _other_domains(task)
    return load_text(keep, model, task.classifies)


def load_text(keep: str | Path | Task, model: nn.Module, classifies: bool) -> Task:
    """Return text without labels in a form for the model; ``classifies`` is whether it has a head for classes."""
    if not isinstance(keep, Task):
        keep = tasks.load(keep)
    columns = [column for column in ("text", "pair", "cluster", "split", "draw") if column in keep.table]
    if "text" not in keep.table:  # images, or prompts whose responses are the targets
        return keep.fit(model)
    if classifies:  # labels are required to encode, but not used
        return replace(keep, kind="classification", labels=("",), table=keep.table[columns].assign(label=""))
    if not getattr(model.config, "is_encoder_decoder", False):
        return replace(keep, kind="lm", labels=(), table=keep.table[columns].drop(columns="pair", errors="ignore"))
    return keep.fit(model)


def _other_domains(task: Task) -> Task:
    if task.kind == "image" or task.name in (_BUNDLED, f"{_BUNDLED}/domains", f"{_BUNDLED}/mixture"):
        raise ValueError(f"keep is required for {task.name}: pass text or images of another origin, see ls.tasks.load")
    bundled = tasks.load(_BUNDLED)
    domain = task.name.rpartition("/")[2]
    return replace(bundled, name=f"{_BUNDLED} without {domain}", table=bundled.table[bundled.table["group"] != domain])


def require_disjoint(task_table: pd.DataFrame, keep_table: pd.DataFrame) -> None:
    """Raise ValueError if rows of the task are also among those on which behavior should stay."""
    key = next((column for column in ("text", "prompt") if column in task_table and column in keep_table), None)
    if key is None:
        return
    shared = set(task_table[key]) & set(keep_table[key])
    if shared:
        raise ValueError(
            f"keep must have other rows than the task, got {len(shared)} of {len(keep_table)} in both, such as "
            f"{min(shared)[:40]!r}"
        )
