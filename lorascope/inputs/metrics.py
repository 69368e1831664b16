"""Metrics of tasks: functions of predictions and answers, registered by name.

Other packages add metrics through the entry point group ``lorascope.metrics``, which names the module that calls
:func:`add`.
"""

from __future__ import annotations

import importlib
import itertools
import math
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from lorascope.array_types import Float, Int
from lorascope.extras import requirement
from lorascope.inputs import caption_metrics
from lorascope.schema.plugins import load_entry_points
from lorascope.schema.suggestions import unknown_name

if TYPE_CHECKING:
    from lorascope.inputs.tasks import Task

__all__ = ["METRICS", "Metric", "add", "get"]

_NEEDS = ("classes", "two classes", "values", "texts", "choices")
DEFAULTS = {"regression": "mse", "choice": "choice_accuracy", "span": "f1_words"}
"""Default metric by kind of task, other than accuracy or perplexity."""

METRICS: dict[str, Metric] = {}
"""Registered metrics by name."""
# Common names of metrics that are not similar to ours.
_SYNONYMS = {"acc": "accuracy", "em": "exact_match", "mcc": "matthews_correlation"}
# Runs record these on the validation and test split next to the metrics.
_RESERVED = ("loss", "metric", "metric_group")


@dataclass(frozen=True)
class Metric:
    """Metric of a task.

    Parameters
    ----------
    name : str
        Name, an identifier.
    needs : {"classes", "two classes", "values", "texts", "choices"}
        Predictions and answers that it compares: class numbers, those of a task with two labels, numbers, texts, or
        choices.
    higher_is_better : bool
        Whether a higher value is better.
    compute : callable
        ``compute(predicted, answers)`` returns the metric as a number. Both are arrays of shape (rows,): int64 class
        numbers or float64 values. Texts are a list of strings, with one list of references per text. Choices are an
        array of shape (rows, choices, 3) with the log-likelihood in nats, the number of characters and that of UTF-8
        bytes; in a row with fewer choices than others, the log-likelihood of the missing ones is -inf. Their answers
        are numbers of choices, from 0.

    Raises
    ------
    ValueError
        A field is invalid.

    Examples
    --------
    >>> import numpy as np
    >>> from lorascope.inputs.metrics import Metric, get
    >>> get("accuracy").compute(np.array([1, 0, 1, 1]), np.array([1, 0, 0, 1]))
    0.75
    >>> recall = Metric("recall", "two classes", True, lambda predicted, answers: predicted[answers == 1].mean())
    """

    name: str
    needs: str
    higher_is_better: bool
    compute: Callable[[Any, Any], float]

    def __post_init__(self) -> None:
        if not str(self.name).isidentifier() or self.name in _RESERVED:
            *first, last = _RESERVED
            reserved = f"{', '.join(first)} and {last}"
            raise ValueError(f"name must be an identifier other than {reserved}, got {self.name!r}")
        if self.needs not in _NEEDS:
            raise ValueError(f"needs must be one of {', '.join(map(repr, _NEEDS))}, got {self.needs!r}")


def add(metric: Metric) -> None:
    """Register a metric, so that ``train`` and sweep files know it by name.

    Raises
    ------
    ValueError
        Another metric has this name.
    """
    if METRICS.setdefault(metric.name, metric) is not metric:
        raise ValueError(f"cannot add metric {metric.name!r}: another one has this name")


def get(name: str) -> Metric:
    """Return a registered metric.

    Raises
    ------
    ValueError
        The name is unknown.
    """
    if name in METRICS:
        return METRICS[name]
    if name in _SYNONYMS:
        raise ValueError(f"unknown metric {name!r}; did you mean {_SYNONYMS[name]!r}?")
    raise ValueError(unknown_name("metric", name, METRICS))


def resolve(metric: object) -> tuple[Metric, ...]:
    """Return the metrics of an argument ``metric``: a name, a Metric, or a sequence of these.

    Raises
    ------
    ValueError
        A name is unknown, a metric is repeated, or a new metric has the name of a registered one.
    """
    values = list(metric) if isinstance(metric, list | tuple) else [metric]
    metrics: dict[str, Metric] = {}
    for value in values:
        if isinstance(value, str):
            value = get(value)
        if not isinstance(value, Metric):
            raise ValueError(f"metric must be a name, a Metric or a sequence of these, got {value!r}")
        # Runs store the name only.
        if METRICS.get(value.name, value) is not value:
            raise ValueError(f"name of a metric must not be that of a registered one, got {value.name!r}")
        if value.name in metrics:
            raise ValueError(f"duplicate metric {value.name!r}")
        metrics[value.name] = value
    if not metrics:
        raise ValueError(f"metric must have at least one name, got {metric!r}")
    return tuple(metrics.values())


def require_fit(metrics: Iterable[Metric], task: Task, generates: bool = False) -> None:
    """Raise a ValueError if a task has other predictions than a metric needs; ``generates`` is whether it has texts."""
    predicts = ("texts",) if generates else task.predicts
    fitting = [metric.name for metric in METRICS.values() if metric.needs in predicts]
    for metric in metrics:
        if metric.needs in predicts:
            require_package(metric)
            continue
        if metric.needs == "texts" and task.kind in ("prompt", "seq2seq") and not task.labels:
            raise ValueError(f"metric {metric.name} requires generation: pass Generation()")
        cannot = f"cannot compute {metric.name} of {task.name}"
        if not fitting:
            raise ValueError(f"{cannot}: it has no classes; omit metric to record the perplexity")
        labels = f"{len(task.labels)} classes"
        if "values" in predicts:
            labels = "numbers"
        if "choices" in task.predicts:
            labels = "choices"
        if "texts" in predicts:
            labels = "texts"
        names = f"{', '.join(fitting[:-1])} or {fitting[-1]}"
        raise ValueError(f"{cannot}: its labels are {labels}; use {names}")


# -- classes and values -------------------------------------------------------------------------------------------

Classes = Int[np.ndarray, "rows"]
Values = Float[np.ndarray, "rows"]


def accuracy(predicted: Classes, answers: Classes) -> float:
    """Compute the fraction of rows whose class is right."""
    return float(np.mean(predicted == answers))


def f1(predicted: Classes, answers: Classes) -> float:
    """Compute the F1 score of the second label, 0 without true positives."""
    from sklearn.metrics import f1_score

    return float(f1_score(answers, predicted, zero_division=0.0))


def f1_macro(predicted: Classes, answers: Classes) -> float:
    """Compute the mean F1 score of the classes that are predicted or right in some row."""
    from sklearn.metrics import f1_score

    return float(f1_score(answers, predicted, average="macro", zero_division=0.0))


def matthews_correlation(predicted: Classes, answers: Classes) -> float:
    """Compute Matthews' correlation coefficient of two or more classes, 0 if predictions or answers are constant."""
    from sklearn.metrics import matthews_corrcoef

    if len(np.union1d(predicted, answers)) < 2:
        return 0.0  # scikit-learn would warn
    return float(matthews_corrcoef(answers, predicted))


def _correlation(name: str, predicted: Values, answers: Values) -> float:
    """Compute a correlation coefficient of scipy; NaN for a constant."""
    from scipy import stats

    if np.ptp(predicted) == 0 or np.ptp(answers) == 0:
        return float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        return float(getattr(stats, name)(predicted, answers).statistic)


def mse(predicted: Values, answers: Values) -> float:
    """Compute the mean squared error."""
    return float(np.mean((predicted - answers) ** 2))


# -- choices ------------------------------------------------------------------------------------------------------

Scored = Float[np.ndarray, "rows choices 3"]


def stack_choices(log_likelihoods: Float[np.ndarray, "rows choices"], texts: Sequence[Sequence[str]]) -> Scored:
    """Return log-likelihood, characters and UTF-8 bytes of the choices of each row, as metrics compare them."""
    scores = np.ones((*log_likelihoods.shape, 3))
    scores[..., 0] = log_likelihoods
    for row, choices in enumerate(texts):
        scores[row, : len(choices), 1] = list(map(len, choices))
        scores[row, : len(choices), 2] = [len(choice.encode()) for choice in choices]
    return scores


def choice_accuracy(predicted: Scored, answers: Classes) -> float:
    """Compute the fraction of rows whose right choice has the largest log-likelihood; ties go to the first choice."""
    return accuracy(predicted[..., 0].argmax(axis=1), answers)


def choice_accuracy_norm(predicted: Scored, answers: Classes) -> float:
    """Compute the fraction of rows whose right choice has the largest log-likelihood per character."""
    return accuracy((predicted[..., 0] / predicted[..., 1]).argmax(axis=1), answers)


def choice_accuracy_bytes(predicted: Scored, answers: Classes) -> float:
    """Compute the fraction of rows whose right choice has the largest log-likelihood per UTF-8 byte."""
    return accuracy((predicted[..., 0] / predicted[..., 2]).argmax(axis=1), answers)


# -- texts --------------------------------------------------------------------------------------------------------

Texts = Sequence[str]
References = Sequence[Sequence[str]]


@contextmanager
def _naming_metric(name: str) -> Iterator[None]:
    """Name the extra to install for a metric if an import within the context fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (required := requirement(error)) is None:
            raise
        raise ModuleNotFoundError(f"metric {name!r} {required}", name=error.name) from None


def require_package(metric: Metric) -> None:
    """Import the package of a metric of texts, so that a missing one, or Java, is reported before the training.

    Raises
    ------
    ModuleNotFoundError
        The package is not installed.
    FileNotFoundError
        The metric requires Java, and there is no command java.
    """
    packages: dict[Any, str] = {_rouge: "rouge_score", _sacrebleu: "sacrebleu", _caption: "pycocoevalcap"}
    package = packages.get(getattr(metric.compute, "func", None))
    if package is not None:
        with _naming_metric(metric.name):
            importlib.import_module(package)
    if package == "pycocoevalcap":
        caption_metrics.require_java(metric.name)


def _best_of_references(score: Callable[[str, str], float], predicted: Texts, answers: References) -> float:
    """Return the mean over texts of the best score among the references of each."""
    scores = [max(score(text, answer) for answer in texts) for text, texts in zip(predicted, answers, strict=True)]
    return float(np.mean(scores))


def _normalized_words(text: str) -> list[str]:
    """Return the words of a text without case, ASCII punctuation and English articles, as SQuAD compares them."""
    letters = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", letters).split()


def _are_equal(text: str, answer: str) -> float:
    return float(_normalized_words(text) == _normalized_words(answer))


def _f1_of_words(text: str, answer: str) -> float:
    words, answer_words = _normalized_words(text), _normalized_words(answer)
    # SQuAD 2.0 has questions without an answer, whose text is empty.
    if not words or not answer_words:
        return float(words == answer_words)
    common = (Counter(words) & Counter(answer_words)).total()
    return 2 * common / (len(words) + len(answer_words))


def exact_match(predicted: Texts, answers: References) -> float:
    """Compute the fraction of texts that equal a reference without case, punctuation and articles (SQuAD)."""
    return _best_of_references(_are_equal, predicted, answers)


def f1_words(predicted: Texts, answers: References) -> float:
    """Compute the mean F1 score of the words of each text and its best reference (SQuAD)."""
    return _best_of_references(_f1_of_words, predicted, answers)


def _rouge(kind: str, predicted: Texts, answers: References) -> float:
    """Compute the mean F-measure of a kind of ROUGE of rouge-score, with stemmer and the best reference of a text."""
    with _naming_metric(kind):
        from rouge_score.rouge_scorer import RougeScorer
    scorer = RougeScorer([kind], use_stemmer=True)

    def score(text: str, answer: str) -> float:
        return float(scorer.score(answer, text)[kind].fmeasure)

    return _best_of_references(score, predicted, answers)


def _sacrebleu(name: str, predicted: Texts, answers: References, **options: Any) -> float:
    """Compute a score of sacrebleu, from 0 to 100, for any number of references per text."""
    with _naming_metric(name):
        import sacrebleu
    scorer: Any = sacrebleu.CHRF if name == "chrf" else sacrebleu.BLEU
    # A list per number of the reference, in which None stands for a missing one.
    references = list(itertools.zip_longest(*answers))
    return float(scorer(**options).corpus_score(list(predicted), references).score)


def _caption(name: str, predicted: Texts, answers: References) -> float:
    """Compute a metric of pycocoevalcap."""
    with _naming_metric(name):
        return caption_metrics.caption_score(name, predicted, answers)


_MAX_NGRAM = 5
# Punctuation other than apostrophes, periods, commas and dashes is a token; these are next to other characters than
# digits, a dash after a digit.
_TOKENIZATION_13A = (
    (r"([{-~\[-` -&(-+:-@/])", r" \1 "),
    (r"([^0-9])([.,])", r"\1 \2 "),
    (r"([.,])([^0-9])", r" \1 \2"),
    (r"([0-9])(-)", r"\1 \2 "),
)


def _tokens_13a(text: str) -> list[str]:
    """Return the tokens of a text without case, as mteval-v13a splits it."""
    text = text.replace("-\n", "").lower()
    for entity, character in {"&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}.items():
        text = text.replace(entity, character)
    text = f" {text} "
    for pattern, replacement in _TOKENIZATION_13A:
        text = re.sub(pattern, replacement, text)
    return text.split()


def _ngrams(tokens: Sequence[str]) -> Counter[tuple[str, ...]]:
    """Count the n-grams of up to five tokens."""
    counts: Counter[tuple[str, ...]] = Counter()
    for size in range(1, _MAX_NGRAM + 1):
        for start in range(len(tokens) - size + 1):
            counts[tuple(tokens[start : start + size])] += 1
    return counts


def nist(predicted: Texts, answers: References) -> float:
    """Compute NIST without case: the information of n-grams, up to 5, that a reference has, as e2e-metrics does.

    References of a text count equally in its mean length. The Perl script mteval-v13a weights texts by their number of
    references there, which changes the score of texts that are shorter than their references.
    """
    corpus: Counter[tuple[str, ...]] = Counter()
    matches: list[Counter[tuple[str, ...]]] = []
    totals, length, reference_length = np.zeros(_MAX_NGRAM), 0, 0.0
    for text, texts in zip(predicted, answers, strict=True):
        tokens, references = _tokens_13a(text), list(map(_tokens_13a, texts))
        best: Counter[tuple[str, ...]] = Counter()
        for reference in references:
            counts = _ngrams(reference)
            corpus += counts
            best |= counts
            corpus[()] += len(reference)
        matches.append(_ngrams(tokens) & best)
        totals += np.maximum(len(tokens) - np.arange(_MAX_NGRAM), 0)
        length += len(tokens)
        reference_length += sum(map(len, references)) / len(references)
    information = np.zeros(_MAX_NGRAM)
    for matched in matches:
        for ngram, count in matched.items():
            information[len(ngram) - 1] += count * math.log2(corpus[ngram[:-1]] / corpus[ngram])
    if not length:
        return 0.0
    ratio = min(length / reference_length, 1.0)
    # Half the score at two thirds of the length.
    penalty = 0.5 ** ((math.log(ratio) / math.log(1.5)) ** 2)
    return float(penalty * np.sum(information / np.maximum(totals, 1)))


add(Metric("accuracy", "classes", True, accuracy))
add(Metric("f1", "two classes", True, f1))
add(Metric("f1_macro", "classes", True, f1_macro))
add(Metric("matthews_correlation", "classes", True, matthews_correlation))
add(Metric("pearson", "values", True, partial(_correlation, "pearsonr")))
add(Metric("spearman", "values", True, partial(_correlation, "spearmanr")))
add(Metric("mse", "values", False, mse))
add(Metric("choice_accuracy", "choices", True, choice_accuracy))
add(Metric("choice_accuracy_norm", "choices", True, choice_accuracy_norm))
add(Metric("choice_accuracy_bytes", "choices", True, choice_accuracy_bytes))
add(Metric("exact_match", "texts", True, exact_match))
add(Metric("f1_words", "texts", True, f1_words))
for _kind in ("rouge1", "rouge2", "rougeL", "rougeLsum"):
    add(Metric(_kind, "texts", True, partial(_rouge, _kind)))
add(Metric("bleu", "texts", True, partial(_sacrebleu, "bleu")))
add(Metric("bleu_lower", "texts", True, partial(_sacrebleu, "bleu_lower", lowercase=True)))
# As NeFT's command, sacrebleu -l en-zh --lowercase.
add(Metric("bleu_zh", "texts", True, partial(_sacrebleu, "bleu_zh", lowercase=True, tokenize="zh")))
add(Metric("nist", "texts", True, nist))
for _kind in ("meteor", "cider", "rougeL_coco"):
    add(Metric(_kind, "texts", True, partial(_caption, _kind)))
add(Metric("chrf", "texts", True, partial(_sacrebleu, "chrf")))

load_entry_points("lorascope.metrics")


def __dir__() -> list[str]:
    return __all__
