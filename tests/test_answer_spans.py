"""Tests of questions with a context: windows and labels by brute force, spans by a plain search, and training."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import tiny
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch.nn import functional as F
from transformers import AutoModelForQuestionAnswering, PreTrainedTokenizerFast

import lorascope as ls
from lorascope.inputs import models, tasks
from lorascope.inputs.answer_spans import best_span, encode_spans
from lorascope.observe.measured_rows import TaskLoss
from lorascope.training.base_weights import prepare_model
from lorascope.training.evaluation import evaluate
from lorascope.training.run_spec import phase_rows
from lorascope.training.session import Session

WORDS = [f"w{number}" for number in range(40)]
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "what", "is", "?"]
LENGTH, STRIDE = 24, 8


def table(rows: int = 60, unanswered: bool = False) -> pd.DataFrame:
    """Return questions on contexts of 5 to 60 words, whose first answer is one to four words."""
    draw, lines = np.random.default_rng(0), []
    for number in range(rows):
        words = draw.choice(WORDS, int(draw.integers(5, 60))).tolist()
        count = int(draw.integers(1, 5))
        first = int(draw.integers(0, len(words) - count + 1))
        context, start = " ".join(words), len(" ".join([*words[:first], ""]))
        row = {"question": f"what is w{number % 40} ?", "context": context}
        row["answers"], row["answer_start"] = [" ".join(words[first : first + count])], [start]
        if unanswered and number % 3 == 0:
            row["answers"], row["answer_start"] = [], []
        lines.append(row)
    return pd.DataFrame(lines)


@pytest.fixture(scope="module")
def reader() -> PreTrainedTokenizerFast:
    numbers = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    core = Tokenizer(WordLevel(numbers, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, numbers[token]) for token in ("[CLS]", "[SEP]")],
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=core, model_input_names=inputs, **names)


@pytest.fixture(scope="module")
def folder(reader, tmp_path_factory) -> str:
    """Folder of a tiny BERT without a head."""
    path = tmp_path_factory.mktemp("models") / "bert"
    tiny("bert", "base", initializer_range=0.5).save_pretrained(path)
    reader.save_pretrained(path)
    return str(path)


# -- windows and labels -----------------------------------------------------------------------------------------------


def test_windows_and_labels_equal_slices_of_the_words(reader):
    task = tasks.from_frame(table())
    rows = task.split("train")
    encoded = task.encode(reader, rows, LENGTH)
    window, hits = 0, 0
    for number, row in enumerate(rows.itertuples()):
        words, question = row.context.split(), row.question.split()
        room = LENGTH - 3 - len(question)
        first, answer = 0, row.answers[0].split()
        starts = [position for position in range(len(words)) if words[position:][: len(answer)] == answer]
        position = len(row.context[: row.answer_start[0]].split())
        assert position in starts
        while True:
            shown = words[first : first + room]
            ids = encoded.batch([window])
            text = ["[CLS]", *question, "[SEP]", *shown, "[SEP]"]
            assert reader.convert_ids_to_tokens(ids["input_ids"][0].tolist()) == text
            shift = len(question) + 2
            expected = (0, 0)
            if first <= position and position + len(answer) <= first + room:
                expected = (shift + position - first, shift + position - first + len(answer) - 1)
                hits += 1
            assert (int(ids["start_positions"]), int(ids["end_positions"])) == expected
            for token, word in enumerate(shown):
                low, high = encoded.offsets[window][shift + token]
                assert row.context[low:high] == word
            assert (encoded.offsets[window][:shift] == -1).all()
            assert encoded.rows[window] == number
            window += 1
            if first + room >= len(words):
                break
            first += room - STRIDE
    assert window == len(encoded)
    assert len(rows) < hits < window


def test_batches_are_padded_and_mark_the_context(reader):
    task = tasks.from_frame(table())
    encoded = task.encode(reader, task.split("train"), LENGTH)
    lengths = encoded.lengths
    short, long = int(lengths.argmin()), int(lengths.argmax())
    batch = encoded.batch([short, long])
    assert batch["attention_mask"].sum(1).tolist() == [lengths[short], lengths[long]]
    assert batch["input_ids"].shape == batch["token_type_ids"].shape == (2, LENGTH)
    assert (batch["token_type_ids"].sum(1) == torch.from_numpy(lengths[[short, long]] - 6)).all()


def test_question_without_room_raises(reader):
    rows = table().assign(question="what is " * 10)
    with pytest.raises(ValueError, match=r"^max_length must be >= 35, because a window has a question of 23 tokens"):
        encode_spans(reader, rows, 34, False)
    assert len(encode_spans(reader, rows, 35, False)) >= len(rows)


# -- the task ---------------------------------------------------------------------------------------------------------


def test_columns_make_a_task_whose_contexts_are_in_one_split():
    rows = table()
    task = tasks.from_frame(pd.concat([rows, rows.assign(question="what ?")]))
    assert (task.kind, task.predicts, task.head_labels) == ("span", ("texts",), ("start", "end"))
    assert (task.table.groupby("context")["split"].nunique() == 1).all()
    assert tasks.from_frame(rows).hash != tasks.from_frame(table(unanswered=True)).hash


def test_pairs_of_lists_in_one_column_are_the_same(tmp_path):
    rows = table(unanswered=True)
    pairs = rows[["question", "context"]].assign(
        answers=[{"text": row.answers, "answer_start": row.answer_start} for row in rows.itertuples()]
    )
    assert tasks.from_frame(pairs).hash == tasks.from_frame(rows).hash
    pairs.to_parquet(tmp_path / "squad.parquet")
    assert tasks.load(str(tmp_path / "squad.parquet")).hash == tasks.from_frame(rows).hash


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"answers": "w1"}, "answers in row 2 of x.csv must be a list of texts, got 'w1'"),
        ({"answer_start": ["0"]}, "answer_start in row 2 of x.csv must be a list of numbers of characters, got ['0']"),
        ({"answer_start": []}, "answer_start in row 2 of x.csv must have 1 numbers, as answers, got 0"),
        ({"answers": ["w99"]}, "answer_start in row 2 of x.csv must be the position of 'w99' in the context, got "),
        ({"answer_start": [-1]}, "answer_start in row 2 of x.csv must be the position of "),
        ({"context": " "}, "context in row 2 of x.csv must be a non-empty string, got ' '"),
    ],
)
def test_invalid_cells_raise_one_line(values, expected):
    rows = table()
    for column, value in values.items():
        rows.at[1, column] = value
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}[^\n]*$"):
        tasks.from_frame(rows, "x.csv")


def test_heads_must_fit(folder, gpt2, reviews):
    task = tasks.from_frame(table(), "quiz")
    model = models.load(folder, task=task)
    assert type(model).__name__ == "BertForQuestionAnswering"
    assert task.fit(model) is task
    for other, data in ((models.load(gpt2), task), (model, reviews)):
        with pytest.raises(ValueError, match=r"require a question answering head$"):
            data.fit(other)


# -- spans ------------------------------------------------------------------------------------------------------------


def plain_search(logits, offsets, context, can_be_empty):
    """Return the answer as run_qa.py selects it."""
    candidates, empty = [], None
    for window, characters in zip(logits, offsets, strict=True):
        sums = window[0, 0] + window[0, 1]
        empty = sums if empty is None else min(empty, sums)
        for start in np.argsort(window[:, 0])[-1:-21:-1].tolist():
            for end in np.argsort(window[:, 1])[-1:-21:-1].tolist():
                if characters[start][0] < 0 or characters[end][0] < 0 or end < start or end - start + 1 > 30:
                    continue
                text = context[characters[start][0] : characters[end][1]]
                candidates.append((window[start, 0] + window[end, 1], text))
    if not candidates:
        return ""
    score, text = max(candidates)
    return "" if can_be_empty and empty > score else text


@pytest.mark.parametrize("can_be_empty", [False, True])
def test_spans_equal_a_plain_search(reader, can_be_empty):
    rows, draw = table(200), np.random.default_rng(1)
    # Longer windows than 30 tokens, so that some spans are too long.
    encoded = encode_spans(reader, rows, 60, can_be_empty)
    answers = []
    for number, context in enumerate(rows["context"]):
        windows = np.flatnonzero(encoded.rows == number)
        offsets = [encoded.offsets[window] for window in windows]
        logits = [draw.normal(size=characters.shape) * 2 for characters in offsets]
        answers.append(best_span(logits, offsets, context, can_be_empty))
        assert answers[-1] == plain_search(logits, offsets, context, can_be_empty)
    assert ("" in answers) == can_be_empty


def test_context_without_candidates_has_an_empty_answer():
    assert best_span([np.zeros((3, 2))], [np.full((3, 2), -1)], "w1", False) == ""


@pytest.mark.parametrize("batch_size", [1, 16])
def test_scores_equal_a_loop_without_batches(folder, reader, batch_size):
    task = tasks.from_frame(table(unanswered=True).assign(group=["a", "b", "c"] * 20))
    model, rows = models.load(folder, task=task), task.split("train")
    metrics = tuple(map(ls.metrics.get, ("exact_match", "f1_words")))
    encoded = task.encode(reader, rows, LENGTH)
    score = evaluate(model, encoded, batch_size=batch_size, metrics=metrics)
    losses, texts = [], []
    for number, context in enumerate(rows["context"]):
        logits, windows = [], np.flatnonzero(encoded.rows == number)
        for window in windows:
            with torch.no_grad():
                output = model(**encoded.batch([window]))
            losses.append(float(output.loss))
            logits.append(torch.stack([output.start_logits[0], output.end_logits[0]], dim=1).numpy())
        texts.append(plain_search(logits, [encoded.offsets[window] for window in windows], context, True))
    assert score.texts["text"].to_list() == texts
    assert score.loss == pytest.approx(np.mean(losses), rel=1e-5)
    references = rows["answers"].map(lambda answers: answers or [""]).to_list()
    assert score.values == {metric.name: metric.compute(texts, references) for metric in metrics}
    is_in_group = (rows["group"] == "b").to_numpy()
    chosen = [list(np.array(values, dtype=object)[is_in_group]) for values in (texts, rows["answers"])]
    chosen[1] = [list(answers) or [""] for answers in chosen[1]]
    assert score.groups["b"] == metrics[0].compute(*chosen)


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_weights_equal_a_plain_loop(folder, tmp_path, monkeypatch, accumulate):
    task, batches = tasks.from_frame(table()), []
    draw = Session.batch

    def record(session, index):
        batches.append(draw(session, index))
        return dict(batches[-1])

    monkeypatch.setattr(Session, "batch", record)
    model, reference = models.load(folder, task=task), models.load(folder, task=task)
    for module in [*model.modules(), *reference.modules()]:
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    settings = {"steps": 5, "batch_size": 4, "lr": 1e-3, "head_lr": 1e-3, "schedule": "constant", "warmup": 0}
    # By default AdamW divides by 1e-8, and the gradients of the biases of the keys are only rounding.
    settings |= {"clip": None, "eps": 1e-2, "accumulate": accumulate, "progress": False, "max_length": LENGTH}
    ls.train(model, task, "full", out=tmp_path / "run", **settings)
    prepare_model(reference, task, 0)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3, eps=1e-2, weight_decay=0.0)
    reference.train()
    assert len(batches) == 5
    for batch in batches:
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids")}
        output = reference(**inputs)
        loss = F.cross_entropy(output.start_logits, batch["start_positions"])
        loss = (loss + F.cross_entropy(output.end_logits, batch["end_positions"])) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        # Rounding of gradients up to 10, 1e-6, divided by eps, in five steps of 1e-3; weights move by 5e-3.
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=5e-7)


def test_run_keeps_its_texts_and_is_scored_again(folder, tmp_path):
    task = tasks.from_frame(table(90, unanswered=True))
    settings = {"epochs": 1, "batch_size": 8, "progress": False, "max_length": LENGTH, "eval_every": "epoch"}
    method = ls.LoRA(rank=2)
    metric = ("f1_words", "exact_match")
    run = ls.train(folder, task, method, out=tmp_path / "run", metric=metric, **settings)
    windows = phase_rows(task, ls.Phase(method), models.load(folder, task=task), LENGTH)
    assert windows > len(task.split("train"))
    assert run.meta.settings["steps"] == -(-windows // 8)
    stored = ls.load(run.path)
    assert len(stored.predictions) == len(task.split("test"))
    assert list(stored.texts) == ["prompt", "text", "references"]
    for name, value in stored.score.values.items():
        assert ls.score(stored, task, name).value == pytest.approx(value, abs=1e-12)
    assert ls.score(stored, task).name == "f1_words"
    model = models.load(folder, task=task)
    stored.restore(model)
    score = evaluate(model, task.encode(models.processor(model), task.split("test"), LENGTH))
    assert score.texts["text"].to_list() == stored.texts["text"].to_list()


def test_adapter_in_peft_has_the_logits_of_the_run(folder, tmp_path):
    peft = pytest.importorskip("peft")
    task = tasks.from_frame(table())
    model = models.load(folder, task=task)
    settings = {"steps": 3, "batch_size": 4, "progress": False, "max_length": LENGTH, "lr": 1e-2}
    run = ls.train(model, task, ls.LoRA(rank=2), out=tmp_path / "run", **settings)
    ls.export.to_peft(run, tmp_path / "adapter")
    base = AutoModelForQuestionAnswering.from_pretrained(folder)
    adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    # PeftModelForQuestionAnswering drops token_type_ids.
    assert type(adapted) is peft.PeftModel
    assert "AutoModelForQuestionAnswering.from_pretrained" in (tmp_path / "adapter" / "README.md").read_text()
    inputs = task.encode(models.processor(model), task.split("test"), LENGTH).batch(range(4))
    with torch.no_grad():
        output, expected = adapted(**inputs), model.eval()(**inputs)
    for name in ("start_logits", "end_logits"):
        # Logits of size 10, as sums of at most 64 products in two blocks.
        torch.testing.assert_close(output[name], expected[name], rtol=0, atol=1e-4)


def test_instruments_in_nats_and_smoothing_reject_spans(folder, tmp_path):
    task = tasks.from_frame(table())
    with pytest.raises(ValueError, match=r"^label_smoothing must be 0 for table, whose labels are spans, got 0.1$"):
        ls.train(folder, task, "lora", steps=1, out=tmp_path / "run", label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"^cannot compute accuracy of table: its labels are texts; use exact_match, "):
        ls.train(folder, task, "lora", steps=1, out=tmp_path / "run", metric="accuracy")
    model = models.load(folder, task=task)
    rows = task.split("train")
    with pytest.raises(ValueError, match=r"^cannot measure in nats: labels must be classes or texts, got spans$"):
        TaskLoss(model, task.encode(models.processor(model), rows, LENGTH), rows)
