"""Figure of a reading: words that a component uses, against random components."""

from __future__ import annotations

from lorascope.analysis.reading import VERDICTS, Reading
from lorascope.charts.chart import Chart
from lorascope.charts.marks import Axis, Point, Rule
from lorascope.files.printable import printable, short_name
from lorascope.plots.figure_registry import document_result

_RANDOM = "random, 95%"
READS = (
    "Each dot is the mean contribution of a component where the word occurs, with its 95% interval over rows. A used "
    "word is outside the range of random components of the same module and size."
)
MISLEADS = (
    "Words are contexts in these rows, not concepts, and a component acts where a word is read as well as where its "
    "meaning was moved to. Compare the words of several seeds before naming a component."
)


@document_result
def reading(reading: Reading, card: int = 1) -> Chart:
    """Plot the words of one component: contribution to the margin per occurrence, against random components.

    Each dot is the mean over the occurrences of a word, with its 95% interval over rows. The other bars are the 95%
    range of random components of the same module and size. Caveat: words are contexts in these rows, not concepts.

    Parameters
    ----------
    reading : Reading
        Result of ``ls.read``.
    card : int
        Number of the component, 1 by default.

    Raises
    ------
    ValueError
        There is no such card.

    Examples
    --------
    ``words`` is ``ls.read(run, model, rows)``.

    >>> ls.plots.reading(words)
    """
    component = reading.card(card)
    # Names that a terminal or a figure cannot show are escaped, and long ones cut.
    words = component.words.assign(word=component.words["word"].map(short_name))
    random = words.assign(verdict=_RANDOM, center=(words["random_low"] + words["random_high"]) / 2)
    sentences = [
        f"Component {component.title}, σ {component.block.norm:.3g}, total {component.total.mean:.3g} nats.",
        "Dots: mean over the occurrences of a word, 95% interval over rows.",
        "Bars: 95% of random components of the same module and σ.",
    ]
    if not component.used:
        sentences.insert(0, "Not above random components.")
    return Chart(
        words,
        [
            Rule(x=0),
            Point(
                "center", "word", "verdict", low="random_low", high="random_high", symbol="line-ns-open", data=random
            ),
            Point("contribution", "word", "verdict", low="low", high="high"),
        ],
        title="Contribution of a component by word",
        x=Axis(label="nats of margin per occurrence"),
        # The word with the largest contribution is at the top.
        y=Axis(order=words["word"], compact=True),
        caption=printable(" ".join(sentences)),
        colors=[*VERDICTS, _RANDOM],
        meta={"run": reading.receipt.run, "figure": "reading"},
    )
