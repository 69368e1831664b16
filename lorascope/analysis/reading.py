"""Reading of components: the words that each uses, and what it makes the model say, against random components.

For a token with module input x (in,) and the gradient g (out,) of the margin with respect to the module's output, the
component :math:`\\sigma u v^T` has

.. math::

    a = \\sigma v^T x, \\qquad s = a \\, u^T g

The sum of the contributions s over all tokens is the slope of the margin in the scale of the component. The margin is
the logit of the label minus the log-sum-exp of the other logits: unlike the loss, its gradient does not vanish on rows
that are already right. Intervals are over rows and do not cover the seed of the training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lorascope.analysis.component_blocks import ComponentBlock
from lorascope.analysis.paired_rows import LEVEL, estimate_rows
from lorascope.analysis.seed_intervals import Estimate, Interval
from lorascope.array_types import Bool, Float, Int
from lorascope.files.lazy_scipy import false_discovery_control
from lorascope.files.printable import count_phrase, printable
from lorascope.runs.receipt import Receipt

VERDICTS = ("uses", "not above random", "nothing learned")
FEWEST_OCCURRENCES = 5
FIRST_WORDS = 10
"""Words of a component with the largest contributions, of which a verdict can be that it uses them."""
COLUMNS = [
    *("card", "module", "component", "sigma", "total", "word", "occurrences", "contribution", "low", "high"),
    *("t", "p", "q", "random_low", "random_high", "random_p", "written", "effect", "verdict"),
]
_FALSE_DISCOVERIES = 0.05
_RANDOM_LEVEL = 0.05  # fraction of random components that may contribute as much to a word that is used


class Passage(NamedTuple):
    """Words of one row with their contributions in nats; special tokens are among them."""

    words: list[str]
    contributions: list[float]


@dataclass(frozen=True, eq=False)
class WordOccurrences:
    """Occurrences of words in measured rows.

    Parameters
    ----------
    words : tuple of str
        Distinct words.
    word, row : array (occurrence,)
        Word and row of each occurrence.
    targets : array (row,)
        Number of targets of each row.
    gains : array (row,)
        Margin of each row minus its margin without the adapter, in nats.
    clusters : array (row,)
        Cluster of each row, from 0.
    """

    words: tuple[str, ...]
    word: Int[np.ndarray, "occurrence"]
    row: Int[np.ndarray, "occurrence"]
    targets: Float[np.ndarray, "row"]
    gains: Float[np.ndarray, "row"]
    clusters: Int[np.ndarray, "row"]

    def testable(self) -> Bool[np.ndarray, "word"]:
        """Return which words can be tested: 5 occurrences or more, in two clusters or more, but not in every row.

        A word of every row, such as one of the question that a language model answers, distinguishes no rows.
        """
        pairs = pd.DataFrame({"word": self.word, "row": self.row, "cluster": self.clusters[self.row]})
        counts = pairs.groupby("word").agg(
            occurrences=("row", "size"), rows=("row", "nunique"), clusters=("cluster", "nunique")
        )
        is_testable = (counts["occurrences"] >= FEWEST_OCCURRENCES) & (counts["clusters"] >= 2)
        is_testable &= counts["rows"] < len(self.targets)
        mask = np.zeros(len(self.words), bool)
        mask[counts.index[is_testable]] = True
        return mask

    def estimate(self, word: int, contributions: Float[np.ndarray, "occurrence"]) -> Estimate:
        """Estimate the mean contribution of an occurrence of a word; rows without the word are not samples."""
        mask = self.word == word
        # Occurrences in one row depend on each other, so their sum is one sample.
        rows, positions = np.unique(self.row[mask], return_inverse=True)
        counts = np.bincount(positions).astype(np.float64)
        return estimate_rows(np.bincount(positions, contributions[mask]), counts, self.clusters[rows])

    def has_learned(self, word: int) -> bool:
        """Return whether the adapter raises the mean margin of the rows with a word.

        Their accuracy does not show it: a base that always answers with the label of these rows is right on all.
        """
        # Each row once, also if the word occurs in it twice.
        rows = np.unique(self.row[self.word == word])
        return bool(self.gains[rows].sum() > 0)


def tabulate_words(
    occurrences: WordOccurrences,
    contributions: Float[np.ndarray, "occurrence"],
    random: Float[np.ndarray, "words draws"],
    testable: Int[np.ndarray, "words"],
) -> pd.DataFrame:
    """Return a row per testable word for one component, the largest contribution first.

    Parameters
    ----------
    occurrences : WordOccurrences
    contributions : array (occurrence,)
        Contribution of the component to the margin at each occurrence, in nats.
    random : array (words, draws)
        Mean contribution of random components to the testable words.
    testable : array (words,)
        Numbers of the testable words.
    """
    # A word at a time: few are testable, and their rows differ.
    records = []
    for word, draws in zip(testable.tolist(), random, strict=True):
        estimate = occurrences.estimate(word, contributions)
        error = estimate.errors[0][0]
        interval = estimate.interval(LEVEL)
        random_low, random_high = np.quantile(draws, [LEVEL, 1 - LEVEL])
        records.append(
            {
                "word": occurrences.words[word],
                "occurrences": int((occurrences.word == word).sum()),
                "contribution": interval.mean,
                "low": interval.low,
                "high": interval.high,
                "t": interval.mean / error if error else np.nan,
                "p": min(1.0, 2 * min(estimate.p_above(0), estimate.p_below(0))),
                "random_low": random_low,
                "random_high": random_high,
                # The sign of a trained component is the one that helps; random ones have either.
                "random_p": float((np.abs(draws) >= abs(interval.mean)).mean()),
                "learned": occurrences.has_learned(word),
            }
        )
    table = pd.DataFrame(records).sort_values("contribution", ascending=False, kind="stable")
    return table.assign(position=np.arange(1, len(table) + 1))


def judge_words(table: pd.DataFrame) -> pd.DataFrame:
    """Add ``q`` and ``verdict`` to the words of all components; Benjamini-Hochberg is over words x components.

    ================  ==================================================================================
    verdict           condition
    ================  ==================================================================================
    nothing learned   the adapter does not raise the mean margin of the rows with the word
    uses              positive contribution, among the first ten, q < 0.05, and larger than that of 95%
                      of random components
    not above random  otherwise
    ================  ==================================================================================

    A condition further up precedes.
    """
    # All words of all components are tested, also those that no verdict can name.
    q = false_discovery_control(table["p"])
    is_first = (table["contribution"] > 0) & (table["position"] <= FIRST_WORDS)
    is_used = is_first & (q < _FALSE_DISCOVERIES) & (table["random_p"] < _RANDOM_LEVEL)
    verdict = np.select([~table["learned"], is_used], ["nothing learned", "uses"], "not above random")
    return table.assign(q=q, verdict=verdict)


@dataclass(frozen=True, eq=False)
class ReadingCard:
    """Card of one component, or of a block of components with nearly equal singular values.

    Parameters
    ----------
    number : int
        Place by total contribution on the selection rows, from 1.
    block : ComponentBlock
        Module, components and singular vectors.
    total : Interval
        Slope of the margin in the scale of the component, in nats per row or target token.
    words : DataFrame
        The first ten words of the table.
    passages : tuple of Passage
        Rows with the largest activations; they have no verdict.
    """

    number: int
    block: ComponentBlock
    total: Interval
    words: pd.DataFrame
    passages: tuple[Passage, ...]

    @property
    def used(self) -> list[str]:
        """Words that the component uses, the largest contribution first."""
        return self.words.loc[self.words["verdict"] == "uses", "word"].to_list()

    @property
    def title(self) -> str:
        """Number, module and component."""
        return f"{self.number}  {self.block.name}"

    @property
    def description(self) -> str:
        """Singular value, total contribution and verdict in one line."""
        total = f"{self.total.mean:.3g} [{self.total.low:.3g}, {self.total.high:.3g}] nats"
        return f"σ {self.block.norm:.3g}, total {total}, {self._verdict()}"

    def _verdict(self) -> str:
        if self.used:
            return f"uses {', '.join(self.used)}"
        if len(self.words) and (self.words["verdict"] == "nothing learned").all():
            return "nothing learned"
        return "not above random components"

    def passages_html(self) -> str:
        """Return the rows with each word shaded by its contribution: green raises the margin, red lowers it."""
        # Shades of one card have one scale, so that rows can be compared.
        sizes = [abs(value) for passage in self.passages for value in passage.contributions]
        largest = max(sizes, default=0.0) or 1.0
        lines = []
        for passage in self.passages:
            spans = []
            for word, value in zip(passage.words, passage.contributions, strict=True):
                color = "46 160 67" if value > 0 else "218 54 51"
                style = f"background:rgb({color} / {abs(value) / largest:.2f})"
                spans.append(f'<span style="{style}" title="{value:+.3g} nats">{escape(printable(word))}</span>')
            lines.append(f"<p>{' '.join(spans)}</p>")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the card as a JSON object."""
        return {
            "card": self.number,
            "module": self.block.module,
            "component": self.block.component,
            "sigma": self.block.norm,
            "total": self.total._asdict(),
            "uses": self.used,
            "passages": [passage._asdict() for passage in self.passages],
        }

    def __repr__(self) -> str:
        lines = [printable(self.title), f"  {printable(self.description)}"]
        for word in self.words.to_dict("records"):
            interval = f"{word['contribution']:+.3g} [{word['low']:+.3g}, {word['high']:+.3g}]"
            random = f"random [{word['random_low']:+.2g}, {word['random_high']:+.2g}]"
            written = f"  writes {word['written']} {word['effect']:+.2g}" if word["written"] else ""
            lines.append(printable(f"  {word['word']:<16} {interval:<28} {random}  {word['verdict']}{written}"))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        table = self.words.drop(columns=["card", "module", "component", "sigma", "total", "t", "p"])
        table[["word", "written"]] = table[["word", "written"]].map(printable)
        heading = f"<h4>{escape(printable(self.title))}</h4><p>{escape(printable(self.description))}</p>"
        return "\n".join([heading, table.to_html(index=False, na_rep=""), self.passages_html()])


@dataclass(frozen=True, eq=False)
class Reading:
    """Words that components of a run use, and what they make the model say; see ``ls.read``.

    Parameters
    ----------
    label : str
        Name of the run.
    cards : tuple of ReadingCard
        Components by their total contribution on the selection rows, the largest first.
    table : DataFrame
        One row per component and word: ``card, module, component, sigma, total`` (nats of margin per row or target
        token), ``word, occurrences, contribution, low, high`` (nats per occurrence, with the 95% interval over rows),
        ``t, p, q, random_low, random_high`` (95% range of random components), ``random_p`` (fraction of random
        components with a contribution of this size), ``written, effect`` (output that the component raises most where
        the word occurs, in nats of logit; only of the first ten words), ``verdict``.
    inputs : mapping module -> array (tokens, in)
        Centered sample of the inputs of the read modules.
    receipt : Receipt
        What was measured, and with what.
    """

    label: str
    cards: tuple[ReadingCard, ...]
    table: pd.DataFrame
    inputs: Mapping[str, Float[np.ndarray, "tokens in"]]
    receipt: Receipt

    def card(self, number: int) -> ReadingCard:
        """Return the card of a component, numbered from 1.

        Raises
        ------
        ValueError
            There is no such card.
        """
        if not 1 <= number <= len(self.cards):
            raise ValueError(f"card must be in [1, {len(self.cards)}], got {number}")
        return self.cards[number - 1]

    def summary(self) -> pd.DataFrame:
        """Return one row per component.

        Returns
        -------
        DataFrame
            ``card, module, component, sigma, total, total_low, total_high`` (nats of margin per row or target token),
            ``uses`` (words, separated by commas).
        """
        rows = []
        for card in self.cards:
            mean, low, high, _ = card.total
            block = card.block
            rows.append((card.number, *block[:2], block.norm, mean, low, high, ", ".join(card.used)))
        columns = ["card", "module", "component", "sigma", "total", "total_low", "total_high", "uses"]
        return pd.DataFrame(rows, columns=columns)

    def to_json(self) -> dict[str, Any]:
        """Return the reading as a JSON object."""
        table = self.table.astype(object).where(self.table.notna(), None)
        return {
            "run": self.label,
            "cards": [card.to_json() for card in self.cards],
            "table": table.to_dict("records"),
            "receipt": self.receipt.to_json(),
        }

    def __repr__(self) -> str:
        lines = [f"Reading of {printable(self.label)}: {count_phrase(len(self.cards), 'component')}"]
        for card in self.cards:
            # Three words fit in the line of a terminal.
            used = ", ".join(card.used[:3]) or card._verdict()
            lines.append(f"  {printable(card.title):<48} total {card.total.mean:.3g} nats  {printable(used)}")
        lines.append("  Words are contexts in these rows. Intervals are over rows; they do not cover the seed of the")
        lines.append("  training.")
        lines.append(f"  receipt  {self.receipt}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return "\n".join(card._repr_html_() for card in self.cards)


class ReadComponent(NamedTuple):
    """Measurements of one component, from which its card follows; ``words`` is a table of `tabulate_words`."""

    block: ComponentBlock
    total: Estimate
    words: pd.DataFrame
    passages: tuple[Passage, ...]


class Written(NamedTuple):
    """Output that a component raises most where a word occurs, and by how much, centered over all outputs."""

    output: str
    effect: float


def reading_of_components(
    label: str,
    components: Sequence[ReadComponent],
    written: Mapping[tuple[int, str], Written],
    inputs: Mapping[str, Float[np.ndarray, "tokens in"]],
    receipt: Receipt,
) -> Reading:
    """Return the reading of measured components; ``written`` is by the number of the card and word."""
    tables = []
    for number, component in enumerate(components, start=1):
        block = component.block
        identity: dict[str, Any] = {
            "card": number,
            "module": block.module,
            "component": block.component,
            "sigma": block.norm,
        }
        tables.append(component.words.assign(**identity, total=component.total.mean))
    table = judge_words(pd.concat(tables, ignore_index=True))
    # Words beyond the first ones are not patched.
    nothing = Written("", np.nan)
    outputs = [written.get(key, nothing) for key in zip(table["card"], table["word"], strict=True)]
    table[["written", "effect"]] = pd.DataFrame(outputs, index=table.index)
    cards = []
    for number, component in enumerate(components, start=1):
        words = table.loc[table["card"] == number, COLUMNS].head(FIRST_WORDS).reset_index(drop=True)
        total = component.total.interval(LEVEL)
        cards.append(ReadingCard(number, component.block, total, words, component.passages))
    return Reading(label, tuple(cards), table[COLUMNS], inputs, receipt)
