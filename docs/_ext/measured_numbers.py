"""Measured numbers that the blocks of README and docs print; text outside the blocks must not repeat them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path

import page_blocks
import pandas as pd
from verdict_tables import SCORES, Tables, format_p

from lorascope.files.printable import printable
from lorascope.files.typed_json import read_text
from lorascope.papers.judging import first_edition, published_numbers
from lorascope.papers.judging.kept_runs import Evidence
from lorascope.papers.judging.registration import Registration
from lorascope.papers.judging.verdicts import Pair
from lorascope.papers.judging.verification import Derived, derive

FILE = "numbers.csv"
COLUMNS = ("key", "value", "digits", "from")
LEAST_DIGITS = 3
"""Numbers with fewer significant digits are often equal by chance."""
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
_DECIMAL = re.compile(r"(?<![\w.,])\d[\d,]*\.\d+(?!\w|\.\d)")
_CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.DOTALL | re.MULTILINE)
_EFFECT = ("effect", "low", "high")


def measured_numbers(tables: Tables) -> pd.DataFrame:
    """List the measured numbers that the blocks print.

    Those are effects with their intervals and p-values, mean scores of arms with half their intervals, and the cost of
    the runs. Bounds, learning rates and numbers that the papers print are not measured.

    Returns
    -------
    DataFrame
        ``COLUMNS``: one row per number. ``value`` is the number as printed, without commas, ``digits`` its number of
        significant digits, and ``from`` the file that it is computed from.
    """
    rows = [(key, text.replace(",", ""), significant_digits(text), source) for key, text, source in _printed(tables)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def derive_all(evidence: Evidence, claims: Registration, pairs: Mapping[str, Pair], data: Path) -> Derived:
    """Compute everything that follows from the runs: what `verification.derive` does, and the measured numbers.

    ``data`` is the folder of the registration.
    """
    derived = derive(evidence, claims, pairs)
    return derived.with_file(FILE, measured_numbers(Tables(claims, data, evidence, derived)))


def significant_digits(text: str) -> int:
    """Return the number of significant digits of a printed number; trailing zeros count."""
    return len(re.sub(r"e.*|\D", "", text).lstrip("0"))


def _printed(tables: Tables) -> Iterator[tuple[str, str, str]]:
    """Return key, text and source of every number."""
    claims = first_edition.read_claims()
    for on_figures in published_numbers.judge_published(claims, tables.data / "published").to_dict("records"):
        if on_figures["outcome"] != published_numbers.NOT_JUDGED:
            yield from _numbers(on_figures["claim"], _EFFECT, on_figures["shown"], "data/published")
    for id, row in tables.rows.items():
        if row["look"] >= 1:
            yield from _numbers(id, _EFFECT, row["shown"], "verdicts.csv")
            for name, p in (("p", row["p_looks"]), ("adjusted p", row["adjusted_p"])):
                if not (text := format_p(p)).startswith("<"):
                    yield from _numbers(id, (name,), text, "verdicts.csv")
            yield from _numbers(f"{id}, all seeds", _EFFECT, row["all_seeds"], "verdicts.csv")
    for other in tables.derived.machines.to_dict("records"):
        yield from _numbers(f"{other['claim']} on {other['block']}", _EFFECT, other["shown"], "runs.csv")
    for label, *_, accuracy, loss in tables.arm_rows:
        for score, text in zip(SCORES, (accuracy, loss), strict=True):
            yield from _numbers(label, (score, f"{score}, half interval"), text, "runs.csv")
    if tables.mixture_rows:
        (_, _, *tasks), _, *arms = tables.mixture_rows
        for arm, _, *accuracies in arms:
            for task, text in zip(tasks, accuracies, strict=True):
                yield from _numbers(arm, (task, f"{task}, half interval"), text, "predictions")
    if len(tables.evidence.runs):
        yield from _numbers("all runs", ("CPU-minutes",), f"{tables.minutes:,}", "runs.csv")


def _numbers(key: str, names: Sequence[str], text: str, source: str) -> Iterator[tuple[str, str, str]]:
    for name, number in zip(names, _NUMBER.findall(text), strict=False):  # some effects have no interval
        yield f"{key}: {name}", number, source


def repeated(page: Path, numbers: pd.DataFrame) -> Iterator[str]:
    """Return one line for every measured number that a page with blocks repeats outside them.

    Numbers with a decimal point and at least ``LEAST_DIGITS`` significant digits are compared, regardless of the sign.
    Code is left out, because it shows the output of other runs.
    """
    text = read_text(page)
    outside = page_blocks.without_blocks(text)
    if outside == text:
        return
    measured = {abs(Decimal(value)): key for key, value in zip(numbers["key"], numbers["value"], strict=True)}
    prose = _CODE.sub(lambda match: "\n" * match[0].count("\n"), outside)
    for line, content in enumerate(prose.splitlines(), start=1):
        for number in _DECIMAL.findall(content):
            key = measured.get(Decimal(number.replace(",", "")))
            if key and significant_digits(number) >= LEAST_DIGITS:
                yield (
                    f"{printable(page)}:{line}: {number} is a measured number outside a block ({key}): leave it out, "
                    "because the text does not follow the evidence"
                )
