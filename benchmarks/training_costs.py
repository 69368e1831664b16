"""CPU time of training students of planted teachers, as in cost tables of the papers.

The figure has the time of four allocations (AdaLoRA's table 15, AutoLoRA's table 5, ALoRA's table 4) and the speed on a
mixture of tasks (HydraLoRA's figure 5). All arms are trained in turn, once per round and on one thread, because times
of different machines and loads cannot be compared. Run ``python benchmarks/training_costs.py``. The times are stored
in ``--times``, where a second call finds them.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

from lorascope.charts.chart import Chart, Drawable
from lorascope.charts.marks import Axis, Point
from lorascope.papers import adalora, alora, autolora, hydralora
from lorascope.papers.course_figures import in_row
from lorascope.papers.figures.variant_gaps import GROUND, published
from lorascope.papers.judging import kept_study, registered_study, truth_names
from lorascope.papers.judging.data_folder import DATA
from lorascope.papers.judging.study_rates import chosen_rates
from lorascope.papers.rank_tables import UNIFORM_STUDENT
from lorascope.papers.training.study_training import StudyJob, finish_job, machine

GROUPS = {
    truth_names.UNEVEN: {
        "LoRA": UNIFORM_STUDENT,
        "AdaLoRA": adalora.ALLOCATED,
        "ALoRA": alora.MOVED,
        "AutoLoRA": autolora.SEARCHED,
    },
    truth_names.SHARED_A: {
        "LoRA, rank 16": "LoRA, rank 16",
        "LoRA, rank 12": hydralora.EQUAL,
        "4 LoRAs of rank 4": hydralora.SEPARATE[4],
        "HydraLoRA": hydralora.EXPERTS,
    },
}
TOKENS = 400 * 16 * 32
"""Tokens of a run: steps, texts of a batch, tokens of a text."""


def measure(rounds: int) -> pd.DataFrame:
    """Train all arms once per round, and tabulate ``truth, name, round, seconds``."""
    registration = registered_study.read()
    evidence = kept_study.read(DATA / "evidence-2")
    rates = {label: choice.rate for label, choice in chosen_rates(registration, evidence.runs).items()}
    rows = []
    # The first run of a truth makes its teachers, so round 0 is not counted.
    for number in range(rounds + 1):
        for truth, arms in GROUPS.items():
            for name, arm in arms.items():
                label = f"{arm}, {truth}"
                rate = rates[label]
                assert rate is not None, label
                with tempfile.TemporaryDirectory() as folder:
                    # Runs that choose rates do not compute tables, which would take time as well.
                    run = finish_job(StudyJob(label, 9001, "tuning", rate), Path(folder), rates)
                seconds = float(run.rows["cpu_seconds"].iloc[0])
                print(f"| {truth} | {name} | {number} | {seconds:.2f} |", flush=True)
                rows.append((truth, name, number, seconds))
    rows = rows[len(rows) // (rounds + 1) :]
    return pd.DataFrame(rows, columns=["truth", "name", "round", "seconds"])


def draw(times: pd.DataFrame) -> Drawable | None:
    """Draw the time of allocations, the tokens per second on a mixture of tasks, and the hours that ALoRA prints."""
    medians = times.groupby("name")["seconds"].median()
    hours = published("ALoRA", "Table 4").query("metric == 'hours to early stopping'")
    printed = hours.assign(name=hours["method"])[["name", "value"]]
    printed_hours = printed.set_index("name")["value"]
    longer = printed_hours["ALoRA"] / printed_hours["LoRA"]
    rounds, model = times["round"].nunique(), machine()["processor"].partition(",")[0]
    caption = (
        f"{GROUND}: 400 steps of 16 texts, on one thread ({model}). A dot for each of {rounds} rounds; title: medians. "
        "Left: allocators of rank; AutoLoRA's time includes its search of 400 steps. Center: tokens of training text "
        "per second on four tasks; HydraLoRA has one A and four B's of rank 4, which a router mixes. Right: training "
        f"until early stopping on E2E, LLaMA-2 7B, where ALoRA takes {longer:.1f} times as long as "
        "LoRA. HydraLoRA's paper prints 1.96 times the speed of LoRA of rank 32."
    )
    charts = []
    # The papers measure energy and hours on GPUs; on one thread both follow from the time.
    panels = {
        truth_names.UNEVEN: ("CPU-seconds", "Allocators (lower is better)"),
        truth_names.SHARED_A: ("tokens per second", "Four tasks (higher is better)"),
    }
    for truth, arms in GROUPS.items():
        table = times[times["truth"] == truth]
        column = table["seconds"] if truth == truth_names.UNEVEN else TOKENS / table["seconds"]
        label, title = panels[truth]
        axes: dict[str, Any] = {"x": Axis(label=label, limits=(0, None)), "y": Axis(order=arms, compact=True)}
        charts.append(Chart(table.assign(value=column), [Point("value", "name")], title=title, caption=caption, **axes))
    axes = {"x": Axis(label="hours", limits=(0, None)), "y": Axis(order=printed["name"], compact=True)}
    panel = Chart(printed, [Point("value", "name", hollow=True)], title="Printed: ALoRA, table 4", **axes)
    ratios = [f"{name} {medians[name] / medians['LoRA']:.1f} times" for name in ("AutoLoRA", "ALoRA", "AdaLoRA")]
    faster = medians["LoRA, rank 16"] / medians["HydraLoRA"]
    title = (
        f"CPU time over that of LoRA: {', '.join(ratios)}; "
        f"HydraLoRA trains at {faster:.1f} times the speed of LoRA, rank 16"
    )
    return in_row(*charts, panel, title=title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--figure", default="figures/costs.png")
    parser.add_argument("--times", type=Path, default=Path("runs/training-costs.csv"), help="measured if there is none")
    arguments = parser.parse_args()
    if not arguments.times.exists():
        arguments.times.parent.mkdir(parents=True, exist_ok=True)
        measure(arguments.rounds).to_csv(arguments.times, index=False)
    figure = draw(pd.read_csv(arguments.times))
    assert figure is not None
    figure.save(arguments.figure, width="page")


if __name__ == "__main__":
    main()
