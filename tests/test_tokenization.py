"""Tests of encoded rows against the tokenizer's own padding and against the original rows."""

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
def tokenizer():
    """Return a tokenizer of whole words that adds no special tokens."""
    return tiny_tokenizer()


@pytest.fixture
def framing():
    """Return a tokenizer that adds [BOS], as LLaMA's does."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[BOS] $A", pair="[BOS] $A [EOS] $B:1", special_tokens=[("[BOS]", 1), ("[EOS]", 2)]
    )
    return tokenizer


def texts(rows: int = 60, longest: int = 9) -> list[str]:
    return [" ".join(WORDS[(n * k + k) % 8] for k in range(1 + n % longest)) + f" {n}" for n in range(rows)]


def classes() -> pd.DataFrame:
    return pd.DataFrame({"text": texts(), "label": ["negative", "positive", "positive"] * 20, "group": ["a", "b"] * 30})


def prompts() -> pd.DataFrame:
    return pd.DataFrame({"prompt": texts(), "response": [f" {' '.join(['very'] * (n % 3))} fine" for n in range(60)]})


def target_ids(labels: torch.Tensor) -> list[int]:
    return labels[labels != IGNORED].tolist()


def test_batch_equals_the_padded_output_of_the_tokenizer(tokenizer):
    task = tasks.from_frame(classes())
    rows = task.split("train")
    encoded = task.encode(tokenizer, rows)
    assert len(encoded) == len(rows)
    for indices in ([0], [3, 1, 2], torch.tensor([5, 5, 7])):
        batch = encoded.batch(indices)
        chosen = rows.iloc[[int(index) for index in indices]]
        own = tokenizer(chosen["text"].to_list(), padding=True, return_tensors="pt")
        assert torch.equal(batch["input_ids"], own["input_ids"])
        assert torch.equal(batch["attention_mask"], own["attention_mask"])
        assert batch["labels"].tolist() == [task.labels.index(label) for label in chosen["label"]]
        assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_encoded_rows_have_their_groups(tokenizer):
    task = tasks.from_frame(classes())
    rows = task.split("test")
    assert task.encode(tokenizer, rows).groups == rows["group"].to_list()


def test_long_texts_are_truncated_at_the_end(tokenizer):
    task = tasks.from_frame(classes())
    rows = task.split("train")
    short, whole = task.encode(tokenizer, rows, max_length=3), task.encode(tokenizer, rows)
    assert short.lengths.max() == 3
    assert short.tokens["input_ids"] == [ids[:3] for ids in whole.tokens["input_ids"]]


def test_pairs_have_two_token_types(framing):
    framing.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    task = tasks.from_frame(classes().assign(pair="music"))
    batch = task.encode(framing, task.split("train")).batch([0, 1, 2])
    music = framing.convert_tokens_to_ids("music")
    assert (batch["input_ids"] == framing.eos_token_id).sum(1).tolist() == [1, 1, 1]
    assert torch.equal(batch["token_type_ids"].bool(), batch["token_type_ids"].bool() & (batch["input_ids"] == music))
    assert batch["token_type_ids"].sum(1).tolist() == [1, 1, 1]


def test_only_response_tokens_are_targets(tokenizer):
    task = tasks.from_frame(prompts()).fit(tiny("gpt2"))
    rows = task.split("train")
    encoded = task.encode(tokenizer, rows)
    for row in range(len(rows)):
        batch = encoded.batch([row])
        reply = tokenizer(rows["response"][row])["input_ids"]
        question = tokenizer(rows["prompt"][row])["input_ids"]
        assert target_ids(batch["labels"]) == [*reply, tokenizer.eos_token_id]
        assert batch["input_ids"][0].tolist() == [*question, *reply, tokenizer.eos_token_id]
        assert task.count_targets(batch) == len(reply) + 1


def test_closed_response_is_the_label_without_end_of_text(tokenizer):
    task = tasks.from_frame(classes()).fit(tiny("gpt2"))
    rows = task.split("train")
    encoded = task.encode(tokenizer, rows)
    labels = encoded.batch(range(len(rows)))["labels"]
    assert tokenizer.convert_ids_to_tokens(target_ids(labels)) == rows["label"].to_list()
    assert tokenizer.convert_ids_to_tokens(encoded.choices.tokens.tolist()) == ["negative", "positive"]


def test_long_prompt_is_truncated_after_its_beginning_of_text_token(framing):
    task = tasks.from_frame(prompts()).fit(tiny("gpt2"))
    rows = task.split("train")
    short, whole = task.encode(framing, rows, max_length=7), task.encode(framing, rows)
    assert short.lengths.max() == 7
    for truncated, ids, labels, all_labels in zip(
        short.tokens["input_ids"],
        whole.tokens["input_ids"],
        short.tokens["labels"],
        whole.tokens["labels"],
        strict=True,
    ):
        assert truncated[0] == framing.bos_token_id
        assert truncated[1:] == ids[1:][-(len(truncated) - 1) :]
        assert [x for x in labels if x != IGNORED] == [x for x in all_labels if x != IGNORED]


def test_response_longer_than_max_length_leaves_one_token_before_it(tokenizer):
    rows = pd.DataFrame({"prompt": texts(), "response": ["very " * 20] * 60})
    task = tasks.from_frame(rows).fit(tiny("gpt2"))
    batch = task.encode(tokenizer, task.split("train"), max_length=6).batch([0])
    assert batch["input_ids"].shape == (1, 6)
    assert task.count_targets(batch) == 5


def test_encoder_decoder_reads_the_prompt_and_writes_the_response(tokenizer):
    task = tasks.from_frame(prompts()).fit(tiny("t5"))
    rows = task.split("train")
    batch = task.encode(tokenizer, rows).batch(range(len(rows)))
    for row in range(len(rows)):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        assert ids.tolist() == tokenizer(rows["prompt"][row])["input_ids"]
        assert target_ids(batch["labels"][row]) == tokenizer(rows["response"][row].strip())["input_ids"]
    assert task.count_targets(batch) == len(target_ids(batch["labels"]))


def test_all_tokens_of_plain_text_except_the_first_are_targets(framing):
    task = tasks.from_frame(pd.DataFrame({"text": texts()}))
    rows = task.split("train")
    encoded = task.encode(framing, rows)
    batch = encoded.batch([0, 1])
    for row in (0, 1):
        ids = [*framing(rows["text"][row])["input_ids"], framing.eos_token_id]
        assert batch["input_ids"][row][: len(ids)].tolist() == ids
        assert target_ids(batch["labels"][row]) == ids
    assert task.count_targets(batch) == sum(encoded.lengths[:2]) - 2


def test_padding_with_end_of_text_is_not_a_target(tokenizer):
    tokenizer.pad_token = "[EOS]"
    task = tasks.from_frame(pd.DataFrame({"text": texts()}))
    encoded = task.encode(tokenizer, task.split("train"))
    batch = encoded.batch(range(8))
    assert task.count_targets(batch) == sum(encoded.lengths[:8]) - 8
    assert batch["attention_mask"].sum() == sum(encoded.lengths[:8])


def task_with_labels(*labels: str) -> tasks.Task:
    rows = pd.DataFrame({"text": texts(), "label": (list(labels) * 60)[:60]})
    return tasks.from_frame(rows).fit(tiny("gpt2"))


def test_choice_is_at_the_first_difference_of_the_responses(tokenizer):
    task = task_with_labels("very fine", "very boring", "very great")
    choices = task.encode(tokenizer, task.split("train")).choices
    assert choices.offset == 1
    assert tokenizer.convert_ids_to_tokens(choices.tokens.tolist()) == ["boring", "fine", "great"]


@pytest.mark.parametrize("labels", [("very fine", "very great", "film"), ("very", "very fine"), ("xyzzy", "plugh")])
def test_labels_that_one_token_does_not_distinguish_are_rejected(tokenizer, labels):
    task = task_with_labels(*labels)
    with pytest.raises(ValueError, match=f"labels .*got {', '.join(sorted(labels))}"):
        task.encode(tokenizer, task.split("train"))
