"""Train LoRA, AdaLoRA and NeFT on all 30 blocks of SmolLM2 and draw the figures: python figures/smollm2.py runs/smollm2

Finished runs in the folder are reused, so a second call only draws. docs/smollm2.md describes the results, with the
captions and numbers that are printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

import lorascope as ls
from lorascope.analysis import factor_sharing, selected_neurons
from lorascope.analysis.norms import last_recorded
from lorascope.charts.chart import Drawable
from lorascope.charts.save import save_small
from lorascope.runs.run import Run

MODEL: Any = "smollm2"
SETTINGS = {"batch_size": 8, "max_length": 64, "eval_every": 0, "eval_size": 40, "test_size": 100}
STEPS = 40
# Seeds of the runs of each domain. They differ, so the initial A's differ too, unless init_seed sets a shared one.
DOMAINS = {"movies": [0, 1], "tweets": [2, 3]}
ONE_A, OWN_A = "shared A", "separate A's"
LORA = {"name": "lora", "rank": 8, "alpha": 16, "targets": "all-linear", "lr": 1e-3, "init_seed": [0, "none"]}
ADALORA = {"name": "adalora", "init_rank": 6, "target_rank": 3, "targets": "all-linear"}
NEFT = {"name": "neft"}


def train(root: str, jobs: int | None) -> dict[str, dict[str, list[Run]]]:
    """Train LoRA by initial A and domain, AdaLoRA on all texts, and NeFT by domain."""

    def runs(tasks: str | list[str], method: Mapping[str, Any], seeds: list[int], steps: int) -> list[Run]:
        settings = SETTINGS | {"steps": steps, "observe": ["norms", {"name": "factors", "every": steps}]}
        grid = {"model": MODEL, "task": tasks, "method": method, "seeds": seeds, "root": root, "settings": settings}
        return ls.sweep(grid, jobs=jobs)

    lora = {domain: runs(f"sentiment/{domain}", LORA, seeds, STEPS) for domain, seeds in DOMAINS.items()}
    neft = runs([f"sentiment/{domain}" for domain in DOMAINS], NEFT, [0], STEPS)
    return {
        ONE_A: {domain: found[:2] for domain, found in lora.items()},
        OWN_A: {domain: found[2:] for domain, found in lora.items()},
        "ranks": {"AdaLoRA": runs("sentiment", ADALORA, [0, 1], 2 * STEPS)},
        "neurons": {domain: [run] for domain, run in zip(DOMAINS, neft, strict=True)},
    }


def draw(found: Mapping[str, Mapping[str, list[Run]]]) -> dict[str, Drawable]:
    """Draw one figure per file; factors only of queries and attention outputs, whose weights are square."""
    first = found[ONE_A]["movies"][0]
    square = [module for module in first.updates() if module.endswith(("q_proj", "o_proj"))]
    return {
        "smollm2-norms": ls.plots.update_norm_heat(found[OWN_A], quantity="relative_update"),
        "smollm2-ranks": ls.plots.rank_allocation(found["ranks"], chance=True),
        "smollm2-factors": ls.plots.factor_embedding(found[ONE_A], control=found[OWN_A], modules=square),
        "smollm2-neurons": ls.plots.neurons(found["neurons"]),
    }


def describe(found: Mapping[str, Mapping[str, list[Run]]]) -> Iterator[str]:
    """Yield the numbers of the page: accuracies, largest updates, and shared factors and neurons of all modules."""
    for name, groups in found.items():
        for label, runs in groups.items():
            accuracies = ", ".join(f"{run.score.metric:.2f}" for run in runs)
            share = runs[0].meta.parameters.trained / runs[0].meta.parameters.total
            yield f"{name}, {label}: accuracy {accuracies}; trained parameters {share:.1%}"
    runs = [run for of in found[OWN_A].values() for run in of]
    changes = pd.concat(last_recorded(run.table[run.table["quantity"] == "relative_update"]) for run in runs)
    means = changes.groupby(["role", "layer"], observed=True)["value"].mean()
    for role in ("v", "o"):
        yield f"relative update of {role} in the first block: {means[role, 0]:.2%}; largest: {means[role].max():.2%}"
    for name in (ONE_A, OWN_A):
        domains = {run.id: domain for domain, of in found[name].items() for run in of}
        updates = {run.id: run.updates() for of in found[name].values() for run in of}
        table = factor_sharing.measure_sharing(updates, domains, views=("raw", "space"), draws=99)
        shown = table[["factor", "view", "sharedness", "sharedness_chance", "cosine"]].round(2)
        yield f"factors, {name}:\n{shown.to_string(index=False, float_format='{:.2f}'.format)}"
    one, other = (run for (run,) in found["neurons"].values())
    first, second = (selected_neurons.to_set(selected_neurons.list_selected(run)) for run in (one, other))
    shared = selected_neurons.compare_selections(first, second, selected_neurons.count_selectable(one).total())[
        "overlap"
    ]
    chance = selected_neurons.compute_expected_overlap(first, second, selected_neurons.count_selectable(one))
    yield f"{len(first):,} neurons of each text, {shared:.0%} shared; as many random ones in each module: {chance:.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", help="folder of the runs")
    parser.add_argument("--jobs", type=int, help="number of parallel runs, about 4 GB each (default: number of cores)")
    given = parser.parse_args()
    found = train(given.root, given.jobs)
    for file, chart in draw(found).items():
        print(save_small(chart, Path(__file__).parent / f"{file}.png"))
        print("\n".join({part.caption for part in chart.panels}))
    print("\n".join(describe(found)))


if __name__ == "__main__":
    main()
