"""First edition: 21 verdicts that its runs decided, estimates of its other claims, and their verification.

The folder ``data/edition-1`` has

- ``registered.toml``: all claims with their bounds, as they were fixed before the runs, and the arms;
- ``runs.csv.gz``, ``right.npz``, ``rows.parquet`` and tables, as in ``kept_study``: what the verdicts follow from;
- ``verdicts.csv``: the 21 verdicts, which ``verify_first`` computes again;
- ``published.csv``: results on published numbers, see ``published_numbers``;
- ``estimates.csv``: estimates of the claims that were withdrawn or retired, with the reason;
- ``earlier.csv``: verdicts before the registration.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lorascope.analysis.seed_intervals import (
    CONFIDENCE,
    Estimate,
    jackknife_estimate,
    pseudo_values,
    t_estimate,
    two_way_estimate,
)
from lorascope.files.data_folder import DATA
from lorascope.files.printable import count_phrase, printable
from lorascope.files.typed_json import unreadable
from lorascope.papers.judging import kept_study
from lorascope.papers.judging.csv_tables import compare_with_file, to_csv
from lorascope.papers.judging.evidence_manifest import kept_digests, manifest, parse_digests
from lorascope.papers.judging.kept_study import StudyEvidence
from lorascope.papers.judging.statistics import Statistic
from lorascope.papers.judging.words import NO_HEADROOM, NOT_LEARNED

FOLDER = DATA / "edition-1"
VERDICTS, PUBLISHED = "verdicts.csv", "published.csv"
FIRST_SEED = 100
_SIDE = (1 - CONFIDENCE) / 2
_HEADLINES = {
    "LoRA": ("lora.parity", ""),
    "AdaLoRA": ("adalora.better", NO_HEADROOM), "AutoLoRA": ("autolora.better", NOT_LEARNED),
    "ALoRA": ("alora.better", NOT_LEARNED), "HydraLoRA": ("hydralora.better", NOT_LEARNED),
    "FourierFT": ("fourierft.parity", ""), "NeFT": ("neft.over_full", ""), "LISA": ("lisa.decoder", ""),
    "Adapprox": ("adapprox.pretraining", ""),
}  # fmt: skip
"""Claim on text, and the word that replaces its estimate, by the method of the paper."""


@dataclass(frozen=True)
class FirstClaim:
    """A claim of the first edition.

    Parameters
    ----------
    id, sentence : str
        Name, and what is claimed.
    arxiv, place : str
        Where a paper claims it.
    published : bool
        Whether it is about numbers that the papers or their authors published, without runs.
    kind : {"superiority", "non-inferiority", "equivalence"}
        Rule that judges it; see ``decide``. No claim of equivalence has a verdict.
    bound : float
        Margin of superiority, or tolerance, > 0, in the unit.
    unit : str
        Unit of the effect.
    interval : {"t", "two-way", "jackknife", "published"}
        Method of the interval.
    seeds : int
        Number of seeds, of which the first is ``FIRST_SEED``; 0 if it is published.
    level : float
        Error of the interval at each end.
    """

    id: str
    sentence: str
    arxiv: str
    place: str
    published: bool
    kind: str
    bound: float
    unit: str
    interval: str
    seeds: int
    level: float

    def decide(self, low: float, high: float) -> str:
        """Judge the claim by the interval of its effect: "supported", "not supported" or "inconclusive".

        It is supported if the whole interval is above the margin of superiority, or above minus the tolerance of
        non-inferiority, and not supported if it is below.
        """
        limit = {"superiority": self.bound, "non-inferiority": -self.bound}[self.kind]
        if low > limit:
            return "supported"
        # An interval that contains the limit decides nothing.
        if high < limit:
            return "not supported"
        return "inconclusive"


def read_claims(file: Path = FOLDER / "registered.toml") -> dict[str, FirstClaim]:
    """Read the registered claims by id, in their order; raise a ValueError if the file is damaged."""
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))["claim"]
        return {table["id"]: _claim(table) for table in tables}
    except (KeyError, TypeError, ValueError) as error:
        raise unreadable(file, printable(error)) from error


def _claim(table: Mapping[str, Any]) -> FirstClaim:
    paper, bound, design = table["paper"], table["bound"], table["design"]
    # All verdicts were decided at the first of the registered numbers of seeds; published numbers have none.
    # A longer design gave the first of them a smaller error, so that a later look could follow.
    seeds, level = [*design["looks"], 0][0], [*design["levels"], _SIDE][0]
    return FirstClaim(
        id=table["id"],
        sentence=table["text"]["sentence"],
        arxiv=paper["arxiv"],
        place=paper["place"],
        published=paper["tier"] == "published",
        kind=bound["kind"],
        bound=bound.get("margin") or bound["tolerance"],
        unit=bound["unit"],
        interval=design["interval"],
        seeds=seeds,
        level=level,
    )


def estimate(claim: FirstClaim, statistic: Statistic, evidence: StudyEvidence) -> Estimate:
    """Estimate the effect of a claim over its registered seeds.

    Parameters
    ----------
    claim : FirstClaim
        The claim.
    statistic : Statistic
        Its effect: one value per seed, per seed and test row, or per pair of seeds, as its interval needs.
    evidence : StudyEvidence
        Kept runs.
    """
    seeds = range(FIRST_SEED, FIRST_SEED + claim.seeds)
    values = statistic(evidence, seeds)
    if claim.interval == "two-way":
        # All arms have the same test rows.
        return two_way_estimate(values, evidence.clusters(min(statistic.arms()), FIRST_SEED))
    if claim.interval == "jackknife":
        # Two pairs with a run in common are not independent, but the pseudo-values of seeds are.
        return jackknife_estimate(pseudo_values(values))
    return t_estimate(values)


def judge(
    claims: Mapping[str, FirstClaim], statistics: Mapping[str, Statistic], evidence: StudyEvidence
) -> pd.DataFrame:
    """Judge the claims that have a statistic.

    Returns
    -------
    DataFrame
        ``claim, seeds, effect, level, low, high, low_95, high_95, outcome``: the interval has the registered error
        ``level`` at each end, and decides the outcome. That at 95% is for comparison.
    """
    rows = []
    for id, statistic in statistics.items():
        claim = claims[id]
        effect = estimate(claim, statistic, evidence)
        mean, low, high, n = effect.interval(claim.level)
        _, low_95, high_95, _ = effect.interval(_SIDE)
        rows.append((id, n, mean, claim.level, low, high, low_95, high_95, claim.decide(low, high)))
    columns = ["claim", "seeds", "effect", "level", "low", "high", "low_95", "high_95", "outcome"]
    return pd.DataFrame(rows, columns=columns)


def _digests(folder: Path) -> dict[str, str]:
    digests = parse_digests(manifest(folder))
    for path in list(digests):
        # Results are computed again, and images contain the digest of their figure.
        if path in (VERDICTS, PUBLISHED) or path.startswith("figures/"):
            del digests[path]
    return digests


def verify_first(folder: Path, statistics: Mapping[str, Statistic]) -> Iterator[str]:
    """Compute the verdicts of a folder again.

    Parameters
    ----------
    folder : path
        Folder of the first edition.
    statistics : mapping id -> Statistic
        Effects of the claims that have a verdict.

    Yields
    ------
    str
        One line per changed file, then one with the number of verdicts that follow from them; or else one line per
        difference of a verdict.
    """
    old, new = kept_digests(folder), _digests(folder)
    changed = sorted(path for path in old.keys() | new.keys() if old.get(path) != new.get(path))
    for path in changed:
        yield f"{folder.name}: {printable(path)}: differs from MANIFEST"
    try:
        content = to_csv(judge(read_claims(folder / "registered.toml"), statistics, kept_study.read(folder)))
    except (KeyError, TypeError, ValueError, OSError) as error:
        yield f"{folder.name}: cannot compute the verdicts: {printable(error)}"
        return
    differences = list(compare_with_file(folder / VERDICTS, content))
    if changed and differences:
        yield f"{folder.name}: {count_phrase(len(differences), 'further difference')} in what follows from these"
    elif not changed:
        yield from (f"{folder.name}: {line}" for line in differences)


def read_estimates(folder: Path = FOLDER) -> pd.DataFrame:
    """Read ``claim, reason, seeds, effect, low, high`` of the claims without a verdict, with 95% intervals."""
    return pd.read_csv(folder / "estimates.csv")


def text_estimates(folder: Path = FOLDER) -> pd.DataFrame:
    """Return the estimates of the methods' effects on text, for the results of the second edition.

    Returns
    -------
    DataFrame
        ``method, claim, effect, low, high, unit, word``: mean and 95% interval in points of accuracy or nats, and the
        word that replaces them, if any.
    """
    verdicts = pd.read_csv(folder / VERDICTS).drop(columns=["low", "high"])
    verdicts = verdicts.rename(columns={"low_95": "low", "high_95": "high"})
    effects = pd.concat([verdicts, read_estimates(folder)]).set_index("claim")[["effect", "low", "high"]]
    claims, rows = read_claims(folder / "registered.toml"), []
    for method, (id, word) in _HEADLINES.items():
        unit, scale = claims[id].unit, 1.0
        if unit == "accuracy":
            unit, scale = "points of accuracy", 100.0
        if word == NOT_LEARNED:
            scale = np.nan  # of an arm at chance level, no number is shown
        rows.append((method, id, *(scale * effects.loc[id].to_numpy(np.float64)), unit, word))
    return pd.DataFrame(rows, columns=["method", "claim", "effect", "low", "high", "unit", "word"])


def format_estimate(claim: FirstClaim, effect: float, low: float, high: float) -> str:
    """Format the effect of a claim and its interval, such as ``0.0112 [0.0041, 0.0183]``.

    There are at least three significant digits, and as many as it takes to see on which side of 0 and of the bounds of
    the claim each end is.
    """
    if np.isnan(low):
        return f"{_format_digits(effect, 3)} [no interval]"
    bounds = np.array([0.0, claim.bound, -claim.bound])
    for digits in range(3, 17):  # a float64 has about 16 significant digits
        text, low_text, high_text = (_format_digits(value, digits) for value in (effect, low, high))
        printed, exact = np.array([[float(low_text)], [float(high_text)]]), np.array([[low], [high]])
        if np.array_equal(np.sign(printed - bounds), np.sign(exact - bounds), equal_nan=True):
            break
    return f"{text} [{low_text}, {high_text}]"


def _format_digits(value: float, digits: int) -> str:
    """Format a number with these significant digits, including zeros at the end, and with all before the point."""
    text = f"{value:#.{digits}g}"
    # A large number would be printed with an exponent, and an integer with a point at its end.
    if "e+" in text:
        return f"{value:.0f}"
    return text.removesuffix(".")
