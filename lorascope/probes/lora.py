"""Probe of LoRA: accuracy compared with full fine-tuning, and similarity of subspaces between ranks.

Source: LoRA (arXiv 2106.09685), section 5 (quality), section 7.2 with figures 3 and 4 (subspace similarity).

Departs:

- Much smaller tasks and models.
- The two runs of a pair never share a seed. With the same seed, a smaller random A equals the first rows of a larger
  one. The paper does not state whether the ranks of its figure 3 share an initialization.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd

from lorascope.adapters.host_weights import host_weight, to_array
from lorascope.evidence.statistics import lora as statistics
from lorascope.inputs import models, tasks
from lorascope.inputs.task_parts import subsample
from lorascope.methods import Full, LoRA
from lorascope.pages.report_figure import ReportFigure, draw
from lorascope.probes.base import (
    Arm,
    OwnArm,
    Probe,
    encoder_settings,
    factor_settings,
)
from lorascope.probes.tfidf_baseline import tfidf_arm
from lorascope.runs.run import Run
from lorascope.updates.linalg import as_float64


def arms() -> list[Arm | OwnArm]:
    """Return the registered arms: full fine-tuning and LoRA, both also on few drawn examples, and word counts.

    The lowest ranks and 1,000 examples are for figures.
    """
    few = encoder_settings(150)
    low = LoRA(rank=8, alpha=8.0, targets="all-linear")
    high = LoRA(rank=64, alpha=64.0, targets="all-linear")
    return [
        Arm(label=statistics.FULL, method=Full(), settings=encoder_settings()),
        Arm(label=statistics.LOW, method=low, settings=factor_settings()),
        Arm(label=statistics.HIGH, method=high, settings=factor_settings()),
        *(
            Arm(label=label, method=method, settings=few, vary=partial(_draw_examples, number))
            for label, method, number in (
                (statistics.FEW_FULL, Full(), 100),
                (statistics.FEW_LOW, low, 100),
                (statistics.MORE_FULL, Full(), 1000),
                (statistics.MORE_LOW, low, 1000),
            )
        ),
        tfidf_arm(statistics.WORDS, "sentiment"),
        *(
            Arm(label=label, method=replace(low, rank=rank, alpha=float(rank)), settings=encoder_settings())
            for rank, label in statistics.LOWER.items()
        ),
    ]


def _draw_examples(number: int, arm: Arm, seed: int) -> Arm:
    return replace(arm, task=subsample(tasks.load("sentiment"), number, seed))


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
)
