"""Rules of an advice: the facts, actions and open questions that follow from a dial and from a price of rank.

Nothing is measured here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pandas as pd

from lorascope.analysis.advice import (
    CONFIRM,
    COSTS,
    LEARNED,
    MEASURED,
    MEND,
    Action,
    Fact,
    OpenQuestion,
    Subject,
)
from lorascope.analysis.dial import KEEP, TASK, WHOLE, Dial
from lorascope.analysis.rank_prices import Price
from lorascope.analysis.seed_intervals import Interval
from lorascope.files.printable import count_phrase

_MOST_NAMES = 3  # groups of modules in one line
_EVEN_SHARES = 10  # of all components, as of the parts of a dial
_MOST_ROWS = 20  # times the rows measured: more will hardly be at hand
_DISTANCES = {"nats": "KL", "drift": "drift"}


def facts_of_dial(dial: Dial) -> Iterator[Fact]:
    """Yield what the update learns and where, how far it moves the model elsewhere, and parts that do not help."""
    whole = dial.parts.iloc[0]
    learn = _interval_of(whole, "learn")
    # Shares of an effect that may be zero would divide noise.
    shares = _share_by_group(dial.parts)
    text = _format_interval(learn, "nats")
    if learn.low <= 0:
        text += ", not shown to learn"
    elif shares:
        text += f": {', '.join(f'{name} {share:.0%}' for name, share in shares.items())} (path shares)"
    yield Fact(LEARNED, "learn", text, *learn[:3], "nats")
    forget = _interval_of(whole, "forget")
    text = f"{_format_interval(forget, dial.unit)} from the base on other text"
    if (scale := dial.best().get(WHOLE)) is not None:
        text += f"; {_point(dial, WHOLE, scale, KEEP)['value']:.3g} at scale {scale:g}"
    yield Fact(COSTS, _DISTANCES[dial.unit], text, *forget[:3], dial.unit)
    for verdict in ("only forgets", "hurts"):
        for _, part in _judged(dial, verdict).head(_MOST_NAMES).iterrows():
            forget = _interval_of(part, "forget")
            text = f"{part_name(part)}: {_format_interval(forget, dial.unit)}, learn at most {part['learn_high']:+.3g}"
            yield Fact(COSTS, verdict, text, *forget[:3], dial.unit)


class _Scale(NamedTuple):
    """Scale of a part below 1, with the change of loss and of the distance from the base."""

    part: str
    name: str
    scale: float
    loss: Interval
    moved: float

    def rows_needed(self, dial: Dial) -> float:
        """Return the number of rows whose interval of the loss would end below the margin; 0 if it does."""
        spread, distance = self.loss.high - self.loss.mean, dial.learn_margin - self.loss.mean
        if spread <= distance:
            return 0.0
        if distance <= 0:
            return math.inf
        return math.ceil(_count_rows(dial) * (spread / distance) ** 2)


def _count_rows(dial: Dial) -> int:
    return int(dial.receipt.rows["task"].split()[0])


def _most_rows(dial: Dial, subject: Subject) -> float:
    """Return the largest number of rows with which a change is worth confirming."""
    return min(_MOST_ROWS * _count_rows(dial), subject.rows)


def _scales_below_1(dial: Dial) -> Iterator[_Scale]:
    """Yield the best scales of the whole update, and of parts that only forget or hurt."""
    parts = [(WHOLE, "the update")]
    for verdict in ("only forgets", "hurts"):
        parts += [(part["part"], part_name(part)) for _, part in _judged(dial, verdict).iterrows()]
    best = dial.best()
    for part, name in parts:
        if best.get(part, 1) < 1:
            loss, distance = _point(dial, part, best[part], TASK), _point(dial, part, best[part], KEEP)
            yield _Scale(
                part, name, best[part], Interval(loss["change"], loss["low"], loss["high"], 0), distance["change"]
            )


def actions_of_dial(dial: Dial, subject: Subject) -> Iterator[Action]:
    """Yield the scales to ship: of the whole update, and of parts that only forget or hurt."""
    by = dial.receipt.call["by"]
    for scale in _scales_below_1(dial):
        moved = scale.moved / dial.parts.iloc[0]["forget"]
        change = (
            f"ship {scale.name} at scale {scale.scale:g}: {_DISTANCES[dial.unit]} {moved:+.0%}, loss "
            f"{_format_interval(scale.loss, 'nats')}, margin {dial.learn_margin:.3f}"
        )
        verdict = MEASURED
        command = subject.export_command("--scales", f"{scale.part}={scale.scale:g}", "--peft", "scaled")
        rows = scale.rows_needed(dial)
        if rows > _most_rows(dial, subject):
            continue
        if rows:
            verdict = CONFIRM
            command = subject.command_with_rows("dial", rows, "--by", by)
        weight = -scale.moved / (dial.forget_margin or math.inf)
        yield Action(verdict, change, *scale.loss[:3], "nats", command, weight)


def is_learning_shown(dial: Dial) -> bool:
    """Return whether the interval of what the whole update learns is above 0."""
    return _interval_of(dial.parts.iloc[0], "learn").low > 0


def questions_of_dial(dial: Dial, subject: Subject) -> Iterator[OpenQuestion]:
    """Yield whether the update learns, and the scales and the parts, if these rows do not decide them."""
    learn = _interval_of(dial.parts.iloc[0], "learn")
    if learn.low <= 0 < learn.high:
        rows = math.inf
        if learn.mean:
            rows = math.ceil(_count_rows(dial) * ((learn.mean - learn.low) / learn.mean) ** 2)
        question = f"cannot tell whether the update learns: {_format_interval(learn, 'nats')}"
        command = subject.command_with_rows("dial", rows, "--by", WHOLE)
        yield OpenQuestion(question + subject.describe_split(rows), rows, command=command)
    for scale in _scales_below_1(dial):
        rows = scale.rows_needed(dial)
        if rows > _most_rows(dial, subject):
            change = f"{scale.name} at scale {scale.scale:g}: loss {_format_interval(scale.loss, 'nats')}"
            question = f"whether {change} is below the margin {dial.learn_margin:.3f}"
            yield OpenQuestion(question + subject.describe_split(rows), rows)
    # A verdict of a single part would need rows that hardly anyone has, so all are counted together.
    undecided = _judged(dial, "undecided")
    if undecided.empty:
        return
    judged = int((dial.parts["verdict"] != "").sum())
    by = dial.receipt.call["by"]
    rows_needed = undecided["rows_needed"].sort_values()
    # The rows that decide half of them; the last ones may take more rows than there are.
    rows = float(rows_needed.iloc[(len(rows_needed) - 1) // 2])
    question = f"{len(undecided)} of {count_phrase(judged, by)}: undecided"
    if math.isinf(rows):
        yield OpenQuestion(question)
        return
    decided = int((rows_needed <= rows).sum())
    question += f", {decided} of them with more rows{subject.describe_split(rows)}"
    yield OpenQuestion(question, rows, command=subject.command_with_rows("dial", rows, "--by", by))


def _judged(dial: Dial, verdict: str) -> pd.DataFrame:
    """Return the parts with a verdict, those that forget most first; controls are not among them."""
    parts = dial.parts[(dial.parts["verdict"] == verdict) & ~dial.parts["control"] & (dial.parts["part"] != WHOLE)]
    return parts.sort_values("forget", ascending=False)


def _point(dial: Dial, part: str, scale: float, axis: str) -> Any:
    """Return the row of the table of one part at one scale on one axis."""
    table = dial.table
    return table[(table["part"] == part) & (table["scale"] == scale) & (table["axis"] == axis)].iloc[0]


def _share_by_group(parts: pd.DataFrame) -> dict[str, float]:
    """Return the largest path shares of the learning by role, or by layer if parts are layers."""
    divided = parts[parts["part"] != WHOLE]
    total = divided["learn_share"].sum()
    if divided.empty or not total > 0:
        return {}
    names = divided["role"].where(divided["role"].notna() & (divided["role"] != ""), divided["part"])
    shares = divided.groupby(names)["learn_share"].sum() / total
    return {str(name): share for name, share in shares.nlargest(_MOST_NAMES).items()}


def part_name(part: Any) -> str:
    """Return the name of a part as a reader knows it: layer and role of a module, else its own."""
    if pd.isna(part["layer"]) or not part["role"]:
        return str(part["part"])
    component = "" if pd.isna(part["component"]) else f", component {part['component']:.0f}"
    return f"layer {part['layer']:.0f} {part['role']}{component}"


def facts_of_price(price: Price) -> Iterator[Fact]:
    """Yield what half the rank costs, whether placement helps, and whether gradients point beyond the rank."""
    half = _rows_of(price, price.rank // 2)
    if not half.empty and price.rank > 1:
        cut = _interval_of(half.iloc[0], "cut")
        verb = "keeps the loss" if cut.high < price.tolerance else "costs"
        text = f"rank {price.rank // 2} of {price.rank} {verb}: cut {_format_interval(cut, 'nats')}"
        yield Fact(LEARNED, "half the rank", text, *cut[:3], "nats")
        if pd.notna(half.iloc[0]["placed"]):
            placed = _interval_of(half.iloc[0], "placed")
            text = f"{_compare(placed)}: {_format_interval(placed, 'nats')}, as many components by size"
            yield Fact(LEARNED, "placement", text, *placed[:3], "nats")
    unused, total = int(price.modules["unused"].sum()), int(price.modules["rank"].sum())
    yield Fact(LEARNED, "unused", f"{unused} of {total} components learn less than an even share", unused)
    # Real labels show nothing by themselves if drawn ones have directions as well.
    directions, control = int(price.modules["directions"].sum()), int(price.modules["control"].sum())
    text = f"signal in {directions} directions (control with drawn labels: {control})"
    yield Fact(LEARNED, "beyond reach", text, directions)
    for _, row in price.table[price.table["seeds"] > 0].iterrows():
        if row["rank"] != price.rank:
            retrained = _interval_of(row, "retrained")
            text = f"rank {row['rank']:.0f} at lr {row['lr']:g}: {_format_interval(retrained, 'nats')}, "
            yield Fact(LEARNED, "retrained", text + count_phrase(int(row["seeds"]), "seed"), *retrained[:3], "nats")
    for rank in sorted(set(price.runs.loc[price.runs["placed"] == 1, "rank"])):
        estimate = price.placement(rank)
        assert estimate is not None  # these ranks have placed runs
        interval = estimate.interval(0.025)
        text = f"rank {rank}, retrained: {_compare(interval)}: {_format_interval(interval, 'nats')}"
        yield Fact(LEARNED, "placement", text, *interval[:3], "nats")


def _compare(placed: Interval) -> str:
    if placed.high < 0:
        return "better than a uniform rank"
    if placed.low > 0:
        return "worse than a uniform rank"
    return "not shown to differ from a uniform rank"


def actions_of_price(price: Price, subject: Subject) -> Iterator[Action]:
    """Yield the smallest cut without loss, and the rank of the next training."""
    budgets = price.table[price.table["rank"].isna()].sort_values("components")
    # The end of the interval, because a cut that may cost more is a risk.
    free = budgets[budgets["cut_high"] < price.tolerance]
    total = int(price.modules["rank"].sum())
    if len(free):
        cut = free.iloc[0]
        interval, components = _interval_of(cut, "cut"), int(cut["components"])
        change = (
            f"cut this adapter to {components} of {total} components: loss {_format_interval(interval, 'nats')}, "
            f"tolerance {price.tolerance:.3f}"
        )
        command = subject.export_command("--budget", str(components), "--peft", "cut")
        yield Action(MEASURED, change, *interval[:3], "nats", command, _EVEN_SHARES * (1 - components / total))
    if price.verdict == "wasteful":
        rank = price.rank // 2
        interval = _interval_of(_rows_of(price, rank).iloc[0], "cut")
        change = f"train the next run at rank {rank}: the cut costs {_format_interval(interval, 'nats')}"
        if price.next_cost:
            change += f", retraining takes {price.next_cost}"
        yield Action(CONFIRM, change, *interval[:3], "nats", price.next_command, _EVEN_SHARES / 2)
    # Retraining has been measured, so nothing is left to confirm.
    elif price.verdict == "enough":
        row = smallest_enough(price)
        interval = _interval_of(row, "retrained")
        change = f"train the next run at rank {row['rank']:.0f}, lr {row['lr']:g}: {_format_interval(interval, 'nats')}"
        saved = 1 - row["rank"] / price.rank
        yield Action(MEASURED, change, *interval[:3], "nats", "", _EVEN_SHARES * saved)
    # A direction beyond the rank is only worth a larger one if retraining used it.
    elif price.verdict == "short":
        change = f"train the next run at rank {2 * price.rank}: it has fewer directions beyond its rank"
        yield Action(MEASURED, change, math.nan, math.nan, math.nan, "nats", "", _EVEN_SHARES)
    elif price.verdict == "not finished":
        change = "train longer, or at another rate: gradients that the factors can follow are above zero"
        yield Action(CONFIRM, change, math.nan, math.nan, math.nan, "nats", "", 1.0)


def smallest_enough(price: Price) -> pd.Series:
    """Return the row of the smallest rank whose retraining costs less than the tolerance, by interval."""
    retrained = price.table[(price.table["retrained_high"] < price.tolerance) & (price.table["rank"] < price.rank)]
    # A rank was trained at two rates, of which the better one counts.
    return retrained.sort_values(["rank", "retrained"]).iloc[0]


def questions_of_price(price: Price, subject: Subject) -> Iterator[OpenQuestion]:
    """Yield whether half the rank is enough, if these rows do not decide it."""
    if price.verdict == "undecided":
        rows = price.rows_needed
        command = ""
        if math.isfinite(rows):
            command = subject.command_with_rows("price", rows)
        question = f"whether rank {price.rank // 2} is enough{subject.describe_split(rows)}"
        yield OpenQuestion(question, rows, command=command)
    if price.runs.empty:
        question = "loss after retraining, and the learning rate: the best one depends on the rank"
        if price.next_cost:
            question += f" ({price.next_cost})"
        yield OpenQuestion(question, seeds_needed=3, command=price.next_command)


def actions_of_findings(findings: Sequence[tuple[str, str]]) -> Iterator[Action]:
    """Yield the fix of every cause that the doctor found; an adapter with a fault is fixed before it is tuned."""
    for cause, fix in findings:
        yield Action(MEND, f"{cause}: {fix}", math.nan, math.nan, math.nan, "", "", math.inf)


def find_contradictions(actions: Sequence[Action], price: Price) -> Iterator[OpenQuestion]:
    """Yield pairs of findings that point in opposite directions; both are printed, and neither is preferred."""
    if price.verdict == "not finished" and any(action.change.startswith("ship the update") for action in actions):
        yield OpenQuestion(
            "contradiction: a smaller scale loses nothing, but gradients say that training was not finished"
        )


def _rows_of(price: Price, rank: int) -> pd.DataFrame:
    return price.table[price.table["rank"] == rank]


def _interval_of(row: Any, name: str) -> Interval:
    return Interval(float(row[name]), float(row[f"{name}_low"]), float(row[f"{name}_high"]), 0)


def _format_interval(interval: Interval, unit: str) -> str:
    text = f"{interval.mean:+.3f} {unit}".replace(" drift", "")
    if math.isnan(interval.low):
        return text
    return f"{text} [{interval.low:.3f}, {interval.high:.3f}]"
