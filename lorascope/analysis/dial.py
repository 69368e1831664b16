"""Learning against forgetting by part of an update: effects of removing each part, verdicts, and best scales.

With L(s) the task loss and K(s) the distance from the base on other text, both when part p has the scale s_p and all
other parts have scale 1:

.. math::

    \\operatorname{learn}_p = L(s_p = 0) - L(1), \\qquad \\operatorname{forget}_p = K(1) - K(s_p = 0)

A positive learn means that the part lowers the task loss, a positive forget that it moves behavior away from the base.
Intervals are over rows and do not cover the seed of the training.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lorascope.analysis.paired_rows import LEVEL, estimate_rows
from lorascope.analysis.part_verdicts import Effects, even_share, judge_parts, rows_needed
from lorascope.analysis.seed_intervals import Estimate
from lorascope.array_types import Float, Int
from lorascope.files.finding_html import finding_html
from lorascope.files.safe_csv import csv_text
from lorascope.files.whole_files import require_absent, write_bytes
from lorascope.runs.receipt import Receipt

VERDICTS = ("keep", "trade", "only forgets", "idle", "hurts", "undecided")
BEST = [f"{name}{end}" for name in ("best_loss", "best_distance") for end in ("", "_low", "_high")]
"""Changes of loss and distance at the best scale, with their intervals."""
COLUMNS = (
    ["part", "module", "layer", "role", "component", "energy"]
    + [f"{name}{end}" for name in ("learn", "forget") for end in ("", "_low", "_high")]
    + ["kl", "learn_share", "forget_share", "learn_slope", "forget_slope"]
    + ["exact", "control", "best_scale"]
    + BEST
    + ["verdict", "rows_needed"]
)
_FEWEST_TRADES = 2  # parts with the least forgetting per learning in the repr
_MOST_SCALES = 3  # best scales of the representation
SCALED = ("trade", "only forgets", "hurts")
"""Verdicts whose parts are measured at further scales."""
WHOLE = "whole"
TASK, KEEP, PROBE = "task", "keep", "probe"


class RowValues(NamedTuple):
    """Values of each row at one scale of one part, summed over the row's targets."""

    part: str
    scale: float
    axis: str
    values: Float[np.ndarray, "row"]


@dataclass(frozen=True, eq=False)
class MeasuredRows:
    """Rows on which one axis of the dial is measured.

    Parameters
    ----------
    unit : str
        ``"nats"`` or ``"drift"``.
    counts : array (row,)
        Number of targets per row.
    clusters : array (row,)
        Cluster of each row, from 0.
    """

    unit: str
    counts: Float[np.ndarray, "row"]
    clusters: Int[np.ndarray, "row"]

    def estimate(self, differences: Float[np.ndarray, "row"]) -> Estimate:
        """Estimate the mean difference per target; see ``estimate_rows``."""
        return estimate_rows(differences, self.counts, self.clusters)


@dataclass(frozen=True, eq=False)
class Dial:
    """Learning against forgetting by part of a run's update; see ``ls.dial``.

    Parameters
    ----------
    label : str
        Name of the run.
    table : DataFrame
        Columns part, scale, axis ("task", "keep" or "probe"), unit, value (the mean), change (from scale 1), low and
        high (its 95% interval over rows).
    parts : DataFrame
        Result of :meth:`summary`.
    learn_margin, forget_margin : float
        Even share of a part: learn and forget of the whole update over the number of parts, or over 10.
    receipt : Receipt
        What was measured, and with what.
    """

    label: str
    table: pd.DataFrame
    parts: pd.DataFrame
    learn_margin: float
    forget_margin: float
    receipt: Receipt

    def summary(self) -> pd.DataFrame:
        """Return one row per part, the whole update first, then in the order of the model.

        Returns
        -------
        DataFrame
            ``part, module, layer, role, component`` (from 1), ``energy`` (fraction of the squared norm), ``learn,
            learn_low, learn_high`` (nats), ``forget, forget_low, forget_high`` (nats or drift), ``kl`` (nats; NaN
            without a probe), ``learn_share, forget_share`` (path shares; those of parts add up, controls excluded),
            ``learn_slope, forget_slope`` (per unit of scale), ``exact`` (whether the part was removed), ``control``,
            ``best_scale`` (NaN without a curve), ``best_loss, best_loss_low, best_loss_high`` (change of the task loss
            at the best scale, nats), ``best_distance, best_distance_low, best_distance_high`` (change of the distance
            from the base there, nats or drift), ``verdict``, ``rows_needed``.
        """
        return self.parts.copy()

    def curve(self, part: str = WHOLE) -> pd.DataFrame:
        """Return the rows of the table of one part that was measured at several scales.

        Raises
        ------
        ValueError
            The part is unknown, or was only removed.
        """
        curve = self.table[self.table["part"] == part]
        if curve["scale"].nunique() <= 2:
            measured = self.table.groupby("part", sort=False)["scale"].nunique()
            raise ValueError(f"part must be one of {', '.join(measured.index[measured > 2])}, got {part!r}")
        return curve.reset_index(drop=True)

    def best(self, margin: float | None = None) -> dict[str, float]:
        """Return the best scale of each part with a curve: least forgetting within a margin of the task loss.

        Parameters
        ----------
        margin : float, optional
            Largest increase of the mean task loss in nats, by default the even share of a part.

        Returns
        -------
        dict part -> scale
            Parts whose best scale is 1 are omitted. Scale parts one at a time: their effects do not add up.
        """
        scales = best_scales(self.table, self.learn_margin if margin is None else margin)
        return {part: scale for part, scale in scales.items() if scale != 1}

    def top(self, number: int = 4) -> list[str]:
        """Return the parts with the largest sum of relative learn and forget, of those with a curve."""
        curves = [part for part in self._with_curves() if part != WHOLE]
        effects = self.parts.set_index("part")[["learn", "forget"]]
        size = (effects.loc[curves] / effects.loc[WHOLE]).abs().sum(axis=1)
        return size.nlargest(number).index.to_list()

    def trades(self) -> pd.Series:
        """Return forget per learn by part, the least first: what each nat of learning costs.

        Only parts whose learn is above 0 by interval have a ratio; controls are omitted.
        """
        parts = self.parts[(self.parts["part"] != WHOLE) & ~self.parts["control"] & (self.parts["learn_low"] > 0)]
        return (parts["forget"] / parts["learn"]).set_axis(parts["part"]).sort_values(kind="stable")

    @property
    def unit(self) -> str:
        """Unit of the distance from the base: nats or drift."""
        return str(self.table.loc[self.table["axis"] == KEEP, "unit"].iloc[0])

    def _with_curves(self) -> list[str]:
        scales = self.table.groupby("part", sort=False)["scale"].nunique()
        return scales.index[scales > 2].to_list()

    def save(self, path: str | Path) -> Path:
        """Write the summary as a CSV table, from which ``lorascope export --scales`` reads the best scales.

        Raises
        ------
        FileExistsError
            The file exists.
        """
        require_absent(Path(path))
        write_bytes(Path(path), csv_text(self.parts.assign(run=self.receipt.run)).encode())
        return Path(path)

    def to_json(self) -> dict[str, Any]:
        """Return the dial as a JSON object."""
        parts = self.parts.astype(object).where(self.parts.notna(), None)
        table = self.table.astype(object).where(self.table.notna(), None)
        return {
            "run": self.label,
            "parts": parts.to_dict("records"),
            "table": table.to_dict("records"),
            "margins": {"learn": self.learn_margin, "forget": self.forget_margin},
            "receipt": self.receipt.to_json(),
        }

    def __repr__(self) -> str:
        whole = self.parts.loc[0]
        lines = [
            f"Dial of {self.label}",
            f"  learn    {_format_interval(whole, 'learn')} nats",
            f"  forget   {_format_interval(whole, 'forget')} {self.unit}",
        ]
        for name, is_control in (("parts", False), ("controls", True)):
            if verdicts := self._count_verdicts(is_control):
                lines.append(f"  {name:<8} {verdicts}")
        lines += [*self._describe_undecided(), *self._describe_trades()]
        scales = [f"{part}: {scale:g}" for part, scale in self.best().items()]
        if len(scales) > _MOST_SCALES:
            scales[_MOST_SCALES:] = [f"and {len(scales) - _MOST_SCALES} more, see best()"]
        lines += [f"  scale    {line}" for line in scales]
        lines.append("  Intervals are over rows; they do not cover the seed of the training.")
        lines.append(f"  receipt  {self.receipt}")
        return "\n".join(lines)

    def _count_verdicts(self, is_control: bool) -> str:
        """Return the number of parts, or of controls, with each verdict."""
        counts = self.parts.loc[self.parts["control"] == is_control, "verdict"].value_counts()
        return ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if verdict in counts)

    def _undecided_rows(self) -> pd.Series:
        """Return the rows that would decide each undecided part; infinite if no number would."""
        return self.parts.loc[(self.parts["verdict"] == "undecided") & ~self.parts["control"], "rows_needed"]

    def _deciding_rows(self) -> float:
        """Return the rows that would decide half of the undecided parts that rows can decide; NaN without any."""
        numbers = self._undecided_rows()
        # Not the largest number, because a few parts are close to a bound.
        return float(np.ceil(numbers[np.isfinite(numbers)].median()))

    def _describe_undecided(self) -> list[str]:
        numbers, rows = self._undecided_rows(), self._deciding_rows()
        if math.isnan(rows):
            return []
        return [
            f"  rows     about {rows:,.0f} would decide {(numbers <= rows).sum()} of {len(numbers)} undecided parts"
        ]

    def next_command(self) -> str:
        """Return the command that follows: ship a scale that costs nothing, or decide more parts; "" for neither."""
        update = self.parts.loc[0]
        if self.receipt.command and update["best_scale"] < 1 and update["best_loss_high"] < self.learn_margin:
            _, _, path, *_ = shlex.split(self.receipt.command)
            scale = f"{WHOLE}={update['best_scale']:g}"
            return shlex.join(["lorascope", "export", path, "--scales", scale, "--peft", "scaled"])
        rows = self._deciding_rows()
        if math.isnan(rows):
            return ""
        return self.receipt.command_with("--rows", f"{rows:.0f}")

    def _describe_trades(self) -> list[str]:
        """Return the parts that forget least and most per learn, in comparison with the whole update."""
        trades, whole = self.trades(), self.parts.loc[0]
        if trades.empty or whole["learn_low"] <= 0:
            return []
        best_ratios = trades.iloc[:_FEWEST_TRADES]
        # The worst part is not one of the best as well.
        worst_ratio = trades.iloc[_FEWEST_TRADES:].iloc[-1:]
        lines = [f"  trades   {whole['forget'] / whole['learn']:.3g} {self.unit} per nat of learning, whole update"]
        for name, ratios in (("least", best_ratios), ("most", worst_ratio)):
            lines += [f"           {name:<5} {ratio:.3g} {part}" for part, ratio in ratios.items()]
        return lines

    def _repr_html_(self) -> str:
        # Changes at the best scale are in the figure of the curve.
        hidden = [
            name for name in COLUMNS if name.startswith(("best_loss", "best_distance")) or name.endswith("_slope")
        ]
        update = self.parts.loc[0]
        learn, forget = _format_interval(update, "learn"), _format_interval(update, "forget")
        finding = f"{self.label}: learn {learn} nats, forget {forget} {self.unit}"
        if verdicts := self._count_verdicts(is_control=False):
            finding += f"; {verdicts}"
        return finding_html(finding, self.parts.drop(columns=["module", *hidden]), self.next_command())


def _format_interval(row: Any, name: str) -> str:
    return f"{row[name]:.4g} [{row[f'{name}_low']:.4g}, {row[f'{name}_high']:.4g}]"


def tabulate_rows(measured: Sequence[RowValues], rows: Mapping[str, MeasuredRows]) -> pd.DataFrame:
    """Return the tidy table of a dial from the values of its rows; ``rows`` by axis.

    Changes are paired by row with the values of the whole update at scale 1.
    """
    reference = _reference_values(measured)
    records: list[tuple[Any, ...]] = []
    for item in measured:
        axis = rows[item.axis]
        change = axis.estimate(item.values - reference[item.axis])
        interval = change.interval(LEVEL)
        value = float(item.values.sum() / axis.counts.sum())
        records.append((item.part, item.scale, item.axis, axis.unit, value, interval.mean, interval.low, interval.high))
    columns = ["part", "scale", "axis", "unit", "value", "change", "low", "high"]
    return pd.DataFrame(records, columns=columns).sort_values(["part", "axis", "scale"], kind="stable", key=_by_order)


def _reference_values(measured: Sequence[RowValues]) -> dict[str, Float[np.ndarray, "_"]]:
    """Return the values of each axis of the adapted model as it is."""
    return {item.axis: item.values for item in measured if (item.part, item.scale) == (WHOLE, 1.0)}


def _by_order(column: pd.Series) -> pd.Series:
    """Return a sort key: parts in order of first appearance, all else by value."""
    if column.name != "part":
        return column
    return pd.Series(pd.factorize(column)[0], index=column.index)


def judge_rows(
    measured: Sequence[RowValues], rows: Mapping[str, MeasuredRows], parts: int, controls: Set[str]
) -> dict[str, str]:
    """Return the verdict of every removed part; controls are judged among themselves."""
    effects = _effects(measured, rows)
    whole = effects.pop(WHOLE)
    margins = even_share(whole.learn.mean, parts), even_share(whole.forget.mean, parts)
    verdicts: dict[str, str] = {}
    # Controls are matched to parts, so together both would count every test twice.
    for is_control in (False, True):
        judged = {part: effect for part, effect in effects.items() if (part in controls) == is_control}
        verdicts |= zip(judged, judge_parts(judged, whole, *margins), strict=True)
    return verdicts


def _effects(measured: Sequence[RowValues], rows: Mapping[str, MeasuredRows]) -> dict[str, Effects]:
    """Estimate learn and forget of every removed part, and of the whole."""
    estimates: dict[str, dict[str, Estimate]] = {axis: {} for axis in rows}
    reference = _reference_values(measured)
    for item in measured:
        if item.scale == 0:
            change = item.values - reference[item.axis]
            # Removing a part raises the task loss by its learn, and reduces the distance from the base by its forget.
            sign = 1 if item.axis == TASK else -1
            estimates[item.axis][item.part] = rows[item.axis].estimate(sign * change)
    return {part: Effects(learn, estimates[KEEP][part]) for part, learn in estimates[TASK].items()}


def dial_of_rows(
    label: str,
    measured: Sequence[RowValues],
    rows: Mapping[str, MeasuredRows],
    parts: pd.DataFrame,
    margin: float | None,
    receipt: Receipt,
) -> Dial:
    """Return the dial of measured rows.

    Parameters
    ----------
    label : str
        Name of the run.
    measured : sequence of RowValues
        Values of each row: the whole at all scales, each removed part at 0, and curves.
    rows : mapping axis -> MeasuredRows
    parts : DataFrame
        Description of each part with its shares and slopes, the whole first.
    margin : float, optional
        Increase of the task loss that a best scale may cost, by default the even share of a part.
    receipt : Receipt
    """
    number = int((~parts["control"]).sum()) - 1  # without the whole
    effects = _effects(measured, rows)
    whole = effects[WHOLE]
    margins = even_share(whole.learn.mean, number), even_share(whole.forget.mean, number)
    table = tabulate_rows(measured, rows)
    verdicts = judge_rows(measured, rows, number, set(parts.loc[parts["control"], "part"]))
    scales = best_scales(table, margins[0] if margin is None else margin)
    probe = table[(table["axis"] == PROBE) & (table["scale"] == 0)].set_index("part")["change"]
    records = []
    for part in parts["part"]:
        effect = effects.get(part)
        record = {"exact": effect is not None, "kl": -probe.get(part, np.nan), "best_scale": scales.get(part, np.nan)}
        record |= {"verdict": verdicts.get(part, ""), "rows_needed": np.nan}
        if effect is not None:
            for name, estimate in effect._asdict().items():
                interval = estimate.interval(LEVEL)
                record |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
        if effect is not None and record["verdict"] == "undecided":
            record["rows_needed"] = rows_needed(effect, whole, *margins, len(rows[TASK].counts))
        records.append(record)
    summary = pd.concat([parts, pd.DataFrame(records)], axis=1).join(_changes_at(table, scales), on="part")
    return Dial(label, table, summary[COLUMNS], *margins, receipt)


def _changes_at(table: pd.DataFrame, scales: Mapping[str, float]) -> pd.DataFrame:
    """Return the changes of loss and distance of each part at a scale, with their intervals, by part."""
    # Parts without a curve have no best scale, so that no row is theirs.
    is_scaled = table["scale"] == table["part"].map(scales)
    names = {TASK: "best_loss", KEEP: "best_distance"}
    changes = []
    for axis, name in names.items():
        points = table[is_scaled & (table["axis"] == axis)].set_index("part")[["change", "low", "high"]]
        changes.append(points.set_axis([name, f"{name}_low", f"{name}_high"], axis=1))
    return pd.concat(changes, axis=1)


def best_scales(table: pd.DataFrame, margin: float) -> dict[str, float]:
    """Return the scale of each part with a curve that forgets least at a task loss increase of at most a margin.

    ``table`` belongs to a dial. Among equal scales, the nearest to 1 is taken.
    """
    scales = {}
    for part, curve in table.groupby("part", sort=False):
        if curve["scale"].nunique() <= 2:
            continue
        points = curve.pivot(index="scale", columns="axis", values="change")
        allowed = points[points[TASK] <= margin]
        distance = pd.Series(np.abs(allowed.index - 1), index=allowed.index)
        # Scale 1 changes nothing, so at least one scale is allowed.
        order = pd.DataFrame({"keep": allowed[KEEP], "distance": distance}).sort_values(["keep", "distance"])
        scales[str(part)] = float(order.index[0])
    return scales
