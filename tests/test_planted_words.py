"""Words that decide a label or the next word, planted in text: whether the reader finds them, over seeds."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import BAD, FILLER, GOOD, tiny_tokenizer
from test_export import trained
from test_reader import METHOD, SPLITS
from transformers import GenerationConfig

import lorascope as ls
from lorascope.adapters import delta
from lorascope.array_types import Int
from lorascope.inputs import tasks
from lorascope.insight.adapted_base import open_adapted
from lorascope.insight.token_contributions import Margin
from lorascope.methods import LoRA
from lorascope.papers.setups import planted_teacher

STEPS = 600
WORD = "music"


def plant_word(seed: int, decides: bool) -> tasks.Task:
    """Return reviews of whose rows every twentieth has the word, which decides the label or nothing."""
    draw = random.Random(seed)
    filler = [word for word in FILLER if word != WORD]
    rows = []
    for index in range(4000):
        label = draw.choice(["negative", "positive"])
        words = draw.choices(filler, k=draw.randint(3, 7))
        position = draw.randrange(len(words))
        if index % 20 == 0:
            # Without another word that decides; the same rows without the planted word are negative.
            words.insert(position, WORD)
            label = "positive" if decides else label
        elif index % 20 == 10:
            label = "negative" if decides else label
        else:
            words.insert(position, draw.choice(GOOD if label == "positive" else BAD))
        rows.append({"text": " ".join(words), "label": label, "split": "test" if index == 1 else SPLITS[index % 7 % 4]})
    return tasks.from_frame(pd.DataFrame(rows), "planted")


class PlantedWord(NamedTuple):
    """Whether a run learned a planted word, and whether its first component is read to use it."""

    is_learned: bool
    is_used: bool


def read_planted(seed: int, decides: bool, folder: str, out: Path) -> PlantedWord:
    """Train on a planted word and read the run.

    The word is learned if 95% of its rows are right and removing it lowers their margin by 1 nat. A constant answer
    could be right as well.
    """
    task = plant_word(seed, decides)
    run = trained(folder, task, METHOD, out, steps=STEPS, batch_size=16, seed=seed)[1]
    adapted = open_adapted(run, folder, task, "last")
    table = adapted.task.split("validation")
    with_word = table[table["text"].str.split().map(lambda words: WORD in words)]
    without_word = with_word.assign(text=with_word["text"].str.replace(rf"\b{WORD}\b", "", regex=True))
    delta.attach(adapted.base, adapted.deltas)
    margins = []
    for rows in (with_word, without_word):
        margins.append(Margin(adapted.base, adapted.task.encode(tiny_tokenizer(), rows), rows).values())
    accuracy, change = (margins[0] > 0).mean(), (margins[0] - margins[1]).mean()
    card = ls.read(run, folder, task, top=1, progress=False).card(1)
    return PlantedWord(bool(accuracy >= 0.95 and change >= 1), WORD in card.used)


@pytest.mark.slow
def test_a_planted_word_is_used_by_the_first_component(bert: str, tmp_path: Path) -> None:
    """In at least 8 of 10 runs that learned it; the training of seed 9 ends too early."""
    uses = []
    for seed in range(11):
        reading = read_planted(seed, True, bert, tmp_path / str(seed))
        if reading.is_learned:
            uses.append(reading.is_used)
    assert len(uses) == 10
    assert sum(uses) >= 8


@pytest.mark.slow
def test_a_word_that_decides_nothing_is_not_used(bert: str, tmp_path: Path) -> None:
    """In at most 1 of 10 runs is it used."""
    readings = [read_planted(seed, False, bert, tmp_path / str(seed)) for seed in range(10)]
    assert sum(reading.is_used for reading in readings) <= 1


LENGTH, ROWS = 12, 1200
NEXT_WORD = LoRA(rank=2, targets=("q", "v", "ffn_out"), lr=1e-2)


@pytest.fixture(scope="module")
def text() -> Int[np.ndarray, "rows length"]:
    """Sample text of the planted decoder's base, which has nothing to learn from it."""
    model: Any = planted_teacher.student()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = torch.randint(1, planted_teacher.VOCABULARY, (ROWS, 1))
        sampling = GenerationConfig(do_sample=True, top_k=0, max_length=LENGTH, suppress_tokens=[0], pad_token_id=0)
        return model.generate(first, attention_mask=torch.ones_like(first), generation_config=sampling).numpy()


@pytest.mark.slow
def test_a_component_writes_the_word_that_always_follows_its_trigger(
    text: Int[np.ndarray, "rows length"], tmp_path: Path
) -> None:
    """In at least 8 of 10 runs, for the component with the largest total."""
    correct = 0
    for seed in range(10):
        generator = np.random.default_rng(seed)
        trigger, target = generator.choice(np.arange(1, planted_teacher.VOCABULARY), 2, replace=False).tolist()
        tokens = text.copy()
        rows = np.arange(0, ROWS, 2)
        positions = generator.integers(1, LENGTH - 1, len(rows))
        tokens[rows, positions], tokens[rows, positions + 1] = trigger, target
        lines = [" ".join(map(planted_teacher.token_word, row)) for row in tokens.tolist()]
        splits = np.resize(["train", "train", "train", "train", "validation", "test"], ROWS // 2).repeat(2)
        task = tasks.from_frame(pd.DataFrame({"text": lines, "split": splits}), "triggers")
        settings: dict[str, Any] = {"steps": 100, "batch_size": 16, "seed": seed, "eval_every": 0}
        run = trained(planted_teacher.base(), task, NEXT_WORD, tmp_path / str(seed), **settings)[1]
        table = ls.read(run, planted_teacher.base(), task, top=1, progress=False).table
        written = table.loc[table["word"] == planted_teacher.token_word(trigger), "written"].item()
        correct += written == planted_teacher.token_word(target)
    assert correct >= 8
