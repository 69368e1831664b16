"""Rotation of neurons between two checkpoints: locations, angles and notable findings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lorascope.diagnosis.inspection import DTYPES, first_and_count, json_values, pool_norms, rows
from lorascope.diagnosis.neuron_scores import score
from lorascope.runs.formats.pretrained_weights import PretrainedWeights
from lorascope.schema.module_roles import position

TOP = 0.1
QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
SHORT = 1e-8  # norm of a neuron's weights below which their direction is not meaningful
_CELL = ["module", "stack", "layer", "role"]


@dataclass(frozen=True)
class NeuronInspection:
    """Result of ``lorascope inspect`` for a whole model and its base.

    Parameters
    ----------
    path, base : Path
        Folders or files of the model and its base.
    facts : tuple of (str, str)
        Header: model, base, size.
    scores : DataFrame
        ``neuron_scores.neuron_scores``, with ``top``: whether the neuron is in the tenth of all neurons with the
        largest cosine distance.
    modules : DataFrame
        ``module, stack, layer, role, neurons, top, share, median, largest, turned, delta_norm``: number of neurons,
        number of them in that tenth, fraction of the tenth, median and maximum of 1 - cos, number of neurons with
        1 - cos > 0, and |dW|.
    findings : tuple of str
        One sentence per finding.
    """

    path: Path
    base: Path
    facts: tuple[tuple[str, str], ...]
    scores: pd.DataFrame
    modules: pd.DataFrame
    findings: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.resolve().name

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
        return {
            "name": self.name,
            "path": str(self.path),
            "kind": self.facts[0][1],
            "facts": dict(self.facts[1:]),
            "quantiles": json_values({f"{share:g}": value for share, value in self.quantiles().items()}),
            "roles": rows(self.roles()),
            "modules": rows(self.modules),
            "largest": rows(self.largest(100).drop(columns="top")),
            "findings": list(self.findings),
        }


def inspect_neurons(tuned: str | Path, base: str | Path) -> NeuronInspection:
    """Score all neurons of a checkpoint against its base, and summarize the scores.

    Raises
    ------
    FileNotFoundError, ValueError
        See ``neuron_scores.neuron_scores``.
    """
    models = PretrainedWeights(base), PretrainedWeights(tuned)
    scores = pd.concat(score(*models), ignore_index=True)
    scores = scores.astype(dict.fromkeys(("module", "stack", "role"), "category"))
    turned = scores["cosine_distance"] > 0
    # Ties are ordered by position, so that the top tenth has a fixed size.
    place = scores["cosine_distance"].rank(method="first", ascending=False)
    scores["top"] = turned & (place <= TOP * len(scores))
    modules = _sum_up_scores(scores, _CELL)
    facts = _checkpoint_facts(*models, modules)
    return NeuronInspection(
        Path(tuned), Path(base), facts, scores, modules, tuple(_neuron_findings(scores, modules, models[1]))
    )


def _sum_up_scores(scores: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    cells = scores.groupby(list(by), sort=False, observed=True)
    distance = cells["cosine_distance"]
    frame = pd.DataFrame(
        {
            "neurons": cells.size(),
            "top": cells["top"].sum(),
            "share": cells["top"].sum() / max(1, int(scores["top"].sum())),
            "median": distance.median(),
            "largest": distance.max(),
            "turned": (scores["cosine_distance"] > 0).groupby([scores[name] for name in by], observed=True).sum(),
            "delta_norm": cells["delta_norm"].agg(pool_norms),
        }
    ).reset_index()
    places = zip(frame["stack"], frame.get("layer", [0] * len(frame)), frame["role"], strict=True)
    order = sorted(range(len(frame)), key=[position(*place) for place in places].__getitem__)
    return frame.iloc[order].reset_index(drop=True)


def _checkpoint_facts(
    base: PretrainedWeights, tuned: PretrainedWeights, modules: pd.DataFrame
) -> tuple[tuple[str, str], ...]:
    formats = []
    for model in (tuned, base):
        dtypes = " and ".join(sorted({DTYPES[model.dtype(module)] for module in modules["module"]}))
        formats.append(f"{dtypes}, {len(model.files)} file{'s' * (len(model.files) > 1)}")
    layers = modules[["stack", "layer"]].drop_duplicates()
    held = f"{modules['neurons'].sum():,} neurons in {len(modules)} projections of {len(layers)} layers"
    return (
        (tuned.folder.resolve().name, f"a whole model, {formats[0]}"),
        ("base", f"{base.folder} ({formats[1]})"),
        ("holds", held),
    )


def _neuron_findings(scores: pd.DataFrame, modules: pd.DataFrame, tuned: PretrainedWeights) -> Iterator[str]:
    # Not the cosine distance, which is 0 or NaN for neurons that only grew or became zero.
    untouched = modules["delta_norm"] == 0
    still = modules["module"][untouched]
    if len(still) == len(modules):
        yield "no neuron changed: the feed-forward modules of the two models are equal"
        return
    if len(still):
        yield f"{len(still)} of {len(modules)} projections have a zero update: {first_and_count(still)}"
    same = int((scores["delta_norm"] == 0).sum()) - int(modules["neurons"][untouched].sum())
    if same:
        narrow = any(tuned.dtype(module) in ("BF16", "F16") for module in modules["module"])
        why = " (16-bit weights lose small changes)" if narrow else ""
        yield f"{same:,} neurons in changed projections did not change{why}"
    absent = scores["cosine_distance"].isna()
    if absent.any():
        where = first_and_count(scores["module"][absent].unique())
        yield f"{absent.sum():,} neurons are zero before or after and have no direction: {where}"
    short = ~absent & (scores["delta_norm"] > 0) & (scores[["norm_original", "norm_tuned"]].min(axis=1) < SHORT)
    if short.any():
        where = first_and_count(scores["module"][short].unique())
        problem = f"changed neurons have a norm below {SHORT:g} before or after, so their 1 - cos is not meaningful"
        yield f"{short.sum():,} {problem}: {where}"
