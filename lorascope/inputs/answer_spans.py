"""Questions about a context whose answers are spans of it: windows of the context, and the best span of their logits.

Windows, labels and the search for a span follow ``run_qa.py`` of transformers.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lorascope.array_types import Float, Int
from lorascope.inputs.tokenization import Tokens

CANDIDATES, MAX_TOKENS = 20, 30
"""Positions that are compared as start and as end of a span, and the maximum number of its tokens."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Windows(Tokens):
    """Tokenized questions, each with one window of its context.

    ``positions`` are the first and the last token of the answer, or twice the token for the whole text if the window
    does not contain it. ``rows`` is the row of each window. ``offsets`` are the characters of each token in the
    context, -1 elsewhere. ``table`` has the rows with the columns prompt, context, references, and group if there are
    groups. ``can_be_empty`` is whether some questions have no answer.
    """

    positions: Int[np.ndarray, "windows 2"]
    rows: Int[np.ndarray, "windows"]
    offsets: list[Int[np.ndarray, "tokens 2"]]
    table: pd.DataFrame
    can_be_empty: bool

    def batch(self, indices: Iterable[Any]) -> dict[str, Tensor]:
        """Return input_ids and attention_mask of shape (windows, tokens), other inputs, and the positions."""
        windows = list(map(int, indices))
        inputs = super().batch(windows)
        inputs["start_positions"], inputs["end_positions"] = torch.from_numpy(self.positions[windows]).T
        return inputs


def read_spans(rows: pd.DataFrame, name: str) -> tuple[list[list[str]], list[list[int]]]:
    """Return the answers of each row and where they start in its context; both are empty without an answer.

    Raises
    ------
    ValueError
        The answers of a row are not lists of texts and numbers, or a text is not in the context at its number.
    """
    columns: Any = rows.reindex(columns=["context", "answers", "answer_start"])
    texts, starts = [], []
    for number, (context, answers, positions) in enumerate(columns.itertuples(index=False), start=1):
        if isinstance(answers, Mapping):  # datasets have a pair of lists
            pair: Mapping[str, Any] = answers
            answers, positions = pair.get("text"), pair.get("answer_start")
        for column, values, kinds in (("answers", answers, str), ("answer_start", positions, int | np.integer)):
            is_list = isinstance(values, list | tuple | np.ndarray)
            if not is_list or not all(isinstance(value, kinds) for value in values):
                expected = "texts" if column == "answers" else "numbers of characters"
                cell = f"{column} in row {number} of {name}"
                raise ValueError(f"{cell} must be a list of {expected}, got {reprlib.repr(values)}")
        if len(answers) != len(positions):
            raise ValueError(
                f"answer_start in row {number} of {name} must have {len(answers)} numbers, as answers, got "
                f"{len(positions)}"
            )
        for answer, start in zip(answers, positions, strict=True):
            if not answer or start < 0 or context[start : start + len(answer)] != answer:
                raise ValueError(
                    f"answer_start in row {number} of {name} must be the position of {reprlib.repr(answer)} in the "
                    f"context, got {start}"
                )
        texts.append(list(answers))
        starts.append(list(map(int, positions)))
    return texts, starts


def encode_spans(tokenizer: Any, rows: pd.DataFrame, max_length: int, can_be_empty: bool) -> Windows:
    """Tokenize questions with windows of their contexts, which overlap by a third of ``max_length``.

    Raises
    ------
    ValueError
        A question leaves no room for its context, or the tokenizer has no offsets.
    """
    if not tokenizer.is_fast:
        raise ValueError("cannot find spans with this tokenizer: offsets require a fast one")
    questions = rows["question"].str.lstrip().to_list()
    lengths = map(len, tokenizer(questions, add_special_tokens=False, verbose=False)["input_ids"])
    longest = max(lengths, default=0) + tokenizer.num_special_tokens_to_add(pair=True)
    if max_length - max_length // 3 <= longest:
        minimum = 3 * longest // 2 + 1
        raise ValueError(
            f"max_length must be >= {minimum}, because a window has a question of {longest} tokens, got {max_length}"
        )
    encoding = tokenizer(
        questions,
        rows["context"].to_list(),
        truncation="only_second",
        max_length=max_length,
        stride=max_length // 3,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    row_numbers = np.array(encoding["overflow_to_sample_mapping"], dtype=np.int64)
    answers, starts = rows["answers"].to_list(), rows["answer_start"].to_list()
    positions, offsets = np.zeros((len(row_numbers), 2), dtype=np.int64), []
    for window, row in enumerate(row_numbers):
        is_context = np.array(encoding.sequence_ids(window), dtype=np.float64) == 1
        characters = np.where(is_context[:, None], encoding["offset_mapping"][window], -1)
        offsets.append(characters)
        positions[window] = _first_token(tokenizer, encoding["input_ids"][window])
        if answers[row] and is_context.any():
            first, last = starts[row][0], starts[row][0] + len(answers[row][0])
            tokens = np.flatnonzero(is_context)
            if characters[tokens[0], 0] <= first and last <= characters[tokens[-1], 1]:
                positions[window, 0] = tokens[characters[tokens, 0] <= first][-1]
                positions[window, 1] = tokens[characters[tokens, 1] >= last][0]
    tokens_of = {"input_ids": encoding["input_ids"]}
    if "token_type_ids" in encoding:
        tokens_of["token_type_ids"] = encoding["token_type_ids"]
    # A question without an answer has the empty text as its reference.
    references = rows["answers"].map(lambda texts: texts or [""])
    table = pd.DataFrame({"prompt": prompts_of(rows), "context": rows["context"], "references": references})
    if "group" in rows:
        table["group"] = rows["group"]
    groups = None if "group" not in rows else rows["group"].iloc[row_numbers].to_list()
    return Windows(
        tokens_of,
        dict.fromkeys(tokens_of, 0) | {"input_ids": tokenizer.pad_token_id},
        positions=positions,
        rows=row_numbers,
        offsets=offsets,
        table=table.reset_index(drop=True),
        can_be_empty=can_be_empty,
        groups=groups,
    )


def prompts_of(rows: pd.DataFrame) -> pd.Series:
    """Return question and context of each row as one text."""
    return rows["question"] + "\n" + rows["context"]


def _first_token(tokenizer: Any, ids: list[int]) -> int:
    """Return the position of the token that stands for no answer: the one for the whole text, or the first."""
    for token in (tokenizer.cls_token_id, tokenizer.bos_token_id):
        if token is not None and token in ids:
            return ids.index(token)
    return 0


def best_span(
    logits: list[Float[np.ndarray, "tokens 2"]],
    offsets: list[Int[np.ndarray, "tokens 2"]],
    context: str,
    can_be_empty: bool,
) -> str:
    """Return the span of a context with the largest sum of the logits of its first and last token.

    Parameters
    ----------
    logits : list of arrays
        Logits of start and end of each window.
    offsets : list of arrays
        Characters of each token in the context, -1 elsewhere.
    context : str
        The context.
    can_be_empty : bool
        Whether the answer is empty if the logits of the first token have a larger sum in all windows, as in SQuAD 2.0.
    """
    best, text, empty = -np.inf, "", np.inf
    for window, characters in zip(logits, offsets, strict=True):
        empty = min(empty, float(window[0].sum()))
        # As many candidates as in the script, each start with each end.
        starts, ends = np.argsort(-window, axis=0, kind="stable")[:CANDIDATES].T
        sizes = ends[None] - starts[:, None] + 1
        sums = window[starts, 0][:, None] + window[ends, 1][None]
        is_span = (sizes >= 1) & (sizes <= MAX_TOKENS)
        is_span &= (characters[starts, 0] >= 0)[:, None] & (characters[ends, 0] >= 0)[None]
        sums = np.where(is_span, sums, -np.inf)
        start, end = np.unravel_index(sums.argmax(), sums.shape)
        if sums[start, end] > best:
            best = float(sums[start, end])
            text = context[characters[starts[start], 0] : characters[ends[end], 1]]
    return "" if can_be_empty and empty > best else text
