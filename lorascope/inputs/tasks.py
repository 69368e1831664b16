"""Tasks: texts or images with labels, prompts with responses, or plain text, in splits fixed by a hash of these."""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor, nn

from lorascope.inputs import images, sources
from lorascope.inputs.tokenization import EncodedRows, encode_classes, encode_pairs, encode_text

SPLITS = {"train": 0.7, "validation": 0.8, "test": 1.0}
"""Upper ends of the splits on the scale of the hash."""

_RULE = "sha256 of the casefolded text; train below 0.7, validation below 0.8, test the rest"


@dataclass(frozen=True, eq=False)
class Task:
    """Rows in splits, and the form in which a model gets them.

    Parameters
    ----------
    name : str
        What it was loaded by.
    kind : {"classification", "image", "prompt", "seq2seq", "lm"}
        Texts with labels; images with labels; prompts with responses for a causal LM or an encoder-decoder; plain text.
    table : DataFrame
        Columns text and label (and pair, a second text), or image and label, or prompt and response, or text; group
        where there are groups; split; and draw, the number in [0, 1) that decides who goes to the search split.
    labels : tuple of str
        Names of the classes in the order of their numbers; empty where there is no closed set of answers.
    hash : str
        SHA-256 of the data and of the rule that splits it.
    """

    name: str
    kind: str
    table: pd.DataFrame
    labels: tuple[str, ...]
    hash: str

    @property
    def classifies(self) -> bool:
        """Does a model do this task by a head with an output for each label?"""
        return self.kind in ("classification", "image")

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups of rows (domains), empty where there are none."""
        return tuple(sorted(self.table["group"].unique())) if "group" in self.table else ()

    @property
    def splits(self) -> Mapping[str, pd.DataFrame]:
        """Rows of train, validation and test."""
        return {name: self.split(name) for name in SPLITS}

    def split(self, name: str, search_share: float = 0.0) -> pd.DataFrame:
        """Rows of one split.

        Parameters
        ----------
        name : str
            train, validation, test, or search: the part of train that outer problems and scoring use.
        search_share : float
            Share of train that is search. It is drawn by another part of the hash, so a text is in one of the two.

        Raises
        ------
        ValueError
            Another name, a share outside [0, 1), or a split without rows.
        """
        if name not in (*SPLITS, "search"):
            raise ValueError(f"unknown split {name!r}: give one of {', '.join(SPLITS)}, search")
        if not 0 <= search_share < 1:
            raise ValueError(f"search_share={search_share} must lie in [0, 1)")
        chosen = self.table["split"] == ("train" if name == "search" else name)
        if name in ("train", "search"):
            chosen &= (self.table["draw"] < search_share) == (name == "search")
        if not chosen.any():
            detail = f" with search_share={search_share}" if name in ("train", "search") else ""
            raise ValueError(f"the {name} split of {self.name}{detail} is empty: it has {len(self.table)} rows in all")
        return self.table[chosen].drop(columns=["split", "draw"]).reset_index(drop=True)

    def fit(self, model: nn.Module) -> Task:
        """The same task in the form that the model's head needs.

        A classification task becomes prompts for a language model, its labels the closed set of responses. A
        classifier that knows the labels in another order keeps its order.

        Raises
        ------
        ValueError
            A model without a head, or a head that cannot do this task.
        """
        head = _head_kind(model)
        if "image" in (head, self.kind) and head != self.kind:
            takes, has = ("images", "text") if head == "image" else ("text", "images")
            raise ValueError(f"{type(model).__name__} takes {takes}, but {self.name} has {has}: give one of a kind")
        if head == self.kind:
            known = tuple(getattr(model.config, "id2label", {}).values()) if self.classifies else ()
            return replace(self, labels=known) if set(known) == set(self.labels) and known else self
        if head == "classification":
            raise ValueError(f"{type(model).__name__} is a classifier, but {self.name} has no column label")
        if self.kind == "classification":
            return replace(self, kind=head, table=_prompt_texts(self.table, self.labels))
        if self.kind == "prompt":
            return replace(self, kind=head)
        if head == "seq2seq":
            raise ValueError(f"{type(model).__name__} needs prompts with responses, but {self.name} is text alone")
        return self

    def encode(self, processor: Any, rows: pd.DataFrame, max_length: int = 128) -> EncodedRows:
        """Make rows ready for batches by index: texts are tokenised once, images are read batch by batch.

        Parameters
        ----------
        processor
            A tokenizer of transformers with a padding token, or an image processor: see ``models.processor``.
        rows : DataFrame
            Rows of this task, as :meth:`split` gives them.
        max_length : int
            Tokens a row; longer texts lose their end. Of a prompt before a causal LM the beginning goes instead, so
            that the response follows what it follows in the data.
        """
        if self.kind == "image":
            return images.encode_images(processor, rows, self.labels)
        if self.kind == "classification":
            return encode_classes(processor, rows, self.labels, max_length)
        if self.kind == "lm":
            return encode_text(processor, rows, max_length)
        return encode_pairs(processor, rows, self.labels, max_length, seq2seq=self.kind == "seq2seq")

    def counted(self, batch: Mapping[str, Tensor]) -> int:
        """How many rows (where there are classes) or tokens the loss of a batch is the mean of."""
        labels = batch["labels"]
        if self.kind in ("prompt", "lm"):
            labels = labels[:, 1:]  # nothing predicts the first token
        return int((labels != -100).sum())


def load(name: str | os.PathLike[str]) -> Task:
    """Load a task by name.

    Parameters
    ----------
    name : str or path
        ``"sentiment"`` or one domain of it (``"sentiment/tweets"``, ``movies``, ``products``, ``news``); a CSV, JSONL
        or Parquet file; a folder with one folder of images for each label; else a data set of the hub,
        ``"owner/name"`` or ``"owner/name:configuration"``. Columns: text and label (and pair, a second text), or image
        (a path, from the file on; or the bytes of one) and label, or prompt and response, or text alone; group or
        domain as well.

    Raises
    ------
    FileNotFoundError
        No such file or data set, or no network to fetch it.
    ValueError
        An unknown name, an unreadable file, unfit columns or labels, or too few rows for three splits.
    """
    return from_frame(sources.read(str(name)), str(name))


def from_frame(rows: pd.DataFrame, name: str = "table") -> Task:
    """Make a task of a table with the columns that :func:`load` describes; the order of its rows does not matter.

    An image may also be an array of uint8 or one of PIL.
    """
    if rows.empty:
        raise ValueError(f"{name} has no rows")
    rows = rows.rename(columns={"domain": "group"})
    if twice := rows.columns[rows.columns.duplicated()].tolist():
        raise ValueError(f"{name} has two columns {twice[0]!r} (domain is another name of group): leave one out")
    kind, texts = _kind(rows, name)
    if kind == "lm":
        rows = rows[rows["text"].astype(str).str.strip() != ""]
    table = rows[texts].reset_index(drop=True) if kind == "image" else _text_columns(rows, texts, name)
    digests = _pictures(rows, name) if kind == "image" else [_text_digest(text) for text in table[texts[0]]]
    labels: tuple[str, ...] = ()
    if kind in ("classification", "image"):
        table["label"] = _label_names(rows, name)
        labels = tuple(
            sorted(table["label"].unique(), key=lambda label: (int(label) if _is_whole_number(label) else 0, label))
        )
        if len(labels) < 2:
            raise ValueError(f"{name} has {len(labels)} class(es): its column label needs at least two")
    if "group" in rows:
        table["group"] = rows["group"].astype(str).to_list()
    columns = [str(column) for column in table]
    shown = table.assign(image=digests)[columns] if kind == "image" else table  # an image goes by its digest
    shown = shown.assign(digest=digests).sort_values(["digest", *columns])
    table = table.loc[shown.index].reset_index(drop=True)
    place = np.array([_digest_to_fraction(digest[:16]) for digest in shown["digest"]])
    table["split"] = np.array(list(SPLITS))[np.searchsorted([*SPLITS.values()], place, side="right")]
    table["draw"] = np.array([_digest_to_fraction(digest[16:32]) for digest in shown["digest"]])
    for split in SPLITS:
        if split not in set(table["split"]):
            raise ValueError(f"{name} has {len(table)} rows, too few: its {split} split is empty")
    data = json.dumps([_RULE, columns, shown[columns].to_numpy().tolist()], ensure_ascii=False)
    return Task(name, kind, table, labels, hashlib.sha256(data.encode()).hexdigest())


def _kind(rows: pd.DataFrame, name: str) -> tuple[str, list[str]]:
    """Kind of task by the columns, and which of them hold what a model reads."""
    columns = set(rows.columns)
    if {"prompt", "response"} <= columns:
        return "prompt", ["prompt", "response"]
    if {"text", "label"} <= columns:
        return "classification", ["text", "pair"] if "pair" in columns else ["text"]
    if {"image", "label"} <= columns:
        return "image", ["image"]
    if columns - {"group"} == {"text"}:
        return "lm", ["text"]
    raise ValueError(
        f"{name} has the columns {', '.join(map(str, rows.columns))}: it needs text and label, or image and label, or "
        "prompt and response, or text alone"
    )


def _text_columns(rows: pd.DataFrame, texts: list[str], name: str) -> pd.DataFrame:
    return pd.DataFrame({column: _texts(rows, column, name) for column in texts})


def _texts(rows: pd.DataFrame, column: str, name: str) -> list[str]:
    texts = rows[column].to_list()
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"row {number} of {name} has {reprlib.repr(text)} as its {column}: a text is needed")
    return texts


def _pictures(rows: pd.DataFrame, name: str) -> list[str]:
    """The digest of every image."""
    digests = []
    for number, image in enumerate(rows["image"].to_list(), start=1):
        try:
            digests.append(images.digest(image))
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"row {number} of {name}: {error}") from None
    return digests


def _label_names(rows: pd.DataFrame, name: str) -> list[str]:
    """Labels as names: strings, whole numbers and truth values are; a fraction is a rating and no class."""
    names = []
    for number, label in enumerate(rows["label"].to_list(), start=1):
        if isinstance(label, float) and label.is_integer():
            label = int(label)
        text = str(label).strip() if isinstance(label, str | int) else ""
        if not text or (_is_numeric(text) and not _is_whole_number(text)):
            raise ValueError(
                f"row {number} of {name} has the label {reprlib.repr(label)}: a class name or whole number is needed"
            )
        names.append(text)
    return names


def _is_numeric(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_whole_number(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _text_digest(text: str) -> str:
    """Texts that differ in case or white space alone count as one, so that no split sees a twin of another's."""
    return hashlib.sha256(" ".join(text.split()).casefold().encode()).hexdigest()


def _digest_to_fraction(digits: str) -> float:
    """16 hexadecimal digits as a number in [0, 1)."""
    return (int(digits, 16) >> 11) / 2**53


def _prompt_texts(table: pd.DataFrame, labels: tuple[str, ...]) -> pd.DataFrame:
    """Each text as a question after its label."""
    question = f"Is this text {', '.join(labels[:-1])} or {labels[-1]}?\n"
    texts = table["text"] + "\n" + table["pair"] if "pair" in table else table["text"]
    return table.assign(prompt=question + "Text: " + texts + "\nAnswer: This text is", response=" " + table["label"])


def _head_kind(model: nn.Module) -> str:
    """What a model of transformers can do: classification, image, prompt (as a causal LM does) or seq2seq."""
    name = type(model).__name__
    if "ForImageClassification" in name:
        return "image"
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise ValueError(f"{name} takes {model.main_input_name} and does not classify images: no task here is for it")
    if "ForSequenceClassification" in name:
        return "classification"
    if "ForCausalLM" in name or "LMHead" in name:
        return "prompt"
    if "ForConditionalGeneration" in name:
        return "seq2seq"
    raise ValueError(
        f"{name} has no head for a task: load it with AutoModelForSequenceClassification, AutoModelForCausalLM, "
        "AutoModelForSeq2SeqLM or AutoModelForImageClassification"
    )
