"""Sentences on what we now believe of each paper, with the results that they rely on, and the table of nine rows."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd

from lorascope.files.printable import printable
from lorascope.files.typed_json import unreadable
from lorascope.papers.judging.csv_tables import NUMBER, TEXT, parse_csv, read_csv
from lorascope.papers.judging.first_edition import VERDICTS
from lorascope.papers.judging.registered_study import StudyClaim, StudyRegistration
from lorascope.papers.judging.study_results import RESULT_COLUMNS
from lorascope.papers.judging.words import NO_HEADROOM, NOT_LEARNED, NOT_RUN

FILE = "beliefs.toml"
MAX_WORDS = 25
UNJUDGED = (NOT_RUN, NOT_LEARNED, NO_HEADROOM)
"""Words that replace an effect."""
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d+\.\d+")
_TEXTS = ("claim", "word", "pair", "excludes_zero", "excludes_printed", "note")
_RESULT_KINDS = dict.fromkeys(RESULT_COLUMNS, NUMBER) | dict.fromkeys(_TEXTS, TEXT)
# Unit of a claim -> digits, and what follows the number.
_FORMATS = {
    "points of accuracy": (2, ""), "nats": (3, " nats"), "percent of the loss": (1, "%"),
    "log10 of the ratio of norms": (2, ""), "doublings": (2, ""), "rank correlation": (2, ""), "scale": (2, ""),
}  # fmt: skip


class Belief(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sentence on what we now believe of a paper.

    Parameters
    ----------
    paper, arxiv : str
        Name of its method, and its number.
    sentence : str
        At most 25 words.
    words : mapping id -> str
        Claims that the sentence relies on, with their words, or verdicts of the first edition; those of the headline
        included.
    numbers : tuple of str
        For each number of the sentence with a decimal point, the claim and column that it is from, such as
        "pair.adalora against_effect". A minus in front exchanges the sign.
    """

    paper: str
    arxiv: str
    sentence: str
    words: dict[str, str]
    numbers: tuple[str, ...] = ()


class _Contents(msgspec.Struct, forbid_unknown_fields=True):
    belief: tuple[Belief, ...]


def read_beliefs(folder: Path) -> tuple[Belief, ...]:
    """Read ``beliefs.toml`` in a folder of evidence.

    Raises
    ------
    FileNotFoundError
        It does not exist.
    ValueError
        It is not TOML, or a key is unknown or has another type.
    """
    file = folder / FILE
    try:
        return msgspec.toml.decode(file.read_bytes(), type=_Contents).belief
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise unreadable(file, printable(error)) from error


def read_results(folder: Path) -> pd.DataFrame:
    """Read ``results.csv`` in a folder of evidence, with NaN for missing numbers."""
    return read_csv(folder / "results.csv", _RESULT_KINDS)


def belief_differences(folder: Path, registration: StudyRegistration, results_csv: bytes) -> Iterator[str]:
    """Compare the sentences with the results that they rely on, and yield one line per difference.

    Parameters
    ----------
    folder : path
        Folder of the evidence, with ``beliefs.toml``. A sentence may also rely on verdicts of ``edition-1`` next to it.
    registration : StudyRegistration
        Claims; each of their papers must have one sentence.
    results_csv : bytes
        Content of ``results.csv``.
    """
    try:
        beliefs = read_beliefs(folder)
    except FileNotFoundError:
        yield f"{FILE}: no such file"
        return
    except ValueError as error:
        yield printable(error)
        return
    papers = sorted({claim.paper.arxiv for claim in registration.claims.values()})
    if sorted(belief.arxiv for belief in beliefs) != papers:
        yield f"{FILE}: must have one sentence per paper: {', '.join(papers)}"
    table = parse_csv(results_csv, _RESULT_KINDS).set_index("claim")
    results: dict[Any, Any] = table.to_dict("index")
    words: dict[Any, str] = table["pair"].where(table["pair"] != "", table["word"]).to_dict()
    verdicts = folder.with_name("edition-1") / VERDICTS
    if verdicts.exists():
        words |= pd.read_csv(verdicts).set_index("claim")["outcome"].to_dict()
    for belief in beliefs:
        for difference in _differences(belief, registration, results, words):
            yield f"{FILE}: {printable(belief.paper)}: {difference}"


def _differences(
    belief: Belief, registration: StudyRegistration, results: Mapping[str, Any], words: Mapping[str, str]
) -> Iterator[str]:
    if (count := len(belief.sentence.split())) > MAX_WORDS:
        yield f"the sentence must have at most {MAX_WORDS} words, got {count}"
    for claim in headline_claims(registration, belief.arxiv):
        if claim.id not in belief.words:
            yield f"words must have {claim.id}, a claim of the headline"
    for id, word in belief.words.items():
        if id not in words:
            yield f"{printable(id)} has no result"
        elif words[id] != word:
            yield f"{id} is {words[id]!r}, the sentence relies on {printable(word)!r}"
    # Other numbers, such as "rank 2" and "9%", are not effects.
    numbers = _NUMBER.findall(belief.sentence)
    if len(numbers) != len(belief.numbers):
        yield f"numbers must have one place per number of the sentence: {', '.join(numbers) or 'none'}"
    for number, position in zip(numbers, belief.numbers, strict=False):
        sign, (id, _, column) = position[:1], position.removeprefix("-").partition(" ")
        if id not in belief.words or id not in results or _RESULT_KINDS.get(column) != NUMBER:
            expected = "a claim of words and a column, such as 'pair.lora low'"
            yield f"numbers must name {expected}, got {printable(position)!r}"
            continue
        value = float(results[id][column])
        # The sentence decides how many digits it has.
        digits = len(number.partition(".")[2])
        rounded = f"{-value if sign == '-' else value:.{digits}f}"
        if float(rounded) != float(number):
            yield f"{position} is {rounded}, the sentence has {number}"


def headline_claims(registration: StudyRegistration, arxiv: str) -> list[StudyClaim]:
    """Return the claims of a paper in the table of nine rows: its pair, and the claim on text if there is one."""
    claims = registration.claims.values()
    return [claim for claim in claims if claim.rule.headline and claim.paper.arxiv == arxiv]


def shown_word(result: Mapping[str, Any]) -> str:
    """Return the word of a result: that of the pair, or else that of the effect."""
    return str(result["pair"] or result["word"])


def headline_table(
    beliefs: Sequence[Belief], registration: StudyRegistration, results: pd.DataFrame, earlier: pd.DataFrame
) -> pd.DataFrame:
    """Tabulate the nine papers as texts: ``paper, printed, text, truths, belief``.

    Parameters
    ----------
    beliefs : sequence of Belief
        One per row.
    registration : StudyRegistration
        Claims.
    results : DataFrame
        See ``read_results``.
    earlier : DataFrame
        Estimates of edition 1, as ``forest_table`` takes them. They appear with the mark "(1)" where this edition has
        no result on text.
    """
    by_claim: dict[Any, Any] = results.set_index("claim").to_dict("index")
    estimates: dict[Any, Any] = earlier.set_index("method").to_dict("index")
    rows = []
    for belief in beliefs:
        # A paper may print no gain, and text is replaced by a result of this edition.
        printed, text, truths = "", "", ""
        if belief.paper in estimates:
            estimate = estimates[belief.paper]
            effect = format_with_interval(estimate, estimate["unit"])
            text = f"{', '.join(filter(None, (effect, estimate['word'])))} (1)"
        for claim in headline_claims(registration, belief.arxiv):
            result = by_claim[claim.id]
            if isinstance(claim.paper.printed, float):
                printed = f"{claim.paper.printed:+g}"
            if claim.id.startswith("pair."):
                truths = result["word"]
                if truths not in UNJUDGED:
                    unit = claim.rule.unit
                    truths = (
                        f"{format_signed(result['effect'], unit)} / {format_signed(result['against_effect'], unit)}"
                    )
            elif result["word"] != NOT_RUN:
                text = result["word"]
                if text not in UNJUDGED:
                    text = format_with_interval(result, claim.rule.unit)
        rows.append((belief.paper, printed, text, truths, belief.sentence))
    return pd.DataFrame(rows, columns=["paper", "printed", "text", "truths", "belief"])


def readme_differences(
    readme: Path, folder: Path, registration: StudyRegistration, earlier: pd.DataFrame
) -> Iterator[str]:
    """Compare the nine rows of the README with those of a folder of evidence, and yield one line per difference."""
    lines = readme.read_text(encoding="utf-8").splitlines()
    table = headline_table(read_beliefs(folder), registration, read_results(folder), earlier)
    for paper, *texts in table.itertuples(index=False):
        link = f"[{paper}](docs/papers/{paper.lower()}.md)"
        row = f"| {' | '.join([link, *texts])} |"
        if row not in lines:
            yield f"{readme.name}: {paper}: there is no row {printable(row)}"


def format_signed(value: float, unit: str) -> str:
    """Format an effect with its sign; a missing one as an empty text."""
    if math.isnan(value):
        return ""
    digits, suffix = _FORMATS.get(unit, (1, ""))
    return f"{value:+.{digits}f}{suffix}"


def format_with_interval(result: Mapping[str, Any], unit: str, prefix: str = "") -> str:
    """Format an effect with its 95% interval; a missing one as an empty text."""
    effect, low, high = (float(result[f"{prefix}{name}"]) for name in ("effect", "low", "high"))
    if math.isnan(effect):
        return ""
    digits, suffix = _FORMATS.get(unit, (1, ""))
    return f"{effect:+z.{digits}f} [{low:z.{digits}f}, {high:z.{digits}f}]{suffix}"
