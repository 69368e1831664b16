"""Train LoRA and full fine-tuning on all 30 blocks of SmolLM2 and draw the figures: python figures/smollm2.py runs

These are runs of the study's claims on norms. Finished runs in the folder are reused, so a second call only draws.
docs/smollm2.md describes the results.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import lorascope as ls
from lorascope.analysis.leading_directions import Directions, leading_singular_vectors
from lorascope.charts.chart import Chart, Drawable
from lorascope.charts.geometry import MINUS
from lorascope.charts.save import save_small
from lorascope.runs.run import Run
from lorascope.schema.module_roles import ROLES
from lorascope.updates.linalg import effective_rank

MODEL: Any = "smollm2"
SETTINGS = {"batch_size": 8, "eval_every": 0, "eval_size": 16, "test_size": 200}
STEPS, SEEDS = 40, (200, 201, 202, 203, 204)
RANK = 16
FULL, LORA = "full fine-tuning", f"LoRA, rank {RANK}"
METHODS = {
    FULL: ls.Full(lr=1e-5, head_lr=1e-5),
    LORA: ls.LoRA(rank=RANK, alpha=16.0, targets=("all-linear", "embed", "lm_head"), lr=1e-3, head_lr=1e-3),
}
GROUND = f"SmolLM2 on sentiment, {STEPS} steps."
LEADING = 4  # directions per update that are compared between seeds
SIGNED = np.log2(1.5)  # cells that differ from the mean by this factor have a sign


def train(root: str, jobs: int | None) -> dict[str, list[Run]]:
    """Train both methods with every seed."""
    settings = SETTINGS | {"steps": STEPS, "observe": [{"name": "norms", "every": 5}]}
    grid = {"model": MODEL, "task": "sentiment", "seeds": list(SEEDS), "root": root, "settings": settings}
    return {label: ls.sweep({**grid, "method": method}, jobs=jobs) for label, method in METHODS.items()}


def draw(runs: Mapping[str, list[Run]]) -> dict[str, Drawable]:
    """Draw one figure per file."""
    return {
        "smollm2-norms": draw_norms(runs),
        "smollm2-ranks": draw_ranks(runs[LORA]),
        "smollm2-directions": draw_directions(runs[LORA]),
    }


def draw_norms(runs: Mapping[str, list[Run]]) -> Drawable:
    """Draw the relative update of every matrix over the mean of its method, whose learning rates differ."""
    charts, largest_updates = [], []
    for chart in ls.plots.update_norm_heat(runs, quantity="relative_update").panels:
        matrices = chart.data[chart.data["role"] != "norm"]
        log = np.log2(matrices["value"] / matrices["value"].mean())
        # In gray, both ends of the colors are dark.
        sign = np.select([log >= SIGNED, log <= -SIGNED], ["+", MINUS], "")
        label = "log₂(update / mean)"
        heat = ls.Heat("place", "role", "log", label, "+.1f", "diverging", limits=(-2, 2), words="sign")
        largest = matrices.loc[log.idxmax()]
        times = 2 ** log.max()
        largest_updates.append(f"{times:.1f} times the mean in {chart.title}")
        title = f"{chart.title}: largest at {largest['role']} of block {largest['place']}"
        # Norm layers are not adapted by LoRA.
        y = replace(chart.y, order=[role for role in chart.y.order or () if role != "norm"])
        caption = (
            f"{GROUND} ‖W − W₀‖ / ‖W₀‖ of every matrix, divided by the mean over the matrices of its method, in powers "
            "of two. Cells with + and − are at "
            "least 1.5 times above or below the mean. "
            f"Mean of {len(SEEDS)} seeds, after step {STEPS}."
        )
        matrices = matrices.assign(log=log, sign=sign)
        charts.append(replace(chart, data=matrices, marks=[heat], title=title, y=y, caption=caption))
    return replace(
        ls.set_side_by_side(*charts), title=f"Largest relative update of a matrix: {', '.join(largest_updates)}"
    )


def draw_ranks(runs: list[Run]) -> Drawable:
    """Draw the effective rank of every update, with that of random factors of the same shapes in the caption."""
    chart = ls.plots.update_norm_heat({LORA: runs}, quantity="effective_rank")
    (panel,) = chart.panels
    matrices = runs[0].modules.dropna(subset="layer")["module"]
    shapes = {update.shape for name, update in runs[0].updates().items() if name in set(matrices)}
    ranks = sorted(random_effective_rank(shape, RANK) for shape in shapes)
    caption = f"{panel.caption} Random factors of the same shapes: {ranks[0]:.1f} to {ranks[-1]:.1f}."
    blocks = panel.data.groupby("place", sort=False, observed=True)["value"].mean()
    title = (
        f"Effective rank of LoRA's updates of rank {RANK}: {blocks.iloc[0]:.0f} in block {blocks.index[0]}, "
        f"{blocks.iloc[-1]:.0f} in block {blocks.index[-1]} (mean over roles)"
    )
    return replace(panel, caption=caption, title=title)


def random_effective_rank(shape: tuple[int, int], rank: int) -> float:
    """Return the effective rank of a product of random factors, the first of them uniform as LoRA's initial A."""
    outputs, inputs = shape
    rng = np.random.default_rng(0)
    A, B = rng.uniform(-1, 1, (rank, inputs)), rng.standard_normal((outputs, rank))
    # The small triangular factors have the singular values of the product.
    triangles = np.linalg.qr(B, mode="r"), np.linalg.qr(A.T, mode="r")
    return effective_rank(np.linalg.svd(triangles[0] @ triangles[1].T, compute_uv=False))


def draw_directions(runs: list[Run]) -> Drawable:
    """Draw the overlap of the leading directions of every update between seeds, minus that of random directions."""
    by_seed = []
    for run in runs:
        updates = run.updates()
        by_seed.append({module: leading_singular_vectors(updates[module], LEADING) for module in updates})
    modules = runs[0].modules.dropna(subset="layer").astype({"layer": int})
    rows = []
    for module in modules[modules["module"].isin(by_seed[0])].to_dict("records"):
        for side in Directions._fields:
            bases = [getattr(directions[module["module"]], side) for directions in by_seed]
            overlaps = [_excess_overlap(*pair) for pair in combinations(bases, 2)]
            rows.append((side, str(module["layer"]), module["role"], np.mean(overlaps)))
    table = pd.DataFrame(rows, columns=["side", "layer", "role", "overlap"])
    caption = (
        f"{GROUND} {LORA}. Overlap ‖U₁ᵀU₂‖² / {LEADING} of the {LEADING} leading singular vectors of an update "
        "between two seeds, "
        f"minus that of random directions; mean over the pairs of {len(runs)} seeds with separate initial A's."
    )
    x = ls.Axis(label="block", order=list(dict.fromkeys(table["layer"])))
    y = ls.Axis(order=[role for role in ROLES if role in set(table["role"])])
    charts, means = [], []
    for side, title in zip(Directions._fields, ("outputs (from B)", "inputs (from A)"), strict=True):
        of_side = table[table["side"] == side]
        means.append(f"{title} {of_side['overlap'].mean():.2f}")
        title += f": mean {of_side['overlap'].mean():.2f}"
        heat = ls.Heat("layer", "role", "overlap", "overlap − chance", limits=(0, None))
        charts.append(Chart(of_side, [heat], title=title, x=x, y=y, caption=caption))
    return replace(
        ls.set_side_by_side(*charts),
        title=f"Overlap of the update's directions between seeds, above chance: {', '.join(means)}",
    )


def _excess_overlap(first: np.ndarray, second: np.ndarray) -> float:
    return float(((first.T @ second) ** 2).sum() / first.shape[1] - first.shape[1] / len(first))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", help="folder of the runs")
    parser.add_argument("--jobs", type=int, help="number of parallel runs, about 4 GB each (default: number of cores)")
    given = parser.parse_args()
    runs = train(given.root, given.jobs)
    for label, of_method in runs.items():
        accuracies = ", ".join(f"{run.score.metric:.2f}" for run in of_method)
        parameters = of_method[0].meta.parameters
        share = parameters.trained / (parameters.total or parameters.trained)
        print(f"{label}: accuracy {accuracies}; trained parameters {share:.1%}")
    for file, chart in draw(runs).items():
        print(save_small(chart, Path(__file__).parent / f"{file}.png"))


if __name__ == "__main__":
    main()
