"""Whether advice holds on other seeds: what it recommends against the unchanged training.

Run ``python benchmarks/advice_retrained.py --seeds 5 --out runs/advice``. Two adapters of the guide "From adapter to
decision, three times" are trained again on the bundled sentences about movies, with seeds that no advice was given on.
A smaller rank is trained; cuts and a scale below 1 are measured on the unchanged adapters. Advice is confirmed if the
95% interval of the change of the test loss, over seeds, ends below the margin with which it was given. Finished runs in
the folder are not trained again. A run takes about 50 CPU seconds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

import lorascope as ls
from lorascope.adapters import delta
from lorascope.analysis.dial import KEEP, TASK, WHOLE
from lorascope.analysis.rank_prices import components_within
from lorascope.analysis.seed_intervals import t_interval
from lorascope.inputs.text_rows import encode_rows, load_keep
from lorascope.insight.adapted_base import open_adapted
from lorascope.insight.cut_updates import cut_updates
from lorascope.insight.dial import DialedModel
from lorascope.insight.update_parts import ScaledUpdates, UpdatePart, component_parts
from lorascope.methods.method import Method
from lorascope.observe.measured_rows import Drift, TaskLoss

MOVIES, TEST_ROWS, KEEP_ROWS, LENGTH = "sentiment/movies", 512, 192, 32
SETTINGS = {"steps": 150, "batch_size": 8, "eval_every": 0, "eval_size": 32, "head_lr": 1e-2}
LORA, SMALLER, ADALORA = ls.LoRA(rank=8, lr=1e-3), ls.LoRA(rank=4, lr=1e-3), ls.AdaLoRA()
SCALE, CUT_LORA, CUT_ADALORA = 0.75, 12, 107


class Outcome(NamedTuple):
    """Change of the test loss by seed in nats, and the margin of the advice."""

    advice: str
    effects: list[float]
    margin: float


def trained(name: str, method: Method, seed: int, out: Path) -> ls.Run:
    """Train a run, or read it if it is finished."""
    folder = out / f"{name}-seed-{seed}"
    if not (folder / "run.json").exists() or ls.load(folder).meta.status != "done":
        settings = SETTINGS | {"max_length": LENGTH, "test_size": TEST_ROWS, "observe": [], "progress": False}
        ls.train("minilm", MOVIES, method, seed=seed, out=folder, **settings)
    return ls.load(folder)


def test_loss(run: ls.Run) -> float:
    """Return the loss on the test split in nats."""
    return float(run.table.query("quantity == 'test_loss'")["value"].iloc[-1])


def cut_effect(run: ls.Run, budget: int) -> float:
    """Return the change of the test loss in nats if a number of components is kept, the largest of all modules."""
    adapted = open_adapted(run, "minilm", MOVIES, "last")
    base = adapted.base.eval()
    loss = TaskLoss(base, *encode_rows(base, adapted.task, "test", TEST_ROWS, LENGTH))
    components = component_parts(base, adapted.updates).directions
    sigma = {}
    for module, directions in components.items():
        sigma[module] = directions.size.double().numpy()
    delta.attach(base, adapted.deltas)
    whole = np.mean(loss.values())
    with cut_updates(base, components, components_within(sigma, budget)):
        return float(np.mean(loss.values()) - whole)


def scale_effects(run: ls.Run) -> tuple[float, float]:
    """Return the change of the test loss at a smaller scale in nats, and the fraction of the drift that remains."""
    adapted = open_adapted(run, "minilm", MOVIES, "last")
    base = adapted.base.eval()
    task_rows = encode_rows(base, adapted.task, "test", TEST_ROWS, LENGTH)
    keep_rows = encode_rows(base, load_keep(None, adapted.task, base), "validation", KEEP_ROWS, LENGTH)
    # What the base returns on the rows to keep is measured before its adapter is attached.
    measures = {TASK: TaskLoss(base, *task_rows), KEEP: Drift(base, *keep_rows)}
    delta.attach(base, adapted.deltas)
    dialed = DialedModel(ScaledUpdates(base, adapted.deltas, {}), measures, tqdm(disable=True))
    points = dialed.curve(UpdatePart(WHOLE, tuple(adapted.deltas)), (SCALE, 1.0))
    means = {(point.axis, point.scale): float(np.mean(point.values)) for point in points}
    return means[TASK, SCALE] - means[TASK, 1.0], means[KEEP, SCALE] / means[KEEP, 1.0]


def judge(low: float, high: float, margin: float) -> str:
    """Return the verdict on advice: whether the loss increases by less than the margin."""
    if high < margin:
        return "confirmed"
    return "refuted" if low > margin else "undecided"


def main() -> None:
    """Print the change of the test loss for each advice: mean, 95% t interval over seeds, and verdict."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/advice"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    smaller = Outcome("LoRA, train at rank 4 instead of 8", [], 0.010)
    cut = Outcome(f"LoRA, cut to {CUT_LORA} of 96 components", [], 0.009)
    cut_adalora = Outcome(f"AdaLoRA, cut to {CUT_ADALORA} of 288 components", [], 0.018)
    scaled = Outcome(f"AdaLoRA, scale {SCALE:g}", [], 0.019)
    outcomes = (smaller, cut, cut_adalora, scaled)
    drifts = []
    # The advice was given on adapters of seed 0.
    for seed in range(1, arguments.seeds + 1):
        control, changed = (trained(*arm, seed, arguments.out) for arm in (("rank-8", LORA), ("rank-4", SMALLER)))
        smaller.effects.append(test_loss(changed) - test_loss(control))
        cut.effects.append(cut_effect(control, CUT_LORA))
        adalora = trained("adalora", ADALORA, seed, arguments.out)
        cut_adalora.effects.append(cut_effect(adalora, CUT_ADALORA))
        effect, drift = scale_effects(adalora)
        scaled.effects.append(effect)
        drifts.append(drift)
        changes = ", ".join(f"{outcome.effects[-1]:+.3f}" for outcome in outcomes)
        print(f"seed {seed}: {changes}; drift x {drift:.2f}", flush=True)
    rows = []
    for advice, effects, margin in outcomes:
        mean, low, high, _ = t_interval(np.array(effects))
        verdict = judge(low, high, margin)
        rows.append({"advice": advice, "change": mean, "low": low, "high": high, "margin": margin, "verdict": verdict})
    print(pd.DataFrame(rows).round(4).to_string(index=False))
    print(f"drift at scale {SCALE:g}: {min(drifts):.0%} to {max(drifts):.0%} of that at scale 1")


if __name__ == "__main__":
    main()
