"""Effects computed from figures that the papers or their authors published, without training.

The tables are in ``data/published``; its README says where each number comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lorascope.analysis.seed_intervals import Estimate, Interval, t_interval
from lorascope.files.printable import printable
from lorascope.papers.judging.csv_tables import compare_with_file, to_csv
from lorascope.papers.judging.first_edition import PUBLISHED, FirstClaim, format_estimate, read_claims

LEVEL = 0.025
MINIMUM_SEEDS = 3  # a t-interval of two seeds reaches 12.7 standard errors to each side
Effect = Callable[[Path], Interval]

_ATTENTION, _FEED_FORWARD = 768 + 768 + 1, 768 + 3072 + 1
"""Parameters of one component of AdaLoRA in DeBERTaV3-base: of a 768 x 768 and of a 768 x 3072 matrix."""


def fourierft(folder: Path) -> Interval:
    """Compute the points by which FourierFT's published logs are above LoRA's scores, mean over comparable cells.

    A cell is a task and a model size. Cells in which LoRA starts from an adapter trained on MNLI are left out. The
    interval is Welch's: every cell has five seeds of FourierFT, and LoRA's printed deviation over as many.
    """
    cells, seeds = pd.read_csv(folder / "fourierft_glue_cells.csv"), pd.read_csv(folder / "fourierft_glue_seeds.csv")
    # Without logs there is nothing to compare, and a start from MNLI is another starting point.
    cells = cells[(cells["seeds"] > 0) & ~cells["lora_starts_from_mnli"]]
    scores = seeds[seeds["used"]].groupby(["task", "size"])["best"]
    logged = cells.join(scores.agg(["mean", "var", "count"]), on=["task", "size"])
    of_lora = logged["lora_printed_sd"] ** 2 / logged["lora_seeds"]
    variances = np.concatenate([logged["var"] / logged["count"], of_lora])
    degrees = np.concatenate([logged["count"] - 1, logged["lora_seeds"] - 1])
    error = float(np.sqrt(variances.sum())) / len(logged)
    welch_degrees = float(variances.sum() ** 2 / (variances**2 / degrees).sum())
    effect = float((logged["mean"] - logged["lora_printed_median"]).mean())
    return Estimate(effect, int(logged["count"].min()), ((error, welch_degrees),)).interval(LEVEL)


def autolora(folder: Path) -> Interval:
    """Compute how far the ranks in AutoLoRA's published lists spread beyond those of random logits.

    The value of a list is the standard deviation of its 24 ranks; the expectation under random logits is simulated.
    """
    lists, chance = pd.read_csv(folder / "autolora_lists.csv"), pd.read_csv(folder / "autolora_chance.csv")
    expected = chance.loc[chance["rule"] == "logit at or above the mean logit", "expected_sd_of_24"].item()
    return t_interval(lists.loc[lists["judged"], "sd"].to_numpy() - expected)


def autolora_data(folder: Path) -> Interval:
    """Return how much more published lists of one dataset agree (Kendall's tau) than of two, with its permutations."""
    tests = pd.read_csv(folder / "autolora_tests.csv")
    row = tests[tests["statement"].str.startswith("lists of one data set agree more")].iloc[0]  # prose: ok
    return Interval(row["effect"], row["low"], row["high"], row["n"])


def adalora(folder: Path) -> Interval:
    """Compute the share of the ranks in feed-forward matrices minus a third, from AdaLoRA's published parameter counts.

    With b components, a fraction f of which are in feed-forward matrices, a model has ``b (1537 (1 - f) + 3841 f)``
    parameters. The interval is what the rounding of both printed counts leaves open, so it has no seeds.
    """
    counts = pd.read_csv(folder / "adalora_parameters.csv")

    def share(rounding: float) -> pd.Series:
        per_component = (counts["printed_millions"] + rounding) * 1e6 / counts["budget"]
        return (per_component - _ATTENTION) / (_FEED_FORWARD - _ATTENTION) - 1 / 3

    # The counts are printed to 0.01 million. The lowest and the highest model limit the interval.
    return Interval(float(share(0).mean()), float(share(-0.005).min()), float(share(0.005).max()), len(counts))


def neft_loss(folder: Path) -> Interval:
    """Compute the nats by which NeFT's best published development loss is below that of full fine-tuning.

    The mean is over two language pairs with one run per method, so there is no interval.
    """
    best = pd.read_csv(folder / "neft_dev_loss.csv").pivot(index="pair", columns="method", values="best_loss")
    return Interval(float((best["full fine-tuning"] - best["NeFT"]).mean()), np.nan, np.nan, len(best))


def hydralora(folder: Path) -> Interval:
    """Return the published points by which HydraLoRA is above LoRA of as many parameters; runs are not stated."""
    gains = pd.read_csv(folder / "printed_gains.csv").set_index("comparison")
    # No number of runs is stated, so n is 0, which makes the claim inconclusive.
    return Interval(gains["mean_gain"]["HydraLoRA over LoRA of as many parameters"], np.nan, np.nan, 0)


EFFECTS: dict[str, Effect] = {
    "published.fourierft": fourierft,
    "published.autolora": autolora,
    "published.autolora_data": autolora_data,
    "published.adalora": adalora,
    "published.neft_loss": neft_loss,
    "published.hydralora": hydralora,
}
"""Effects of the judged claims on published figures, by the id of the claim."""
NOT_JUDGED = "shown, not judged"
"""Outcome of a claim on printed numbers that have no interval by their nature."""
_WITHOUT_SEEDS = {"published.adalora"}  # its interval covers the rounding of the printed numbers


def judge_published(claims: Mapping[str, FirstClaim], folder: Path) -> pd.DataFrame:
    """Judge the claims on published numbers, which are not corrected for their number.

    A claim whose effect has no interval, or comes from fewer than three runs or lists, is inconclusive. NeFT's overlap
    is only shown next to its chance level.

    Returns
    -------
    DataFrame
        ``claim, effect, low, high, n, outcome, shown``; claims on trained runs are left out.

    Raises
    ------
    ValueError
        A table is damaged.
    """
    rows: list[dict[str, Any]] = []
    for id in claims:
        try:
            if id == "published.neft":
                rows.append({"claim": id} | _show_overlap(folder))
            if id not in EFFECTS:
                continue
            claim, (effect, low, high, n) = claims[id], EFFECTS[id](folder)
        except Exception as error:  # a damaged table raises KeyError, TypeError, ValueError and others
            raise ValueError(f"{printable(folder)}: cannot compute {id}: {printable(error)}") from error
        outcome = "inconclusive"
        # A single printed number has no interval, and two runs have one that is too wide to decide.
        if not np.isnan(low) and (n >= MINIMUM_SEEDS or id in _WITHOUT_SEEDS):
            outcome = claim.decide(low, high)
        rows.append({
            "claim": id, "effect": effect, "low": low, "high": high, "n": n,
            "outcome": outcome,
            "shown": format_estimate(claim, effect, low, high),
        })  # fmt: skip
    return pd.DataFrame(rows)


def verify_published(folder: Path) -> Iterator[str]:
    """Compute the results of a folder of the first edition again, and return one line for each difference."""
    try:
        content = to_csv(judge_published(read_claims(folder / "registered.toml"), folder.parent / "published"))
    except ValueError as error:
        yield f"{folder.name}: {printable(error)}"
        return
    yield from (f"{folder.name}: {line}" for line in compare_with_file(folder / PUBLISHED, content))


def _show_overlap(folder: Path) -> dict[str, Any]:
    """Return the row of the claim on NeFT's overlap between two samples of one corpus, at four sizes of the choice."""
    table = neft_overlap(folder)
    table = table[table["comparison"].str.startswith("two disjoint")]
    overlap, chance = (f"{table[name].min():.2f} to {table[name].max():.2f}" for name in ("overlap", "chance"))
    text = f"{overlap}; chance {chance}"
    row = {"n": len(table), "outcome": NOT_JUDGED, "shown": text}
    return dict.fromkeys(("effect", "low", "high"), np.nan) | row


def neft_overlap(folder: Path) -> pd.DataFrame:
    """Return how many neurons two published selections of NeFT share, and what random ones of this size share."""
    table = pd.read_csv(folder / "neft_overlap.csv")
    return table.assign(chance=table["neurons"] / table["pool"])
