"""Memory of one training step by method, on both models that need no download.

Run ``python benchmarks/memory.py``. It prints the rows of the README's table and plots its figure. Every step is
measured in a separate process. The runs are stored in ``--runs``, where a second call finds them.
"""

from __future__ import annotations

import argparse
from functools import partial

import lorascope as ls
from lorascope.analysis import norms

MODELS = {"minilm": "minilm", "smollm2": partial(ls.models.load, "smollm2", blocks=6)}
WAYS = {
    "full (AdamW)": ls.Full(),
    "LoRA, rank 8": ls.LoRA(rank=8, targets="all-linear"),
    "LISA, 2 blocks": ls.LISA(n_active=2, interval=20),
    "Adapprox": ls.Adapprox(),
    "Adapprox, rank 1, β₁ = 0": ls.Adapprox(max_rank=1, betas=(0.0, 0.999)),
    "Adafactor": ls.Full(optimizer_name="adafactor"),
    "CAME": ls.Full(optimizer_name="came"),
}
PARTS = ("parameter_bytes", "gradient_bytes", "optimizer_bytes", "peak_bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--figure", default="figures/memory.png")
    arguments = parser.parse_args()
    found: dict[str, list[ls.Run]] = {way: [] for way in WAYS}
    for name in arguments.models:
        print(f"| {name} | parameters | gradients | optimizer | peak |")
        for way, method in WAYS.items():
            run = ls.step_memory.measure(MODELS[name], "sentiment", method, root=arguments.runs)
            found[way].append(run)
            memory = norms.last_recorded(run.table).set_index("quantity")["value"] / 2**20
            parameters, gradients, optimizer, peak = (memory[part] for part in PARTS)
            print(f"| {way} | {parameters:.1f} | {gradients:.1f} | {optimizer:.1f} | {peak:.0f} |", flush=True)
    drawn = ls.plots.memory(found)
    panels = drawn.panels
    # Measured models are in the left column, so that the long names of the right one need no gutter on the left.
    measured, computed = panels[: len(arguments.models)], panels[len(arguments.models) :]
    figure = ls.set_side_by_side(ls.stack_vertically(*measured), ls.stack_vertically(*computed), title=drawn.title)
    figure.save(arguments.figure, width="page")


if __name__ == "__main__":
    main()
