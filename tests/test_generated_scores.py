"""Scores of runs whose texts are generated: against transformers row by row, sacrebleu and rouge-score."""

from __future__ import annotations

import codecs
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sacrebleu
import torch
from rouge_score.rouge_scorer import RougeScorer
from test_generation import word_tokenizer
from tiny import tiny

import lorascope as ls
from lorascope.cli.main import main
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


def test_another_metric_is_computed_from_the_texts_of_a_run(run, writer, task, tmp_path):
    texts = run.texts
    expected = metrics.get("f1_words").compute(texts["text"].tolist(), texts["references"].tolist())
    score = ls.score(run, task, "f1_words", bootstrap=200)
    assert (score.name, score.value, score.units) == ("f1_words", expected, 10)
    single = []
    for text, answers in zip(texts["text"], texts["references"], strict=True):
        single.append(metrics.get("f1_words").compute([text], [answers]))
    # The interval of a mean over items, by the normal approximation.
    assert score.high - score.low == pytest.approx(2 * 1.96 * np.std(single) / np.sqrt(10), rel=0.2)
    assert ls.score(run, task, "bleu_lower", bootstrap=0).value == run.score.metric
    with pytest.raises(FileNotFoundError, match=r"it was trained without generation=Generation\(\)"):
        ls.score(ls.train(writer, task, "full", root=tmp_path, **SETTINGS), task, "f1_words")


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


# -- files for other scorers ---------------------------------------------------------------------------------------


def read_as_e2e_metrics(folder: Path) -> tuple[list[str], list[list[str]]]:
    """Read texts and references as ``read_lines`` of e2e-metrics does, which breaks lines at any line boundary."""
    with codecs.open(str(folder / "texts.txt"), "rb", "UTF-8") as file:
        texts = [line.strip() for line in file]
    references: list[list[str]] = [[]]
    with codecs.open(str(folder / "references.txt"), "rb", "UTF-8") as file:
        for line in map(str.strip, file):
            if line:
                references[-1].append(line)
            else:
                references.append([])
    return texts, references


def test_written_texts_are_those_that_e2e_metrics_reads(run, tmp_path, capsys):
    assert main(["texts", str(run.path), "-o", str(tmp_path / "scored")]) == 0
    assert "10 texts and 20 references in prompts.txt, texts.txt and references.txt" in capsys.readouterr().out
    texts, references = read_as_e2e_metrics(tmp_path / "scored")
    assert texts == run.texts["text"].tolist()
    assert references == run.texts["references"].tolist()
    prompts = (tmp_path / "scored" / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert prompts == run.texts["prompt"].tolist()
    assert main(["texts", str(run.path), "-o", str(tmp_path / "again"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(tmp_path / "again"), "texts": 10, "references": 20}


def test_written_texts_have_one_line_each(run, tmp_path):
    changed = ls.Run.read(run.path)
    texts = ["", "first\nsecond", " a\r\x85b\u2028c ", "é £20"]
    references = [["one\n\ntwo"], ["x"], ["y\x0bz", "z"], ["é"]]
    vars(changed)["texts"] = pd.DataFrame({"prompt": list("abcd"), "text": texts, "references": references})
    folder = ls.export.to_texts(changed, tmp_path / "scored")
    assert read_as_e2e_metrics(folder) == (
        ["", "first second", "a b c", "é £20"],
        [["one two"], ["x"], ["y z", "z"], ["é"]],
    )


def test_texts_that_cannot_be_written_are_one_line(run, writer, task, tmp_path, capsys):
    other = ls.train(writer, task, "full", root=tmp_path, **SETTINGS)
    (tmp_path / "old").mkdir()
    for words, message in [
        ([], "RUN is required: lorascope texts runs/lora -o scored"),
        ([str(run.path)], "-o DIR is required: lorascope texts runs/lora -o scored"),
        ([str(run.path), "-o", str(tmp_path / "old")], "it exists, pass a new path"),
        ([str(other.path), "-o", str(tmp_path / "new")], "it was trained without generation=Generation()"),
    ]:
        assert main(["texts", *words]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


# -- settings on the command line and in sweeps ---------------------------------------------------------------------


def test_fields_of_generation_on_the_command_line_and_in_a_sweep_are_those_of_python(writer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table().drop(columns="group").to_csv("meanings.csv", index=False)
    words = ["--model", writer, "--task", "meanings.csv", "--steps", "1", "--device", "cpu", "--no-progress"]
    fields = ["max_new_tokens=5", "num_beams=2", "length_penalty=0.9", "no_repeat_scope=all", "stop=|", "stop=food"]
    assert main(["train", "lora", *words, "--metric", "nist", "--generation", *fields, "-o", "typed"]) == 0
    generation = ls.Generation(
        max_new_tokens=5, num_beams=2, length_penalty=0.9, no_repeat_scope="all", stop=("|", "food")
    )
    typed = ls.load("typed")
    assert typed.meta.settings["generation"] == generation.to_dict()
    settings = {"steps": 1, "device": "cpu", "metric": "nist", "generation": {"max_new_tokens": 5, "num_beams": 2}}
    grid = {"model": writer, "task": "meanings.csv", "method": "lora", "settings": settings, "seeds": 1}
    (swept,) = ls.sweep(grid, jobs=1, progress=False)
    assert swept.meta.settings["generation"] == ls.Generation(max_new_tokens=5, num_beams=2).to_dict()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["num_beams"], "--generation requires NAME=VALUE, such as num_beams=10, got num_beams"),
        (["beams=3"], "unknown field of generation 'beams'; did you mean 'num_beams'?"),
        (["num_beams=ten"], "num_beams must be an integer, got 'ten'"),
        (["num_beams=1", "num_beams=2"], "duplicate field of generation 'num_beams'"),
    ],
)
def test_an_invalid_field_of_generation_on_the_command_line_is_one_line(words, message, capsys):
    assert main(["train", "lora", "--steps", "1", "--generation", *words]) == 2
    assert capsys.readouterr().err == f"lorascope: {message}\n"
