"""Probe of LoRA: accuracy compared with full fine-tuning, and similarity of subspaces between ranks.

Source: LoRA (arXiv 2106.09685), section 5 (quality), section 7.2 with figures 3 and 4 (subspace similarity).

Departs:

- Much smaller tasks and models.
- The two runs of a pair never share a seed. With the same seed, a smaller random A equals the first rows of a larger
  one. The paper does not state whether the ranks of its figure 3 share an initialization.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from lorascope import plots
from lorascope.adapters.host_weights import host_weight, to_array
from lorascope.analysis import norms
from lorascope.charts.chart import Chart
from lorascope.charts.marks import Heat
from lorascope.evidence.statistics import lora as statistics
from lorascope.inputs import models, tasks
from lorascope.inputs.task_parts import subsample
from lorascope.methods import Full, LoRA
from lorascope.pages.report_figure import ReportFigure, draw
from lorascope.plots.builders import add_printed, heat_by_role
from lorascope.probes.base import (
    Arm,
    EvidenceFigure,
    OwnArm,
    Probe,
    accuracy_bars,
    encoder_settings,
    factor_settings,
    own_labels,
    training_loss,
)
from lorascope.probes.printed_numbers import printed
from lorascope.probes.tfidf_baseline import tfidf_arm
from lorascope.runs.run import Run
from lorascope.schema import module_table
from lorascope.updates.linalg import as_float64


def arms() -> list[Arm | OwnArm]:
    """Return the registered arms: full fine-tuning and LoRA, both also on 100 drawn examples, and word counts."""
    few = encoder_settings(150)
    low = LoRA(rank=8, alpha=8.0, targets="all-linear")
    high = LoRA(rank=64, alpha=64.0, targets="all-linear")
    return [
        Arm(label=statistics.FULL, method=Full(), settings=encoder_settings()),
        Arm(label=statistics.LOW, method=low, settings=factor_settings()),
        Arm(label=statistics.HIGH, method=high, settings=factor_settings()),
        Arm(label=statistics.FEW_FULL, method=Full(), settings=few, vary=_with_few_examples),
        Arm(label=statistics.FEW_LOW, method=low, settings=few, vary=_with_few_examples),
        tfidf_arm(statistics.WORDS, "sentiment"),
    ]


def _with_few_examples(arm: Arm, seed: int) -> Arm:
    return replace(arm, task=subsample(tasks.load("sentiment"), 100, seed))


def keep_directions(run: Run) -> pd.DataFrame:
    """Return the kept table ``directions``; see ``evidence.statistics.lora``."""
    parts = []
    for when, step in (("start", 0), ("end", None)):
        for module, factors in run.factors(step).items():
            first = np.linalg.svd(as_float64(factors["A"]), full_matrices=False)[2][0]
            index = np.arange(len(first), dtype=np.uint16)
            parts.append(
                pd.DataFrame({"module": module, "when": when, "index": index, "value": first.astype(np.float16)})
            )
    return pd.concat(parts, ignore_index=True)


def keep_amplification(run: Run) -> pd.DataFrame:
    """Return the kept table ``amplification``; see ``evidence.statistics.lora``.

    The norm between k left and k right random directions is the root mean square over all directions,
    ``k |W| / sqrt(out * in)``, which is exact.
    """
    model, rows = models.load(run.meta.model), []
    for module, update in run.updates().items():
        weight = as_float64(to_array(host_weight(model.get_submodule(module))))
        left, sigma, right = update.svd()
        between, whole = np.linalg.norm(left.T @ weight @ right), np.linalg.norm(weight)
        rows.append((module, between, len(sigma) * whole / np.sqrt(weight.size)))
    return pd.DataFrame(rows, columns=["module", "update", "random"])


def figures(runs: Mapping[str, Run]) -> list[ReportFigure]:
    """Draw the norms of the updates of full fine-tuning and LoRA."""
    both = {label: runs[label] for label in (statistics.FULL, statistics.LOW)}
    return [draw(figure, both) for figure in ("update_norm", "update_norm_heat", "norm_over_steps")]


def _draw_sizes(runs: Mapping[str, Sequence[Any]]) -> Chart:
    numbers = printed(paper="LoRA", table="Table 2", model="RoBERTa-base", data="SST-2")
    numbers = numbers[numbers["method"].isin([statistics.FULL, "LoRA"])]
    return add_printed(plots.accuracy_by_parameters(runs), numbers, "parameters", "LoRA, table 2, SST-2")


def _draw_amplification(runs: Mapping[str, Sequence[Any]]) -> Chart:
    """Plot the kept table ``amplification`` by layer and role, averaged over seeds on a logarithmic scale."""
    tables = pd.concat(run.tables[statistics.AMPLIFICATION] for run in runs[statistics.LOW])
    ratios = np.log10(tables["update"] / tables["random"]).groupby(tables["module"]).mean()
    cells = pd.DataFrame([module_table.parse(name) for name in ratios.index], columns=["stack", "layer", "role"])
    cells = cells.assign(value=ratios.to_numpy(), recipe="").astype({"layer": "Int16"})
    cells = cells.assign(place=norms.place(cells))
    (chart,) = heat_by_role(
        cells,
        [""],
        lambda own: Heat("place", "role", "value", "log10 of the ratio", ".2f", scale="diverging"),
        "layer",
        "Norm of W between eight left and right singular vectors of the update, over its expectation for random "
        f"directions; mean of {len(runs[statistics.LOW])} seeds. 0: no amplification.",
    )
    return replace(chart, title="Base weight along the update, relative to random directions")


def evidence_figures() -> list[EvidenceFigure]:
    """Return the figures of norms, training, spectra, subspaces and accuracy."""
    both, ranks = own_labels(statistics.FULL, statistics.LOW), own_labels(statistics.LOW, statistics.HIGH)
    compared = "full fine-tuning and LoRA"
    return [
        EvidenceFigure(name="update-norm", alt=f"Update norm by layer: {compared}", arms=both, draw=plots.update_norm),
        EvidenceFigure(
            name="update-norm-heat",
            alt=f"Update norm by block and role: {compared}",
            arms=both,
            draw=plots.update_norm_heat,
        ),
        EvidenceFigure(
            name="norm-over-steps",
            alt=f"Update norm by layer over the steps: {compared}",
            arms=both,
            draw=plots.norm_over_steps,
        ),
        EvidenceFigure(
            name="training-curves",
            alt=f"Training loss: {compared} of rank 8 and 64",
            arms=both | ranks,
            draw=training_loss,
        ),
        EvidenceFigure(
            name="spectrum", alt="Singular values of the updates of rank 8 and 64", arms=ranks, draw=plots.spectrum
        ),
        EvidenceFigure(
            name="subspace-similarity",
            alt="Subspace similarity of rank 8 and rank 64 with different seeds, and at chance",
            arms=ranks,
            # With one seed, the smaller random A equals the first rows of the larger one.
            draw=lambda runs: plots.subspace_similarity(
                {statistics.LOW: runs[statistics.LOW][0], statistics.HIGH: runs[statistics.HIGH][1]}
            ),
            seeds=2,
        ),
        EvidenceFigure(
            name="subspace-seeds",
            alt="Subspace similarity of two seeds of rank 64, and at chance",
            arms=own_labels(statistics.HIGH),
            draw=plots.subspace_similarity,
            seeds=2,
        ),
        EvidenceFigure(
            name="low-data",
            alt="Accuracy of full fine-tuning and LoRA on all examples and on 100",
            arms={
                "full": statistics.FULL,
                "LoRA": statistics.LOW,
                "full, 100 examples": statistics.FEW_FULL,
                "LoRA, 100 examples": statistics.FEW_LOW,
            },
            draw=lambda runs: accuracy_bars(runs, "Accuracy by number of training examples", start=0.5),
            seeds=None,
            scores_only=True,
        ),
        EvidenceFigure(
            name="amplification",
            alt="Norm of the base weight along the directions of the update, relative to random ones",
            arms=own_labels(statistics.LOW),
            draw=_draw_amplification,
            seeds=None,
            scores_only=True,
            table=statistics.AMPLIFICATION,
        ),
        EvidenceFigure(
            name="accuracy-lora",
            alt="Accuracy by trained parameters: full fine-tuning, LoRA of rank 8 and 64, and printed numbers",
            arms=both | ranks,
            draw=_draw_sizes,
            seeds=None,
            scores_only=True,
        ),
    ]


PROBE = Probe(
    name="lora",
    title="LoRA: low-rank compared with full-rank updates",
    source="Hu et al., LoRA, arXiv 2106.09685",
    question="Is LoRA of rank 8 as accurate as full fine-tuning, and does a larger rank learn the same subspace?",
    order=0,  # first, because other probes compare their methods with its arms
    arms=arms,
    keep={
        (statistics.DIRECTIONS, statistics.LOW): keep_directions,
        (statistics.DIRECTIONS, statistics.HIGH): keep_directions,
        (statistics.AMPLIFICATION, statistics.LOW): keep_amplification,
    },
    figures=figures,
    evidence_figures=evidence_figures,
)
