"""Tasks: labeled texts or images, prompts with responses, or plain text, in splits that a content hash fixes."""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pandas as pd
from torch import Tensor, nn

from lorascope.inputs import answer_spans, images, questions, sources, task_columns
from lorascope.inputs import labels as label_values
from lorascope.inputs import splits as split_rules
from lorascope.inputs.splits import SPLITS
from lorascope.inputs.tokenization import (
    IGNORED,
    EncodedRows,
    encode_choices,
    encode_classes,
    encode_pairs,
    encode_text,
    encode_values,
)

__all__ = ["Task", "from_frame", "load"]

# Kinds of tasks that heads can do, by a part of the class name of the model.
_HEADS = {
    "ForImageClassification": "image",
    "ForSequenceClassification": "classification",
    "ForCausalLM": "prompt",
    "LMHead": "prompt",
    "ForConditionalGeneration": "seq2seq",
    "ForQuestionAnswering": "span",
}


class HashedTable(NamedTuple):
    """Hash of a task, and the table that it is of."""

    hash: str
    table: pd.DataFrame


@dataclass(frozen=True, eq=False)
class Task:
    """Rows of a task in splits, and their encoding for a model.

    Parameters
    ----------
    name : str
        Name, path or hub id of the source.
    kind : {"classification", "regression", "image", "prompt", "seq2seq", "choice", "span", "lm"}
        Labeled texts; texts with numbers; labeled images; prompts with responses for a causal LM or an
        encoder-decoder; prompts with choices; questions with answers in a context; plain text.
    table : DataFrame
        Columns text and label (and optionally pair, a second text), or image and label, or prompt and response, or
        prompt, choices (lists of texts) and answer (the number of the right one), or question, context, answers (lists
        of texts) and answer_start (lists of characters), or text. Also group if there are
        groups, cluster if rows depend on each other (such as sentences of one article), split, and draw, a number in
        [0, 1) that selects the search split.
    labels : tuple of str
        Class names in the order of their numbers; empty without a closed set of answers.
    hash : str
        SHA-256 of the data and of the rule that splits it; clusters are not part of it.
    options : dict
        Arguments of :func:`load` other than the name that have another value than by default.
    selected_on_test : bool
        Whether validation and test are the same rows, so that the best state is selected on the reported split.
    test_sets : tuple of str
        Names of several test sets, of which the first is the split test, and another one the split ``"test:NAME"``.
    augment : {"none", "crop-flip"}
        How the images of a batch are cropped; see ``train``, which sets it. The hash does not depend on it.
    hashed : HashedTable, optional
        Table that ``hash`` is of. ``dataclasses.replace`` with another table, but no other hash, derives a hash from
        it. None: ``hash`` is of ``table``.
    """

    name: str
    kind: str
    table: pd.DataFrame
    labels: tuple[str, ...]
    hash: str
    options: Mapping[str, Any] = field(default_factory=dict)
    selected_on_test: bool = False
    test_sets: tuple[str, ...] = ()
    augment: str = "none"
    hashed: HashedTable | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        before = self.hashed
        if before is not None and before.hash == self.hash and before.table is not self.table:
            content = _content_hash(self.table)
            if content != _content_hash(before.table):
                object.__setattr__(self, "hash", hashlib.sha256(f"{self.hash} {content}".encode()).hexdigest())
        object.__setattr__(self, "hashed", HashedTable(self.hash, self.table))

    @property
    def classifies(self) -> bool:
        """Whether the task needs a head with one output per label."""
        return self.kind in ("classification", "image")

    @property
    def head_labels(self) -> tuple[str, ...] | None:
        """Names of the outputs of the head that the task needs; None for the head of a language model."""
        if self.kind == "regression":
            return ("value",)
        if self.kind == "span":
            return ("start", "end")
        return self.labels if self.classifies else None

    @property
    def predicts(self) -> tuple[str, ...]:
        """Kinds of predictions for a row that metrics compare with its label; see ``Metric.needs``."""
        if len(self.labels) == 2:
            return ("classes", "two classes")
        if self.labels:
            return ("classes",)
        return {"regression": ("values",), "choice": ("choices",), "span": ("texts",)}.get(self.kind, ())

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups of rows (domains); empty without groups."""
        return tuple(sorted(self.table["group"].unique())) if "group" in self.table else ()

    @property
    def splits(self) -> Mapping[str, pd.DataFrame]:
        """Rows of train, validation and test."""
        return {name: self.split(name) for name in SPLITS}

    @property
    def other_tests(self) -> dict[str, str]:
        """Splits of the test sets after the first, by their names."""
        return {name: split_rules.split_of_test_set(name) for name in self.test_sets[1:]}

    def split(self, name: str, search_share: float = 0.0) -> pd.DataFrame:
        """Return the rows of one split.

        Parameters
        ----------
        name : str
            train, validation, test, ``"test:NAME"`` for further test sets, or search, the part of train for outer
            problems and scoring.
        search_share : float
            Fraction of train that is split off as search. Another part of the hash selects it, so that equal texts are
            never in both.

        Raises
        ------
        ValueError
            The name is unknown, ``search_share`` is not in [0, 1), or the split has no rows.
        """
        allowed = (*SPLITS, *self.other_tests.values(), "search")
        if name not in allowed:
            raise ValueError(f"unknown split {name!r}; expected one of {', '.join(allowed)}")
        if not 0 <= search_share < 1:
            raise ValueError(f"search_share must be in [0, 1), got {search_share}")
        detail = ""
        if name in ("train", "search"):
            is_search = self.table["draw"] < search_share
            mask = (self.table["split"] == "train") & (is_search == (name == "search"))
            detail = f" with search_share={search_share}"
        else:
            mask = self.table["split"] == name
        if not mask.any():
            raise ValueError(
                f"cannot use the {name} split of {self.name}{detail}: it has none of the {len(self.table)} rows"
            )
        return self.table[mask].drop(columns=["split", "draw"]).reset_index(drop=True)

    def fit(self, model: nn.Module) -> Task:
        """Return the task in the form that the model's head needs.

        For a language model, a classification task becomes prompts with the labels as closed set of responses. A
        classifier with the same labels in another order keeps its order.

        Raises
        ------
        ValueError
            The model has no head, or its head cannot do this task.
        """
        head = _head_kind(model)
        cannot = f"cannot use {self.name} with {type(model).__name__}"
        if "image" in (head, self.kind) and head != self.kind:
            takes, has = ("images", "text") if head == "image" else ("text", "images")
            raise ValueError(f"{cannot}: the task has {has}, but the model takes {takes}")
        if "span" in (head, self.kind) and head != self.kind:
            raise ValueError(f"{cannot}: questions with a context, and only these, require a question answering head")
        if self.kind == "regression":
            if head != "classification":
                raise ValueError(f"{cannot}: regression requires a classifier head")
            return self
        if self.kind == "choice":
            if head != "prompt":
                raise ValueError(f"{cannot}: multiple choice requires a causal LM")
            return self
        if head == self.kind:
            if not self.classifies:
                return self
            model_labels = tuple(getattr(model.config, "id2label", {}).values())
            if set(model_labels) != set(self.labels):
                return self
            return replace(self, labels=model_labels)
        if head == "classification":
            raise ValueError(f"{cannot}: a classifier needs the column label")
        if self.kind == "classification":
            question = f"Is this text {', '.join(self.labels[:-1])} or {self.labels[-1]}?\n"
            table, texts = self.table, self.table["text"]
            if "pair" in table:
                texts = texts + "\n" + table["pair"]
            prompts = question + "Text: " + texts + "\nAnswer: This text is"
            prompt_table = table.assign(prompt=prompts, response=" " + table["label"])
            # The same rows in another form have the same hash.
            return replace(self, kind=head, table=prompt_table, hashed=None)
        if self.kind == "prompt":
            return replace(self, kind=head)
        if head == "seq2seq":
            raise ValueError(f"{cannot}: an encoder-decoder needs the columns prompt and response")
        return self

    def encode(self, processor: Any, rows: pd.DataFrame, max_length: int = 128) -> EncodedRows:
        """Encode rows for batches by index: texts are tokenized once, images are read for each batch.

        Parameters
        ----------
        processor
            Tokenizer with a padding token or image processor of transformers; see ``models.processor``.
        rows : DataFrame
            Rows of this task, as returned by :meth:`split`.
        max_length : int
            Maximum number of tokens per row; longer texts are truncated at the end. A prompt for a causal LM is
            truncated at the beginning, so that the same words precede the response as in the data.
        """
        if self.kind == "image":
            return images.encode_images(processor, rows, self.labels, self.augment)
        if self.kind == "classification":
            return encode_classes(processor, rows, self.labels, max_length)
        if self.kind == "regression":
            return encode_values(processor, rows, max_length)
        if self.kind == "span":
            can_be_empty = not self.table["answers"].map(len).all()
            return answer_spans.encode_spans(processor, rows, max_length, can_be_empty)
        if self.kind == "choice":
            return encode_choices(processor, rows, max_length)
        if self.kind == "lm":
            return encode_text(processor, rows, max_length)
        return encode_pairs(processor, rows, self.labels, max_length, seq2seq=self.kind == "seq2seq")

    def count_targets(self, batch: Mapping[str, Tensor]) -> int:
        """Return the number of rows (for classes) or tokens over which the loss of a batch is averaged."""
        if self.kind == "span":
            return len(batch["input_ids"])
        labels = batch["labels"]
        if self.kind == "regression":
            return len(labels)
        if self.kind in ("prompt", "choice", "lm"):
            labels = labels[:, 1:]  # a causal LM does not predict the first token
        return int((labels != IGNORED).sum())


def load(
    name: str | os.PathLike[str],
    *,
    splits: str | Mapping[str, str | Mapping[str, str]] | None = None,
    kind: str | None = None,
    columns: Mapping[str, str] | None = None,
    revision: str | None = None,
    prompt_end: str | None = None,
) -> Task:
    """Load a task by name.

    Parameters
    ----------
    name : str or path
        ``"sentiment"`` or one domain of it (``"sentiment/tweets"``, ``movies``, ``products``, ``news``); its sentences
        with the domain as label (``"sentiment/domains"``) or with four questions (``"sentiment/mixture"``); a CSV,
        JSONL or Parquet file; a folder with one subfolder of images per label, one that ``datasets`` reads, or one with
        train.txt, valid.txt and test.txt, whose lines have ``||`` between prompt and response; or a dataset on the
        Hugging Face Hub, ``"owner/name"`` or ``"owner/name:configuration"``. Columns: text and label (and optionally
        pair, a second text), or image (a path relative to the file, or bytes) and label, or prompt and response, or
        prompt, choices (a list of texts; in train also a single one, a response) and answer (the number of the right
        one, from 0), or question, context, answers and answer_start (the list of answers in the context, empty without
        one, and that of their first characters), or only text; also group or domain, cluster, and split, optionally.
    splits : {"given", "hash"} or mapping, optional
        ``"given"`` takes the splits of the source: those of a dataset, or the column split, which has train,
        validation (or dev, valid) or test in each row. Rows of train are shuffled into a split without rows.
        ``"hash"`` shuffles all rows. A mapping names the split of the source for train, validation and test, or a part
        of it, such as ``{"train": "train[10%:]", "validation": "train[:10%]", "test": "validation"}``; validation and
        test may be the same. Several test sets are a mapping, ``{"m": "validation_matched", "mm":
        "validation_mismatched"}``: the first is the split test, and the others only have a metric. By default
        ``"given"`` with a column split, otherwise ``"hash"``.
    kind : {"classification", "regression"}, optional
        Whether labels are names of classes or numbers. By default numbers if any has a fraction.
    columns : mapping, optional
        Column of the source for each column above, such as ``{"text": "premise", "pair": "hypothesis"}``. Columns of
        other names are not read then.
    revision : str, optional
        Commit, branch or tag of a dataset on the Hugging Face Hub.
    prompt_end : str, optional
        Text to append to each prompt, such as ``"<|endoftext|>"``, which separates it from the response.

    Raises
    ------
    FileNotFoundError
        The file or dataset does not exist, or the Hugging Face Hub is unavailable.
    ValueError
        The name, a split or a column is unknown, the file unreadable, a column or label invalid, or a split would be
        empty.
    """
    name = str(name)
    arguments = {"splits": splits, "kind": kind, "columns": columns, "revision": revision, "prompt_end": prompt_end}
    options = {option: value for option, value in arguments.items() if value is not None}
    if name == sources.MIXTURE:
        if options:
            raise ValueError(f"{next(iter(options))} must be None for {name}, whose rows lorascope makes")
        table = questions.ask()
        labels = tuple(sorted(table["label"].unique()))
        return Task(name, "classification", table, labels, _hash(questions.RULE, table.drop(columns="cluster")))
    split_rules.require_rule(splits)
    rows = sources.read(name, columns, revision, with_splits=splits not in (None, "hash"))
    if prompt_end is not None:
        rows = task_columns.end_prompts(rows, prompt_end, name)
    return replace(from_frame(rows, name, splits=splits, kind=kind), options=options)


def from_frame(
    rows: pd.DataFrame,
    name: str = "table",
    *,
    splits: str | Mapping[str, str | Mapping[str, str]] | None = None,
    kind: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> Task:
    """Make a task from a table with the columns of :func:`load`; the order of its rows does not matter.

    Parameters
    ----------
    rows : DataFrame
        Rows of the task. An image may also be a uint8 array or a PIL image.
    name : str
        Name of the task.
    splits, kind, columns
        See :func:`load`.

    Raises
    ------
    ValueError
        A column, label or split is invalid, or a split would be empty.
    """
    split_rules.require_rule(splits)
    if rows.empty:
        raise ValueError(f"cannot make a task from {name}: it has no rows")
    if columns is not None:
        rows = sources.rename_columns(rows, columns, name)
    rows = rows.rename(columns={"domain": "group"})
    if duplicates := rows.columns[rows.columns.duplicated()].tolist():
        raise ValueError(f"duplicate column {duplicates[0]!r} in {name} (domain is an alias of group)")
    kind, texts = task_columns.read_kind(rows, name, kind)
    if kind == "lm":
        rows = rows[rows["text"].astype(str).str.strip() != ""]
    if kind == "image":
        table, digests = rows[texts].reset_index(drop=True), _image_digests(rows, name)
    else:
        table = pd.DataFrame({column: rows[column].to_list() for column in texts})
        for column in texts:
            for number, text in enumerate(rows[column].to_list(), start=1):
                if not isinstance(text, str) or not text.strip():
                    cell = f"{column} in row {number} of {name}"
                    raise ValueError(f"{cell} must be a non-empty string, got {reprlib.repr(text)}")
        digests = table[texts[0]].map(split_rules.digest_text).to_list()
    if kind in ("classification", "image"):
        table["label"] = label_values.read_names(rows, name)
    if kind == "regression":
        table["label"] = label_values.read_numbers(rows, name)
    if kind == "choice":
        table["choices"] = label_values.read_choices(rows, name)
        table["answer"] = label_values.read_answers(rows, table["choices"].to_list(), name)
    if kind == "span":
        table["answers"], table["answer_start"] = answer_spans.read_spans(rows, name)
    for column in ("group", "cluster"):
        if column in rows and rows[column].isna().any():
            number = 1 + int(rows[column].isna().to_numpy().argmax())
            raise ValueError(f"{column} in row {number} of {name} must be a name, got a missing value")
    if "group" in rows:
        table["group"] = rows["group"].astype(str).to_list()
    rule, selected_on_test = split_rules.RULE, False
    test_sets: tuple[str, ...] = ()
    if splits is not None and splits != "hash" and "split" not in rows:
        raise ValueError(f"cannot use splits={splits!r} of {name}: it has no column split")
    if isinstance(splits, Mapping):
        words = rows["split"].astype(str).str.strip().reset_index(drop=True)
        # Rows are shared, shuffled or left out, so everything below refers to the selected ones.
        selection = split_rules.select(splits, words, pd.Series(digests), name)
        test_sets = selection.test_sets
        if test_sets and "group" in rows:
            raise ValueError(f"splits: test must be one split, because {name} has groups")
        table, rows = table.iloc[selection.positions], rows.iloc[selection.positions]
        table = table.assign(split=selection.splits).reset_index(drop=True)
        digests = [digests[position] for position in selection.positions]
        rule, selected_on_test = split_rules.COLUMN_RULE, selection.selected_on_test
    elif "split" in rows and splits != "hash":
        table["split"], rule = split_rules.read_column(rows["split"], name), split_rules.COLUMN_RULE
    labels: tuple[str, ...] = ()
    task_columns.require_known_labels(table, name)
    if kind in ("classification", "image"):
        labels = tuple(sorted(table["label"].unique(), key=label_values.sort_key))
        if len(labels) < 2:
            raise ValueError(f"column label of {name} must have at least 2 classes, got {len(labels)}")
    column_names = list(map(str, table))
    # Sorted by content, because the order of the rows must not change the hash.
    hashed = table.assign(digest=digests)
    if kind == "image":
        hashed["image"] = digests  # neither paths nor file formats are part of the hash
    for column in {"choices", "answers", "answer_start"} & set(table):
        hashed[column] = table[column].map(json.dumps)  # lists cannot be sorted
    order = ["digest", *column_names]
    # Clusters order rows that are equal otherwise, but are not part of the hash.
    if "cluster" in rows:
        table["cluster"] = hashed["cluster"] = rows["cluster"].astype(str).to_list()
        order.append("cluster")
    hashed = hashed.sort_values(order)
    table = table.loc[hashed.index].reset_index(drop=True)
    assigned = split_rules.assign(hashed["digest"])
    if "split" in table:
        assigned["split"] = split_rules.complete(table.pop("split"), assigned["split"])
    table = table.join(assigned)
    task_columns.require_closed_choices(table, name)
    for split in SPLITS:
        if split not in set(table["split"]):
            raise ValueError(f"cannot split {name}: its {split} split has none of the {len(table)} rows")
    hash = _hash(rule, hashed[column_names])
    return Task(name, kind, table, labels, hash, selected_on_test=selected_on_test, test_sets=test_sets)


def _content_hash(table: pd.DataFrame) -> str:
    """Return the SHA-256 of the rows of a task and of their splits, without clusters."""
    rows = table.drop(columns=["cluster", "draw"], errors="ignore")
    if "image" in rows:
        rows = rows.assign(image=rows["image"].map(images.digest_image))
    return _hash("", rows)


def _hash(rule: str, rows: pd.DataFrame) -> str:
    data = json.dumps([rule, list(rows.columns), rows.to_numpy().tolist()], ensure_ascii=False)
    return hashlib.sha256(data.encode()).hexdigest()


def _image_digests(rows: pd.DataFrame, name: str) -> list[str]:
    """Return the digest of every image."""
    digests = []
    for number, image in enumerate(rows["image"].to_list(), start=1):
        try:
            digests.append(images.digest_image(image))
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"row {number} of {name}: {error}") from None
    return digests


def _head_kind(model: nn.Module) -> str:
    """Return the kind of task that a model's head can do: classification, image, prompt (causal LM) or seq2seq."""
    name = type(model).__name__
    kind = next((kind for head, kind in _HEADS.items() if head in name), None)
    if kind != "image" and getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise ValueError(f"cannot use {name}: it takes {model.main_input_name} but does not classify images")
    if kind is None:
        classes = "AutoModelForSequenceClassification, AutoModelForCausalLM, AutoModelForSeq2SeqLM"
        hint = f"load it with {classes} or AutoModelForImageClassification"
        raise ValueError(f"cannot use {name}: it has no head; {hint}")
    return kind


def __dir__() -> list[str]:
    return __all__
