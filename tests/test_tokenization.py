"""Encoded rows: against the tokenizer's own padding, and against what was put in."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from conftest import tiny_tokenizer
from tiny import tiny
from tokenizers.processors import TemplateProcessing

from lorascope.inputs import tasks
from lorascope.inputs.tokenization import IGNORED

WORDS = ["fine", "great", "film", "plot", "was", "boring", "very", "music"]


@pytest.fixture
def words():
    """A tokenizer of whole words that puts nothing before or after them."""
    return tiny_tokenizer()


@pytest.fixture
def framing():
    """A tokenizer that begins with [BOS], as LLaMA's does."""
    words = tiny_tokenizer()
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="[BOS] $A", pair="[BOS] $A [EOS] $B:1", special_tokens=[("[BOS]", 1), ("[EOS]", 2)]
    )
    return words


def texts(rows: int = 60, longest: int = 9) -> list[str]:
    return [" ".join(WORDS[(n * k + k) % 8] for k in range(1 + n % longest)) + f" {n}" for n in range(rows)]


def classes() -> pd.DataFrame:
    return pd.DataFrame({"text": texts(), "label": ["negative", "positive", "positive"] * 20, "group": ["a", "b"] * 30})


def prompts() -> pd.DataFrame:
    return pd.DataFrame({"prompt": texts(), "response": [f" {' '.join(['very'] * (n % 3))} fine" for n in range(60)]})


def counted(labels: torch.Tensor) -> list[int]:
    return labels[labels != IGNORED].tolist()


def test_batch_is_what_the_tokenizer_pads(words):
    task = tasks.from_frame(classes())
    rows = task.split("train")
    encoded = task.encode(words, rows)
    assert len(encoded) == len(rows)
    for indices in ([0], [3, 1, 2], torch.tensor([5, 5, 7])):
        batch = encoded.batch(indices)
        chosen = rows.iloc[[int(index) for index in indices]]
        own = words(chosen["text"].to_list(), padding=True, return_tensors="pt")
        assert torch.equal(batch["input_ids"], own["input_ids"])
        assert torch.equal(batch["attention_mask"], own["attention_mask"])
        assert batch["labels"].tolist() == [task.labels.index(label) for label in chosen["label"]]
        assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_groups_go_with_the_rows(words):
    task = tasks.from_frame(classes())
    rows = task.split("test")
    assert task.encode(words, rows).groups == rows["group"].to_list()


def test_long_texts_lose_their_end(words):
    task = tasks.from_frame(classes())
    rows = task.split("train")
    short, whole = task.encode(words, rows, max_length=3), task.encode(words, rows)
    assert short.lengths.max() == 3
    assert short.tokens["input_ids"] == [ids[:3] for ids in whole.tokens["input_ids"]]


def test_pairs_have_two_parts(framing):
    framing.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    task = tasks.from_frame(classes().assign(pair="music"))
    batch = task.encode(framing, task.split("train")).batch([0, 1, 2])
    music = framing.convert_tokens_to_ids("music")
    assert (batch["input_ids"] == framing.eos_token_id).sum(1).tolist() == [1, 1, 1]
    assert torch.equal(batch["token_type_ids"].bool(), batch["token_type_ids"].bool() & (batch["input_ids"] == music))
    assert batch["token_type_ids"].sum(1).tolist() == [1, 1, 1]


def test_only_the_response_counts(words):
    task = tasks.from_frame(prompts()).fit(tiny("gpt2"))
    rows = task.split("train")
    encoded = task.encode(words, rows)
    for row in range(len(rows)):
        batch = encoded.batch([row])
        reply = words(rows["response"][row])["input_ids"]
        question = words(rows["prompt"][row])["input_ids"]
        assert counted(batch["labels"]) == [*reply, words.eos_token_id]
        assert batch["input_ids"][0].tolist() == [*question, *reply, words.eos_token_id]
        assert task.counted(batch) == len(reply) + 1


def test_closed_response_is_the_label_without_an_end(words):
    task = tasks.from_frame(classes()).fit(tiny("gpt2"))
    rows = task.split("train")
    encoded = task.encode(words, rows)
    labels = encoded.batch(range(len(rows)))["labels"]
    assert words.convert_ids_to_tokens(counted(labels)) == rows["label"].to_list()
    assert words.convert_ids_to_tokens(encoded.choices.tokens.tolist()) == ["negative", "positive"]


def test_long_prompt_keeps_its_beginning_token_its_end_and_the_response(framing):
    task = tasks.from_frame(prompts()).fit(tiny("gpt2"))
    rows = task.split("train")
    short, whole = task.encode(framing, rows, max_length=7), task.encode(framing, rows)
    assert short.lengths.max() == 7
    for cut, ids, labels, all_labels in zip(
        short.tokens["input_ids"],
        whole.tokens["input_ids"],
        short.tokens["labels"],
        whole.tokens["labels"],
        strict=True,
    ):
        assert cut[0] == framing.bos_token_id
        assert cut[1:] == ids[1:][-(len(cut) - 1) :]
        assert [x for x in labels if x != IGNORED] == [x for x in all_labels if x != IGNORED]


def test_response_longer_than_everything_leaves_room_for_what_predicts_it(words):
    rows = pd.DataFrame({"prompt": texts(), "response": ["very " * 20] * 60})
    task = tasks.from_frame(rows).fit(tiny("gpt2"))
    batch = task.encode(words, task.split("train"), max_length=6).batch([0])
    assert batch["input_ids"].shape == (1, 6)
    assert task.counted(batch) == 5


def test_encoder_decoder_reads_the_prompt_and_writes_the_response(words):
    task = tasks.from_frame(prompts()).fit(tiny("t5"))
    rows = task.split("train")
    batch = task.encode(words, rows).batch(range(len(rows)))
    for row in range(len(rows)):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        assert ids.tolist() == words(rows["prompt"][row])["input_ids"]
        assert counted(batch["labels"][row]) == words(rows["response"][row].strip())["input_ids"]
    assert task.counted(batch) == len(counted(batch["labels"]))


def test_plain_text_counts_all_but_its_first_token(framing):
    task = tasks.from_frame(pd.DataFrame({"text": texts()}))
    rows = task.split("train")
    encoded = task.encode(framing, rows)
    batch = encoded.batch([0, 1])
    for row in (0, 1):
        ids = [*framing(rows["text"][row])["input_ids"], framing.eos_token_id]
        assert batch["input_ids"][row][: len(ids)].tolist() == ids
        assert counted(batch["labels"][row]) == ids
    assert task.counted(batch) == sum(encoded.lengths[:2]) - 2


def test_padding_is_never_counted_though_it_is_the_end_of_text(words):
    words.pad_token = "[EOS]"
    task = tasks.from_frame(pd.DataFrame({"text": texts()}))
    encoded = task.encode(words, task.split("train"))
    batch = encoded.batch(range(8))
    assert task.counted(batch) == sum(encoded.lengths[:8]) - 8
    assert batch["attention_mask"].sum() == sum(encoded.lengths[:8])


def labelled(*labels: str) -> tasks.Task:
    rows = pd.DataFrame({"text": texts(), "label": (list(labels) * 60)[:60]})
    return tasks.from_frame(rows).fit(tiny("gpt2"))


def test_choice_is_made_where_the_responses_part(words):
    task = labelled("very fine", "very boring", "very great")
    choices = task.encode(words, task.split("train")).choices
    assert choices.offset == 1
    assert words.convert_ids_to_tokens(choices.tokens.tolist()) == ["boring", "fine", "great"]


@pytest.mark.parametrize("labels", [("very fine", "very great", "film"), ("very", "very fine"), ("xyzzy", "plugh")])
def test_labels_that_no_single_token_tells_apart_are_refused(words, labels):
    task = labelled(*labels)
    with pytest.raises(ValueError, match="begin alike for this tokenizer: rename them"):
        task.encode(words, task.split("train"))
