"""Retraining with the ranks of a run: which alpha goes with smaller ranks.

Run ``python benchmarks/rank_pattern_retraining.py --seeds 5 --out runs/retraining``. A LoRA of rank 8 is trained on the
bundled sentiment task, a quarter of its components gives the rank of each module, and LoRAs of these ranks are trained
again, with the scale or the alpha of the first one. A LoRA of rank 2 everywhere has as many components. Finished runs
in the folder are not trained again. A run takes about two CPU-minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd
import torch

import lorascope as ls
from lorascope.methods.lora import LoRA

RANK, BUDGET, RATE = 8, 0.25, 1e-3


class SameScaleLoRA(LoRA, name="same-scale-lora"):
    """LoRA whose modules have the scale 1 at any rank: alpha / rank of the run that the ranks are from."""

    def factor_options(self, name: str) -> tuple[int, float, float]:
        rank, _, dropout = super().factor_options(name)
        return rank, 1.0, dropout


def configurations(ranks: Mapping[str, int]) -> Iterator[tuple[str, LoRA]]:
    """Yield a name and a method for every configuration that is retrained."""
    for label, rank in (("ranks of the run", ranks), ("rank 2", round(BUDGET * RANK))):
        yield f"{label}, scale kept", SameScaleLoRA(rank=rank, lr=RATE)
        yield f"{label}, alpha kept", LoRA(rank=rank, alpha=RANK, lr=RATE)


def accuracy_of(name: str, method: LoRA, seed: int, steps: int, out: Path) -> tuple[float, Path]:
    """Train a run, or read it if it is finished, and return its accuracy on the test split, and its folder."""
    folder = out / f"{name.replace(' ', '-').replace(',', '')}-{steps}-steps-seed-{seed}"
    if not (folder / "run.json").exists() or ls.load(folder).meta.status != "done":
        ls.train("minilm", "sentiment", method, steps=steps, seed=seed, observe=[], out=folder, progress=False)
    rows = ls.load(folder).table.query("quantity == 'test_metric'")
    return float(rows["value"].iloc[-1]), folder


def main() -> None:
    """Print the accuracy of every configuration, mean and standard deviation over seeds."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--out", type=Path, default=Path("runs/retraining"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in range(arguments.seeds):
        reference = LoRA(rank=RANK, alpha=RANK, lr=RATE)
        accuracy, folder = accuracy_of(f"rank {RANK}", reference, seed, arguments.steps, arguments.out)
        rows.append({"configuration": f"rank {RANK}", "seed": seed, "accuracy": accuracy})
        ranks = ls.export.select_components(ls.load(folder), BUDGET).ranks
        for name, method in configurations(ranks):
            accuracy, _ = accuracy_of(name, method, seed, arguments.steps, arguments.out)
            rows.append({"configuration": name, "seed": seed, "accuracy": accuracy})
            print(f"seed {seed}, {name}: {accuracy:.3f}", flush=True)
    table = pd.DataFrame(rows).groupby("configuration", sort=False)["accuracy"]
    print(table.agg(["mean", "std", "min", "max"]).round(3).to_string())


if __name__ == "__main__":
    main()
