"""Tests of the metrics of tasks against worked numbers and other implementations, and of their registry."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections import Counter
from types import ModuleType

import installation
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import sklearn.metrics

from lorascope.inputs import metrics, tasks
from lorascope.inputs.metrics import METRICS, Metric


def compute(name: str, predicted, answers) -> float:
    return metrics.get(name).compute(predicted, answers)


def classes(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


# -- classes ------------------------------------------------------------------------------------------------------


def test_metrics_of_two_classes_equal_worked_numbers():
    # 3 true positives, 1 false positive, 2 false negatives, 4 true negatives.
    answers = classes(1, 1, 1, 1, 1, 0, 0, 0, 0, 0)
    predicted = classes(1, 1, 1, 0, 0, 1, 0, 0, 0, 0)
    assert compute("accuracy", predicted, answers) == pytest.approx(0.7)
    assert compute("f1", predicted, answers) == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    negative = 2 * 4 / (2 * 4 + 1 + 2)
    assert compute("f1_macro", predicted, answers) == pytest.approx((2 / 3 + negative) / 2)
    expected = (3 * 4 - 1 * 2) / math.sqrt((3 + 1) * (3 + 2) * (4 + 1) * (4 + 2))
    assert compute("matthews_correlation", predicted, answers) == pytest.approx(expected)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_metrics_of_classes_equal_scikit_learn(count):
    draw = np.random.default_rng(count)
    answers = draw.integers(count, size=300)
    predicted = np.where(draw.random(300) < 0.5, answers, draw.integers(count, size=300))
    assert compute("accuracy", predicted, answers) == sklearn.metrics.accuracy_score(answers, predicted)
    assert compute("f1_macro", predicted, answers) == sklearn.metrics.f1_score(answers, predicted, average="macro")
    expected = sklearn.metrics.matthews_corrcoef(answers, predicted)
    assert compute("matthews_correlation", predicted, answers) == expected
    if count == 2:
        assert compute("f1", predicted, answers) == sklearn.metrics.f1_score(answers, predicted)


@pytest.mark.parametrize("name", ["accuracy", "f1", "f1_macro", "matthews_correlation"])
def test_constant_classes_give_a_number_without_a_warning(name):
    mixed, constant = classes(0, 1, 1, 0), classes(0, 0, 0, 0)
    for predicted, answers in [(constant, mixed), (mixed, constant), (constant, constant)]:
        value = compute(name, predicted, answers)
        assert type(value) is float
        assert 0 <= value <= 1


# -- values -------------------------------------------------------------------------------------------------------


def test_metrics_of_values_equal_worked_numbers_and_scipy():
    answers, predicted = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 9.0])
    assert compute("mse", predicted, answers) == pytest.approx((0 + 1 + 1 + 25) / 4)
    # The squared differences of the ranks sum to 2: 1 - 6 * 2 / (4 * 15).
    assert compute("spearman", predicted, answers) == pytest.approx(0.8)
    assert compute("pearson", predicted, answers) == pytest.approx(np.corrcoef(predicted, answers)[0, 1])
    draw = np.random.default_rng(0)
    answers = draw.integers(6, size=200) / 2
    predicted = answers + draw.normal(size=200)
    assert compute("pearson", predicted, answers) == scipy.stats.pearsonr(predicted, answers).statistic
    assert compute("spearman", predicted, answers) == scipy.stats.spearmanr(predicted, answers).statistic


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_correlation_with_a_constant_is_nan_without_a_warning(name):
    mixed, constant = np.array([1.0, 2.0, 4.0]), np.full(3, 0.1)
    for predicted, answers in [(constant, mixed), (mixed, constant), (mixed[:1], mixed[:1])]:
        assert math.isnan(compute(name, predicted, answers))


def test_mean_squared_error_is_better_if_lower():
    assert not metrics.get("mse").higher_is_better
    assert all(metric.higher_is_better for name, metric in METRICS.items() if name != "mse")


# -- texts --------------------------------------------------------------------------------------------------------


def test_exact_match_and_f1_of_words_equal_worked_numbers():
    predicted = ["The Eiffel Tower!", "in the year 1999", "no", ""]
    references = [["eiffel tower"], ["1999", "the year 1998"], ["yes"], [""]]
    assert compute("exact_match", predicted, references) == pytest.approx(2 / 4)
    # The second has 1 of 3 words and the only word of 1999 (0.5), or 1 of 3 and 1 of 2 words (0.4).
    assert compute("f1_words", predicted, references) == pytest.approx((1 + 0.5 + 0 + 1) / 4)


def test_f1_of_words_counts_repeated_words():
    # 2 of the 3 words are common: precision 2/3, recall 2/2.
    assert compute("f1_words", ["very very fine"], [["fine very"]]) == pytest.approx(2 * (2 / 3) / (2 / 3 + 1))
    assert compute("f1_words", ["a an the"], [["film"]]) == 0.0


def test_rouge_equals_worked_numbers():
    predicted, references = ["the cat sat on the mat"], [["the cat is on the mat"]]
    assert compute("rouge1", predicted, references) == pytest.approx(5 / 6)
    assert compute("rouge2", predicted, references) == pytest.approx(3 / 5)
    assert compute("rougeL", predicted, references) == pytest.approx(5 / 6)
    # The stemmer removes endings, and the best reference of a text counts.
    assert compute("rouge1", ["cats running"], [["dog", "cat runs"]]) == pytest.approx(1.0)
    assert compute("rouge1", ["cat", "film"], [["cat"], ["music"]]) == pytest.approx(0.5)


def test_rouge_lsum_splits_at_line_breaks_only():
    # Over the whole text, the longest common subsequence is one sentence of 3 words; by lines, it is both.
    predicted, reference = "alpha beta gamma\ndelta epsilon zeta", "delta epsilon zeta\nalpha beta gamma"
    assert compute("rougeL", [predicted], [[reference]]) == pytest.approx(0.5)
    assert compute("rougeLsum", [predicted], [[reference]]) == pytest.approx(1.0)
    no_breaks = predicted.replace("\n", ". "), reference.replace("\n", ". ")
    assert compute("rougeLsum", [no_breaks[0]], [[no_breaks[1]]]) == pytest.approx(0.5)


def bleu(predicted: list[str], references: list[list[str]]) -> float:
    """Compute the BLEU of texts of words by its definition, in which every n-gram order has a match."""
    hits, totals, length, reference_length = np.zeros(4), np.zeros(4), 0, 0
    for text, answers in zip(predicted, references, strict=True):
        words = text.split()
        length += len(words)
        lengths = [len(answer.split()) for answer in answers]
        reference_length += min(lengths, key=lambda other: (abs(other - len(words)), other))
        for n in range(1, 5):
            grams = [Counter(zip(*(each.split()[k:] for k in range(n)), strict=False)) for each in [text, *answers]]
            best = Counter[tuple[str, ...]]()
            for counts in grams[1:]:
                best |= counts
            hits[n - 1] += (grams[0] & best).total()
            totals[n - 1] += grams[0].total()
    return 100 * min(1.0, math.exp(1 - reference_length / length)) * math.exp(np.log(hits / totals).mean())


def test_bleu_equals_its_definition_with_any_number_of_references():
    predicted = ["it was a very fine film and the music was fine", "the plot was rather boring and the film was long"]
    references = [
        ["it was a very fine film with fine music", "the film was fine and the music was fine"],
        ["the plot was rather boring and too long"],
    ]
    assert compute("bleu", predicted, references) == pytest.approx(bleu(predicted, references))
    assert compute("bleu", predicted, [[text] for text in predicted]) == pytest.approx(100)


def test_bleu_variants_differ_in_case_and_tokens():
    predicted, references = ["The Film Was Fine, it was"], [["the film was fine, it was"]]
    assert compute("bleu", predicted, references) < compute("bleu_lower", predicted, references) - 10
    assert compute("bleu_lower", predicted, references) == pytest.approx(100)
    # Chinese has no spaces: each character is a token.
    predicted, references = ["这部电影很好看。"], [["这部电影不好看。"]]
    spaced = [" ".join(predicted[0])], [[" ".join(references[0][0])]]
    assert compute("bleu_zh", predicted, references) == pytest.approx(compute("bleu", *spaced))
    assert compute("bleu_zh", ["NBA 很好看。"], [["nba 很好看。"]]) == pytest.approx(100)


def test_nist_equals_worked_numbers():
    # Of 4 tokens of references, a is 2, so that it tells log2(4/2) = 1 bit, b log2(4/1) = 2 and ab log2(2/1) = 1.
    assert compute("nist", ["a b"], [["a b", "a c"]]) == pytest.approx((1 + 2) / 2 + 1 / 1)
    # Each of 3 tokens tells log2(3), and the score is half at two thirds of the length.
    assert compute("nist", ["a b"], [["a b c"]]) == pytest.approx(math.log2(3) / 2)
    assert compute("nist", [""], [["a b c"]]) == 0.0


E2E_REFERENCES = [
    [
        "Zizzi is a pub near The Avalon. It is rated 3.5 out of 5.",
        "Near the Avalon, there is a cheap pub: Zizzi, which has 3.5 out of 5 stars and is very popular.",
    ],
    [
        "The Mill isn't family-friendly and serves Chinese food for £20-25.",
        "Chinese food for less than £20-25 is what The Mill, which isn't family friendly, serves near the river.",
        ' "The Mill" & co. serves Chinese food, but it isn\'t for families.',
    ],
]
E2E_TEXTS = [
    "Zizzi is a cheap pub, rated 3.5 out of 5 (near the Avalon).",
    "The Mill serves Chinese food for £20-25; it isn't family-friendly.",
]


def test_nist_equals_that_of_e2e_metrics():
    # NISTScore of its pymteval.py, at commit 1b9c4d8.
    assert compute("nist", E2E_TEXTS, E2E_REFERENCES) == pytest.approx(4.47292127703913, rel=1e-12)
    short = ["Zizzi is a cheap pub.", "The Mill serves Chinese food."]
    assert compute("nist", short, E2E_REFERENCES) == pytest.approx(0.022106248962292976, rel=1e-12)


def test_tokens_of_nist_are_those_of_sacrebleu():
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    draw = np.random.default_rng(0)
    words = [
        "Aa",
        "3,5",
        "7-8",
        "£9",
        "(k)",
        "f-g",
        "it's",
        '"q"',
        "x.",
        "1.",
        ".5",
        "&amp;",
        "a/b",
        "[z]",
        "~",
        "2-",
        ",",
    ]
    texts = [" ".join(draw.choice(words, 12)) for _ in range(50)]
    assert [metrics._tokens_13a(text) for text in texts] == [Tokenizer13a()(text).lower().split() for text in texts]


def test_chrf_equals_its_definition():
    predicted, answer = "afilm", "afine"
    # Common n-grams of 1 to 5 characters: a f i, af fi, afi; no word has 6.
    precisions = np.array([3 / 5, 2 / 4, 1 / 3, 0, 0])
    recall = precision = precisions.mean()
    expected = 100 * 5 * precision * recall / (4 * precision + recall)
    assert compute("chrf", [predicted], [[answer]]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "expected", "empty"),
    [
        ("meteor", 0.5092153528977639, 0.08417658763222688),
        ("cider", 3.7389988667645238, 0.23302121974043616),
        ("rougeL_coco", 0.6456200227531286, 0.19395866454689983),
    ],
)
def test_metrics_of_captions_equal_those_of_e2e_metrics(name, expected, empty):
    pytest.importorskip("pycocoevalcap")
    if shutil.which("java") is None:
        pytest.skip("requires Java")
    # run_coco_eval of its measure_scores.py, at commit 1b9c4d8.
    assert compute(name, E2E_TEXTS, E2E_REFERENCES) == pytest.approx(expected, rel=1e-12)
    assert compute(name, ["Zizzi is a cheap pub.", ""], E2E_REFERENCES) == pytest.approx(empty, rel=1e-12)
    # A line separator within a text does not shift the texts after it.
    broken = [E2E_TEXTS[0].replace(" cheap ", "\r\u2028cheap\x0b"), E2E_TEXTS[1]]
    assert compute(name, broken, E2E_REFERENCES) == pytest.approx(expected, rel=1e-12)
    assert compute(name, ["", ""], E2E_REFERENCES) == 0.0


@pytest.mark.parametrize("name", ["meteor", "cider", "rougeL_coco"])
def test_metrics_of_captions_without_java_are_one_line(name, monkeypatch):
    # As if the package were installed.
    for module in ("", ".cider", ".cider.cider", ".meteor", ".meteor.meteor", ".rouge", ".rouge.rouge"):
        monkeypatch.setitem(sys.modules, f"pycocoevalcap{module}", ModuleType(f"pycocoevalcap{module}"))
    monkeypatch.setenv("PATH", "")
    line = f"^metric '{name}' requires Java: install a runtime whose command java is on the PATH$"
    with pytest.raises(FileNotFoundError, match=line):
        metrics.require_fit([metrics.get(name)], unlabeled("prompt", "response"), generates=True)
    with pytest.raises(FileNotFoundError, match=line):
        compute(name, ["a"], [["a"]])


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("bleu", "sacrebleu", "text"),
        ("rougeL", "rouge-score", "text"),
        ("meteor", "pycocoevalcap", "e2e"),
        ("cider", "pycocoevalcap", "e2e"),
        ("rougeL_coco", "pycocoevalcap", "e2e"),
    ],
)
def test_metric_without_its_extra_names_what_to_install(name: str, package: str, extra: str) -> None:
    module = package.replace("-", "_")
    code = f"{installation.hide([module])}\nfrom lorascope.inputs import metrics\n"
    last = f"ModuleNotFoundError: metric {name!r} requires {package}: pip install 'lorascope[{extra}]'"
    # The second is called before a training.
    metric = f"metrics.get({name!r})"
    for call in (f"{metric}.compute(['a'], [['a']])", f"metrics.require_fit([{metric}], 0, True)"):
        done = subprocess.run([sys.executable, "-c", code + call], capture_output=True, text=True)
        assert done.stderr.splitlines()[-1] == last


# -- registry -----------------------------------------------------------------------------------------------------


def test_unknown_metric_suggests_a_name():
    with pytest.raises(ValueError, match=r"^unknown metric 'mcc'; did you mean 'matthews_correlation'\?$"):
        metrics.get("mcc")
    with pytest.raises(ValueError, match=r"^unknown metric 'acuracy'; did you mean 'accuracy' or 'choice_accuracy'\?$"):
        metrics.get("acuracy")


def test_metrics_resolve_to_a_tuple_without_duplicates():
    own = Metric("half", "classes", True, lambda predicted, answers: 0.5)
    assert metrics.resolve("f1") == (METRICS["f1"],)
    assert metrics.resolve(("f1", own)) == (METRICS["f1"], own)
    assert metrics.resolve(own) == (own,)
    for value, message in [
        ([], "metric must have at least one name, got \\[\\]"),
        (["f1", "f1"], "duplicate metric 'f1'"),
        (3, "metric must be a name, a Metric or a sequence of these, got 3"),
        (["f1", None], "metric must be a name, a Metric or a sequence of these, got None"),
        (Metric("f1", "classes", True, max), "name of a metric must not be that of a registered one, got 'f1'"),
    ]:
        with pytest.raises(ValueError, match=f"^{message}$"):
            metrics.resolve(value)


def test_own_metric_is_registered_once():
    own = Metric("half", "classes", True, lambda predicted, answers: 0.5)
    try:
        metrics.add(own)
        metrics.add(own)
        assert metrics.get("half") is own
        with pytest.raises(ValueError, match=r"^cannot add metric 'half': another one has this name$"):
            metrics.add(Metric("half", "classes", True, lambda predicted, answers: 0.5))
    finally:
        del METRICS["half"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "my metric"}, "name must be an identifier other than loss, metric and metric_group, got 'my metric'"),
        ({"name": "loss"}, "name must be an identifier other than loss, metric and metric_group, got 'loss'"),
        ({"needs": "rows"}, "needs must be one of 'classes', 'two classes', 'values', 'texts', 'choices', got 'rows'"),
    ],
)
def test_invalid_metric_raises_one_line(fields, message):
    valid = {"name": "half", "needs": "classes", "higher_is_better": True, "compute": max}
    with pytest.raises(ValueError, match=f"^{message}$"):
        Metric(**valid | fields)


# -- tasks --------------------------------------------------------------------------------------------------------


def labeled(count: int) -> tasks.Task:
    rows = [{"text": f"film {number}", "label": f"class {number % count}"} for number in range(60)]
    return tasks.from_frame(pd.DataFrame(rows), "x.csv")


def fit(name: str, task: tasks.Task) -> None:
    metrics.require_fit([metrics.get(name)], task)


def test_metric_that_does_not_fit_the_task_names_those_that_fit():
    fit("f1", labeled(2))
    fit("f1_macro", labeled(3))
    line = "cannot compute pearson of x.csv: its labels are 2 classes; use accuracy, f1, f1_macro or "
    with pytest.raises(ValueError, match=f"^{line}matthews_correlation$"):
        fit("pearson", labeled(2))
    line = "cannot compute f1 of x.csv: its labels are 3 classes; use accuracy, f1_macro or matthews_correlation"
    with pytest.raises(ValueError, match=f"^{line}$"):
        fit("f1", labeled(3))


def unlabeled(*columns: str) -> tasks.Task:
    rows = pd.DataFrame({column: [f"{column} {number}" for number in range(60)] for column in columns})
    return tasks.from_frame(rows, "x.csv")


def test_task_without_classes_fits_no_metric():
    line = "cannot compute bleu of x.csv: it has no classes; omit metric to record the perplexity"
    with pytest.raises(ValueError, match=f"^{line}$"):
        fit("bleu", unlabeled("text"))


def test_metric_of_texts_requires_that_they_are_generated():
    task = unlabeled("prompt", "response")
    with pytest.raises(ValueError, match=r"^metric bleu requires generation: pass Generation\(\)$"):
        fit("bleu", task)
    metrics.require_fit([metrics.get("bleu")], task, generates=True)
    line = "cannot compute accuracy of x.csv: its labels are texts; use exact_match, f1_words, .* or chrf"
    with pytest.raises(ValueError, match=f"^{line}$"):
        metrics.require_fit([metrics.get("accuracy")], task, generates=True)
