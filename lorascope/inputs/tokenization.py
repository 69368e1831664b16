"""Encoded rows of a task: texts are tokenized once, batched by index, and padded to the longest of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from lorascope.array_types import Float, Float32, Int

IGNORED = -100
"""Label of tokens that the loss ignores."""


@dataclass(frozen=True, eq=False)
class Choices:
    """Closed set of responses that the token at one position distinguishes."""

    tokens: Int[np.ndarray, "labels"]  # token of each response at the first position where the responses differ
    offset: int  # this position in the response, from 0
    answers: Int[np.ndarray, "rows"]  # number of the correct response of each row


@dataclass(frozen=True, eq=False)
class Continuations:
    """Choices of all rows, each after the prompt of its row, whose log-likelihoods are compared."""

    tokens: EncodedRows  # one row per choice, with its tokens as labels
    rows: Int[np.ndarray, "choices"]  # row of each choice
    numbers: Int[np.ndarray, "choices"]  # number of each choice in its row, from 0
    texts: list[list[str]]  # choices of each row
    answers: Int[np.ndarray, "rows"]  # number of the right choice of each row


@dataclass(frozen=True, eq=False, kw_only=True)
class EncodedRows(ABC):
    """Tokenized rows, or images, of a task in the form of model inputs."""

    classes: Int[np.ndarray, "rows"] | None = None  # class numbers; None if the labels are tokens or values
    values: Float32[np.ndarray, "rows"] | None = None  # numbers to predict
    choices: Choices | None = None  # closed set of responses, among which the preferred one is evaluated
    continuations: Continuations | None = None  # choices of each row, of which the right one has the labels
    groups: list[str] | None = None  # group of each row
    shifted: bool = False  # whether position t - 1 predicts the label at position t, as in a causal LM

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @property
    @abstractmethod
    def lengths(self) -> Int[np.ndarray, "rows"]:
        """Length of each row; rows of similar length are batched together."""

    @property
    def longest(self) -> int:
        """Length of the longest row or choice; 0 without rows."""
        rows = self if self.continuations is None else self.continuations.tokens
        return int(max(rows.lengths, default=0))

    @abstractmethod
    def batch(self, indices: Iterable[Any]) -> dict[str, Tensor]:
        """Return model inputs and labels of these rows."""

    def training_batch(self, indices: Iterable[Any], generator: np.random.Generator) -> dict[str, Tensor]:
        """Return the batch of these rows for a training step; ``generator`` draws what is random in them."""
        return self.batch(indices)


@dataclass(frozen=True, eq=False)
class Tokens(EncodedRows):
    """Tokenized rows: for each model input, one list of ids per row and the padding value.

    The inputs are input_ids, and optionally token_type_ids and labels.
    """

    tokens: dict[str, list[list[int]]]
    padding: dict[str, int]

    def __len__(self) -> int:
        return len(self.tokens["input_ids"])

    @property
    def lengths(self) -> Int[np.ndarray, "rows"]:
        """Number of input tokens of each row."""
        return np.array(list(map(len, self.tokens["input_ids"])), dtype=np.int64)

    def batch(self, indices: Iterable[Any]) -> dict[str, Tensor]:
        """Return input_ids and attention_mask of shape (rows, tokens), other inputs, and labels of these rows."""
        rows = list(map(int, indices))
        inputs = {}
        for key, lists in self.tokens.items():
            batch_lists = [lists[row] for row in rows]
            padded = np.full((len(rows), max(map(len, batch_lists))), self.padding[key], dtype=np.int64)
            for line, ids in zip(padded, batch_lists, strict=True):
                line[: len(ids)] = ids
            inputs[key] = torch.from_numpy(padded)
        lengths = torch.tensor([len(self.tokens["input_ids"][row]) for row in rows])
        columns = torch.arange(inputs["input_ids"].shape[1])
        inputs["attention_mask"] = (columns < lengths[:, None]).long()
        if self.classes is not None:
            inputs["labels"] = torch.from_numpy(self.classes[rows])
        if self.values is not None:
            inputs["labels"] = torch.from_numpy(self.values[rows])
        return inputs


def encode_classes(tokenizer: Any, rows: pd.DataFrame, labels: Sequence[str], max_length: int) -> Tokens:
    """Tokenize texts, or pairs of texts, with class numbers."""
    tokens, padding = _encode_texts(tokenizer, rows, max_length)
    return Tokens(tokens, padding, classes=class_numbers(rows, labels), groups=groups_of(rows))


def encode_values(tokenizer: Any, rows: pd.DataFrame, max_length: int) -> Tokens:
    """Tokenize texts, or pairs of texts, with the numbers to predict."""
    tokens, padding = _encode_texts(tokenizer, rows, max_length)
    return Tokens(tokens, padding, values=rows["label"].to_numpy(np.float32), groups=groups_of(rows))


def _encode_texts(
    tokenizer: Any, rows: pd.DataFrame, max_length: int
) -> tuple[dict[str, list[list[int]]], dict[str, int]]:
    """Return the inputs of texts, or pairs of texts, and their padding values."""
    pairs = {"text_pair": rows["pair"].to_list()} if "pair" in rows else {}
    encoding = tokenizer(rows["text"].to_list(), **pairs, truncation=True, max_length=max_length)
    tokens, padding = {"input_ids": encoding["input_ids"]}, {"input_ids": tokenizer.pad_token_id}
    if pairs and "token_type_ids" in encoding:
        tokens["token_type_ids"], padding["token_type_ids"] = encoding["token_type_ids"], 0
    return tokens, padding


def encode_text(tokenizer: Any, rows: pd.DataFrame, max_length: int) -> Tokens:
    """Tokenize plain text for a causal LM: all tokens except the first are targets, including end-of-text."""
    start, end = _start_ids(tokenizer), _end_ids(tokenizer)
    ids = [[*start, *text, *end][:max_length] for text in _token_ids(tokenizer, rows["text"].to_list())]
    padding = {"input_ids": tokenizer.pad_token_id, "labels": IGNORED}
    return Tokens({"input_ids": ids, "labels": ids}, padding, groups=groups_of(rows), shifted=True)


def encode_pairs(
    tokenizer: Any, rows: pd.DataFrame, labels: Sequence[str], max_length: int, *, seq2seq: bool
) -> Tokens:
    """Tokenize prompts with responses; only the tokens of the responses are targets.

    With ``labels``, the responses are a closed set. An open response ends with the end-of-text token, so that the model
    learns where to stop.
    """
    if seq2seq:
        inputs = prompt_ids(tokenizer, rows["prompt"].to_list(), max_length, seq2seq=True)
        targets = tokenizer(text_target=rows["response"].str.strip().to_list(), truncation=True, max_length=max_length)
        responses = targets["input_ids"]
    else:
        start, end = _start_ids(tokenizer), [] if labels else _end_ids(tokenizer)
        # At least one token precedes a reply, because a causal LM does not predict the first one.
        replies = [[*reply, *end][: max_length - 1] for reply in _token_ids(tokenizer, rows["response"].to_list())]
        prompts = _token_ids(tokenizer, rows["prompt"].to_list())
        inputs, responses = [], []
        for prompt, reply in zip(prompts, replies, strict=True):
            room = max_length - len(reply) - len(start)
            ids = [*start, *prompt[max(0, len(prompt) - room) :]]
            inputs.append(ids + reply)
            responses.append([IGNORED] * len(ids) + reply)
    return Tokens(
        {"input_ids": inputs, "labels": responses},
        {"input_ids": tokenizer.pad_token_id, "labels": IGNORED},
        choices=_find_choices(tokenizer, rows, labels, seq2seq) if labels else None,
        groups=groups_of(rows),
        shifted=not seq2seq,
    )


def encode_choices(tokenizer: Any, rows: pd.DataFrame, max_length: int) -> Tokens:
    """Tokenize prompts with each of their choices after one space; only the tokens of a choice are targets.

    As in lm-eval, prompt and choice are tokenized together, and a choice has the tokens after as many as the prompt has
    without it. Spaces at the end of a prompt belong to the choice. No end-of-text token follows, because the choices
    are a closed set. A single choice is an open response, which ends and is truncated as in :func:`encode_pairs`.

    Raises
    ------
    ValueError
        A choice has ``max_length`` tokens or more, or none.
    """
    start, end, texts = _start_ids(tokenizer), _end_ids(tokenizer), rows["choices"].to_list()
    row_numbers = np.repeat(np.arange(len(rows)), list(map(len, texts)))
    prompts = rows["prompt"].to_list()
    context_ids = _token_ids(tokenizer, rows["prompt"].str.rstrip().to_list())
    full_texts: list[str] = []
    numbers: list[int] = []
    for prompt, choices in zip(prompts, texts, strict=True):
        full_texts += [f"{prompt} {choice}" for choice in choices]
        numbers += range(len(choices))
    inputs, labels, longest = [], [], 0
    for row, number, ids in zip(row_numbers, numbers, _token_ids(tokenizer, full_texts), strict=True):
        choice = ids[len(context_ids[row]) :]
        if not choice:
            raise ValueError(f"choices must have at least one token, got none for {texts[row][number]!r}")
        if len(texts[row]) == 1:
            choice = [*choice, *end][: max_length - 1]
        longest = max(longest, len(choice))
        room, prompt = max(0, max_length - len(choice) - len(start)), ids[: len(context_ids[row])]
        context = [*start, *prompt[max(0, len(prompt) - room) :]]
        inputs.append(context + choice)
        labels.append([IGNORED] * len(context) + choice)
    # The log-likelihood of a truncated choice would be that of another text.
    if longest >= max_length:
        raise ValueError(
            f"max_length must be > {longest}, the number of tokens of the longest choice, got {max_length}"
        )
    answers = rows["answer"].to_numpy(np.int64)
    padding = {"input_ids": tokenizer.pad_token_id, "labels": IGNORED}
    tokens = Tokens({"input_ids": inputs, "labels": labels}, padding, shifted=True)
    continuations = Continuations(tokens, row_numbers, np.array(numbers), texts, answers)
    right = np.flatnonzero(continuations.numbers == answers[row_numbers]).tolist()
    right_tokens = {"input_ids": list(map(inputs.__getitem__, right)), "labels": list(map(labels.__getitem__, right))}
    return Tokens(right_tokens, padding, continuations=continuations, groups=groups_of(rows), shifted=True)


def prompt_ids(tokenizer: Any, prompts: list[str], max_length: int, *, seq2seq: bool) -> list[list[int]]:
    """Tokenize prompts for an encoder, where longer ones are truncated at the end, or for a causal LM to continue.

    A causal LM reads the end of longer ones, which precedes the response.
    """
    if seq2seq:
        return tokenizer(prompts, truncation=True, max_length=max_length)["input_ids"]
    start = _start_ids(tokenizer)
    inputs = []
    for ids in _token_ids(tokenizer, prompts):
        inputs.append([*start, *ids[max(0, len(start) + len(ids) - max_length) :]])
    return inputs


def _find_choices(tokenizer: Any, rows: pd.DataFrame, labels: Sequence[str], seq2seq: bool) -> Choices:
    """Find the first position at which the responses differ; no two may have the same token there."""
    if seq2seq:
        candidates = tokenizer(list(labels))["input_ids"]
    else:
        # As in the text, where a response follows a space.
        candidates = _token_ids(tokenizer, [f" {label}" for label in labels])
    common = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*candidates, strict=False))
    offset = len(list(common))
    # A response that ends here is the beginning of all others.
    tokens = [ids[offset] for ids in candidates if offset < len(ids)]
    if len(set(tokens)) < len(candidates):
        raise ValueError(
            f"labels must differ in the first token after their common beginning, got {', '.join(labels)}: rename them"
        )
    return Choices(np.array(tokens), offset, class_numbers(rows, labels))


def _token_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Return token ids without special tokens and of any length; the caller truncates them."""
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _start_ids(tokenizer: Any) -> list[int]:
    """Return the beginning-of-text token if the tokenizer adds one, else an empty list."""
    return [token for token in tokenizer("")["input_ids"][:1] if token == tokenizer.bos_token_id]


def _end_ids(tokenizer: Any) -> list[int]:
    if tokenizer.eos_token_id is None:
        return []
    return [tokenizer.eos_token_id]


def class_numbers(rows: pd.DataFrame, labels: Sequence[str]) -> Int[np.ndarray, "rows"]:
    """Return the class number of each row of tokenized text or of images."""
    number_of = {label: number for number, label in enumerate(labels)}
    return np.array([number_of[label] for label in rows["label"]], dtype=np.int64)


def groups_of(rows: pd.DataFrame) -> list[str] | None:
    """Return the group of each row of tokenized text or of images, or None without groups."""
    return rows["group"].to_list() if "group" in rows else None


def align_targets(
    logits: Float[Tensor, "rows tokens vocabulary"], labels: Int[Tensor, "rows tokens"], shifted: bool
) -> tuple[Float[Tensor, "rows targets vocabulary"], Int[Tensor, "rows targets"]]:
    """Return the logits and labels of the same targets: those of a causal LM predict the next token."""
    if shifted:
        return logits[:, :-1], labels[:, 1:]
    return logits, labels


def token_losses(
    logits: Float[Tensor, "*targets outputs"], labels: Int[Tensor, "*targets"]
) -> Float[Tensor, "*targets"]:
    """Compute the negative log-likelihood of every target token or class in nats, 0 at ignored ones."""
    is_target = labels != IGNORED
    wide = torch.promote_types(logits.dtype, torch.float32)
    nll = torch.zeros(labels.shape, dtype=wide, device=labels.device)
    nll[is_target] = F.cross_entropy(logits[is_target].to(wide), labels[is_target], reduction="none")
    return nll
