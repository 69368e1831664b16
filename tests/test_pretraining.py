"""Tests of pre-training from scratch: its text, its tokenizer and its model."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

import lorascope as ls
from lorascope.inputs import models, sources, tasks
from lorascope.methods import Adapprox, Full
from lorascope.papers.setups import pretraining
from lorascope.training.base_weights import prepare_model
from lorascope.training.evaluation import evaluate


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Replace the bundled sentences by a few hundred short ones, and the cache by an empty folder."""
    draw = np.random.default_rng(0)
    words = ["film", "phone", "lovely", "boring", "it", "was", "the", "plot", "naïve"]
    texts = [" ".join(draw.choice(words, draw.integers(2, 90))) + f" {number}" for number in range(300)]
    rows = pd.DataFrame({"text": texts, "id": [str(number) for number in range(300)], "group": "tweets"})
    monkeypatch.setenv("LORASCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "sentiment", lambda: rows)
    pretraining.plain_text.cache_clear()
    yield rows
    pretraining.plain_text.cache_clear()


def test_task_is_the_plain_text_of_all_sentences(made):
    task = pretraining.plain_text()
    assert task.kind == "lm"
    assert sorted(task.table["text"]) == sorted(made["text"])
    labeled = tasks.from_frame(made.assign(label=list("ab") * 150)[["text", "label"]])
    for name, rows in labeled.splits.items():
        assert task.split(name)["text"].to_list() == rows["text"].to_list()
    assert task.table["cluster"].is_unique


def test_tokenizer_knows_only_the_train_split_and_returns_every_text(made, monkeypatch):
    seen = []
    trained = pretraining.train_tokenizer
    monkeypatch.setattr(pretraining, "train_tokenizer", lambda texts: seen.extend(texts) or trained(texts))
    monkeypatch.setattr(pretraining.package_assets, "build_once", lambda folder, build: build(folder) or folder)
    pretraining.untrained_folder()
    assert seen == pretraining.plain_text().split("train")["text"].to_list()
    reader = trained(seen)
    for text in made["text"]:
        assert reader.decode(reader(text)["input_ids"]) == text


def test_tokenizer_is_the_same_at_each_training(made):
    first, second = (pretraining.train_tokenizer(made["text"].to_list()).get_vocab() for _ in range(2))
    assert first == second
    assert (first["<pad>"], first["<end>"]) == (0, 1)


def test_model_has_the_architecture_of_gpt2_and_its_tokenizer(made):
    model = pretraining.untrained_model()
    per_layer = 12 * 128**2 + 13 * 128  # attention 4 d^2 + 4 d, feed-forward 8 d^2 + 5 d, two norms 4 d
    assert sum(parameter.numel() for parameter in model.parameters()) == 2048 * 128 + 64 * 128 + 4 * per_layer + 2 * 128
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert model.config.n_head == 4
    reader = models.tokenizer(model)
    rows = pretraining.plain_text().encode(reader, pretraining.plain_text().split("test"), pretraining.LENGTH)
    assert rows.lengths.max() == pretraining.LENGTH
    short = rows.tokens["input_ids"][int(rows.lengths.argmin())]
    assert short[-1] == reader.eos_token_id


def test_only_matrices_depend_on_the_seed_of_the_run(made):
    drawn = {}
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        model = pretraining.untrained_model()
        drawn[name] = prepare_model(model, pretraining.plain_text(), seed).w0_hash, dict(model.named_parameters())
    (hashed, first), (_, again), (other_hash, other) = drawn.values()
    assert hashed == other_hash
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        assert torch.equal(weight, other[name]) == (weight.ndim == 1), name
        if weight.ndim > 1:
            assert weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("method", [Full(lr=1e-3, head_lr=1e-3), Adapprox(lr=1e-3, head_lr=1e-3)])
def test_model_trains_and_its_predictions_average_to_the_loss(method, made, tmp_path):
    model = pretraining.untrained_model()
    settings = {"eval_every": 0, "progress": False, "device": "cpu", "max_length": pretraining.LENGTH}
    run = ls.train(model, pretraining.plain_text(), method, steps=8, batch_size=8, out=tmp_path / "run", **settings)
    assert run.score.loss < math.log(2048) - 0.1
    assert run.predictions["nll"].astype("float64").mean() == pytest.approx(run.score.loss, abs=1e-3)


def test_untrained_model_is_the_same_at_each_call_and_draws_no_random_number(made):
    state = torch.get_rng_state()
    first, second = (pretraining.untrained_model().state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_padding_does_not_count_in_the_loss(made):
    model, task = pretraining.untrained_model(), pretraining.plain_text()
    rows = task.encode(models.tokenizer(model), task.split("test"), pretraining.LENGTH)
    alone, together = (evaluate(model, rows, batch_size=size) for size in (1, len(rows)))
    np.testing.assert_allclose(alone.nll, together.nll, rtol=1e-4)
    assert alone.counts.tolist() == (rows.lengths - 1).tolist()
    assert together.loss == pytest.approx(math.log(2048), abs=0.1)
    batch = rows.batch(range(len(rows)))
    assert float(model(**batch).loss.detach()) == pytest.approx(together.loss, rel=1e-4)
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


@pytest.mark.real
def test_published_text_has_the_splits_of_sentiment_and_a_fixed_tokenizer():
    task = pretraining.plain_text()
    assert task.hash == "606ce214e198b131875274886602359c402414616f51d96e484bf99363873394"
    known = tasks.load("sentiment")
    for name, rows in known.splits.items():
        assert task.split(name)["text"].to_list() == rows["text"].to_list()
    vocabulary = json.dumps(models.tokenizer(pretraining.untrained_model()).get_vocab(), sort_keys=True)
    assert hashlib.sha256(vocabulary.encode()).hexdigest() == (
        "b3749d7ab5561dee533358b49b76527bf4281df04e154df2597fd617e9ad4627"
    )
