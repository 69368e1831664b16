"""Fixtures for training tests: folders of tiny models with tokenizers, and a tiny task."""

from __future__ import annotations

import gc
import os
import random
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from comparisons import are_tolerant, compares_values
from forks import Forks
from hypothesis import settings
from killing import SETTINGS
from planted import plant
from tiny import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import lorascope as ls
from lorascope.inputs import tasks
from lorascope.inputs.models import load

settings.register_profile("suite", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("suite")
# A test measures what it tests, also if an earlier run of the suite has.
os.environ["LORASCOPE_MEASURE_AGAIN"] = "1"

GOOD = ["fine", "great", "lovely", "superb"]
BAD = ["awful", "boring", "dreadful", "poor"]
FILLER = ["the", "film", "plot", "was", "a", "very", "rather", "it", "and", "music"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items) -> None:
    """Mark the tests that compare values in files with a tolerance: they depend on the processor's rounding."""
    for item in items:
        if are_tolerant(vars(item.module).values()) and compares_values(item.function):
            item.add_marker(pytest.mark.numbers)


def pytest_collection_finish() -> None:
    """Exempt all imported modules from garbage collection, which transformers' trainer runs after each training.

    Collect less often as well: together this saves about a fifth of the time of the suite.
    """
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


@pytest.fixture(autouse=True, scope="session")
def heeded_interrupts() -> None:
    """Handle Ctrl-C as in a terminal, because a shell lets its background jobs ignore it, and so does training then."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Draw the same random numbers in each test, regardless of earlier tests in the same process."""
    random.seed(0)
    torch.default_generator.manual_seed(0)  # torch.manual_seed also formats a stack trace if there is no GPU
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = [
        "[PAD]",
        "[BOS]",
        "[EOS]",
        "[UNK]",
        *GOOD,
        *BAD,
        *FILLER,
        "positive",
        "negative",
        "Review",
        ":",
        "Sentiment",
    ]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]", unk_token="[UNK]"
    )


def tiny_folder(path: Path, family: str, head: str | None = None) -> str:
    model = tiny(family, head) if head else tiny(family)
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> str:
    """Folder of a tiny BERT without a head, with a tokenizer."""
    return tiny_folder(tmp_path_factory.mktemp("models") / "bert", "bert", "base")


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory) -> str:
    """Folder of a tiny GPT-2 with its LM head, tied and with Conv1D."""
    return tiny_folder(tmp_path_factory.mktemp("models") / "gpt2", "gpt2")


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> str:
    """Folder of a tiny LLaMA with its LM head."""
    return tiny_folder(tmp_path_factory.mktemp("models") / "llama", "llama")


def draw_reviews(seed: int, filler: list[str]) -> pd.DataFrame:
    """Return 900 reviews of filler around one word that decides the label."""
    draw = random.Random(seed)
    rows = []
    for _ in range(900):
        label = draw.choice(["negative", "positive"])
        words = draw.choices(filler, k=draw.randint(3, 7))
        words.insert(draw.randrange(len(words)), draw.choice(GOOD if label == "positive" else BAD))
        rows.append({"text": " ".join(words), "label": label})
    return pd.DataFrame(rows)


@pytest.fixture(scope="session")
def reviews() -> tasks.Task:
    return tasks.from_frame(draw_reviews(0, FILLER), "reviews")


@pytest.fixture(scope="session")
def other_text() -> tasks.Task:
    """Text without labels that has other words than the reviews."""
    return tasks.from_frame(draw_reviews(1, [*FILLER[::2], "Review"])[["text"]], "other")


@pytest.fixture(scope="session")
def task() -> tasks.Task:
    """Short reviews in two domains, whose label depends on a single word."""
    draw = random.Random(0)
    rows = []
    for number in range(300):
        label = draw.choice(["negative", "positive"])
        words = draw.choices(FILLER, k=draw.randint(3, 7))
        words.insert(draw.randrange(len(words)), draw.choice(GOOD if label == "positive" else BAD))
        rows.append({"text": " ".join(words), "label": label, "group": "film" if number % 2 else "music"})
    return tasks.from_frame(pd.DataFrame(rows), "toy")


@pytest.fixture
def fresh_bert(bert, task):
    """A freshly loaded tiny BERT classifier."""
    return load(bert, task=task)


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Return ``plant`` for the folder of the test."""
    return partial(plant, tmp_path)


@pytest.fixture(scope="session")
def forks(bert, task, tmp_path_factory):
    """A warm process that trains the tiny BERT on the tiny task, each time in a fork."""
    table = tmp_path_factory.mktemp("table") / "reviews.csv"
    task.table[["text", "label", "group"]].to_csv(table, index=False)
    with Forks(bert, table) as forks:
        yield forks


@pytest.fixture(scope="session")
def train_once(bert, task, tmp_path_factory):
    """Return a function that trains the tiny BERT by a method once per name, and returns run and model."""
    known: dict[str, Any] = {}

    def once(name: str, method: ls.Method) -> tuple[ls.Run, Any]:
        if name not in known:
            model = load(bert, task=task)
            known[name] = ls.train(model, task, method, out=tmp_path_factory.mktemp("once") / "run", **SETTINGS), model
        return known[name]

    return once
