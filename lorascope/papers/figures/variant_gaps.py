"""Figures of variants on planted teachers: gap closed by variant or by a number, next to what the paper prints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from lorascope.analysis.seed_intervals import seed_cells
from lorascope.charts.chart import Chart, Drawable, set_side_by_side
from lorascope.charts.geometry import drawn_number
from lorascope.charts.marks import Axis, Mark, Point, Rule
from lorascope.papers.figures.study_marks import GAP, SMALL, write_word
from lorascope.papers.judging.kept_study import StudyEvidence
from lorascope.papers.judging.registered_study import STUDY_FILE
from lorascope.plots.builders import curves, dots, ticks_at
from lorascope.plots.run_groups import INTERVAL

PUBLISHED = STUDY_FILE.with_name("published")
CLOSED = "gap closed (points)"
GROUND = "Small decoders, trained on the text of planted teachers, whose updates are known"


def common_seeds(evidence: StudyEvidence, arms: Iterable[str], table: str = "") -> list[int]:
    """Return the seeds with which all arms have runs, or rows of a kept table.

    Arms of claims have more seeds than those that only figures show.
    """
    rows = evidence.runs
    if table:
        rows = evidence.tables.get(table, pd.DataFrame(columns=["arm", "seed"]))
    seeds = set(evidence.runs["seed"])
    for arm in arms:
        # An earlier run may lack a table that was added later.
        seeds &= set(rows.loc[rows["arm"] == arm, "seed"]) & set(evidence.seeds(arm))
    return sorted(seeds)


def variant_gap_table(evidence: StudyEvidence, arms: Mapping[str, str]) -> pd.DataFrame:
    """Tabulate ``name, seed, value``: the gap that arms close, in points, for the seeds that all of them have.

    Parameters
    ----------
    evidence : StudyEvidence
        Kept runs.
    arms : mapping name -> label
        Arms by their names in the figure.
    """
    rows = []
    for seed in common_seeds(evidence, arms.values()):
        for name, arm in arms.items():
            rows.append((name, seed, evidence.closed(arm, seed)))
    return pd.DataFrame(rows, columns=["name", "seed", "value"]).astype({"value": "float64"})


def gaps_by_variant(
    evidence: StudyEvidence, arms: Mapping[str, str], title: str, caption: str, x: str = CLOSED
) -> Chart | None:
    """Draw the gap that variants of a method close, a dot per seed; None if an arm has no runs.

    Parameters
    ----------
    evidence, arms
        See ``variant_gap_table``; the arms are rows from top to bottom.
    title, caption : str
        Text of the figure.
    x : str
        Label of the axis.
    """
    table = variant_gap_table(evidence, arms)
    if table.empty:
        return None
    means = table.groupby("name", sort=False)["value"].mean().reset_index()
    seeds = table["seed"].nunique()
    return Chart(
        table,
        [
            Point("value", "name", label="one seed"),
            Point("value", "name", symbol="line-ns-open", label="mean", data=means),
        ],
        title=title,
        x=Axis(label=x),
        y=Axis(order=arms, compact=True),
        caption=f"{GROUND}, {seeds} seeds with the same teachers in all rows. {GAP} {caption}",
    )


def gaps_by_number(
    evidence: StudyEvidence,
    series: Mapping[str, Mapping[Any, str]],
    x: str,
    title: str,
    caption: str,
    references: Mapping[str, str] | None = None,
    log: bool = True,
) -> Chart | None:
    """Draw the gap that arms close by a number, a line per series; None if an arm has no runs.

    Parameters
    ----------
    evidence : StudyEvidence
        Kept runs.
    series : mapping name -> number -> label
        Arms of every line.
    x : str
        Label of the axis.
    title, caption : str
        Text of the figure.
    references : mapping name -> label, optional
        Arms without a number, drawn as lines across the panel.
    log : bool
        Whether x is logarithmic.
    """
    references = references or {}
    labels = [*references.values()]
    for arms in series.values():
        labels += arms.values()
    seeds = common_seeds(evidence, labels)
    if not seeds:
        return None
    rows = []
    for name, arms in series.items():
        for number, arm in arms.items():
            for seed in seeds:
                rows.append((name, number, evidence.closed(arm, seed)))
    table = pd.DataFrame(rows, columns=["recipe", "number", "value"])
    marks: list[Mark] = []
    for name, arm in references.items():
        # A line has no interval, because bars of several references would overlap.
        closed = variant_gap_table(evidence, {name: arm})
        marks.append(Rule(y=closed.loc[closed["seed"].isin(seeds), "value"].mean(), label=name))
    return curves(
        seed_cells(table, ["recipe", "number"]),
        "number",
        (Axis(label=x, log=log, ticks=ticks_at(sorted(set(table["number"])))), CLOSED),
        *marks,
        title=title,
        caption=f"{GROUND}, {len(seeds)} seeds with the same teachers everywhere; bars: {INTERVAL}. {GAP} {caption}",
        colors=series,
    )


def numbered(template: str, numbers: Iterable[Any], name: str = "") -> dict[Any, str]:
    """Return the arms whose labels have a number by that number, or by a name that has it as well."""
    arms: dict[Any, str] = {}
    for number in numbers:
        arms[name.format(number) if name else number] = template.format(number)
    return arms


def published(paper: str, source: str) -> pd.DataFrame:
    """Read the numbers that a paper prints in a table or figure, from ``data/published``."""
    table = pd.concat([pd.read_csv(PUBLISHED / "reported.csv"), pd.read_csv(PUBLISHED / "neft_figures.csv")])
    return table[(table["paper"] == paper) & (table["table"] == source)]


def printed(paper: str, source: str, names: Mapping[str, str], size: str = "") -> pd.DataFrame:
    """Tabulate ``name, data, value`` of a paper's printed scores.

    Parameters
    ----------
    paper, source : str
        Paper, and its table or figure.
    names : mapping method -> name
        Rows to show, and their names in the figure.
    size : str
        Printed size of the rows to show; "" takes all.
    """
    rows = published(paper, source)
    rows = rows[rows["method"].isin(list(names))]
    if size:
        rows = rows[rows["parameters"] == size]
    return rows.assign(name=rows["method"].map(names))[["name", "data", "value"]]


def printed_curves(
    numbers: pd.DataFrame, axes: tuple[Axis, Axis], title: str, caption: str, colors: Iterable[str]
) -> Chart:
    """Draw printed numbers, which are of another model and task, with hollow dots in the colors of the methods."""
    hollow = Point("x", "value", "recipe", hollow=True)
    return curves(numbers, "x", axes, hollow, points=False, title=title, caption=caption, colors=colors)


def printed_by_fraction(source: str, added: str) -> pd.DataFrame:
    """Tabulate ``recipe, x, value, low, high`` of NeFT's printed numbers by fraction of further neurons, in percent.

    ``added`` is the pattern of the number in the name of a method, with one group.
    """
    table = published("NeFT", source)
    is_reversed = table["method"].str.contains("highest|reversed")
    recipe = is_reversed.map({True: "reversed", False: "next"})
    x = table["method"].str.extract(added)[0].astype("float64")
    return pd.DataFrame({"recipe": recipe, "x": x, "value": table["value"], "low": np.nan, "high": np.nan})


def number_above(cells: pd.DataFrame, first: str, second: str) -> str:
    """Return at how many numbers, of all that both have, the line of a recipe is above that of another one."""
    means = cells.pivot(index="number", columns="recipe", values="value")[[first, second]].dropna()
    means = means[means[first] != means[second]]  # both lines may begin with the same arm
    return f"{(means[first] > means[second]).sum()} of {len(means)}"


def paired_cells(evidence: StudyEvidence, pairs: Mapping[Any, tuple[str, str]]) -> pd.DataFrame:
    """Tabulate ``number, value, low, high, n``: the gap that the first arm of a pair closes minus that of the second.

    Every pair has all seeds that both of its arms have.
    """
    rows = []
    for number, arms in pairs.items():
        for seed in common_seeds(evidence, arms):
            first, second = (evidence.closed(arm, seed) for arm in arms)
            rows.append((number, first - second))
    return seed_cells(pd.DataFrame(rows, columns=["number", "value"]), ["number"])


def paired_gaps(evidence: StudyEvidence, pairs: Mapping[Any, tuple[str, str]], names: tuple[str, str]) -> Chart:
    """Draw the gap that one arm closes more than another, over the numbers or names that the pairs are of.

    Parameters
    ----------
    evidence : StudyEvidence
        Kept runs.
    pairs : mapping number or name -> two labels
        Arms; the second one is subtracted.
    names : two str
        Names of the arms in all pairs.
    """
    cells = paired_cells(evidence, pairs)
    label = f"{names[0]} − {names[1]} (points)"
    return Chart(cells, [Rule(y=0), *dots(cells, "number")], title="Difference, paired by seed", y=Axis(label=label))


def sort_rows(chart: Chart) -> Chart:
    """Sort the rows of a chart of variants, the largest mean on top."""
    means = chart.data.groupby("name", sort=False)["value"].mean()
    return replace(chart, y=replace(chart.y, order=means.sort_values(ascending=False, kind="stable").index))


def beside_differences(chart: Chart, evidence: StudyEvidence, arms: Mapping[str, str]) -> tuple[Chart, Chart]:
    """Sort a chart of variants, the largest gap on top, and draw the differences from its first arm by seed."""
    base, chart = chart.data["name"].iloc[0], sort_rows(chart)
    pairs = {name: (arm, arms[base]) for name, arm in arms.items() if name != base}
    cells = paired_cells(evidence, pairs).rename(columns={"number": "name"})
    marks, x = [Rule(x=0), *dots(cells, "value", "name")], Axis(label=f"minus {base} (points)")
    counts = " or ".join(map(str, sorted(set(cells["n"]))))
    caption = (
        f"{chart.caption} Center: difference from {base}, paired by seed, of all seeds that both have ({counts}); "
        f"bars: {INTERVAL}; if it includes 0, no difference is seen. {SMALL}"
    )
    chart = replace(chart, caption=caption)
    return chart, Chart(cells, marks, title="Difference", x=x, y=chart.y, caption=caption)


def describe_differences(
    paired: Chart, key: str = "name", digits: str = ".1f", words: tuple[str, str] = ("points less", "points more")
) -> dict[Any, str]:
    """Return the difference of every row, with its interval, by ``key``: ``7.9 [6.5, 9.3] points less``.

    ``words`` follow negative and positive differences, whose numbers have the format ``digits``.
    """
    described = {}
    for name, value, low, high in paired.data[[key, "value", "low", "high"]].itertuples(index=False):
        sign, word = 1, words[1]
        if value < 0:
            sign, word = -1, words[0]
        text = drawn_number(abs(value), digits)
        # Two seeds have no interval.
        if not np.isnan(low):
            lower, upper = sorted([sign * low, sign * high])
            text += f" [{drawn_number(lower, digits)}, {drawn_number(upper, digits)}]"
        described[name] = f"{text} {word}"
    return described


def range_by_step(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return means by ``column`` and step, with the range over seeds of their means."""
    by_seed = table.groupby([column, "step", "seed"])["value"].mean().groupby([column, "step"])
    return by_seed.agg(value="mean", low="min", high="max").reset_index()


def describe_seen(paired: Chart, name: str) -> str:
    """Return the differences whose interval excludes 0 by number, and the numbers at which none is seen.

    ``name`` is what the numbers are of: ``1.5 [0.6, 2.3] points more at budget 2; no difference is seen at 1``.
    """
    words, seen, unseen = describe_differences(paired, "number"), list[str](), list[str]()
    for number, low, high in paired.data[["number", "low", "high"]].itertuples(index=False):
        if low < 0 < high:
            unseen.append(str(number))
        else:
            seen.append(f"{words[number]} at {name} {number}")
    findings = " and ".join(seen)
    if unseen:
        findings += f"; no difference is seen at {' and '.join(unseen)}"
    return findings.removeprefix("; ")


def beside_printed(
    evidence: StudyEvidence,
    arms: Mapping[str, str],
    texts: tuple[str, str, str],
    printed_numbers: tuple[pd.DataFrame, str],
    printed_base: str = "",
) -> Drawable | None:
    """Draw variants, their differences from the first one, and the paper's differences; None if an arm has no runs.

    Parameters
    ----------
    evidence, arms
        See ``variant_gap_table``.
    texts : (title, left, caption)
        The title may have fields with the names of rows, which become the measured differences, and ``{best}`` and
        ``{printed}``, the best rows; ``left`` is the title of the left panel.
    printed_numbers : (table, title)
        Printed scores, see ``printed``, and the title of their panel.
    printed_base : str
        Row whose printed scores are subtracted, if the paper does not have the first one.
    """
    title, left, caption = texts
    chart = gaps_by_variant(evidence, arms, left, caption)
    if chart is None:
        return None
    numbers, right = printed_numbers
    printed_base = printed_base or chart.data["name"].iloc[0]
    measured = chart.data[chart.data["name"].isin(numbers["name"])].groupby("name")["value"].mean()
    # Scores of different tasks are not comparable, but differences from one row are.
    base_scores = numbers[numbers["name"] == printed_base].set_index("data")["value"]
    numbers = numbers.assign(difference=numbers["value"] - numbers["data"].map(base_scores))
    rows = numbers[numbers["name"].isin(measured.index)]
    # A task with fewer rows does not count.
    counts = rows.groupby("data")["name"].transform("size")
    of_paper = rows[counts == counts.max()].groupby("name")["value"].mean().idxmax()
    best = measured.idxmax()
    caption = (
        f"{chart.caption} Right: printed scores, of another model, so only the order is comparable. Best of the rows "
        f"in both panels: {best}" + (", as printed." if best == of_paper else f"; printed: {of_paper}.")
    )
    measured_chart, paired = beside_differences(replace(chart, caption=caption), evidence, arms)
    y = replace(chart.y, order=dict.fromkeys([*(measured_chart.y.order or ()), *numbers["name"]]))
    # A row that only one panel has would look like a missing result in the other one.
    missing = write_missing(numbers["name"], chart.data["name"], chart.data["value"], "not run")
    measured_chart = replace(measured_chart, marks=[*measured_chart.marks, *missing])
    marks: list[Mark] = [Rule(x=0), Point("difference", "name", shape="data", hollow=True)]
    marks += write_missing(chart.data["name"], numbers["name"], numbers["difference"], "not printed")
    x = Axis(label=f"printed, minus {printed_base}")
    panel = replace(measured_chart, data=numbers, marks=marks, title=right, x=x)
    finding = title.format_map(describe_differences(paired) | {"best": best, "printed": of_paper})
    return set_side_by_side(*(replace(chart, y=y) for chart in (measured_chart, paired, panel)), title=finding)


def write_missing(names: Iterable[str], drawn_names: pd.Series, values: pd.Series, word: str) -> list[Mark]:
    """Return the marks of a word in the rows that a panel lacks, in the middle of its values."""
    middle = (values.min() + values.max()) / 2
    return [write_word(middle, name, word) for name in dict.fromkeys(names) if name not in set(drawn_names)]
