"""Rotation of neurons between two checkpoints: locations, angles, notable findings, and their screens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from lorascope.diagnosis.causes.finding import Finding, Kind, power_of_ten
from lorascope.diagnosis.inspection import Facts, InspectionReport, describe_files
from lorascope.diagnosis.inspection_screen import header_blocks, report_screen, shell_command
from lorascope.diagnosis.layer_strips import Modules, Strip, layer_strip
from lorascope.files.lazy_pandas import pandas as pd
from lorascope.files.printable import first_of
from lorascope.files.small_floats import ENCODED
from lorascope.files.text_layout import Block, Elided, TableColumn, aligned_table, format_norm, format_percent
from lorascope.formats.pretrained_weights import PretrainedWeights
from lorascope.runs.module_summary import column, in_axis_order, json_rows, pool_norms

TOP = 0.1  # fraction of all neurons
QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
SHORT = 1e-8  # norm of a neuron's weights below which their direction is not meaningful
_COLUMNS = (
    TableColumn("share", 7, "share", format_percent),
    TableColumn("median", 7, "median", format_norm),
    TableColumn("largest", 7, "largest", format_norm),
    TableColumn("|dW|", 7, "delta_norm", format_norm),
)

_observation = partial(Kind, needs="tuned model")
UNCHANGED_MODEL = _observation(
    "LS401",
    "neurons-unchanged",
    "caution",
    problem="The feed-forward modules of two models are equal.",
    evidence="no neuron changed",
)
UNCHANGED_PROJECTIONS = _observation(
    "LS402",
    "projections-unchanged",
    problem="Projections have a zero update.",
    evidence="number of projections in which no neuron changed",
)
UNCHANGED_NEURONS = _observation(
    "LS403",
    "neurons-still",
    problem="Neurons in changed projections did not change.",
    evidence="number of neurons whose weights are equal before and after; 16-bit weights lose small changes",
)
ZERO_NEURONS = _observation(
    "LS404",
    "neurons-zero",
    problem="Neurons have no direction, so 1 - cos is unknown.",
    evidence="weights of the neuron are zero before or after",
)
SHORT_NEURONS = _observation(
    "LS405",
    "neurons-short",
    problem="The rotation of short neurons is not meaningful.",
    evidence=f"norm of a changed neuron below {power_of_ten(SHORT)} before or after",
)
KINDS = (UNCHANGED_MODEL, UNCHANGED_PROJECTIONS, UNCHANGED_NEURONS, ZERO_NEURONS, SHORT_NEURONS)


@dataclass(frozen=True)
class NeuronInspection(InspectionReport):
    """Inspection of the neurons of a whole model and its base, as ``lorascope inspect`` shows it.

    ``scores`` has the columns of ``neuron_scores`` and ``top``: whether the neuron is in the tenth of all neurons
    with the largest cosine distance. The columns of ``modules`` are ``module, stack, layer, role, neurons, top,
    share, median, largest, turned, delta_norm``: number of neurons, number of them in this tenth, fraction of this
    tenth, median and maximum of 1 - cos, number of neurons with 1 - cos > 0, and |dW|.
    """

    modules: pd.DataFrame
    base: Path
    scores: pd.DataFrame

    def module_rows(self) -> list[dict[str, Any]]:
        return json_rows(self.modules)

    def role_rows(self) -> list[dict[str, Any]]:
        return json_rows(self.roles())

    def roles(self) -> pd.DataFrame:
        """Return the same columns per stack and role."""
        return _sum_up_scores(self.scores, ["stack", "role"])

    def largest(self, count: int) -> pd.DataFrame:
        """Return the neurons with the largest cosine distance."""
        return self.scores.nlargest(count, "cosine_distance")

    def quantiles(self) -> pd.Series:
        """Return quantiles of 1 - cos over all neurons."""
        return self.scores["cosine_distance"].quantile(list(QUANTILES))

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; unknown values are None."""
        return self._json(
            quantiles={f"{share:g}": value for share, value in self.quantiles().items()},
            roles=self.role_rows(),
            modules=self.module_rows(),
            largest=json_rows(self.largest(100).drop(columns="top")),
        )


def inspect_neurons(tuned: str | Path, base: str | Path) -> NeuronInspection:
    """Inspect all neurons of a checkpoint: score them against its base, and summarize the scores.

    Raises
    ------
    FileNotFoundError, ValueError
        See ``neuron_scores.neuron_scores``.
    """
    # It imports pandas, which the doctor does not need for the kinds of findings of this file.
    from lorascope.diagnosis.neuron_scores import neuron_scores

    scores = neuron_scores(base, tuned)
    # Ties are ordered by position, so that the top tenth has a fixed size.
    ordinal = scores["cosine_distance"].rank(method="first", ascending=False)
    scores["top"] = (scores["cosine_distance"] > 0) & (ordinal <= TOP * len(scores))
    modules = _sum_up_scores(scores, ["module", "stack", "layer", "role"])
    before, after = PretrainedWeights(base), PretrainedWeights(tuned)
    formats = [describe_files(map(model.dtype, modules["module"]), model.files) for model in (after, before)]
    layers = modules[["stack", "layer"]].drop_duplicates()
    facts: Facts = (
        (after.folder.resolve().name, f"a whole model, {formats[0]}"),
        ("base", f"{before.folder} ({formats[1]})"),
        ("size", f"{modules['neurons'].sum():,} neurons in {len(modules)} projections of {len(layers)} layers"),
    )
    findings = tuple(_find(scores, modules, after))
    return NeuronInspection(Path(tuned), facts, findings, modules, Path(base), scores)


def _sum_up_scores(scores: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    cells = scores.assign(turned=scores["cosine_distance"] > 0).groupby(list(columns), sort=False, observed=True)
    frame = cells.agg(
        neurons=("neuron", "size"),
        top=("top", "sum"),
        share=("top", lambda top: top.sum() / max(1, int(scores["top"].sum()))),
        median=("cosine_distance", "median"),
        largest=("cosine_distance", "max"),
        turned=("turned", "sum"),
        delta_norm=("delta_norm", pool_norms),
    ).reset_index()
    return in_axis_order(frame, frame.get("layer", [0] * len(frame)))


def _find(scores: pd.DataFrame, modules: pd.DataFrame, tuned: PretrainedWeights) -> Iterator[Finding]:
    # Not the cosine distance, which is 0 or NaN for neurons that only grew or became zero.
    unchanged = modules["delta_norm"] == 0
    names = modules["module"][unchanged]
    if len(names) == len(modules):
        yield UNCHANGED_MODEL.finding("no neuron changed: the feed-forward modules of the two models are equal")
        return
    if len(names):
        message = f"{len(names)} of {len(modules)} projections have a zero update"
        yield _finding_about(UNCHANGED_PROJECTIONS, message, names)
    same = int((scores["delta_norm"] == 0).sum()) - int(modules["neurons"][unchanged].sum())
    if same:
        reason = ""
        if not {"F16", *ENCODED}.isdisjoint(map(tuned.dtype, modules["module"])):
            reason = " (weights of 16 bits or fewer lose small changes)"
        yield UNCHANGED_NEURONS.finding(f"{same:,} neurons in changed projections did not change{reason}")
    zero = scores["cosine_distance"].isna()
    if zero.any():
        message = f"{zero.sum():,} neurons are zero before or after and have no direction"
        yield _finding_about(ZERO_NEURONS, message, scores["module"][zero].unique())
    short = ~zero & (scores["delta_norm"] > 0) & (scores[["norm_original", "norm_tuned"]].min(axis=1) < SHORT)
    if short.any():
        neurons = f"{short.sum():,} changed neurons have a norm below {SHORT:g} before or after"
        message = f"{neurons}, so their 1 - cos is not meaningful"
        yield _finding_about(SHORT_NEURONS, message, scores["module"][short].unique())


def _finding_about(kind: Kind, message: str, names: Iterable[str]) -> Finding:
    names = tuple(names)
    return kind.finding(f"{message}: {first_of(names)}", names)


def neurons_screen(inspection: NeuronInspection, target: Console) -> str:
    """Format the inspection of neurons in a whole model and its base as a screen: their rotation."""
    strip = Strip("in top 10%", _top_fraction, "{} of a layer's neurons", format_percent)
    quantiles = "  ".join(f"{quantile:.0%} {format_norm(value)}" for quantile, value in inspection.quantiles().items())
    neurons = [
        Elided(row["module"], f"{format_norm(row['cosine_distance']):<8} ", f"  neuron {row['neuron']}")
        for row in inspection.largest(3).to_dict("records")
    ]
    command = "lorascope inspect {} --csv > neurons.csv"
    return report_screen(
        target,
        header_blocks(inspection.facts),
        *layer_strip(inspection, target, [strip], _COLUMNS),
        blocks=[Block("1 - cos", [quantiles]), Block("largest", neurons)],
        findings=inspection.details,
        command=shell_command(command, (inspection.path or Path(), inspection.base)),
    )


def _top_fraction(modules: Modules) -> float:
    """Return the fraction of the neurons of modules that are in the tenth with the largest distance."""
    return sum(column(modules, "top")) / sum(column(modules, "neurons"))


def projections_screen(inspection: NeuronInspection, target: Console) -> str:
    """Format the inspection of neurons in a whole model and its base with one line per projection, without strips."""
    columns = [TableColumn("projection", 39, "module"), TableColumn("role", 8, "role"), *_COLUMNS]
    body = aligned_table(columns, inspection.module_rows())
    return report_screen(target, header_blocks(inspection.facts), body, findings=inspection.details)
