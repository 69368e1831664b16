"""Tests of multiple choice: log-likelihoods against plain torch, metrics on worked numbers, training and scoring."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hostile import sign
from tiny import tiny
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

import lorascope as ls
from lorascope.inputs import models, tasks
from lorascope.inputs.metrics import stack_choices
from lorascope.inputs.tokenization import encode_pairs
from lorascope.runs.run import Run
from lorascope.training.base_weights import prepare_model
from lorascope.training.evaluation import evaluate
from lorascope.training.session import Session

METRICS = ("choice_accuracy", "choice_accuracy_norm", "choice_accuracy_bytes")
WORDS = ("rouge", "café noir", "a good film", "été", "the long and winding road", "no")
ROWS = 60


def table(rows: int = ROWS) -> pd.DataFrame:
    """Return distinct prompts with two to four choices of different lengths, in characters and in bytes."""
    lines = []
    for number in range(rows):
        count = 2 + number % 3
        choices = [WORDS[(number + 2 * shift) % len(WORDS)] for shift in range(count)]
        lines.append({"prompt": f"Question {number}: what follows?", "choices": choices, "answer": number % count})
    return pd.DataFrame(lines)


@pytest.fixture(scope="session")
def byte_gpt2(tmp_path_factory) -> str:
    """Folder of a tiny GPT-2 whose tokens are bytes and pieces of words, so that a space belongs to the next word."""
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    texts = [f"{row.prompt} {' '.join(row.choices)}" for row in table().itertuples()]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(texts, BpeTrainer(vocab_size=272, special_tokens=["<end>"], initial_alphabet=alphabet))
    folder = tmp_path_factory.mktemp("models") / "byte-gpt2"
    # Logits of different rows differ by tenths, because those of an untrained head would be almost equal.
    model = tiny("gpt2", vocab_size=core.get_vocab_size(), n_positions=160, initializer_range=0.3)
    model.config.pad_token_id = model.config.bos_token_id = model.config.eos_token_id = core.token_to_id("<end>")
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<end>", eos_token="<end>", bos_token="<end>"
    ).save_pretrained(folder)
    return str(folder)


# -- the task -------------------------------------------------------------------------------------------------------


def test_columns_make_a_task_of_choices():
    task = tasks.from_frame(table().assign(choices=table()["choices"].map(np.array)), "quiz")
    assert (task.kind, task.labels, task.predicts, task.head_labels) == ("choice", (), ("choices",), None)
    rows = pd.concat(task.splits.values()).sort_values("prompt", ignore_index=True)
    pd.testing.assert_frame_equal(rows, table().sort_values("prompt", ignore_index=True))


def test_hash_depends_on_choices_and_answers_and_not_on_the_order_of_rows():
    task, rows = tasks.from_frame(table()), table()
    assert tasks.from_frame(rows.sample(frac=1, random_state=0)).hash == task.hash
    others = [rows.assign(answer=0), rows.assign(choices=[choices[::-1] for choices in rows["choices"]])]
    assert len({task.hash, *(tasks.from_frame(other).hash for other in others)}) == 3


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_files_with_lists_are_read_with_columns_of_other_names(suffix, tmp_path):
    file, rows = tmp_path / f"quiz{suffix}", table().rename(columns={"prompt": "question", "answer": "gold"})
    if suffix == ".jsonl":
        rows.to_json(file, orient="records", lines=True)
    else:
        rows.to_parquet(file)
    task = tasks.load(str(file), columns={"prompt": "question", "answer": "gold"})
    assert task.hash == tasks.from_frame(table()).hash


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        ("answer", 4, "answer in row 3 of x.csv must be from 0 to 3, got 4"),
        ("answer", -1, "answer in row 3 of x.csv must be from 0 to 3, got -1"),
        ("answer", 1.5, "answer in row 3 of x.csv must be from 0 to 3, got 1.5"),
        ("answer", "C", "answer in row 3 of x.csv must be from 0 to 3, got 'C'"),
        ("answer", True, "answer in row 3 of x.csv must be from 0 to 3, got True"),
        ("choices", [], "choices in row 3 of x.csv must be a list of non-empty strings, got []"),
        ("choices", "a, b", "choices in row 3 of x.csv must be a list of non-empty strings, got 'a, b'"),
        ("choices", ["a", " "], "choices in row 3 of x.csv must be a list of non-empty strings, got "),
        ("choices", ["a", 5], "choices in row 3 of x.csv must be a list of non-empty strings, got ['a', 5]"),
        ("prompt", "", "prompt in row 3 of x.csv must be a non-empty string, got ''"),
    ],
)
def test_invalid_cells_raise_one_line(column, value, expected):
    rows = table().astype(object)
    assert len(rows.at[2, "choices"]) == 4
    rows.at[2, column] = value
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}[^\n]*$"):
        tasks.from_frame(rows, "x.csv")


def test_a_single_choice_is_a_response_to_train_on(byte_gpt2):
    rows = table().assign(split=["train", "validation", "test"] * (ROWS // 3))
    responses = [f"{choices[0]} {'and ' * number}more" for number, choices in enumerate(rows["choices"])]
    is_train = rows["split"] == "train"
    open_rows = rows[is_train].assign(choices=[[text] for text in np.array(responses)[is_train]], answer=0)
    mixed = pd.concat([open_rows, rows[~is_train]])
    task = tasks.from_frame(mixed, "mixed")
    processor = models.tokenizer(models.load(byte_gpt2))
    # Shorter than some responses.
    train = task.encode(processor, task.split("train"), 40)
    pairs = task.split("train").assign(response=[f" {choices[0]}" for choices in task.split("train")["choices"]])
    oracle = encode_pairs(processor, pairs, (), 40, seq2seq=False)
    assert train.tokens == oracle.tokens
    assert max(train.lengths) == 40 > min(train.lengths)
    ends = [labels[-1] == processor.eos_token_id for labels in train.tokens["labels"]]
    assert any(ends)
    assert not all(ends)
    # The others are as without open responses.
    closed = tasks.from_frame(rows, "quiz")
    texts = task.encode(processor, task.split("test"), 128).tokens
    assert texts == closed.encode(processor, closed.split("test"), 128).tokens
    mixed.loc[mixed["split"] == "test", "choices"] = pd.Series([["sole"]] * ROWS, rows.index)
    expected = "choices in the test split of mixed must be at least 2, got ['sole']: a row with a "
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}response only must be in train$"):
        tasks.from_frame(mixed.assign(answer=0), "mixed")


def test_other_heads_cannot_choose(bert, llama):
    task = tasks.from_frame(table(), "quiz")
    assert task.fit(models.load(llama)) is task
    for model in (models.load(bert), tiny("t5")):
        name = type(model).__name__
        with pytest.raises(ValueError, match=f"^cannot use quiz with {name}: multiple choice requires a causal LM$"):
            task.fit(model)


def test_metrics_of_other_kinds_do_not_fit(gpt2, tmp_path):
    model, task = models.load(gpt2), tasks.from_frame(table(), "quiz")
    expected = (
        "cannot compute accuracy of quiz: its labels are choices; use choice_accuracy, choice_accuracy_norm or "
        "choice_accuracy_bytes"
    )
    with pytest.raises(ValueError, match=f"^{expected}$"):
        ls.train(model, task, "lora", steps=1, out=tmp_path / "run", metric="accuracy")


def test_choices_are_not_generated(gpt2, tmp_path):
    expected = "^cannot generate for quiz: its answers are choices; omit generation$"
    with pytest.raises(ValueError, match=expected):
        ls.train(
            models.load(gpt2),
            tasks.from_frame(table(), "quiz"),
            "lora",
            steps=1,
            out=tmp_path / "run",
            generation=ls.Generation(),
        )


@pytest.mark.parametrize("with_splits", [True, False])
def test_dataset_keeps_the_numbers_of_answers_and_hides_those_of_its_test_split(tmp_path, with_splits):
    datasets = pytest.importorskip("datasets")
    rows = table().rename(columns={"prompt": "question"})
    letters = datasets.ClassLabel(names=["A", "B", "C", "D"])
    saved = {}
    for split in ("train", "validation", "test"):
        # Those of MMLU are classes with the letters as names.
        content = rows.assign(answer=-1) if split == "test" else rows
        saved[split] = datasets.Dataset.from_pandas(content).cast_column("answer", letters)
    datasets.DatasetDict(saved).save_to_disk(str(tmp_path / "quiz"))
    name, columns = str(tmp_path / "quiz"), {"prompt": "question"}
    if not with_splits:
        task = tasks.load(name, columns=columns)
        assert sorted(task.table["answer"].value_counts().to_dict()) == sorted(set(rows["answer"]))
        assert len(task.table) == 2 * ROWS
        return
    splits = {"train": "train", "validation": "validation[:50%]", "test": "validation[50%:]"}
    task = tasks.load(name, columns=columns, splits=splits)
    assert task.split("train")["answer"].sum() == rows["answer"].sum()
    with pytest.raises(ValueError, match=r"^cannot use the test split of .*: its labels are hidden \(-1\)"):
        tasks.load(name, columns=columns, splits=splits | {"test": "test", "validation": "validation"})


# -- log-likelihoods ------------------------------------------------------------------------------------------------


def plain_log_likelihoods(model, prompt: str, choices: list[str]) -> list[float]:
    """Return the log-likelihoods of the choices of one row, one forward pass each."""
    tokenizer = models.processor(model)
    context = tokenizer(prompt)["input_ids"]
    values = []
    for choice in choices:
        ids = tokenizer(f"{prompt} {choice}")["input_ids"]
        with torch.no_grad():
            log_probabilities = F.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
        predicted = log_probabilities[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        values.append(float(predicted[len(context) - 1 :].sum()))
    return values


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_scores_equal_a_loop_without_batches(byte_gpt2, batch_size):
    model = models.load(byte_gpt2)
    task = tasks.from_frame(table())
    rows = task.split("train")
    score = evaluate(model, task.encode(models.processor(model), rows), batch_size=batch_size)
    assert (score.name, score.higher_is_better) == ("choice_accuracy", True)
    right, losses, tokens = [], 0.0, 0
    for number, (prompt, choices, answer) in enumerate(rows.itertuples(index=False)):
        expected = plain_log_likelihoods(model, prompt, choices)
        # Sums of at most 20 float32 log-probabilities of size 10.
        np.testing.assert_allclose(score.choices[number, : len(choices), 0], expected, rtol=1e-5)
        assert np.isneginf(score.choices[number, len(choices) :, 0]).all()
        right.append(int(np.argmax(expected)) == answer)
        losses -= expected[answer]
        tokenizer = models.processor(model)
        tokens += len(tokenizer(f"{prompt} {choices[answer]}")["input_ids"]) - len(tokenizer(prompt)["input_ids"])
    assert 0 < sum(right) < len(rows)
    assert score.metric == np.mean(right)
    assert score.loss == pytest.approx(losses / tokens, rel=1e-5)


def test_groups_have_their_own_accuracy(byte_gpt2):
    model = models.load(byte_gpt2)
    task = tasks.from_frame(table().assign(group=["a", "b", "b"] * (ROWS // 3)))
    rows = task.split("train")
    score = evaluate(model, task.encode(models.processor(model), rows), metrics=(ls.metrics.get(METRICS[1]),))
    for group in ("a", "b"):
        right = []
        for row in rows[rows["group"] == group].itertuples():
            values = np.array(plain_log_likelihoods(model, row.prompt, row.choices))
            right.append(int(np.argmax(values / list(map(len, row.choices)))) == row.answer)
        assert score.groups[group] == np.mean(right)


def test_long_prompts_lose_their_first_tokens(byte_gpt2):
    model = models.load(byte_gpt2)
    reader = models.processor(model)
    task = tasks.from_frame(table().assign(choices=[["été", "no"]] * ROWS, answer=0))
    rows = task.split("train")
    encoded, full_lengths = task.encode(reader, rows, max_length=12), []
    for number, (prompt, choices, answer) in enumerate(rows.itertuples(index=False)):
        full = reader(f"{prompt} {choices[answer]}")["input_ids"]
        full_lengths.append(len(full))
        assert encoded.batch([number])["input_ids"][0].tolist() == full[-12:]
    assert max(full_lengths) > 12


def test_choice_that_does_not_fit_raises(byte_gpt2):
    reader, task = models.processor(models.load(byte_gpt2)), tasks.from_frame(table())
    lengths = []
    for choices in task.split("train")["choices"]:
        lengths += [len(reader(f" {choice}")["input_ids"]) for choice in choices]
    expected = f"max_length must be > {max(lengths)}, the number of tokens of the longest choice, got {max(lengths)}"
    with pytest.raises(ValueError, match=f"^{expected}$"):
        task.encode(reader, task.split("train"), max_length=max(lengths))
    assert task.encode(reader, task.split("train"), max_length=max(lengths) + 1)


def test_wrong_choice_that_exceeds_the_positions_raises_before_the_training(byte_gpt2, tmp_path):
    long = "no " * 100  # each word has at least one token, and the model has 160 positions
    rows = table().assign(choices=[["no", long + f"{number} no" * 40] for number in range(ROWS)], answer=0)
    with pytest.raises(ValueError, match="160"):
        ls.train(models.load(byte_gpt2), tasks.from_frame(rows), "lora", steps=1, out=tmp_path / "run", max_length=900)


# -- metrics --------------------------------------------------------------------------------------------------------


def test_metrics_of_worked_examples():
    # Per character -2 and -1.8 in the first row; per byte of "é" and "no" -1.5 and -1.6 in the second.
    choices = [["a", "abcde"], ["é", "no"], ["x", "y", "z"]]
    scores = stack_choices(np.array([[-2, -9, -np.inf], [-3, -3.2, -np.inf], [-4, -4, -5]]), choices)
    answers = np.array([1, 0, 0])
    values = {name: ls.metrics.get(name).compute(scores, answers) for name in METRICS}
    assert values == {METRICS[0]: 2 / 3, METRICS[1]: 2 / 3, METRICS[2]: 1.0}
    assert ls.metrics.get(METRICS[1]).compute(scores[1:2], answers[1:2]) == 0.0


def test_ties_go_to_the_first_choice():
    scores = stack_choices(np.array([[-3.0, -1.0, -1.0, -1.0]]), [["a", "b", "c", "d"]])
    for name in METRICS:
        compute = ls.metrics.get(name).compute
        assert [compute(scores, np.array([answer])) for answer in range(4)] == [0.0, 1.0, 0.0, 0.0]


# -- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_weights_equal_a_plain_loop_on_the_right_choices(byte_gpt2, tmp_path, monkeypatch, accumulate):
    rows = table()
    task = tasks.from_frame(rows)
    draw, indices = Session.batch, []

    def record(session, index):
        batch = draw(session, index)
        indices.append(batch["input_ids"].tolist())
        return batch

    monkeypatch.setattr(Session, "batch", record)
    model, reference = models.load(byte_gpt2), models.load(byte_gpt2)
    for module in [*model.modules(), *reference.modules()]:
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    settings = {"steps": 5, "batch_size": 4, "lr": 1e-3, "schedule": "constant", "warmup": 0, "clip": None}
    # By default AdamW divides by 1e-8, and the gradients of the biases of the keys are only rounding.
    settings["eps"] = 1e-2
    ls.train(model, task, "full", out=tmp_path / "run", accumulate=accumulate, progress=False, **settings)
    prepare_model(reference, task, 0)
    tokenizer, examples = models.processor(reference), {}
    for prompt, choices, answer in task.split("train").itertuples(index=False):
        ids = tokenizer(f"{prompt} {choices[answer]}")["input_ids"]
        examples[tuple(ids)] = len(tokenizer(prompt)["input_ids"])
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3, eps=1e-2, weight_decay=0.0)
    reference.train()
    assert len(indices) == 5
    for batch in indices:
        losses = []
        for padded in batch:
            (ids,) = (ids for ids in examples if list(ids) == padded[: len(ids)] and not any(padded[len(ids) :]))
            logits = reference(torch.tensor([ids])).logits[0]
            losses.append(F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")[examples[ids] - 1 :])
        optimizer.zero_grad()
        torch.cat(losses).mean().backward()
        optimizer.step()
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        # Rounding of gradients up to 10, 1e-6, divided by eps, in five steps of 1e-3; weights move by 5e-3.
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=5e-7)


@pytest.fixture(scope="module")
def run(byte_gpt2, tmp_path_factory) -> Run:
    settings = {"steps": 4, "batch_size": 8, "progress": False, "lr": 1e-2, "eval_every": 2}
    folder = tmp_path_factory.mktemp("runs") / "run"
    return ls.train(models.load(byte_gpt2), tasks.from_frame(table()), ls.LoRA(rank=2), out=folder, **settings)


def test_run_records_the_accuracy_and_can_be_scored_by_each_metric(run, byte_gpt2):
    task, stored = tasks.from_frame(table()), ls.load(run.path)
    assert (stored.score.name, stored.score.values) == ("choice_accuracy", {"choice_accuracy": stored.score.metric})
    names = {name: str(dtype) for name, dtype in stored.predictions.dtypes.items()}
    choices = {f"choice_{number}": "float32" for number in range(4)}
    assert names == {"nll": "float16", "predicted": "int16", **choices}
    model = models.load(byte_gpt2)
    stored.restore(model)
    rows = task.split("test")
    lengths = {"choice_accuracy": lambda choice: 1, "choice_accuracy_norm": len}
    lengths["choice_accuracy_bytes"] = lambda choice: len(choice.encode())
    for name, length in lengths.items():
        right = []
        for row in rows.itertuples():
            values = plain_log_likelihoods(model, row.prompt, row.choices)
            right.append(np.argmax(np.array(values) / list(map(length, row.choices))) == row.answer)
        score = ls.score(stored, task, name)
        assert score.value == np.mean(right), name
        assert score.low <= score.value <= score.high
    assert ls.score(stored, task) == ls.score(stored, task, "choice_accuracy")


def test_metrics_select_the_best_state_and_are_recorded(byte_gpt2, tmp_path):
    task = tasks.from_frame(table())
    settings = {"steps": 2, "batch_size": 4, "progress": False, "metric": METRICS[::-1], "eval_every": 1}
    run = ls.train(models.load(byte_gpt2), task, ls.LoRA(rank=2), out=tmp_path / "run", **settings)
    assert list(run.score.values) == list(METRICS[::-1])
    for name, value in run.score.values.items():
        assert ls.score(run, task, name).value == value
    assert set(run.table["quantity"]) >= {f"eval_{name}" for name in METRICS}


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows.drop(columns="choice_1"),
        lambda rows: rows.astype({"choice_1": "float64"}),
        lambda rows: rows[["nll", "predicted"]],
    ],
)
def test_changed_predictions_are_rejected(run, tmp_path, change):
    copy = run.save(tmp_path / "run")
    rows = change(copy.predictions)
    rows.to_parquet(Path(copy.path) / "predictions.parquet", index=False)
    sign(copy.path)
    with pytest.raises(ValueError, match="columns must be"):
        _ = Run.read(copy.path).predictions
