"""Tests of evaluation against the model's own loss and the log-probabilities of full responses."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_tokenizer
from tiny import tiny
from tolerance import TEXT, TINY, near

from lorascope.inputs import tasks
from lorascope.training.evaluation import evaluate

FAMILIES = ("bert", "gpt2", "llama", "t5", "bart")


def sharp(family: str, **config) -> torch.nn.Module:
    """Return a tiny model whose predictions are far from uniform."""
    model = tiny(family, **config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model


def encoded(task: tasks.Task, split: str = "train"):
    return task.encode(tiny_tokenizer(), task.split(split))


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_equals_the_models_own_for_any_batch_size(task, family):
    model = sharp(family)
    fitted = task.fit(model)
    rows = encoded(fitted)
    batch = rows.batch(range(40))
    with torch.no_grad():
        own = float(model(**batch).loss)
    first = fitted.encode(tiny_tokenizer(), fitted.split("train").head(40))
    for size in (1, 7, 64):
        assert evaluate(model, first, batch_size=size).loss == near(own, terms=TINY, growth=TEXT)
    assert fitted.count_targets(batch) == evaluate(model, first).counts.sum()


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_losses_of_micro_batches_weighted_by_targets_equal_the_loss_of_the_batch(family):
    rows = pd.DataFrame(
        {"prompt": [f"film {n}" for n in range(60)], "response": [" very" * (n % 5) + " fine" for n in range(60)]}
    )
    model = sharp(family)
    task = tasks.from_frame(rows).fit(model)
    batch = encoded(task).batch(range(12))
    parts = [{key: value[start : start + 4] for key, value in batch.items()} for start in (0, 4, 8)]
    with torch.no_grad():
        whole = float(model(**batch).loss)
        mean = sum(float(model(**part).loss) * task.count_targets(part) for part in parts) / task.count_targets(batch)
    assert mean == near(whole, terms=TINY, growth=TEXT)


@pytest.mark.parametrize("labels", [("negative", "positive"), ("very boring", "very fine")])
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bart"])
def test_preferred_response_has_the_largest_probability(task, family, labels):
    model = sharp(family)
    table = task.table.replace({"label": dict(zip(task.labels, labels, strict=True))})
    fitted = tasks.from_frame(table[["text", "label"]]).fit(model)
    tokenizer = tiny_tokenizer()
    rows = fitted.split("test").head(12)
    score = evaluate(model, fitted.encode(tokenizer, rows), batch_size=5)
    # Brute force: the full log-probability of each response to each prompt, one at a time and without padding.
    for row in range(len(rows)):
        chances = []
        for label in fitted.labels:
            one = rows.iloc[[row]].assign(label=label, response=f" {label}")
            chances.append(-evaluate(model, fitted.encode(tokenizer, one), batch_size=1).nll[0])
        assert score.correct[row] == (fitted.labels[int(np.argmax(chances))] == rows["label"][row])
    assert 0 < score.metric < 1


def test_predicted_class_has_the_largest_logit(task):
    model = sharp("bert")
    rows = encoded(task)
    score = evaluate(model, rows, batch_size=9)
    batch = rows.batch(range(len(rows)))
    with torch.no_grad():
        logits = model(**batch).logits
    assert (score.name, score.higher_is_better) == ("accuracy", True)
    assert score.correct.tolist() == (logits.argmax(1) == batch["labels"]).tolist()
    assert score.metric == pytest.approx(np.mean(score.correct))
    assert 0 < score.metric < 1


def test_weighted_group_metrics_average_to_the_metric(task):
    score = evaluate(sharp("bert"), encoded(task, "test"))
    groups = task.split("test")["group"]
    assert list(score.groups) == ["film", "music"]
    for name, metric in score.groups.items():
        assert metric == pytest.approx(score.correct[(groups == name).to_numpy()].mean())
    shares = groups.value_counts(normalize=True)
    assert sum(score.groups[name] * shares[name] for name in score.groups) == pytest.approx(score.metric)


def test_perplexity_averages_over_target_tokens():
    lines = pd.DataFrame(
        {"text": ["fine " * (1 + n % 6) + "film" * (n % 2) + f" {n}" for n in range(80)], "group": ["a", "b"] * 40}
    )
    task = tasks.from_frame(lines)
    model = sharp("llama")
    rows = encoded(task)
    score = evaluate(model, rows, batch_size=16)
    nll, counts = [], []
    with torch.no_grad():
        for row in range(len(rows)):
            ids = rows.batch([row])["input_ids"]
            chances = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            nll.append(-float(chances.gather(1, ids[0, 1:, None]).sum()))
            counts.append(ids.shape[1] - 1)
    assert (score.name, score.higher_is_better, score.correct) == ("perplexity", False, None)
    assert score.nll == near(nll, terms=TINY, growth=TEXT)
    assert score.counts.tolist() == counts
    assert score.metric == near(math.exp(sum(nll) / sum(counts)), terms=TINY, growth=TEXT * math.log(TINY))
    part = [number for number, group in enumerate(rows.groups) if group == "a"]
    expected = math.exp(sum(nll[number] for number in part) / sum(counts[number] for number in part))
    assert score.groups["a"] == near(expected, terms=TINY, growth=TEXT * math.log(TINY))


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_disables_dropout_and_restores_the_mode(task, training):
    model = tiny("bert", hidden_dropout_prob=0.5).train(training)
    rows = encoded(task)
    state = torch.get_rng_state()
    assert evaluate(model, rows).loss == evaluate(model, rows).loss
    assert model.training is training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_perplexity_of_a_huge_loss_is_infinite():
    lines = tasks.from_frame(pd.DataFrame({"text": [f"film {n}" for n in range(60)]}))
    model = tiny("gpt2")
    with torch.no_grad():
        model.transformer.wte.weight.mul_(1e6)
    assert evaluate(model, encoded(lines)).metric == math.inf
