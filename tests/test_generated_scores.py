"""Scores of runs whose texts are generated: against transformers row by row, sacrebleu and rouge-score."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pandas as pd
import pytest
import sacrebleu
import torch
from rouge_score.rouge_scorer import RougeScorer
from test_generation import word_tokenizer
from tiny import tiny

import lorascope as ls
from lorascope.inputs import metrics, models, tasks
from lorascope.training.evaluation import evaluate
from lorascope.training.settings import Settings

NAMES, FOODS, RATINGS = ("Zizzi", "Aromi"), ("Chinese", "English"), ("1", "5")
AREAS = ("city", "in", "has", "is")
SETTINGS = {
    "steps": 40, "batch_size": 4, "eval_every": 8, "lr": 0.02, "schedule": "constant", "clip": None, "seed": 1,
    "progress": False, "device": "cpu",
}  # fmt: skip
TEXTS = ls.Generation(max_new_tokens=12, num_beams=2)


def table() -> pd.DataFrame:
    """Return meanings with two texts each; the splits have different meanings."""
    lines = []
    for number, (name, food, rating, area) in enumerate(itertools.product(NAMES, FOODS, RATINGS, AREAS)):
        prompt = f"name : {name} | rating : {rating} out of 5 | food : {food} | area : {area}"
        split = ("train", "validation", "test")[number % 3]
        # The first word is the last one of the prompt, which a tiny model learns.
        for text in (f"{area} pub {name} serves {food} food", f"{area} {name} has {food} food | rated {rating}"):
            lines.append({"prompt": prompt, "response": f" {text}", "split": split, "group": area})
    return pd.DataFrame(lines)


@pytest.fixture(scope="module")
def writer(tmp_path_factory) -> str:
    """Folder of a tiny GPT-2 with a tokenizer of the words of the texts."""
    folder = tmp_path_factory.mktemp("models") / "writer"
    tokenizer = word_tokenizer()
    tiny("gpt2", vocab_size=len(tokenizer), n_positions=64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def task() -> tasks.Task:
    return tasks.from_frame(table().drop(columns="group"), "meanings", splits="given")


NAMED = ("bleu_lower", "rougeL", "exact_match")


@pytest.fixture(scope="module")
def run(writer, task, tmp_path_factory) -> ls.Run:
    root = tmp_path_factory.mktemp("runs")
    return ls.train(writer, task, "full", metric=NAMED, generation=TEXTS, root=root, **SETTINGS)


def restored(run: ls.Run, folder: str, state: str = "last"):
    model = models.load(folder)
    run.restore(model, state=state)
    return model


def write_rows(model, prompts) -> list[str]:
    """Generate a text per prompt with transformers only, without padding."""
    tokenizer, texts = models.tokenizer(model), []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), pad_token_id=0, max_new_tokens=12, num_beams=2, do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        texts.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


def test_run_keeps_the_texts_of_its_last_state_with_all_references(run, writer, task):
    texts = run.texts
    assert list(texts) == ["prompt", "text", "references"]
    rows = task.split("test")
    assert texts["prompt"].tolist() == rows["prompt"].drop_duplicates().tolist()
    assert texts["text"].tolist() == write_rows(restored(run, writer), texts["prompt"])
    for prompt, references in zip(texts["prompt"], texts["references"], strict=True):
        assert references == rows.loc[rows["prompt"] == prompt, "response"].str.strip().tolist()
        assert len(references) == 2
    assert texts["text"].nunique() > 1


def test_scores_are_those_of_the_libraries_on_the_texts(run, writer, task):
    texts = run.texts
    references = list(zip(*texts["references"], strict=True))
    bleu = sacrebleu.corpus_bleu(texts["text"].tolist(), references, lowercase=True).score
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    rouge = []
    for text, answers in zip(texts["text"], texts["references"], strict=True):
        rouge.append(max(scorer.score(answer, text)["rougeL"].fmeasure for answer in answers))
    assert 0 < bleu < 100
    values = run.score.values
    assert values["bleu_lower"] == pytest.approx(bleu)
    assert values["rougeL"] == pytest.approx(np.mean(rouge))
    assert (run.score.name, run.score.metric, run.score.higher_is_better) == ("bleu_lower", values["bleu_lower"], True)
    encoded = task.encode(models.tokenizer(models.load(writer)), task.split("test"))
    assert run.score.loss == pytest.approx(evaluate(restored(run, writer), encoded).loss)
    recorded = run.table.set_index("quantity")["value"]
    assert recorded["test_bleu_lower"] == recorded["test_metric"] == values["bleu_lower"]


def test_the_loss_selects_the_best_state_of_a_run_that_generates_for_the_test_only(run):
    quantities = set(run.table["quantity"])
    assert "eval_loss" in quantities
    assert not {"eval_metric", "eval_bleu_lower"} & quantities
    losses = run.table[(run.table["quantity"] == "eval_loss") & (run.table["step"] > 0)]
    assert run.meta.states["best"].step == losses.loc[losses["value"].idxmin(), "step"]


def test_evaluations_that_generate_select_the_best_state(writer, task, tmp_path):
    generation = {"max_new_tokens": 12, "num_beams": 2, "every": 3}
    run = ls.train(
        writer, task, "full", metric=NAMED, generation=generation, root=tmp_path, **SETTINGS | {"lr": 0.1, "seed": 0}
    )
    course = run.table[run.table["quantity"] == "eval_bleu_lower"].set_index("step")["value"]
    # Evaluations 0 and 3 of 0 to 5, and the last.
    assert course.index.tolist() == [0, 24, 40]
    assert run.table[run.table["quantity"] == "eval_metric"]["value"].tolist() == course.tolist()
    assert len(run.table[run.table["quantity"] == "eval_loss"]) == 6
    assert course[24] > course[40]
    assert run.meta.states["best"].step == 24
    rows = task.split("validation")
    texts = write_rows(restored(run, writer), rows["prompt"].drop_duplicates())
    answers = rows.groupby("prompt", sort=False)["response"].agg(lambda texts: texts.str.strip().tolist())
    assert course[40] == pytest.approx(metrics.get("bleu_lower").compute(texts, answers.tolist()))


def test_groups_have_the_metric_of_their_texts(writer, tmp_path):
    task = tasks.from_frame(table(), "meanings", splits="hash")
    run = ls.train(writer, task, "full", metric="rougeL", generation=TEXTS, root=tmp_path, **SETTINGS)
    texts = run.texts
    expected = {}
    for group, rows in texts.groupby("group"):
        expected[group] = metrics.get("rougeL").compute(rows["text"].tolist(), rows["references"].tolist())
    assert run.score.groups == pytest.approx(expected)
    assert len(expected) > 1


def test_texts_without_a_metric_leave_the_perplexity(writer, task, tmp_path):
    run = ls.train(writer, task, "full", generation=TEXTS, root=tmp_path, **SETTINGS)
    assert run.score.name == "perplexity"
    assert len(run.texts) == 10
    assert (run.table["quantity"] == "eval_metric").sum() == 6


def test_the_best_state_writes_the_texts_if_it_is_tested(writer, task, tmp_path):
    settings = SETTINGS | {"test_state": "best"}
    run = ls.train(writer, task, "full", metric=NAMED, generation=TEXTS, root=tmp_path, **settings)
    best = run.meta.states["best"].step
    assert best < 40
    assert run.texts["text"].tolist() == write_rows(restored(run, writer, "best"), run.texts["prompt"])


@pytest.mark.parametrize(
    "method", [ls.HydraLoRA(rank=2), ls.FourierFT(coefficients=8), ls.LISA(n_active=1, interval=3)]
)
def test_every_kind_of_method_generates(method, writer, task, tmp_path):
    run = ls.train(writer, task, method, metric="nist", generation=TEXTS, root=tmp_path, **SETTINGS)
    assert run.texts["text"].tolist() == write_rows(restored(run, writer), run.texts["prompt"])


def test_a_run_without_generation_keeps_its_id_and_batches_do_not_change_one(run, writer, task, tmp_path):
    rates = {"steps": 1, "lr": 0.1, "head_lr": 0.1}
    assert "generation" not in Settings(**rates).to_dict()
    stored = Settings(**rates, generation=TEXTS).to_dict()
    assert stored == Settings(**rates, generation=ls.Generation(max_new_tokens=12, num_beams=2, batch_size=3)).to_dict()
    assert Settings.read(stored).to_dict() == stored == Settings(**rates, generation=stored["generation"]).to_dict()
    assert stored != Settings(**rates, generation=ls.Generation(max_new_tokens=12)).to_dict()
    assert run.meta.settings["generation"] == stored["generation"]
    again = ls.train(writer, task, "full", metric=NAMED, generation=TEXTS, root=run.path.parent, **SETTINGS)
    assert again.meta.started == run.meta.started


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "bleu"}, "metric bleu requires generation: pass Generation()"),
        ({"generation": {"beams": 3}}, "unknown field of generation 'beams'; did you mean 'num_beams'?"),
        ({"generation": 3}, "generation must be a Generation, a table of its fields or None, got 3"),
        ({"generation": {"every": 1}}, "every of generation requires a metric of texts, such as metric='bleu'"),
        ({"generation": {"num_beams": 0}}, "num_beams must be >= 1, got 0"),
        ({"metric": "accuracy", "generation": {}}, "cannot compute accuracy of meanings: its labels are texts; use "),
    ],
)
def test_a_generation_that_cannot_be_is_one_line(options, message, writer, task, tmp_path):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as raised:
        ls.train(writer, task, "full", root=tmp_path, **SETTINGS, **options)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_classifier_cannot_generate(bert, reviews, tmp_path):
    message = "cannot generate with BertForSequenceClassification: it has no language model head"
    with pytest.raises(ValueError, match=f"^{message}$"):
        ls.train(models.load(bert, task=reviews), reviews, "lora", generation=TEXTS, root=tmp_path, **SETTINGS)


def test_a_run_without_texts_or_with_changed_ones_is_one_line(run, writer, task, tmp_path):
    other = ls.train(writer, task, "full", root=tmp_path, **SETTINGS)
    message = f"cannot read the texts of run {other.id}: it was trained without generation=Generation()"
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}$"):
        _ = other.texts
    copy = run.save(tmp_path / "copy")
    copy.texts.to_csv(copy.path / "texts.parquet")
    with pytest.raises(ValueError, match=r"checksum differs from run\.json"):
        _ = ls.Run.read(copy.path).texts
